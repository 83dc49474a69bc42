"""Corrupted copies of evaluation data, as a camera or a microphone in the field spoils them: the same for a seed.

Pictures: Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations,
ICLR 2019; the constants are those of the authors' ImageNet-C, and for a short side below 64 pixels those
of their CIFAR-10-C. Audio: white noise at the signal-to-noise ratios of Aurora-2 (Hirsch and Pearce, ISCA ITRW
ASR2000), and a gain, whose steps are our choice (6 dB halve the amplitude).
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgepack.errors import InputError
from edgepack.judge.data_set import Array, DataSet, Feed
from edgepack.judge.signals import Kind, Signal, find_signals
from edgepack.spec.load import did_you_mean
from edgepack.spec.project import Preprocess

Floats = NDArray[np.float64]
Change = Callable[[Floats, float, np.random.Generator], Floats]
"""(values, the severity's constant, randomness) to values. Pictures are [channels, height, width] from 0 to 1."""

SEVERITIES = (1, 2, 3, 4, 5)
SMALL_SIDE = 64
VERSION = 1
"""Part of every digest: raise it when a corruption gives other values."""


def gaussian_noise(x: Floats, sigma: float, generator: np.random.Generator) -> Floats:
    return np.asarray(x + generator.normal(scale=sigma, size=x.shape))


def gaussian_blur(x: Floats, sigma: float, generator: np.random.Generator) -> Floats:
    """Separable, cut at four sigma, edges repeated, as scikit-image's filter that the authors used."""
    del generator
    radius = int(4 * sigma + 0.5)
    at = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (at / sigma) ** 2)
    weights /= weights.sum()
    for axis in (1, 2):
        edges = [(0, 0)] * 3
        edges[axis] = (radius, radius)
        padded, size = np.pad(x, edges, mode="edge"), x.shape[axis]
        x = np.sum([w * padded.take(range(k, k + size), axis=axis) for k, w in enumerate(weights)], axis=0)
    return np.asarray(x, np.float64)


def brightness(x: Floats, amount: float, generator: np.random.Generator) -> Floats:
    """HSV's value (the largest channel) raised, hue and saturation kept."""
    del generator
    value = x.max(axis=0)
    raised = np.clip(value + amount, 0, 1)
    ratio = np.divide(raised, value, out=np.zeros_like(value), where=value > 0)
    return np.asarray(np.where(value > 0, x * ratio, raised))


def contrast(x: Floats, factor: float, generator: np.random.Generator) -> Floats:
    """Drawn towards the mean of each channel."""
    del generator
    means = x.mean(axis=(1, 2), keepdims=True)
    return np.asarray((x - means) * factor + means)


def jpeg(x: Floats, quality: float, generator: np.random.Generator) -> Floats:
    """Through Pillow's JPEG and back; 1 or 3 channels, RGB."""
    del generator
    pixels = np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=int(quality))
    with Image.open(io.BytesIO(buffer.getvalue())) as opened:
        back = np.asarray(opened, np.float64) / 255
    return back[np.newaxis] if back.ndim == 2 else back.transpose(2, 0, 1)


def noise(x: Floats, snr_db: float, generator: np.random.Generator) -> Floats:
    """White noise below a signal of mean square 1, the level to which `Signal` brings the set."""
    return np.asarray(x + generator.normal(scale=10 ** (-snr_db / 20), size=x.shape))


def gain(x: Floats, gain_db: float, generator: np.random.Generator) -> Floats:
    del generator
    return np.asarray(x * 10 ** (gain_db / 20))


@dataclass(frozen=True, slots=True, kw_only=True)
class Corruption:
    kind: Kind
    change: Change
    large: tuple[float, ...]
    """Constants of severities 1 to 5."""
    small: tuple[float, ...]
    """The same for pictures whose short side is below 64 pixels."""
    unit: str


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian-noise": Corruption(
        kind="picture",
        change=gaussian_noise,
        large=(0.08, 0.12, 0.18, 0.26, 0.38),
        small=(0.04, 0.06, 0.08, 0.09, 0.10),
        unit="standard deviation, of a range of 1",
    ),
    "gaussian-blur": Corruption(
        kind="picture",
        change=gaussian_blur,
        large=(1, 2, 3, 4, 6),
        small=(0.4, 0.6, 0.7, 0.8, 1),
        unit="sigma in pixels",
    ),
    "brightness": Corruption(
        kind="picture",
        change=brightness,
        large=(0.1, 0.2, 0.3, 0.4, 0.5),
        small=(0.05, 0.1, 0.15, 0.2, 0.3),
        unit="added, of a range of 1",
    ),
    "contrast": Corruption(
        kind="picture",
        change=contrast,
        large=(0.4, 0.3, 0.2, 0.1, 0.05),
        small=(0.75, 0.5, 0.4, 0.3, 0.15),
        unit="factor",
    ),
    "jpeg": Corruption(
        kind="picture", change=jpeg, large=(25, 18, 15, 10, 7), small=(80, 65, 58, 50, 40), unit="quality"
    ),
    "noise": Corruption(
        kind="audio", change=noise, large=(20, 15, 10, 5, 0), small=(20, 15, 10, 5, 0), unit="SNR in dB"
    ),
    "gain": Corruption(
        kind="audio", change=gain, large=(-3, -6, -12, -18, -24), small=(-3, -6, -12, -18, -24), unit="dB"
    ),
}


