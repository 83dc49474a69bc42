from __future__ import annotations

import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgepack.errors import InputError
from edgepack.judge.data import DataSet, Role, open_data
from edgepack.judge.npz import open_npz
from edgepack.spec.project import Data, Preprocess
from edgepack.spec.tensor import TensorSpec

X = TensorSpec(name="x", dtype="float32", shape=(1, 1, 4, 4))
SEQUENCE = (
    TensorSpec(name="input", dtype="float32", shape=("T", 6)),
    TensorSpec(name="h", dtype="float32", shape=(1, 1, 3)),
)
PICTURES = np.arange(5 * 16, dtype=np.float32).reshape(5, 1, 4, 4)


def opened(
    folder: Path,
    *inputs: TensorSpec,
    data: str = "d.npz",
    preprocess: Preprocess | None = None,
    role: Role = "evaluation",
    limit: int | None = None,
) -> DataSet:
    return open_data(Data(data=data, limit=limit), root=folder, inputs=inputs or (X,), preprocess=preprocess, role=role)


def refused(folder: Path, *inputs: TensorSpec, data: str = "d.npz", **given: Any) -> str:
    with pytest.raises(InputError) as caught:
        opened(folder, *inputs, data=data, **given)
    assert data in str(caught.value)
    return str(caught.value)


def test_an_array_of_the_inputs_rank_is_cut_into_batches_of_one(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=PICTURES, labels=np.arange(5, dtype=np.uint8))
    data = opened(tmp_path)
    assert len(data) == 5
    assert data.batch_of_one
    assert isinstance(data.labels, np.ndarray)
    assert data.labels.dtype == np.int64
    assert data.labels.tolist() == [0, 1, 2, 3, 4]
    feeds = list(data.feeds())
    assert [feed["x"].shape for feed in feeds] == [(1, 1, 4, 4)] * 5
    assert np.array_equal(np.concatenate([feed["x"] for feed in feeds]), PICTURES)
    assert np.array_equal(data.feed(3)["x"], PICTURES[3:4])


