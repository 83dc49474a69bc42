"""The `edgepack` command: runs the CLI and turns every error into one message and its exit code."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import sys
import traceback
from collections.abc import Iterator

from edgepack.errors import EdgepackError, StorageError

DEFECT = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
READER_LEFT = 141  # 128 + SIGPIPE


def main() -> None:
    """Console script. Exits with a code of errors.py, 70 for a defect, 130 for Ctrl-C, 141 where the reader left."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may hold bytes that no encoding has
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
        if type(error).__name__ == "NoArgsIsHelpError":
            print(_message(error), file=sys.stderr)
            return 2
        return _fail(_message(error), kind="usage", code=2, as_json=as_json, hint=_usage(error))
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", kind="interrupted", code=INTERRUPTED, as_json=as_json)
    except SystemExit as stop:  # typer's own: at the end of shell completion, and where it met a broken pipe
        if not isinstance(stop.__context__, BrokenPipeError):
            raise
        _silence(1)
        return READER_LEFT
    except EdgepackError as error:
        return _fail(str(error), kind=error.kind, code=error.exit_code, as_json=as_json)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return _fail(_defect(error), kind="defect", code=DEFECT, as_json=as_json)
        where = error.filename or "standard output"
        message = f"{where}: the disk is full; free some space and run the same command again"
        return _fail(message, kind=StorageError.kind, code=StorageError.exit_code, as_json=as_json)
    except Exception as error:  # noqa: BLE001 - the last door: a user never sees a traceback
        return _fail(_defect(error), kind="defect", code=DEFECT, as_json=as_json)
    if result == INTERRUPTED:  # typer makes an exit of Ctrl-C by itself
        return _fail("interrupted", kind="interrupted", code=INTERRUPTED, as_json=as_json)
    return result if isinstance(result, int) else 0


def _fail(message: str, *, kind: str, code: int, as_json: bool, hint: str = "") -> int:
    with _deaf(2):
        print(f"{hint}edgepack: error: {message}", file=sys.stderr, flush=True)
    with _deaf(1):
        if as_json:
            print(json.dumps({"error": {"kind": kind, "exit_code": code, "message": message}}, indent=1))
        sys.stdout.flush()
    return code


@contextlib.contextmanager
def _deaf(descriptor: int) -> Iterator[None]:
    """A stream that takes nothing must not hide the exit code: what was to be said there is lost."""
    try:
        yield
    except OSError:
        _silence(descriptor)


def _silence(descriptor: int) -> None:
    """Python flushes its streams at exit, and would fail there."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


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
