"""Two models timed in turns: what is slower is called so, and noise is not."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepack.bench.signed_rank import ratio_estimate, ratio_interval, signed_rank
from edgepack.bench.versus import LOOKS, Contestant, SpeedRatio, VersusOrder, compare_on, compare_speed, decide
from edgepack.errors import InputError, UnsupportedError
from edgepack.protocol import RUNNER_PATH, BenchOrder, EnvironmentSample, Loaded, Measured, ModelRef
from edgepack.transports.local import LocalTransport
from tests.support.runtime import lib_folder, model_ref

BASELINE = ModelRef(runtime="onnxruntime", lib="lib", files={"model": "baseline.onnx"})
CANDIDATE = ModelRef(runtime="onnxruntime", lib="lib", files={"model": "candidate.onnx"})


@dataclass
class FakeMachine:
    """Times models by a law instead of a processor: drift, a wandering load, bursts over whole blocks, long tails."""

    seed: int
    slowdown: float = 1.0
    noise: float = 0.02
    drift_per_block: float = 0.0
    bursts: float = 0.1
    seconds: float = 0.0
    load_ns: int = 3_000_000
    blocks: list[str] = field(default_factory=list)
    orders: list[BenchOrder] = field(default_factory=list)
    steal_per_block: int = 0
    foreign_per_block: int = 0
    _load: float = 0.0
    _ticks: int = 0

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def clock(self) -> float:
        return self.seconds

    def bench(self, model: ModelRef, inputs: str, order: BenchOrder) -> Measured:
        name = Path(model.files["model"]).stem
        self.blocks.append(name)
        self.orders.append(order)
        self._load = 0.8 * self._load + self.noise * self.random.normal()
        level = 1e6 * math.exp(self._load + self.drift_per_block * len(self.blocks))
        level *= 1 + self.random.pareto(1.5) * (self.random.random() < self.bursts)
        level *= self.slowdown if name == "candidate" else 1.0
        tails = self.noise * np.abs(self.random.standard_t(2, size=21))
        samples = [int(ns) for ns in level * (1 + tails)]
        before = self._environment()
        self.seconds += 0.1
        self._ticks += 10
        return measured(samples, (before, before, self._environment()), self.load_ns)

    def _environment(self) -> EnvironmentSample:
        count, ns = self._ticks // 10, int(self.seconds * 1e9)
        steal, foreign = self.steal_per_block * count, self.foreign_per_block * count
        stat = f"cpu {self._ticks + foreign} 0 0 {self._ticks} 0 0 0 {steal} 0 0\n"
        own = f"7 (python3) S {'0 ' * 10}{self._ticks} 0 0"
        files = {"/proc/stat": stat, "/proc/self/stat": own}
        return EnvironmentSample(t_ns=ns, wall_ns=10**18 + ns, raw_ns=ns, files=files, commands={})


def measured(
    samples_ns: Sequence[int], environment: tuple[EnvironmentSample, ...], load_ns: int = 3_000_000
) -> Measured:
    return Measured(
        loaded=Loaded(source="model", note=None, driver=None),
        fresh=False,
        import_ns=0,
        load_ns=load_ns,
        first_ns=samples_ns[0],
        warmup_ns=(),
        samples_ns=tuple(samples_ns),
        starts_ns=tuple(range(len(samples_ns))),
        environment=environment,
        max_rss_kib_before=0,
        max_rss_kib_loaded=0,
        max_rss_kib_after=0,
        clock="perf_counter_ns",
        clock_resolution_ns=1,
    )


class Window:
    """One of two runners on a machine: the same bench, another process."""

    def __init__(self, machine: FakeMachine) -> None:
        self.machine = machine

    def bench(self, model: ModelRef, inputs: str, order: BenchOrder) -> Measured:
        return self.machine.bench(model, inputs, order)


def compare(machine: FakeMachine, order: VersusOrder | None = None) -> SpeedRatio:
    sides = (
        Contestant(timer=Window(machine), model=BASELINE),
        Contestant(timer=Window(machine), model=CANDIDATE),
    )
    return compare_speed(*sides, inputs="inputs.npz", order=order, clock=machine.clock)


# --- the interval ---


def test_signed_ranks_agree_with_the_published_table() -> None:
    # Critical values of the signed-rank test, two-sided 5 % (Wilcoxon & Wilcox 1964): reject where T+ <= value.
    table = {6: 0, 7: 2, 8: 3, 9: 5, 10: 8, 12: 13, 15: 25, 20: 52, 25: 89, 50: 434}
    assert {count: signed_rank(count, 0.025) - 1 for count in table} == table
    assert signed_rank(5, 0.025) == 0
    assert signed_rank(LOOKS[0], 0.05 / len(LOOKS) / 2) >= 1


def test_the_interval_covers_the_true_ratio_under_heavy_tails() -> None:
    random, covered = np.random.default_rng(1), 0
    for _ in range(400):
        logs = math.log(1.1) + 0.05 * random.standard_t(1.5, size=32)
        interval = ratio_interval(list(logs), 0.95)
        assert interval is not None
        covered += interval[0] <= 1.1 <= interval[1]
    assert covered >= 0.925 * 400  # 95 % less twice the binomial error


def test_the_estimate_and_interval_do_not_depend_on_the_order_and_turn_with_the_sides() -> None:
    logs = list(np.random.default_rng(2).normal(0.1, 0.02, size=20))
    assert ratio_estimate(logs) == ratio_estimate(logs[::-1])
    there, back = ratio_interval(logs, 0.95), ratio_interval([-value for value in logs], 0.95)
    assert there is not None
    assert back is not None
    assert back == pytest.approx((1 / there[1], 1 / there[0]))


def test_the_verdict_follows_the_interval_and_never_slower_needs_proof() -> None:
    verdicts = [decide(interval, 0.02) for interval in ((0.9, 0.99), (0.98, 1.02), (1.0, 1.021), (1.021, 1.3), None)]
    assert verdicts == ["faster", "equal", "unresolved", "slower", "unresolved"]


# --- whole comparisons ---


def test_noise_does_not_cry_wolf() -> None:
    """200 comparisons of a model with itself: at most 2 % may be called slower."""
    verdicts = [compare(FakeMachine(seed=seed, noise=0.03)).verdict for seed in range(200)]
    assert verdicts.count("slower") <= 4
    assert verdicts.count("equal") + verdicts.count("faster") >= 180


def test_a_slowdown_of_five_percent_is_found() -> None:
    verdicts = [compare(FakeMachine(seed=seed, slowdown=1.05)).verdict for seed in range(200)]
    assert verdicts.count("slower") >= 190
    assert verdicts.count("equal") + verdicts.count("faster") <= 4


def test_what_is_clearly_faster_or_slower_ends_at_the_first_looks() -> None:
    faster, slower = (compare(FakeMachine(seed=3, slowdown=s, noise=0.005, bursts=0.0)) for s in (0.5, 2.0))
    assert (faster.verdict, slower.verdict) == ("faster", "slower")
    assert max(faster.rounds, slower.rounds) <= 16
    assert faster.ratio == pytest.approx(0.5, rel=0.03)
    assert faster.never_slower
    assert not slower.never_slower


@pytest.mark.parametrize("drift", [0.01, -0.01])
def test_a_machine_that_drifts_by_a_percent_a_block_slows_neither_side(drift: float) -> None:
    result = compare(FakeMachine(seed=4, drift_per_block=drift, noise=0.002, bursts=0.0))
    assert result.verdict in ("equal", "faster")
    assert result.ratio == pytest.approx(1.0, abs=0.005)
    assert "drift" in [reason.rule for reason in result.disturbances]


def test_rounds_alternate_abba_and_baab() -> None:
    machine = FakeMachine(seed=0)
    compare(machine, VersusOrder(max_seconds=0.5))
    a, b = "baseline", "candidate"
    assert machine.blocks[:8] == [a, b, b, a, b, a, a, b]


def test_a_model_that_takes_long_to_load_is_given_blocks_as_long() -> None:
    quick, slow = FakeMachine(seed=0), FakeMachine(seed=0, load_ns=2_000_000_000)
    for machine in (quick, slow):
        compare(machine, VersusOrder(max_seconds=1.0))
    assert {order.seconds for order in quick.orders} == {0.05}
    assert slow.orders[3].seconds == 0.05
    assert slow.orders[4].seconds == pytest.approx(2.0, rel=0.01)
    assert slow.orders[4].max_seconds >= slow.orders[4].seconds


def test_too_little_time_for_an_interval_is_unresolved_and_not_equal() -> None:
    result = compare(FakeMachine(seed=0), VersusOrder(max_seconds=0.7))
    assert (result.verdict, result.interval, result.never_slower) == ("unresolved", None, False)
    assert result.rounds < LOOKS[0]


def test_a_noisy_machine_ends_at_the_time_budget_with_what_it_has() -> None:
    result = compare(FakeMachine(seed=1, noise=0.8), VersusOrder(max_seconds=20.0))
    assert result.verdict == "unresolved"
    assert result.interval is not None
    assert result.interval[0] < 1.02 < result.interval[1]


def test_steal_and_load_by_others_are_marked_and_the_other_runner_is_not_load() -> None:
    quiet = compare(FakeMachine(seed=0, noise=0.001, bursts=0.0))
    assert [reason.rule for reason in quiet.disturbances] == []
    stolen = compare(FakeMachine(seed=0, noise=0.001, bursts=0.0, steal_per_block=3))
    assert [(reason.rule, reason.severity) for reason in stolen.disturbances] == [("steal", "invalid")]
    loaded = compare(FakeMachine(seed=0, noise=0.001, bursts=0.0, foreign_per_block=8))
    assert [reason.rule for reason in loaded.disturbances] == ["load"]


def test_medians_and_load_times_are_given_for_both() -> None:
    result = compare(FakeMachine(seed=5, slowdown=2.0, noise=0.001, bursts=0.0))
    assert result.candidate_ms == pytest.approx(2 * result.baseline_ms, rel=0.02)
    assert result.baseline_load_ms == result.candidate_load_ms == 3.0


def test_different_threads_are_refused() -> None:
    machine = FakeMachine(seed=0)
    more = Contestant(timer=machine, model=replace(CANDIDATE, threads=2))
    with pytest.raises(InputError, match="baseline 1, candidate 2"):
        compare_speed(Contestant(timer=machine, model=BASELINE), more, inputs="inputs.npz")


def test_an_emulated_device_is_refused(tmp_path: Path) -> None:
    emulated = LocalTransport(home=tmp_path, emulated=True)
    with pytest.raises(UnsupportedError, match="time means nothing"):
        compare_on(emulated, BASELINE, CANDIDATE, python="python3", runner="r.py", inputs="i.npz")


# --- the real thing: structure, not times, is asserted, for others may use this machine ---


def save_square(path: Path, width: int) -> Path:
    """x [1, 64] through a hidden layer of `width`."""
    random = np.random.default_rng(0)
    constants = [
        numpy_helper.from_array(random.normal(size=shape).astype(np.float32), name)
        for name, shape in (("v", (64, width)), ("w", (width, 64)))
    ]
    nodes = [helper.make_node("MatMul", ["x", "v"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 64]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "square", values[:1], values[1:], constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(made.SerializeToString())
    return path


@pytest.mark.parametrize("width", [64, 2048])
def test_two_real_models_are_compared_in_two_runners(tmp_path: Path, width: int) -> None:
    inputs = tmp_path / "inputs.npz"
    np.savez(inputs, x=np.ones((3, 1, 64), np.float32))
    order = VersusOrder(block_s=0.005, max_seconds=3.0)
    small, other = (model_ref(save_square(tmp_path / f"{w}-{w == width}.onnx", w)) for w in (64, width))
    assert Path(lib_folder("onnxruntime")).is_dir()
    result = compare_on(
        LocalTransport(home=tmp_path),
        other,
        small,
        python=sys.executable,
        runner=str(RUNNER_PATH),
        inputs=str(inputs),
        order=order,
    )
    assert result.rounds >= 1
    assert result.ratio > 0
    assert result.baseline_ms > 0
    assert result.candidate_load_ms > 0
    assert result.verdict in ("faster", "equal", "slower", "unresolved")
    assert result.interval is None or result.interval[0] <= result.ratio <= result.interval[1]