def test_an_array_of_one_rank_more_holds_whole_feeds_and_labels_may_be_arrays(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stored, state = rng.normal(size=(4, 7, 6)).astype(np.float32), np.zeros((4, 1, 1, 3), np.float32)
    np.savez_compressed(tmp_path / "d.npz", input=stored, h=state, labels=np.full((4, 7), -1, np.int8))
    data = opened(tmp_path, *SEQUENCE)
    assert not data.batch_of_one
    assert data.feed(2)["input"].shape == (7, 6)
    assert data.feed(2)["h"].shape == (1, 1, 3)
    assert np.array_equal(data.feed(2)["input"], stored[2])
    assert isinstance(data.labels, list)
    assert len(data.labels) == 4
    assert np.shape(data.labels[0]) == (7,)


def test_a_scalar_input_has_one_value_a_sample(tmp_path: Path) -> None:
    rate = TensorSpec(name="sr", dtype="int64", shape=())
    np.savez(tmp_path / "d.npz", x=PICTURES, sr=np.full(5, 16000))
    feed = opened(tmp_path, X, rate).feed(4)
    assert feed["sr"].shape == ()
    assert feed["sr"].dtype == np.int64


def test_labels_of_calibration_data_are_not_used(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=PICTURES, labels=np.arange(5))
    assert opened(tmp_path, role="calibration").labels is None


def test_text_labels_are_a_list(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=PICTURES, labels=np.array(["a", "bc", "", "d", "ü"]))
    assert opened(tmp_path).labels == ["a", "bc", "", "d", "ü"]


def test_limit_takes_the_first_samples_and_their_labels(tmp_path: Path) -> None:
    stored = PICTURES.copy()
    stored[4] = np.nan  # beyond the limit: not looked at
    np.savez(tmp_path / "d.npz", x=stored, labels=np.arange(5))
    data = opened(tmp_path, limit=2)
    assert len(data) == 2
    assert data.labels is not None
    assert len(data.labels) == 2
    with pytest.raises(IndexError, match="no sample 2"):
        data.feed(2)


@settings(max_examples=25, deadline=None)
@given(
    stored=arrays(np.uint8, st.tuples(st.integers(1, 4), st.just(3), st.just(2), st.just(5))),
    mean=st.floats(0, 255, width=32),
    std=st.floats(0.5, 255, width=32),
    packed=st.booleans(),
)
def test_integers_become_x_minus_mean_over_std(
    stored: np.ndarray[Any, Any], mean: float, std: float, packed: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("n")
    (np.savez_compressed if packed else np.savez)(folder / "d.npz", x=stored)
    spec = TensorSpec(name="x", dtype="float32", shape=(1, 3, 2, 5))
    data = opened(folder, spec, preprocess=Preprocess(mean=(mean, 0.0, 1.0), std=std))
    wanted = (stored.astype(np.float32) - np.array([mean, 0, 1], np.float32).reshape(1, 3, 1, 1)) / np.float32(std)
    found = np.concatenate([feed["x"] for feed in data.feeds()])
    assert found.dtype == np.float32
    assert np.array_equal(found, wanted)


def test_channels_last_means_meet_the_last_axis(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.full((1, 2, 2, 3), 10, np.uint8))
    spec = TensorSpec(name="x", dtype="float32", shape=(1, 2, 2, 3))
    feed = opened(tmp_path, spec, preprocess=Preprocess(layout="nhwc", mean=(1.0, 2.0, 3.0))).feed(0)
    assert feed["x"][0, 1, 1].tolist() == [9, 8, 7]


def test_integers_with_scale_and_zero_stand_for_floats(tmp_path: Path) -> None:
    stored = np.arange(16, dtype=np.int16).reshape(1, 1, 4, 4)
    np.savez(tmp_path / "d.npz", x=stored, x__scale=np.float32(0.5), x__zero=np.float32(3))
    assert np.array_equal(opened(tmp_path).feed(0)["x"], (stored.astype(np.float32) - 3) * np.float32(0.5))


def test_integers_without_preprocessing_are_refused_with_the_cure(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=PICTURES.astype(np.uint8))
    message = refused(tmp_path)
    assert "uint8" in message
    assert "mean = 0, std = 255" in message


def test_integers_of_the_inputs_own_type_pass_as_they_are(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.array([[5], [7]]))
    data = opened(tmp_path, TensorSpec(name="x", dtype="int64", shape=(1, 1)), preprocess=Preprocess(mean=1.0))
    assert [feed["x"].tolist() for feed in data.feeds()] == [[[5]], [[7]]]


def test_big_endian_and_fortran_arrays_come_out_plain(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.asfortranarray(PICTURES.astype(">f4")))
    feed = opened(tmp_path).feed(1)
    assert feed["x"].dtype == np.dtype("=f4")
    assert feed["x"].flags.c_contiguous
    assert np.array_equal(feed["x"], PICTURES[1:2])


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        ({"X": PICTURES}, "found 'X'; is 'X' meant?"),
        ({"x": PICTURES, "label": np.arange(5)}, "did you mean 'labels'"),
        ({"x": PICTURES, "labels": np.arange(4)}, "'x' 5, 'labels' 4"),
        ({"x": PICTURES[:, :, :3]}, "shape [1, 1, 3, 4]"),
        ({"x": PICTURES[:, 0, 0]}, "shape [5, 4]"),
        ({"x": PICTURES.astype(np.float64)}, "array.astype('float32')"),
        ({"x": PICTURES[:0]}, "no sample"),
        ({"x": np.float32(1)}, "single value"),
        ({"x": np.array([{}], dtype=object)}, "Python objects"),
        ({"x": PICTURES, "labels": np.array([b"a"] * 5)}, "unicode"),
        ({"x": PICTURES, "labels": np.array([0, 1, np.nan, 0, 0])}, "'labels' has NaN or infinity, first in sample 2"),
        ({}, "found nothing"),
    ],
)
def test_a_wrong_array_is_named_with_what_was_found_and_expected(
    tmp_path: Path, stored: dict[str, Any], says: str
) -> None:
    np.savez(tmp_path / "d.npz", allow_pickle=True, **stored)
    assert says in refused(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named_by_array_and_first_sample(tmp_path: Path, value: float) -> None:
    stored = PICTURES.copy()
    stored[3, 0, 1, 2] = value
    np.savez(tmp_path / "d.npz", x=stored)
    assert "array 'x' has NaN or infinity, first in sample 3" in refused(tmp_path)


def test_a_model_with_a_fixed_batch_is_refused_with_the_cure(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=PICTURES)
    message = refused(tmp_path, TensorSpec(name="x", dtype="float32", shape=(8, 1, 4, 4)))
    assert "fixed batch of 8" in message
    assert "export the model with a batch of 1" in message


def test_a_file_that_is_missing_or_no_npz_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path)
    (tmp_path / "d.npz").write_text("text")
    assert "not an .npz" in refused(tmp_path)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 1400), packed=st.booleans())
