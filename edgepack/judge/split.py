"""Evaluation data in two parts: one chooses among candidates, the other gates the one that was chosen.

Who chooses the best of many by the data that also gates it finds the luckiest (Varma and Simon, "Bias in error
estimation when using cross-validation for model selection", BMC Bioinformatics 7:91, 2006). So no sample does both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from edgepack.judge.data_set import DataSet

SELECTION_SHARE = 0.25
"""Choosing needs less than proving: it may be wrong, the gate may not."""
UNPROVED_SHARE = 0.5
"""Where the gate has too few samples to prove anything, or need not: what chooses badly then ships nothing."""
MOST_SELECTION = 2000
"""The drop of a share then has a standard error below a tenth of a point where a fiftieth of the answers change."""


def split(data: DataSet, seed: int, share: float = SELECTION_SHARE) -> tuple[DataSet, DataSet]:
    """(what chooses, what gates), each in the order of `data`; drawn by `seed` and the data's digest; `share` chooses.

    With fewer than two samples all of them gate and choose: no split is honest there, and the gate stays unresolved.
    """
    count = min(int(len(data) * share), MOST_SELECTION)
    if count < 1:
        return data, data
    drawn = hashlib.sha256(json.dumps([data.digest, seed]).encode()).digest()
    order = np.random.Generator(np.random.PCG64(int.from_bytes(drawn[:16], "big"))).permutation(len(data))
    choosing, gating = np.sort(order[:count]).tolist(), np.sort(order[count:]).tolist()
    return subset(data, choosing, f"selection {seed}"), subset(data, gating, f"gate {seed}")


def subset(data: DataSet, places: Sequence[int], name: str) -> DataSet:
    """The samples at `places`, with a digest of their own; `name` says which part it is."""
    labels: Any = data.labels
    if labels is not None:
        labels = labels[places] if isinstance(labels, np.ndarray) else [labels[place] for place in places]
    digest = hashlib.sha256(json.dumps([data.digest, name, list(places)]).encode()).hexdigest()
    return replace(data, count=len(places), labels=labels, digest=digest, read=lambda index: data.feed(places[index]))
