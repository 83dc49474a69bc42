"""A function of the user's, `module.py:function`, loaded by path; what it raises comes back with its file and line."""

from __future__ import annotations

import contextlib
import hashlib
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepack.errors import EdgepackError, InputError
from edgepack.spec.load import did_you_mean

REFERENCE = re.compile(r"(?P<file>.+\.py):(?P<name>[A-Za-z_][A-Za-z0-9_]*)")


def is_reference(text: str) -> bool:
    """Whether `text` has the form `module.py:function`."""
    return REFERENCE.fullmatch(text) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class UserFunction:
    path: Path
    name: str
    digest: str
    """sha256 of the module's source, the very bytes that were run."""
    function: Callable[..., Any]

    def __str__(self) -> str:
        return f"{self.path}:{self.name}"

    def call(self, *arguments: object) -> object:
        """What the function returns. Raises InputError for whatever it raises."""
        with users_code(self.path):
            return self.function(*arguments)

    def items(self, iterable: object) -> Iterator[object]:
        """The items of what the function returned; a generator's exceptions are the user's too."""
        with users_code(self.path):
            if not isinstance(iterable, Iterable):
                raise InputError(f"{self}: gave {type(iterable).__name__}; expected an iterable of samples")
            iterator = iter(iterable)
        end = object()
        while True:
            with users_code(self.path):
                item = next(iterator, end)
            if item is end:
                return
            yield item


@contextlib.contextmanager
def users_code(path: Path) -> Iterator[None]:
    """Runs the block with the module's folder importable; sys.path is as before afterwards. Raises InputError."""
    saved = list(sys.path)
    sys.path.insert(0, str(path.parent))
    try:
        yield
    except EdgepackError:
        raise
    except (Exception, SystemExit) as error:  # whatever a user's code raises is the user's to mend
        raise InputError(f"{_place(path, error)}: {type(error).__name__}: {error}") from error
    finally:
        sys.path[:] = saved


def _place(path: Path, error: BaseException) -> str:
    """`file:line` of the last frame in the user's own module, else of the last frame."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if frame.filename == str(path):
            return f"{path}:{frame.lineno}"
    return str(path)


def load_function(reference: str, root: Path) -> UserFunction:
    """The function that `module.py:function` names, the path relative to `root`. Raises InputError."""
    match = REFERENCE.fullmatch(reference)
    if match is None:
        raise InputError(f"'{reference}': expected module.py:function")
    path = (root / match["file"]).absolute()
    try:
        source = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; expected the module of '{reference}'") from error
    digest = hashlib.sha256(source).hexdigest()
    # compiled here, not imported: no stale or new bytecode file, and what is hashed is what runs
    module = types.ModuleType(f"edgepack_user_{path.stem}_{digest[:12]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and pickle look their module up by name
    with users_code(path):
        exec(compile(source, str(path), "exec"), module.__dict__)
    function = getattr(module, match["name"], None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if isinstance(v, types.FunctionType) and not n.startswith("_")]
        raise InputError(f"{path}: no function '{match['name']}'{did_you_mean(match['name'], names)}")
    return UserFunction(path=path, name=match["name"], digest=digest, function=function)
