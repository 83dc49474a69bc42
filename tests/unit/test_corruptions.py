from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgepack.errors import InputError
from edgepack.judge.corruptions import CORRUPTIONS, SEVERITIES, corrupt, corruptions_for, thin
from edgepack.judge.data_set import DataSet, Feed
from edgepack.judge.signals import find_signals
from edgepack.spec.project import Preprocess

Array = NDArray[Any]
PICTURES, SOUNDS = corruptions_for("picture"), corruptions_for("audio")


def data_of(samples: Array | Callable[[int], Feed], count: int | None = None, labels: Any = None) -> DataSet:
    read = samples if callable(samples) else lambda index: {"x": samples[index]}
    size = count if count is not None else len(samples)  # type: ignore[arg-type]
    return DataSet(where="evaluation data e", count=size, labels=labels, digest="d" * 64, batch_of_one=True, read=read)


def pictures(shape: tuple[int, ...] = (3, 24, 20), count: int = 4, seed: int = 1) -> Array:
    """Smooth pictures from 0 to 1, [count, 1, *shape] float32."""
    generator = np.random.default_rng(seed)
    coarse = generator.uniform(0.2, 0.8, (count, 1, shape[0], shape[1] // 4, shape[2] // 4))
    return np.repeat(np.repeat(coarse, 4, axis=3), 4, axis=4).astype(np.float32)


def sounds(count: int = 4) -> Array:
    return (np.random.default_rng(2).normal(size=(count, 1, 400)) * 0.1).astype(np.float32)


def distance(a: Array, b: Array) -> float:
    return float(np.abs(a.astype(np.float64) - b).mean())


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_a_corruption_is_the_same_for_a_seed_in_any_order_and_keeps_shape_and_type(name: str) -> None:
    samples = pictures() if name in PICTURES else sounds()
    data = data_of(samples)
    first, again = corrupt(data, name, 3, 7), corrupt(data, name, 3, 7)
    backwards = [again.feed(index)["x"] for index in (3, 2, 1, 0)][::-1]
    for index, feed in enumerate(first.feeds()):
        assert np.array_equal(feed["x"], backwards[index])
        assert feed["x"].dtype == np.float32
        assert feed["x"].shape == samples[index].shape
        assert feed["x"].flags.c_contiguous
        assert not np.array_equal(feed["x"], samples[index])
    assert first.digest == again.digest


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_a_higher_severity_changes_more(name: str) -> None:
    samples = pictures((3, 96, 80)) if name in PICTURES else sounds()
    changes = [
        np.mean(
            [distance(f["x"], s) for f, s in zip(corrupt(data_of(samples), name, v, 1).feeds(), samples, strict=True)]
        )
        for v in SEVERITIES
    ]
    assert changes == sorted(changes)
    assert changes[0] > 0


def test_digests_tell_corruption_severity_seed_and_data_apart_and_labels_stay() -> None:
    data = data_of(pictures(), labels=np.arange(4))
    made = [corrupt(data, n, v, s) for n in ("jpeg", "contrast") for v in (1, 2) for s in (0, 1)]
    assert len({m.digest for m in [data, *made]}) == 9
    assert all(m.labels is data.labels for m in made)
    assert "under jpeg of severity 1" in made[0].where


def test_noise_depends_on_the_seed_and_differs_between_samples() -> None:
    same = data_of(np.repeat(pictures(count=1), 3, axis=0))
    one, other = (corrupt(same, "gaussian-noise", 1, seed) for seed in (1, 2))
    assert not np.array_equal(one.feed(0)["x"], one.feed(1)["x"])
    assert not np.array_equal(one.feed(0)["x"], other.feed(0)["x"])


def test_pixels_are_found_through_mean_and_std_and_constants_apply_to_them() -> None:
    mean, std = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)
    preprocess = Preprocess(mean=mean, std=std)
    raw = pictures() * 255
    wide = (raw - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    data = data_of(wide.astype(np.float32))
    (signal,) = find_signals(data, preprocess=preprocess)
    assert (signal.space, signal.layout) == ("pixels", "nchw")
    dull = corrupt(data, "contrast", 1, 0, preprocess=preprocess).feed(0)["x"]
    back = dull * np.reshape(std, (3, 1, 1)) + np.reshape(mean, (3, 1, 1))
    means = raw[0].mean(axis=(2, 3), keepdims=True)
    assert np.allclose(back, (raw[0] - means) * 0.75 + means, atol=0.01)  # CIFAR-10-C: 24 pixels are a small picture


def test_large_pictures_take_the_constants_of_imagenet_c() -> None:
    samples = pictures((1, 64, 64))
    means = samples[0].mean()
    dull = corrupt(data_of(samples), "contrast", 5, 0).feed(0)["x"]
    low, high = samples.min(), samples.max()
    expected = np.clip((samples[0] - means) * 0.05 + means, low, high)
    assert np.allclose(dull, expected, atol=1e-5)


def test_arrays_that_do_not_lead_to_pixels_are_taken_in_their_own_range() -> None:
    data = data_of(pictures() * 4 - 2)
    for preprocess in (None, Preprocess(), Preprocess(std=255.0, mean=0.0)):
        (signal,) = find_signals(data, preprocess=preprocess)
        assert signal.space == "own range"
        values = signal.enter(data.feed(0)["x"])
        assert -1e-6 <= values.min() <= values.max() <= 1 + 1e-6
    assert find_signals(data_of(pictures()), preprocess=Preprocess(std=255.0))[0].space == "pixels"


def test_channels_last_gives_the_same_picture_as_channels_first() -> None:
    first = pictures()
    last = np.ascontiguousarray(first.transpose(0, 1, 3, 4, 2))
    for name in ("gaussian-blur", "brightness", "contrast", "jpeg"):
        a, b = (corrupt(data_of(samples), name, 2, 0).feed(1)["x"] for samples in (first, last))
        assert np.allclose(a.transpose(0, 2, 3, 1), b, atol=1e-6)


def test_bgr_is_turned_before_jpeg_and_back() -> None:
    raw = (pictures() * 255).astype(np.float32)
    rgb = corrupt(data_of(raw), "jpeg", 3, 0, preprocess=Preprocess()).feed(0)["x"]
    turned = data_of(np.ascontiguousarray(raw[:, :, ::-1]))
    bgr = corrupt(turned, "jpeg", 3, 0, preprocess=Preprocess(colour="bgr")).feed(0)["x"]
    assert np.array_equal(rgb, bgr[:, ::-1])


def test_blur_keeps_an_even_picture_and_brightness_keeps_the_hue() -> None:
    even = np.full((2, 1, 3, 16, 16), 0.5, np.float32)
    even[1] = pictures((3, 16, 16), count=1)[0]
    assert np.allclose(corrupt(data_of(even), "gaussian-blur", 5, 0).feed(0)["x"], 0.5, atol=1e-6)
    raw = np.zeros((1, 1, 3, 16, 16), np.float32) + np.reshape([100.0, 50.0, 0.0], (3, 1, 1))
    bright = corrupt(data_of(raw), "brightness", 3, 0, preprocess=Preprocess()).feed(0)["x"]
    assert bright[0, 0, 0, 0] == pytest.approx(100 + 0.15 * 255, rel=1e-5)
    assert bright[0, 1, 0, 0] == pytest.approx(bright[0, 0, 0, 0] / 2, rel=1e-5)
    black = corrupt(data_of(raw * 0 + raw[:, :, :1] * 0), "brightness", 3, 0, preprocess=Preprocess()).feed(0)["x"]
    assert np.all(black[0, 0] == black[0, 2])


def test_uint8_pictures_stay_bytes() -> None:
    raw = (pictures() * 255).astype(np.uint8)
    noisy = corrupt(data_of(raw), "gaussian-noise", 5, 0).feed(0)["x"]
    assert noisy.dtype == np.uint8
    assert 5 < distance(noisy, raw[0]) < 40  # sigma 0.1 of 255 is 25


def test_sound_gets_noise_at_the_ratio_that_is_named_and_gain_in_decibels() -> None:
    samples = sounds(8)
    data = data_of(samples)
    noisy = np.stack([feed["x"] for feed in corrupt(data, "noise", 3, 0).feeds()])
    snr_db = 10 * np.log10((samples**2).sum() / ((noisy - samples) ** 2).sum())
    assert snr_db == pytest.approx(10, abs=0.3)
    assert np.allclose(corrupt(data, "gain", 2, 0).feed(0)["x"], samples[0] * 10 ** (-6 / 20), rtol=1e-6)


def test_only_inputs_of_the_kind_are_corrupted() -> None:
    def read(index: int) -> Feed:
        return {
            "input": sounds()[index],
            "state": np.zeros((2, 1, 128), np.float32),
            "context": np.zeros((1, 64), np.float32),
            "rate": np.array(16000),
        }

    data = data_of(read, 4)
    assert [signal.name for signal in find_signals(data)] == ["input"]
    feed = corrupt(data, "noise", 1, 0).feed(0)
    assert all(np.array_equal(feed[name], read(0)[name]) for name in ("state", "context", "rate"))


def test_a_picture_can_be_declared_sound_but_not_the_other_way_round() -> None:
    table = np.random.default_rng(1).normal(size=(3, 28, 400)).astype(np.float32)
    assert find_signals(data_of(table))[0].kind == "audio"
    with pytest.raises(InputError, match="none of it looks like picture"):
        find_signals(data_of(table), kind="picture")


def test_data_that_is_neither_is_refused_with_its_shapes() -> None:
    with pytest.raises(InputError, match=r"x int64\[1, 8\]; none of it looks like pictures or sound"):
        find_signals(data_of(np.zeros((2, 1, 8), np.int64)))


def test_unknown_names_severities_and_kinds_are_refused() -> None:
    data = data_of(pictures())
    with pytest.raises(InputError, match="did you mean 'gaussian-blur'"):
        corrupt(data, "gausian-blur", 1, 0)
    with pytest.raises(InputError, match="severities: found 6"):
        corrupt(data, "jpeg", 6, 0)
    with pytest.raises(InputError, match="'noise' is for audio data, and evaluation data e is picture"):
        corrupt(data, "noise", 1, 0)


def test_thinning_spreads_over_the_set_and_takes_the_labels_along() -> None:
    data = data_of(pictures(count=9), labels=[str(i) for i in range(9)])
    few = thin(data, 3)
    assert (len(few), few.labels) == (3, ["0", "4", "8"])
    assert np.array_equal(few.feed(1)["x"], data.feed(4)["x"])
    assert thin(data, 9) is data
    assert thin(data, None) is data
    with pytest.raises(InputError, match="limit: found 0"):
        thin(data, 0)