def test_a_file_cut_off_anywhere_is_refused(cut: int, packed: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("cut")
    file = folder / "d.npz"
    noise = np.random.default_rng(1).normal(size=(20, 1, 4, 4)).astype(np.float32)
    (np.savez_compressed if packed else np.savez)(file, x=noise)
    whole = file.read_bytes()
    file.write_bytes(whole[: min(cut, len(whole) - 1)])
    refused(folder)


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 1350), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_changes_nothing(
    at: int, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("bit")
    file = folder / "d.npz"
    noise = np.random.default_rng(1).normal(size=(20, 1, 4, 4)).astype(np.float32)
    np.savez(file, x=noise)
    raw = bytearray(file.read_bytes())
    raw[at % len(raw)] ^= 1 << bit
    file.write_bytes(raw)
    try:
        data = opened(folder)
    except InputError:
        return
    assert np.array_equal(np.concatenate([feed["x"] for feed in data.feeds()]), noise)


def test_a_header_that_promises_more_than_there_is_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", PICTURES)
    raw = (tmp_path / "x.npy").read_bytes().replace(b"(5, 1, 4, 4)", b"(9, 1, 4, 4)")
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", raw)
    assert "cut off: 320 bytes of data" in refused(tmp_path)


def test_a_member_that_numpy_did_not_write_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "readme.txt" in refused(tmp_path)


def test_plainly_stored_arrays_are_mapped_and_not_read_into_memory(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((8 << 20,), np.float32))
    tracemalloc.start()
    array = open_npz(tmp_path / "d.npz", "here")["x"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(array, np.memmap)
    assert array.size == 8 << 20
    assert peak < 4 << 20


def test_a_folder_of_npz_gives_one_feed_a_file_of_any_length_sorted_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for name, length in (("b", 9), ("a", 4)):
        np.savez(
            folder / f"{name}.npz",
            input=np.full((length, 6), length, np.float32),
            h=np.zeros((1, 1, 3), np.float32),
            labels=np.ones(length, np.int8),
        )
    data = opened(tmp_path, *SEQUENCE, data="clips")
    assert [feed["input"].shape for feed in data.feeds()] == [(4, 6), (9, 6)]
    assert isinstance(data.labels, list)
    assert [len(label) for label in data.labels] == [4, 9]


def test_single_labels_of_a_folder_of_npz_become_one_array(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for index in range(3):
        np.savez(folder / f"{index}.npz", x=PICTURES[index : index + 1], labels=np.int64(index))
    data = opened(tmp_path, data="clips")
    assert isinstance(data.labels, np.ndarray)
    assert data.labels.tolist() == [0, 1, 2]
    assert data.batch_of_one


def test_a_folder_of_npz_names_the_file_that_is_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    np.savez(folder / "0.npz", x=PICTURES[:1], labels=np.int64(1))
    np.savez(folder / "1.npz", x=PICTURES[:2])
    assert "1.npz: array 'x' gives a feed of shape [2, 1, 4, 4]" in refused(tmp_path, data="clips")
    np.savez(folder / "1.npz", x=PICTURES[:1])
    assert "sample 1 has no label" in refused(tmp_path, data="clips")


def test_an_empty_folder_and_a_mixed_one_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    assert "no samples in this folder" in refused(tmp_path, data="f")
    np.savez(folder / "0.npz", x=PICTURES[:1])
    (folder / "labels.csv").write_text("file,label\n")
    assert "holds both 0.npz and labels.csv" in refused(tmp_path, data="f")


def test_the_digest_follows_contents_preprocessing_and_limit_and_nothing_else(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=PICTURES)
    np.savez(tmp_path / "same.npz", x=PICTURES)
    first = opened(tmp_path).digest
    assert first == opened(tmp_path).digest
    assert first == opened(tmp_path, data="same.npz").digest
    others = [opened(tmp_path, limit=3).digest, opened(tmp_path, preprocess=Preprocess(std=2.0)).digest]
    np.savez(tmp_path / "d.npz", x=PICTURES + 1)
    others.append(opened(tmp_path).digest)
    assert len({first, *others}) == 4
