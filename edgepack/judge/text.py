"""Text out of a recogniser's outputs: charset, greedy CTC decoding, edit distance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepack.errors import InputError


def read_charset(path: Path) -> list[str]:
    """What each class stands for, as PaddleOCR numbers them: the blank, then one line of the file each, then a space.

    Raises InputError when the file cannot be read or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read: {error.strerror}; expected the charset, one character a line"
        ) from error
    except ValueError as error:  # not UTF-8, or a NUL in the path
        raise InputError(f"{path}: cannot be read ({error}); expected the charset, one character a line") from error
    lines = text.removesuffix("\n").split("\n")  # never splitlines: a charset may hold U+2028
    if lines == [""]:
        raise InputError(f"{path}: empty; expected the charset, one character a line")
    return ["", *lines, " "]


def steps_of(output: NDArray[Any]) -> NDArray[Any]:
    """[steps, classes] out of [1, steps, classes], [steps, 1, classes] or itself. Raises InputError."""
    if output.ndim == 3 and output.shape[0] == 1:
        return np.asarray(output[0])
    if output.ndim == 3 and output.shape[1] == 1:
        return np.asarray(output[:, 0])
    if output.ndim == 2:
        return output
    raise InputError(f"an output of shape {list(output.shape)} is no text; expected [1, steps, classes]")


def ctc_text(scores: NDArray[Any], characters: list[str]) -> str:
    """Greedy ("best path") decoding of [steps, classes], class 0 being the blank.

    Graves et al., Connectionist Temporal Classification, ICML 2006, section 3.2: the best class of each
    step, then repeats and then blanks are dropped.
    """
    best = scores.argmax(axis=1)
    return "".join(characters[k] for step, k in enumerate(best) if k and (step == 0 or best[step - 1] != k))


def edit_distance(a: str, b: str) -> int:
    """Least insertions, deletions and substitutions that turn `a` into `b` (Wagner and Fischer, 1974), one row kept."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]
