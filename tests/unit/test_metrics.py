from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepack.errors import InputError
from edgepack.judge.data_set import Labels
from edgepack.judge.metric import MetricInstance
from edgepack.judge.metrics import METRICS, make_metric
from edgepack.judge.text import ctc_text, edit_distance, read_charset
from edgepack.spec.project import Metric
from edgepack.spec.tensor import TensorSpec

SCORES = TensorSpec(name="y", dtype="float32", shape=(1, 4))
NOWHERE = Path("/nowhere")


def output_of(*shape: int | str | None) -> TensorSpec:
    return TensorSpec(name="y", dtype="float32", shape=shape)


def made(
    name: str, labels: Labels, output: TensorSpec = SCORES, *, root: Path = NOWHERE, **options: Any
) -> MetricInstance:
    return make_metric(Metric(name=name, **options), outputs=(output,), labels=labels, root=root)


def refused(name: str, labels: Labels, output: TensorSpec = SCORES, *, root: Path = NOWHERE, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        made(name, labels, output, root=root, **options)
    return str(caught.value)


def value_of(metric: MetricInstance, outputs: list[Any], labels: Any, reference: list[Any] | None = None) -> float:
    statistics = [
        metric.statistic({"y": np.asarray(y)}, label, None if r is None else {"y": np.asarray(r)})
        for y, label, r in zip(outputs, labels, reference or [None] * len(outputs), strict=True)
    ]
    assert all(metric.is_finite(s) for s in statistics)
    value = metric.reduce(statistics)
    assert metric.reduce(metric.gather(statistics)) == value
    assert metric.reduce(metric.gather(statistics), np.full(len(outputs), 3)) == pytest.approx(value)
    return value


def test_top1_is_the_share_of_right_classes() -> None:
    metric = made("auto", np.array([0, 1, 3]))
    assert metric.name == "top1"
    assert metric.spread == "yes-no"
    assert value_of(metric, [[[9, 1, 2, 3]], [[9, 1, 2, 3]], [[0, 0, 0, 1]]], np.array([0, 1, 3])) == pytest.approx(
        2 / 3
    )


def test_a_dead_model_that_scores_all_classes_alike_is_right_only_for_the_first() -> None:
    labels = np.array([0, 1, 2, 7])
    wide = output_of(1, 8)
    assert value_of(made("top1", labels, wide), [np.zeros((1, 8))] * 4, labels) == 0.25
    assert value_of(made("top5", labels, wide), [np.zeros((1, 8))] * 4, labels) == 0.75


@given(st.lists(st.integers(0, 6), min_size=1, max_size=20), st.integers(0, 2**32 - 1))
def test_top5_is_at_least_top1_and_both_agree_with_sorting(labels: list[int], seed: int) -> None:
    scores = np.random.default_rng(seed).normal(size=(len(labels), 1, 7))
    answers = np.array(labels)
    order = np.argsort(-scores[:, 0], axis=1)
    one, five = (value_of(made(n, answers, output_of(1, 7)), list(scores), answers) for n in ("top1", "top5"))
    assert one == (order[:, 0] == answers).mean()
    assert five == (order[:, :5] == answers[:, None]).any(axis=1).mean()
    assert one <= five


def test_an_output_with_axes_of_one_behind_the_classes_is_a_classification() -> None:
    labels = np.array([2])
    assert value_of(made("auto", labels, output_of("N", 3, 1, 1)), [np.arange(3).reshape(1, 3, 1, 1)], labels) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_sample_with_a_value_that_is_not_finite_is_marked_and_not_averaged(bad: float) -> None:
    metric = made("top1", np.array([0]))
    assert not metric.is_finite(metric.statistic({"y": np.array([[9.0, bad, 0.0, 0.0]])}, np.int64(0)))


def test_binary_pools_elements_and_leaves_out_the_ignored() -> None:
    labels = [np.array([1, 0, -1, 1]), np.array([-1, -1, 0, -1])]
    metric = made("binary", labels, output_of("T"), ignore=-1)
    assert value_of(metric, [[0.9, 0.6, 0.9, 0.4], [0.9, 0.9, 0.1, 0.9]], labels) == 0.5
    assert value_of(made("binary", labels, output_of("T"), ignore=-1, threshold=0.3), [[0.4] * 4] * 2, labels) == 0.5


def test_binary_takes_one_number_a_sample() -> None:
    labels = np.array([1, 0, 0])
    assert value_of(made("binary", labels, output_of(1, 1)), [[[0.9]], [[0.9]], [[0.5]]], labels) == pytest.approx(
        2 / 3
    )


def test_mae_is_in_the_labels_unit_and_lower_is_better() -> None:
    labels = [np.array([1.0, 2.0]), np.array([0.0, 0.0])]
    metric = made("mae", labels, output_of(1, 2))
    assert not metric.higher_is_better
    assert not metric.is_share
    assert value_of(metric, [[[2.0, 2.0]], [[0.0, -3.0]]], labels) == 1.0


def slow_distance(a: str, b: str) -> int:
    @functools.cache
    def go(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(go(i - 1, j) + 1, go(i, j - 1) + 1, go(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return go(len(a), len(b))


@given(st.text("ab", max_size=7), st.text("abc", max_size=7))
def test_edit_distance_is_that_of_its_definition(a: str, b: str) -> None:
    assert edit_distance(a, b) == slow_distance(a, b) == edit_distance(b, a)


def one_hot(steps: list[int], classes: int) -> np.ndarray[Any, Any]:
    return np.eye(classes, dtype=np.float32)[steps][np.newaxis]


@given(st.text("abc ", max_size=8))
def test_ctc_decodes_what_was_spelt_with_blanks_and_repeats(text: str) -> None:
    characters = ["", "a", "b", "c", " "]
    steps = [step for letter in text for step in (0, characters.index(letter), characters.index(letter))]
    assert ctc_text(one_hot([0, *steps], 5)[0], characters) == text


def test_char_accuracy_divides_all_edits_by_all_characters(tmp_path: Path) -> None:
    (tmp_path / "chars.txt").write_text("a\nb\n\u2028\n", encoding="utf-8")
    assert read_charset(tmp_path / "chars.txt") == ["", "a", "b", "\u2028", " "]
    labels = ["ab", "aaaaaa"]
    outputs = [one_hot([1, 0, 0, 1], 5), one_hot([1, 1, 0, 1], 5)]  # "aa", "aa"
    metric = made("char-accuracy", labels, output_of(1, "T", 5), root=tmp_path, charset="chars.txt")
    assert value_of(metric, outputs, labels) == pytest.approx(1 - (1 + 4) / 8)
    exact = made("exact-match", ["aa", "b"], output_of(1, "T", 5), root=tmp_path, charset="chars.txt")
    assert value_of(exact, outputs, ["aa", "b"]) == 0.5
    turned = [output.transpose(1, 0, 2) for output in outputs]  # [steps, 1, classes]
    assert value_of(exact, turned, ["aa", "b"]) == 0.5


def test_whole_number_labels_are_read_as_text_where_text_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "chars.txt").write_text("0\n1\n2\n")
    labels = np.array([10, 2])
    metric = made("exact-match", labels, output_of(1, "T", 5), root=tmp_path, charset="chars.txt")
    assert value_of(metric, [one_hot([2, 1], 5), one_hot([3], 5)], labels) == 1


def test_a_charset_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chars.txt").write_text("a\nb\n")
    message = refused("char-accuracy", ["a"], output_of(1, "T", 9), root=tmp_path, charset="chars.txt")
    assert "2 lines make 4 classes" in message
    assert "has 9" in message
    assert "cannot be read" in refused("exact-match", ["a"], output_of(1, 2, 4), root=tmp_path, charset="gone.txt")
    assert "charset" in refused("char-accuracy", ["a"])
    (tmp_path / "none.txt").write_text("")
    assert "empty" in refused("char-accuracy", ["a"], root=tmp_path, charset="none.txt")


@given(st.integers(0, 2**32 - 1), st.sampled_from(["nchw", "nhwc", "map"]))
def test_mean_iou_is_that_of_its_definition_in_each_layout(seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    classes, ignore = 4, 255
    truth = rng.integers(0, 3, (3, 5, 6)).astype(np.uint8)  # class 3 is never there
    truth[0, 0] = ignore
    found = rng.integers(0, 3, (3, 5, 6))
    scores = np.eye(classes, dtype=np.float32)[found]
    outputs = {"nchw": scores.transpose(0, 3, 1, 2), "nhwc": scores, "map": found.astype(np.int32)}[layout]
    metric = made("mean-iou", list(truth), output_of(1, *outputs.shape[1:]), ignore=ignore, classes=classes)
    keep = truth != ignore
    ious = [((truth == k) & (found == k) & keep).sum() / (((truth == k) | (found == k)) & keep).sum() for k in range(3)]
    assert value_of(metric, [o[np.newaxis] for o in outputs], list(truth)) == pytest.approx(np.mean(ious))


def test_mean_iou_finds_its_classes_in_the_output() -> None:
    truth = [np.array([[0, 1], [2, 2]])]
    assert "expected 0 to 1" in refused("mean-iou", truth, output_of(1, 2, 2, 2))
    metric = made("mean-iou", truth, output_of(1, 3, 2, 2))
    with pytest.raises(InputError, match="label map"):
        metric.statistic({"y": np.zeros((1, 3, 4, 4), np.float32)}, truth[0])


def test_agreement_of_a_classification_counts_equal_top_classes_and_reports_sqnr() -> None:
    metric = made("auto", None)
    reference = [np.array([[1.0, 2, 3, 4]]), np.array([[4.0, 3, 2, 1]])]
    outputs = [np.array([[1.0, 2, 3, 5]]), np.array([[2.5, 3, 2, 1]])]
    assert metric.is_agreement
    assert metric.name == "agreement-top1"
    assert value_of(metric, outputs, [None, None], reference) == 0.5
    statistics = [metric.statistic({"y": o}, None, {"y": r}) for o, r in zip(outputs, reference, strict=True)]
    assert metric.extra(statistics)["sqnr_db"] == pytest.approx(10 * np.log10(60 / (1 + 1.5**2)))


def test_agreement_elsewhere_is_the_mean_cosine() -> None:
    metric = made("agreement", None, output_of("T"))
    assert metric.spread == "graded"
    assert value_of(metric, [[1.0, 0.0], [3.0, 3.0]], [None] * 2, [[1.0, 1.0], [1.0, 1.0]]) == pytest.approx(
        (2**-0.5 + 1) / 2
    )
    same = [metric.statistic({"y": np.ones(3)}, None, {"y": np.ones(3)})]
    assert metric.reduce(same) == 1.0
    assert metric.extra(same) == {"sqnr_db": None}


def test_agreement_of_single_numbers_is_one_cosine_over_the_set_and_not_always_one() -> None:
    metric = made("agreement", None, output_of("N", 1))
    assert metric.spread == "pooled"
    assert value_of(metric, [[[1.0]], [[0.0]]], [None] * 2, [[[1.0]], [[1.0]]]) == pytest.approx(2**-0.5)
    assert value_of(metric, [[[0.0]], [[0.0]]], [None] * 2, [[[1.0]], [[1.0]]]) == 0.0


@pytest.mark.parametrize(
    ("name", "labels", "output", "says"),
    [
        ("top1", np.array([0, 12]), SCORES, "label of sample 1 is 12; the output y float32[1, 4] has classes 0 to 3"),
        ("top1", np.array([-1]), SCORES, "label of sample 0 is -1"),
        ("top1", ["cat"], SCORES, "1 texts (first 'cat'); expected one whole number"),
        ("top1", [np.eye(4)[0]], SCORES, "float64[4]"),
        ("top1", np.array([0]), output_of(1, 4, 8, 8), "no [1, classes]"),
        ("top5", None, SCORES, "no labels"),
        ("mae", ["a"], SCORES, "expected numbers"),
        ("binary", np.array([0, 2]), output_of(1, 1), "a label of sample 1 is 2; expected 0, 1"),
        ("mean-iou", np.array([0]), SCORES, "a map [height, width]"),
        ("mean-iou", [np.zeros((2, 2), int)], output_of(1, "C", "H", "W"), "give [metric] classes"),
        ("mean-iou", [np.zeros((2, 2))], output_of(1, 3, 2, 2), "holds float64"),
        ("char-accuracy", [np.zeros(3)], SCORES, "one text a sample"),
        ("auto", ["a"], SCORES, "cannot be told; name one of top1, top5"),
        ("auto", np.array([1]), output_of(1, 4, 8, 8), "cannot be told"),
        ("top-1", None, SCORES, "unknown metric 'top-1'; did you mean 'top1'?"),
    ],
)
def test_labels_and_outputs_that_do_not_fit_the_metric_are_refused(
    name: str, labels: Labels, output: TensorSpec, says: str
) -> None:
    assert says in refused(name, labels, output)


def test_everything_ignored_is_refused() -> None:
    assert "ignore" in refused("binary", np.array([-1, -1]), output_of(1, 1), ignore=-1)


def test_labels_of_another_size_than_the_output_are_refused_when_met() -> None:
    with pytest.raises(InputError, match="one label an element"):
        made("mae", [np.zeros(3)], output_of(1, 4)).statistic({"y": np.zeros((1, 4))}, np.zeros(3))


def test_an_unknown_output_is_refused_and_a_named_one_is_judged() -> None:
    outputs = (SCORES, TensorSpec(name="aux", dtype="float32", shape=(1, 2)))
    with pytest.raises(InputError, match="no output 'auxs'; did you mean 'aux'"):
        make_metric(Metric(output="auxs"), outputs=outputs, labels=np.array([1]), root=NOWHERE)
    metric = make_metric(Metric(output="aux"), outputs=outputs, labels=np.array([1]), root=NOWHERE)
    assert metric.output == "aux"
    assert metric.reduce([metric.statistic({"y": np.zeros((1, 4)), "aux": np.array([[0, 1]])}, np.int64(1))]) == 1


def test_every_registered_metric_says_what_it_measures() -> None:
    assert all(function.__doc__ for function in METRICS.values())


def scripted(folder: Path, body: str, labels: Labels) -> MetricInstance:
    (folder / "mine.py").write_text(f"def score(outputs, labels):\n    {body}\n")
    return made("mine.py:score", labels, root=folder)


def test_the_users_function_gets_all_outputs_and_labels(tmp_path: Path) -> None:
    metric = scripted(
        tmp_path,
        "return sum(int(o['y'].argmax() == t) for o, t in zip(outputs, labels)) / len(labels)",
        np.array([0, 1]),
    )
    assert metric.digest is not None
    assert not metric.is_share
    assert value_of(metric, [[[1, 0, 0, 0]], [[1, 0, 0, 0]]], np.array([0, 1])) == 0.5


def test_the_users_function_gets_none_where_there_are_no_labels_and_only_the_named_output(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def score(outputs, labels):\n    return len(outputs[0]) + 10 * (labels is None)\n"
    )
    metric = make_metric(Metric(name="mine.py:score", output="y"), outputs=(SCORES,), labels=None, root=tmp_path)
    kept = metric.statistic({"y": np.zeros(2), "big": np.zeros(9)}, None)
    assert metric.reduce([kept]) == 11.0


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return outputs[0]['z']", r"mine\.py:2: KeyError"),
        ("return 'a'", "gave str; expected a float"),
        ("return None", "gave NoneType"),
    ],
)
def test_mistakes_of_the_users_metric_come_back_with_file_and_line(tmp_path: Path, body: str, says: str) -> None:
    metric = scripted(tmp_path, body, None)
    with pytest.raises(InputError, match=says):
        metric.reduce([metric.statistic({"y": np.zeros(2)}, None)])
