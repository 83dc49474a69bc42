from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from edgepack.errors import InputError
from edgepack.judge.data import DataSet, Role, open_data
from edgepack.judge.user_code import load_function
from edgepack.spec.project import Data
from edgepack.spec.tensor import TensorSpec

X = TensorSpec(name="x", dtype="float32", shape=(1, "T"))
HEAD = "import numpy as np\n"


def opened(folder: Path, source: str, *, role: Role = "evaluation", limit: int | None = None) -> DataSet:
    (folder / "mine.py").write_text(HEAD + source)
    return open_data(Data(data="mine.py:samples", limit=limit), root=folder, inputs=(X,), preprocess=None, role=role)


def refused(folder: Path, source: str) -> str:
    path = list(sys.path)
    with pytest.raises(InputError) as caught:
        opened(folder, source)
    assert sys.path == path
    return str(caught.value)


def test_a_generator_of_pairs_gives_samples_and_labels_in_any_order(tmp_path: Path) -> None:
    data = opened(
        tmp_path,
        "def samples():\n    for n in range(1, 5):\n        yield {'x': np.full((1, n), n, np.float32)}, n % 2\n",
    )
    assert len(data) == 4
    assert isinstance(data.labels, np.ndarray)
    assert data.labels.tolist() == [1, 0, 1, 0]
    assert data.feed(3)["x"].tolist() == [[4, 4, 4, 4]]
    assert data.feed(0)["x"].tolist() == [[1]]
    assert [feed["x"].shape for feed in data.feeds()] == [(1, 1), (1, 2), (1, 3), (1, 4)]
    assert data.batch_of_one


def test_a_function_that_draws_lots_is_asked_once(tmp_path: Path) -> None:
    data = opened(tmp_path, "def samples():\n    return [{'x': np.random.rand(1, 3).astype('f4')} for _ in range(3)]\n")
    assert data.labels is None
    for first, second in zip(data.feeds(), data.feeds(), strict=True):
        assert np.array_equal(first["x"], second["x"])


def test_limit_stops_an_endless_generator(tmp_path: Path) -> None:
    source = "def samples():\n    while True:\n        yield {'x': np.zeros((1, 2), np.float32)}, 'text'\n"
    data = opened(tmp_path, source, limit=3)
    assert len(data) == 3
    assert data.labels == ["text"] * 3
    assert opened(tmp_path, source, limit=3, role="calibration").labels is None


def test_the_users_module_imports_its_neighbour_and_sys_path_is_as_before(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_mine.py").write_text("LENGTH = 5\n")
    path = list(sys.path)
    source = (
        "import sys\nsys.path.append('/nowhere')\n"
        "def samples():\n    import neighbour_of_mine\n"
        "    yield {'x': np.zeros((1, neighbour_of_mine.LENGTH), np.float32)}\n"
    )
    assert opened(tmp_path, source).feed(0)["x"].shape == (1, 5)
    assert sys.path == path
    assert not (tmp_path / "__pycache__" / "mine.cpython-311.pyc").exists()
    sys.modules.pop("neighbour_of_mine")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def samples():\n    return 1 / 0\n", "mine.py:3: ZeroDivisionError"),
        ("def samples():\n    yield {'x': np.zeros((1, 1), 'f4')}\n    raise KeyError('a')\n", "mine.py:4: KeyError"),
        ("def samples(:\n", "mine.py:2: SyntaxError"),
        ("raise SystemExit(3)\n", "mine.py:2: SystemExit"),
        ("import no_such_module_at_all\n", "mine.py:2: ModuleNotFoundError"),
        ("def sample():\n    return []\n", "no function 'samples'; did you mean 'sample'?"),
        ("def samples():\n    return 3\n", "gave int; expected an iterable"),
        ("def samples():\n    return []\n", "no sample"),
        ("def samples():\n    return [3]\n", "sample 0 is int; expected a dict"),
        ("def samples():\n    return [{'y': np.zeros((1, 1), 'f4')}]\n", "no array 'x'"),
        ("def samples():\n    return [{'x': np.zeros((1, 1))}]\n", "array.astype('float32')"),
        ("def samples():\n    return [{'x': np.zeros((2, 1), 'f4')}]\n", "shape [2, 1]"),
        ("def samples():\n    return [{'x': np.full((1, 1), np.nan, 'f4')}]\n", "first in sample 0"),
        ("def samples():\n    return [({'x': np.zeros((1, 1), 'f4')}, {})]\n", "label of sample 0 is object"),
        (
            "def samples():\n    x = {'x': np.zeros((1, 1), 'f4')}\n    return [(x, 1), (x, 'a')]\n",
            "some labels are text",
        ),
    ],
)
def test_mistakes_of_the_users_function_come_back_with_file_and_line(tmp_path: Path, source: str, says: str) -> None:
    message = refused(tmp_path, source)
    assert says in message
    assert "mine.py" in message


def test_a_module_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.py: cannot be read"):
        load_function("gone.py:f", tmp_path)


def test_the_digest_follows_the_source_and_the_samples(tmp_path: Path) -> None:
    source = "def samples():\n    return [({'x': np.zeros((1, 2), 'f4')}, 1)]\n"
    first = opened(tmp_path, source).digest
    assert opened(tmp_path, source).digest == first
    assert opened(tmp_path, source + "# other\n").digest != first
    assert opened(tmp_path, source.replace("zeros", "ones")).digest != first
    assert opened(tmp_path, source.replace(", 1)]", ", 2)]")).digest != first
