from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from edgepack.errors import InputError
from edgepack.judge.data import DataSet, Role, open_data
from edgepack.judge.data_images import resized_size
from edgepack.spec.project import Data, Preprocess
from edgepack.spec.tensor import TensorSpec

PLAIN = Preprocess()


def spec_of(*shape: int | str | None, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name="image", dtype=dtype, shape=shape)


RGB = spec_of(1, 3, 6, 8)


def draw(file: Path, *, width: int = 8, height: int = 6, seed: int = 0, mode: str = "RGB") -> np.ndarray[Any, Any]:
    """A picture of noise with a bar; gives its pixels as RGB."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    ImageDraw.Draw(picture).line((0, 0, width, height), fill=(255, 0, 0))
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.convert(mode).save(file)
    return np.asarray(Image.open(file).convert("RGB"))


def opened(
    folder: Path,
    spec: TensorSpec = RGB,
    preprocess: Preprocess | None = PLAIN,
    *,
    role: Role = "evaluation",
    labels: str | None = None,
) -> DataSet:
    return open_data(Data(data="p", labels=labels), root=folder, inputs=(spec,), preprocess=preprocess, role=role)


def refused(folder: Path, *arguments: Any, **named: Any) -> str:
    with pytest.raises(InputError) as caught:
        opened(folder, *arguments, **named)
    return str(caught.value)


def test_pictures_are_read_in_the_order_of_the_csv_with_whole_number_labels(tmp_path: Path) -> None:
    first, second = draw(tmp_path / "p/sub/b.png", seed=1), draw(tmp_path / "p/a.png", seed=2)
    (tmp_path / "p/labels.csv").write_text("file,label,source\nsub/b.png,7,x\n\na.png,-1,y\n")
    data = opened(tmp_path)
    assert len(data) == 2
    assert data.batch_of_one
    assert isinstance(data.labels, np.ndarray)
    assert data.labels.tolist() == [7, -1]
    for feed, pixels in zip(data.feeds(), (first, second), strict=True):
        assert feed["image"].dtype == np.float32
        assert feed["image"].flags.c_contiguous
        assert np.array_equal(feed["image"], pixels.transpose(2, 0, 1)[np.newaxis])


@pytest.mark.parametrize("header", ["picture,answer", "file,text,font", "Label,File", "\ufefffile,label"])
def test_text_labels_and_other_headers_are_understood(tmp_path: Path, header: str) -> None:
    draw(tmp_path / "p/a.png")
    cells = "007,a.png" if header.startswith("Label") else "a.png,007"
    (tmp_path / "p/labels.csv").write_text(f"{header}\n{cells}\n", encoding="utf-8")
    assert opened(tmp_path).labels == ["007"]


def test_calibration_needs_no_labels_and_takes_all_pictures_by_name(tmp_path: Path) -> None:
    second, first = draw(tmp_path / "p/b.png", seed=1), draw(tmp_path / "p/a.jpg", seed=2)
    (tmp_path / "p/notes.txt").write_text("no picture")
    data = opened(tmp_path, role="calibration")
    assert data.labels is None
    assert np.array_equal(data.feed(0)["image"][0, 0], first[:, :, 0])
    assert np.array_equal(data.feed(1)["image"][0, 2], second[:, :, 2])


def test_colour_mean_and_std_come_before_the_padding_with_zeros(tmp_path: Path) -> None:
    pixels = draw(tmp_path / "p/a.png")
    preprocess = Preprocess(colour="bgr", mean=(1.0, 2.0, 3.0), std=127.5, pad=(7, 12))
    found = opened(tmp_path, spec_of(1, 3, 7, 12), preprocess).feed(0)["image"]
    wanted = ((pixels[:, :, ::-1].astype(np.float32) - np.array([1, 2, 3], np.float32)) / np.float32(127.5)).transpose(
        2, 0, 1
    )
    assert np.array_equal(found[0, :, :6, :8], wanted)
    assert not found[0, :, 6:].any()
    assert not found[0, :, :, 8:].any()


def test_grey_channels_last_and_bytes(tmp_path: Path) -> None:
    draw(tmp_path / "p/a.png")
    found = opened(tmp_path, spec_of(1, 6, 8, 1, dtype="uint8"), Preprocess(colour="grey", layout="nhwc"))
    wanted = np.asarray(Image.open(tmp_path / "p/a.png").convert("L"))
    assert found.feed(0)["image"].dtype == np.uint8
    assert np.array_equal(found.feed(0)["image"][0, :, :, 0], wanted)


def test_resize_of_the_short_side_then_centre_crop(tmp_path: Path) -> None:
    draw(tmp_path / "p/a.png", width=40, height=20)
    found = opened(tmp_path, spec_of(1, 3, 8, 8), Preprocess(resize=10, crop=(8, 8))).feed(0)["image"]
    small = np.asarray(Image.open(tmp_path / "p/a.png").resize((20, 10), Image.Resampling.BILINEAR))
    assert np.array_equal(found[0], small[1:9, 6:14].transpose(2, 0, 1))


@given(height=st.integers(1, 4000), width=st.integers(1, 4000), resize=st.integers(1, 600))
def test_the_short_side_gets_the_size_and_the_ratio_is_kept(height: int, width: int, resize: int) -> None:
    new = resized_size(height, width, resize)
    assert min(new) == resize
    assert abs(max(new) - resize * max(height, width) / min(height, width)) < 1


def test_pictures_of_different_sizes_go_into_free_dimensions(tmp_path: Path) -> None:
    draw(tmp_path / "p/a.png", width=8)
    draw(tmp_path / "p/b.png", width=11)
    data = opened(tmp_path, spec_of(None, 3, 6, "W"))
    assert [feed["image"].shape for feed in data.feeds()] == [(1, 3, 6, 8), (1, 3, 6, 11)]


def test_an_input_without_a_batch_gets_none(tmp_path: Path) -> None:
    draw(tmp_path / "p/a.png")
    data = opened(tmp_path, spec_of(3, 6, 8))
    assert data.feed(0)["image"].shape == (3, 6, 8)
    assert not data.batch_of_one


@pytest.mark.parametrize(
    ("spec", "preprocess", "says"),
    [
        (RGB, None, "[preprocess]"),
        (spec_of(1, 3, 9, 9), PLAIN, "6 high and 8 wide"),
        (spec_of(1, 6, 8, 3), PLAIN, "set layout"),
        (spec_of(1, 1, 6, 8), PLAIN, "set colour"),
        (spec_of(4, 3, 6, 8), PLAIN, "fixed batch of 4"),
        (spec_of(1, 3), PLAIN, "4 axes"),
        (spec_of(1, 3, 6, 8, dtype="int64"), PLAIN, "int64"),
        (spec_of(1, 3, 6, 8, dtype="uint8"), Preprocess(std=255.0), "uint8 only with mean 0"),
        (RGB, Preprocess(mean=(1.0, 2.0)), "2 values, one a channel"),
        (RGB, Preprocess(crop=(7, 8)), "crop less"),
        (RGB, Preprocess(pad=(5, 8)), "pad more"),
    ],
)
def test_a_picture_that_does_not_fit_the_model_is_refused_with_the_cure(
    tmp_path: Path, spec: TensorSpec, preprocess: Preprocess | None, says: str
) -> None:
    draw(tmp_path / "p/a.png")
    assert says in refused(tmp_path, spec, preprocess)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("", "empty"),
        ("file,label\n", "no sample"),
        ("file,kind,source\na.png,1,2\n", "no column 'label'; found file, kind, source"),
        ("file\na.png\n", "no column 'label'"),
        ("a.png,1\n", "line 1 names a picture"),
        ("file,label\na.png,1\ngone.png,2\n", "line 3: no picture 'gone.png'"),
        ("file,label\na.png\n", "line 2 has 1 columns"),
    ],
)
def test_a_wrong_table_is_named_with_its_line(tmp_path: Path, table: str, says: str) -> None:
    draw(tmp_path / "p/a.png")
    (tmp_path / "p/labels.csv").write_text(table)
    message = refused(tmp_path)
    assert says in message
    assert "labels.csv" in message or says == "no sample"


def test_a_table_that_is_asked_for_must_be_there(tmp_path: Path) -> None:
    draw(tmp_path / "p/a.png")
    assert "other.csv: cannot be read" in refused(tmp_path, labels="other.csv")
    (tmp_path / "p/other.csv").write_bytes(b"file,label\na.png,\xff\n")
    assert "not a CSV in UTF-8" in refused(tmp_path, labels="other.csv")


def test_a_file_that_is_no_picture_is_found_when_the_set_is_opened(tmp_path: Path) -> None:
    draw(tmp_path / "p/a.png")
    (tmp_path / "p/b.png").write_text("text")
    assert "b.png: not a picture" in refused(tmp_path)


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_a_cut_off_picture_is_named_when_it_is_read(tmp_path: Path, name: str) -> None:
    draw(tmp_path / "p" / name, width=64, height=64)
    file = tmp_path / "p" / name
    file.write_bytes(file.read_bytes()[:-400])
    data = opened(tmp_path, spec_of(1, 3, 64, 64))
    with pytest.raises(InputError, match=f"{name}: damaged or cut off"):
        data.feed(0)


def test_more_than_eight_bits_are_refused_and_not_clipped(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    Image.fromarray(np.full((6, 8), 4000, np.uint16)).save(tmp_path / "p/a.png")
    assert "more than 8 bits" in refused(tmp_path)


def test_pictures_for_a_model_of_two_inputs_are_refused(tmp_path: Path) -> None:
    draw(tmp_path / "p/a.png")
    with pytest.raises(InputError, match="one input; this one has 2"):
        open_data(Data(data="p"), root=tmp_path, inputs=(RGB, RGB), preprocess=PLAIN, role="calibration")


def test_the_digest_follows_pictures_labels_and_preprocessing(tmp_path: Path) -> None:
    draw(tmp_path / "p/a.png")
    table = tmp_path / "p/labels.csv"
    table.write_text("file,label\na.png,1\n")
    first, calibration = opened(tmp_path).digest, opened(tmp_path, role="calibration").digest
    assert opened(tmp_path, preprocess=Preprocess(std=2.0)).digest != first
    table.write_text("file,label\na.png,2\n")
    assert opened(tmp_path).digest != first
    assert opened(tmp_path, role="calibration").digest == calibration
    draw(tmp_path / "p/a.png", seed=3)
    assert opened(tmp_path, role="calibration").digest != calibration
