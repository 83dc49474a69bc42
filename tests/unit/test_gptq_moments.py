"""Moments of a layer's inputs: the sums are right whatever the chunks, and few samples are trusted little."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgepack.passes import row_moments
from edgepack.passes.row_moments import Moments, MomentStream

Array = NDArray[np.float64]


def data(seed: int, samples: int, rows: int, columns: int, groups: int = 1) -> tuple[list[Array], list[Array]]:
    """Rows with a mean, unequal variances and correlations, and gaps that follow them."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(groups, columns, columns)) * np.geomspace(1, 10, columns)
    drawn = [random.normal(size=(groups, rows, columns)) @ mixing + 5 for _ in range(samples)]
    return drawn, [0.1 * each + random.normal(size=each.shape) for each in drawn]


def moments(rows: list[Array], gaps: list[Array], *, centred: bool = True, diagonal: bool = False) -> Moments:
    stream = MomentStream(rows[0].shape[0], rows[0].shape[2], diagonal=diagonal)
    for row, gap in zip(rows, gaps, strict=True):
        stream.add(row, gap)
    return stream.finish(centred=centred)


def off_diagonal(matrix: Array) -> Array:
    columns = matrix.shape[-1]
    return matrix[..., ~np.eye(columns, dtype=bool)]


@pytest.mark.parametrize("samples", [3, 40, 100])
@pytest.mark.parametrize("centred", [True, False])
def test_they_are_what_the_rows_say(samples: int, centred: bool) -> None:
    rows, gaps = data(1, samples, 7, 5, groups=2)
    found = moments(rows, gaps, centred=centred)
    x, d = np.concatenate(rows, axis=1), np.concatenate(gaps, axis=1)
    mean, gap = x.mean(axis=1), d.mean(axis=1)
    assert np.allclose(found.mean, mean) and np.allclose(found.mean_gap, gap)
    kept = (1 - found.shrinkage)[:, None, None] * ~np.eye(5, dtype=bool) + np.eye(5)
    assert found.cross is not None
    for matrix, other, other_mean in ((found.second, x, mean), (found.cross, d, gap)):
        covariance = (x - mean[:, None]).transpose(0, 2, 1) @ (other - other_mean[:, None]) / x.shape[1]
        expected = covariance * kept
        if not centred:
            expected = expected + mean[:, :, None] * other_mean[:, None, :]
        assert np.allclose(matrix, expected, rtol=1e-6, atol=1e-6)


def test_the_shrinkage_is_schaefer_and_strimmers() -> None:
    """Their formula on standardised columns; one row a sample, all in one chunk."""
    rows, gaps = data(2, 20, 1, 6)
    found = moments(rows, gaps)
    x = np.concatenate(rows, axis=1)[0]
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    products = z[:, :, None] * z[:, None, :]
    variance = products.var(axis=0, ddof=1) / len(z)
    expected = off_diagonal(variance).sum() / (off_diagonal(products.mean(axis=0)) ** 2).sum()
    assert found.shrinkage[0] == pytest.approx(min(expected, 1.0), rel=1e-6)
    assert 0 < found.shrinkage[0] < 1


def test_samples_count_and_not_their_rows() -> None:
    """A picture whose rows are all alike is one observation, however many rows are drawn."""
    rows, gaps = data(3, 20, 1, 6)
    repeated = moments([np.repeat(each, 50, axis=1) for each in rows], [np.repeat(each, 50, axis=1) for each in gaps])
    assert repeated.shrinkage[0] == pytest.approx(moments(rows, gaps).shrinkage[0], rel=1e-6)


def test_few_samples_are_shrunk_more_than_many() -> None:
    few, many = (moments(*data(4, samples, 4, 30)).shrinkage[0] for samples in (8, 400))
    assert many < 0.1 < few


def test_independent_columns_are_taken_for_independent() -> None:
    random = np.random.default_rng(5)
    rows = [random.normal(size=(1, 1, 50)) for _ in range(30)]
    assert moments(rows, rows).shrinkage[0] > 0.8


def test_one_sample_proves_no_correlation() -> None:
    found = moments(*data(6, 1, 9, 4))
    assert found.shrinkage[0] == 1
    assert not off_diagonal(found.second).any()


@pytest.mark.parametrize("centred", [True, False])
def test_the_diagonal_alone_is_the_full_matrix_diagonal(centred: bool) -> None:
    rows, gaps = data(7, 40, 5, 6, groups=2)
    full, alone = (moments(rows, gaps, centred=centred, diagonal=each) for each in (False, True))
    assert alone.cross is None
    assert np.allclose(alone.second, np.diagonal(full.second, axis1=1, axis2=2))
    assert np.allclose(alone.mean, full.mean)


def test_the_size_of_chunks_changes_nothing_but_the_first_chunks_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, gaps = data(8, 64, 3, 4)
    one = moments(rows, gaps)
    monkeypatch.setattr(row_moments, "CHUNK_BYTES", 1)
    other = moments(rows, gaps)
    assert np.allclose(np.diagonal(one.second[0]), np.diagonal(other.second[0]))
    assert other.shrinkage[0] == pytest.approx(one.shrinkage[0], rel=0.5)


def test_columns_that_never_move_have_no_moments() -> None:
    rows, gaps = data(9, 40, 3, 5)
    for each in (*rows, *gaps):
        each[:, :, 2] = 0
    found = moments(rows, gaps)
    assert not found.second[0, 2].any() and not found.second[0, :, 2].any()
    assert np.isfinite(found.second).all() and np.isfinite(found.shrinkage).all()


@pytest.mark.parametrize("groups", [1, 2], ids=["all of it", "one group"])
def test_what_is_still_in_the_first_chunk_may_move_later(groups: int) -> None:
    rows, gaps = data(10, 3 * row_moments.CHUNK_SAMPLES, 3, 4, groups=groups)
    for each in rows[: row_moments.CHUNK_SAMPLES]:
        each[-1] = 0
    found = moments(rows, gaps)
    x = np.concatenate(rows, axis=1)
    assert np.allclose(np.diagonal(found.second, axis1=1, axis2=2), x.var(axis=1), rtol=1e-5)
    assert np.isfinite(found.second).all() and np.isfinite(found.shrinkage).all()