def corruptions_for(kind: Kind) -> tuple[str, ...]:
    """The names that go with a kind of data."""
    return tuple(name for name, corruption in CORRUPTIONS.items() if corruption.kind == kind)


def corrupt(
    data: DataSet,
    corruption: str,
    severity: int,
    seed: int,
    *,
    preprocess: Preprocess | None = None,
    kind: Kind | None = None,
    signals: Sequence[Signal] | None = None,
) -> DataSet:
    """`data` with each sample corrupted when it is read, the same for the same arguments whatever the order.

    `signals` says what is corrupted and in which units (else `find_signals` finds out, with `preprocess` and `kind`).
    Labels stay. The digest is of its own. Raises InputError for an unknown corruption or severity, one that
    does not go with the data, and what `find_signals` raises.
    """
    chosen = CORRUPTIONS.get(corruption)
    if chosen is None:
        raise InputError(
            f"[robustness] corruptions: unknown '{corruption}'{did_you_mean(corruption, list(CORRUPTIONS))}; "
            f"expected some of {', '.join(CORRUPTIONS)}"
        )
    if severity not in SEVERITIES:
        raise InputError(f"[robustness] severities: found {severity}; expected whole numbers from 1 to 5")
    found = tuple(signals) if signals is not None else find_signals(data, preprocess=preprocess, kind=kind)
    if found[0].kind != chosen.kind:
        raise InputError(
            f"[robustness] corruptions: '{corruption}' is for {chosen.kind} data, and {data.where} is {found[0].kind}; "
            f"expected some of {', '.join(corruptions_for(found[0].kind))}"
        )

    def read(index: int) -> Feed:
        feed = dict(data.feed(index))
        for signal in found:
            generator = _generator(seed, corruption, severity, signal.name, index)
            feed[signal.name] = _changed(feed[signal.name], signal, chosen, severity, generator)
        return feed

    document = [VERSION, data.digest, corruption, severity, seed, [signal.facts() for signal in found]]
    return replace(
        data,
        where=f"{data.where} under {corruption} of severity {severity}",
        digest=hashlib.sha256(json.dumps(document).encode()).hexdigest(),
        read=read,
    )


def thin(data: DataSet, limit: int | None) -> DataSet:
    """At most `limit` samples, evenly spread over the set, for one sorted by class is common."""
    if limit is None or limit >= len(data):
        return data
    if limit < 1:
        raise InputError(f"[robustness] limit: found {limit}; expected at least one sample")
    chosen = np.linspace(0, len(data) - 1, limit).round().astype(int).tolist()
    labels: Any = data.labels
    if labels is not None:
        labels = labels[chosen] if isinstance(labels, np.ndarray) else [labels[index] for index in chosen]
    return replace(
        data,
        count=limit,
        labels=labels,
        digest=hashlib.sha256(json.dumps([data.digest, "thinned", limit]).encode()).hexdigest(),
        read=lambda index: data.feed(chosen[index]),
    )


def _generator(seed: int, *place: str | int) -> np.random.Generator:
    """Randomness of its own for each sample, input, corruption and severity."""
    digest = hashlib.sha256(json.dumps([seed, *place]).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))


def _changed(
    array: Array, signal: Signal, corruption: Corruption, severity: int, generator: np.random.Generator
) -> Array:
    values = signal.enter(array)
    is_small = signal.kind == "picture" and min(values.shape[1:]) < SMALL_SIDE
    constant = (corruption.small if is_small else corruption.large)[severity - 1]
    return signal.leave(corruption.change(values, constant, generator), array)
