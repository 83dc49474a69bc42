"""The `edgepack` command: runs the CLI and turns every error into one message and its exit code."""

from __future__ import annotations

import json
import os
import sys
import traceback

from edgepack.errors import EdgepackError

DEFECT = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main() -> None:
    """Console script. Exits with a code of errors.py, 70 for a defect of edgepack, 130 for Ctrl-C."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; gives its exit code."""
    import typer

    from edgepack.cli.main import app

    # typer carries its click inside; the base of its errors is reached by way of one that is public
    wrong_usage = next(
        k for k in typer.BadParameter.__mro__ if issubclass(k, Exception) and k.__name__ == "ClickException"
    )
    as_json = "--json" in arguments
    try:
        result = app(args=arguments, prog_name="edgepack", standalone_mode=False)
    except typer.Exit as stop:
        result = stop.exit_code
    except wrong_usage as error:
        return _fail(_message(error), kind="usage", code=2, as_json=as_json, hint=_usage(error))
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", kind="interrupted", code=INTERRUPTED, as_json=as_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has left; Python flushes at exit
        return INTERRUPTED
    except EdgepackError as error:
        return _fail(str(error), kind=error.kind, code=error.exit_code, as_json=as_json)
    except Exception as error:  # noqa: BLE001 - the last door: a user never sees a traceback
        return _fail(_defect(error), kind="defect", code=DEFECT, as_json=as_json)
    if result == INTERRUPTED:  # typer makes an exit of Ctrl-C by itself
        return _fail("interrupted", kind="interrupted", code=INTERRUPTED, as_json=as_json)
    return result if isinstance(result, int) else 0


def _fail(message: str, *, kind: str, code: int, as_json: bool, hint: str = "") -> int:
    print(f"{hint}edgepack: error: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": {"kind": kind, "exit_code": code, "message": message}}, indent=1))
    return code


def _message(error: BaseException) -> str:
    format_message = getattr(error, "format_message", None)
    return str(format_message()) if format_message else str(error)


def _usage(error: object) -> str:
    context = getattr(error, "ctx", None)
    return f"{context.get_usage()}\n" if context is not None else ""


def _defect(error: Exception) -> str:
    """Keep the traceback in a file of its own, and say where."""
    import tempfile

    what = f"a defect of edgepack, not of your input: {type(error).__name__}: {str(error)[:200]}"
    try:
        with tempfile.NamedTemporaryFile("w", prefix="edgepack-crash-", suffix=".log", delete=False) as log:
            log.write("".join(traceback.format_exception(error)))
    except OSError as full:
        return f"{what}\nno details were kept: {full.strerror}"
    return f"{what}\nthe details are in {log.name}; please report them"


if __name__ == "__main__":
    main()
