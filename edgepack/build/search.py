"""The search: which candidate is the best for a target that still holds, and why the others are not.

    proposals -> judged on the samples that choose, the most promising first
              -> static int8 would not hold: sensitivity by layer, then the same with its worst layers in float
              -> those that would hold, by the objective; where the clock counts, timed against fp32
              -> none is as fast as fp32: what was passed over for their sake is tried after all
              -> one, which the caller gates on the samples that were kept apart

What cannot beat a candidate that would hold already is not tried. A candidate that is certainly beyond the gate is
dropped before all samples are run. Everything measured is remembered by content, so a killed search goes on where it
was. docs/adr/0015-search.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from edgepack.build.arena import Made
from edgepack.build.candidate import Candidate, pareto_front, speed_json
from edgepack.build.estimate import Profile, estimate
from edgepack.build.execute import bytes_of, execute
from edgepack.build.judging import Judge
from edgepack.build.planner import BuildPlan
from edgepack.build.sensitivity import Sensitivity, measure_sensitivity
from edgepack.bundle.pack import MIB
from edgepack.errors import DefectError, EdgepackError, GateMissedError, GateUnresolvedError, UnsupportedError
from edgepack.judge.data_set import DataSet
from edgepack.judge.session import ModelDoesNotRunError
from edgepack.passes.contract import PassDefect
from edgepack.runtimes.recipes import (
    OTHER_RANGES,
    Recipe,
    narrowed,
    price_of,
    ranges_of,
    repriced,
    smaller_input,
    with_ranges,
)
from edgepack.spec.project import Search
from edgepack.store import Json

TIMED = 4
"""Most candidates that are timed, the cheapest by estimate first: a comparison takes up to 20 s."""
LEAST_CHANCE = 0.8
"""That the gate passes it, for a candidate to be taken as one that holds. The gate is asked once: a bolder choice would
fail more builds, a shyer one ship larger models."""
HALVINGS = 2
"""Of the ratio between two prices of a bit, a factor of 4 at first: then bytes are within a fifth of a bit a weight."""
MACS_SHARES = (0.7, 0.5)
"""Of the arithmetic left, in turn."""
FLOAT_LAYERS = (1, 2, 4, 8, 16, 32)
"""How many of the most sensitive layers are left in float, in turn."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """All that a search works with and does not change."""

    judge: Judge
    plans: Sequence[BuildPlan]
    """Of the proposals, in their order."""
    plan_of: Callable[[Recipe], BuildPlan]
    """For recipes that the search makes itself."""
    baseline: Made
    """fp32 in the runtime that ships."""
    profile: Profile
    selection: DataSet | None
    """None where there is nothing to choose: then all samples gate."""
    gate_samples: int
    baseline_bytes: int
    budget_mib: float | None
    """Of the model."""
    search: Search
    clock: Callable[[], float] = time.monotonic


@dataclass(kw_only=True)
class Found:
    """What a search came to."""

    chosen: Candidate
    candidates: list[Candidate]
    sensitivity: tuple[Sensitivity, ...]
    speed: dict[str, Json] | None
    """Of the chosen one; None where this machine is not of the target's kind."""

    def evidence(self, setting: Setting) -> dict[str, Json]:
        """As JSON (docs/json.md), without the gate, which comes after."""
        front = pareto_front(self.candidates, setting.baseline_bytes)
        target, where = self.chosen.plan.target, setting.judge.arena.where
        return {
            "schema": 1,
            "name": setting.judge.opened.project.name,
            "target": target.name,
            "objective": setting.search.objective,
            "seed": setting.search.seed,
            "samples": {
                "selection": 0 if setting.selection is None else len(setting.selection),
                "gate": setting.gate_samples,
            },
            "baseline": {"bytes": setting.baseline_bytes},
            "candidates": [each.to_json(each.name in front, where) for each in self.candidates],
            "sensitivity": [each.to_json() for each in self.sensitivity],
        }


def find(setting: Setting) -> Found:
    """Search. Raises GateMissedError or GateUnresolvedError where none is proved not to be slower, UnsupportedError
    where no recipe can be made of the model, and what executing and judging raise."""
    return _Search(setting).run()


@dataclass
class _Search:
    setting: Setting
    candidates: list[Candidate] = field(default_factory=list)
    sensitivity: tuple[Sensitivity, ...] = ()
    judged: int = 0
    began: float = 0.0

    def run(self) -> Found:
        setting, where = self.setting, self.setting.judge.arena.where
        self.began = setting.clock()
        for plan in setting.plans:
            self._add(plan, base=plan.recipe.name)
        proposed = list(self.candidates)
        last_static = max((place for place, c in enumerate(proposed) if _is_refined(c)), default=None)
        for place, candidate in enumerate(proposed):
            self._try(candidate)
            if place == last_static:
                self._rerange()
                self._refine()
                self._narrow()
                self._shrink()
                self._mix()
        chosen = self._choose()
        return Found(
            chosen=chosen,
            candidates=self.candidates,
            sensitivity=self.sensitivity,
            speed=None if chosen.speed is None else speed_json(chosen.speed, where),
        )

    def _add(self, plan: BuildPlan, *, base: str) -> Candidate:
        expected = estimate(plan.recipe, self.setting.profile, plan.target)
        candidate = Candidate(plan=plan, base=base, expected=expected)
        self.candidates.append(candidate)
        return candidate

    def _has_time(self) -> bool:
        budget = self.setting.search.time_budget_s
        return budget is None or self.setting.clock() - self.began < budget

    def _spent(self) -> str:
        """What ends the search; empty while it may go on."""
        search = self.setting.search
        if self.judged >= search.evaluations:
            return f"the {search.evaluations} evaluations were spent"
        if self.judged and not self._has_time():
            return f"the time budget of {search.time_budget_s:g} s was spent"
        return ""

    def _try(self, candidate: Candidate) -> None:
        """Make and judge a candidate, unless that cannot change the choice."""
        candidate.reason = self._spent()
        if candidate.reason:
            return
        better = self._beaten_by(candidate)
        if better is not None:
            candidate.reason = f"cannot be better than {better.name}, which holds"
            return
        if not self._make(candidate):
            return
        twin = next((c for c in self.candidates if c is not candidate and c.record and c.is_same_as(candidate)), None)
        if twin is not None:
            candidate.outcome, candidate.reason = "dropped", f"the same bytes as {twin.name}"
            return
        most_mib = self.setting.budget_mib
        if most_mib is not None and candidate.bytes is not None and candidate.bytes > most_mib * MIB:
            candidate.outcome = "dropped"
            candidate.reason = f"it takes {candidate.bytes / MIB:.2f} MiB; the budget is {most_mib:g} MiB"
            return
        self._judge(candidate)

    def _make(self, candidate: Candidate) -> bool:
        judge = self.setting.judge
        try:
            record = execute(candidate.plan, judge.opened, judge.bench)
        except UnsupportedError as error:
            candidate.outcome, candidate.reason = "dropped", str(error)
            return False
        except ModelDoesNotRunError as error:
            self._refused(candidate, error)
            return False
        except PassDefect as error:
            candidate.outcome, candidate.reason = "failed", f"a defect of edgepack: {error}"
            judge.bench.say(f"{candidate.plan.target.name}: {candidate.name} failed: {candidate.reason}")
            return False
        candidate.record = record
        candidate.bytes = bytes_of(record, judge.bench.store)
        return True

    def _judge(self, candidate: Candidate) -> None:
        """Fill in the verdict on the samples that choose."""
        setting, judge = self.setting, self.setting.judge
        assert candidate.record is not None
        self.judged += 1
        if setting.selection is None:
            candidate.outcome = "kept"
            return
        judge.bench.say(f"{candidate.plan.target.name}: trying {candidate.name} ({candidate.plan.recipe.why})")
        made = Made(plan=candidate.plan, record=candidate.record)
        try:
            seen = judge.select(made, setting.selection, gate_samples=setting.gate_samples)
        except ModelDoesNotRunError as error:
            self._refused(candidate, error)
            return
        verdict = candidate.selection = seen.verdict
        candidate.stopped_early, candidate.foreseen_worst = seen.stopped_early, seen.foreseen_worst
        candidate.chance, candidate.drift = seen.chance, seen.drift
        candidate.outcome = "kept" if self._holds(candidate) else "dropped"
        if verdict.drop is None:
            candidate.reason = verdict.reason
        elif candidate.outcome == "dropped":
            candidate.reason = (
                f"drop {verdict.drop:.4g} on the samples that choose, limit {verdict.max_drop:g}: "
                f"the gate would pass it with a chance of {candidate.chance:.0%}"
            )

    def _refused(self, candidate: Candidate, error: ModelDoesNotRunError) -> None:
        """The runtime that ships does not take it: no loss but of this candidate, unlike the user's own model."""
        candidate.outcome, candidate.reason = "dropped", str(error)
        self.setting.judge.bench.say(f"{candidate.plan.target.name}: {candidate.name} does not run: {error}")

    def _holds(self, candidate: Candidate) -> bool:
        return not candidate.stopped_early and candidate.chance >= LEAST_CHANCE

    def _holding(self) -> list[Candidate]:
        """The best by the objective first."""
        return sorted((c for c in self.candidates if c.outcome == "kept"), key=self._rank)

    def _rank(self, candidate: Candidate) -> tuple[int, float]:
        return candidate.rank(self.setting.search.objective, self.setting.baseline_bytes)

    def _beaten_by(self, candidate: Candidate) -> Candidate | None:
        """One that holds and costs no more than this one can at best."""
        best = next(iter(self._holding()), None)
        return best if best is not None and self._rank(best)[0] <= self._rank(candidate)[0] else None

    def _rerange(self) -> None:
        """Where no price of a bit holds, though other ranges of activations come nearer than plain int8's: the prices
        again, with those. The weights are made already."""
        priced = [c for c in self.candidates if price_of(c.plan.recipe) is not None and c.selection is not None]
        plain = next((c for c in self.candidates if c.name == "int8" and c.selection is not None), None)
        others = [c for c in self.candidates if c.selection and c.base in OTHER_RANGES]
        nearest = max(others, key=lambda c: c.chance, default=None)
        if (
            plain is None
            or nearest is None
            or nearest.chance <= plain.chance
            or any(c.outcome == "kept" for c in priced)
        ):
            return
        for base in priced:
            recipe = with_ranges(base.plan.recipe, ranges_of(nearest.plan.recipe))
            candidate = self._add(self.setting.plan_of(recipe), base=base.base)
            self._try(candidate)
            if candidate.outcome == "kept":
                return

    def _refine(self) -> None:
        """Between the highest price of a bit that holds and the next one that does not, by halves of their ratio; twice
        the price where there is none that does not."""
        for _ in range(HALVINGS):
            judged = [(price_of(c.plan.recipe), c) for c in self.candidates if c.selection is not None]
            rungs = sorted(((price, c) for price, c in judged if price is not None), key=lambda each: each[0])
            holding = [each for each in rungs if each[1].outcome == "kept"]
            beyond = [price for price, _ in rungs if holding and price > holding[-1][0]]
            if not holding:
                return
            price, base = holding[-1]
            other = math.sqrt(price * beyond[0]) if beyond else 2 * price
            recipe = repriced(base.plan.recipe, other)
            self._try(self._add(self.setting.plan_of(recipe), base=base.base))

    def _narrow(self) -> None:
        """Take channels out of the best so far, ever more of them, as long as it holds. At half its price of a bit, as
        what is left has less to spare; at its price where bytes alone count."""
        best = self._best_to_lighten()
        if best is None:
            return
        price = price_of(best.plan.recipe)
        whole = best.plan.recipe
        if price is not None and self.setting.search.objective != "size":
            whole = repriced(whole, price / 2)
        self._while_it_holds([narrowed(whole, share) for share in MACS_SHARES], best)

    def _shrink(self) -> None:
        """Let the best so far see its input smaller, where the project allows it, as long as it holds."""
        best = self._best_to_lighten()
        if best is None or self.setting.search.objective == "size":
            return  # the weights are as many as they were
        shares = sorted(self.setting.search.resolutions, reverse=True)
        self._while_it_holds([smaller_input(best.plan.recipe, share) for share in shares], best)

    def _best_to_lighten(self) -> Candidate | None:
        """The best that holds, of those that the search goes on from."""
        return next((c for c in self._holding() if _is_refined(c)), None)

    def _while_it_holds(self, recipes: Sequence[Recipe], base: Candidate) -> None:
        """Try one after the other, each bolder than the one before it."""
        for recipe in recipes:
            candidate = self._add(self.setting.plan_of(recipe), base=base.base)
            self._try(candidate)
            if candidate.outcome != "kept":
                return

    def _mix(self) -> None:
        """Where static int8 does not hold: leave the layers that cost most in float, ever more, until it does.

        A mixed candidate costs no less than the one that it comes from, so where that is beaten, all of them are.
        """
        judge = self.setting.judge
        gate = judge.opened.project.gate
        is_hopeless = not (gate.accept_unresolved or judge.can_prove(self.setting.gate_samples))
        if any(c.is_static for c in self._holding()) or is_hopeless or self._spent():
            return
        # saturation is the target's, and probes run here
        tried = [c for c in self.candidates if c.is_static and c.selection and not c.plan.recipe.emulate_saturation]
        base = min(tried, key=lambda c: (-c.chance, c.foreseen_worst), default=None)
        if base is None or self._beaten_by(base) is not None:
            return
        assert base.record is not None
        made = Made(plan=base.plan, record=base.record)
        self.sensitivity = measure_sensitivity(made, judge.opened, judge.bench, more_time=self._has_time)
        for count in FLOAT_LAYERS:
            if 2 * count > len(self.sensitivity):
                return
            candidate = self._add(self.setting.plan_of(self._mixed(base, count)), base=base.base)
            self._try(candidate)
            if candidate.outcome in ("kept", "not tried"):
                return

    def _mixed(self, base: Candidate, count: int) -> Recipe:
        recipe = base.plan.recipe
        left: list[Json] = [*sorted(each.node for each in self.sensitivity[:count])]
        passes = recipe.with_params("quantise-static", {"float_nodes": left})
        bits: dict[str, Json] = {"bits_by_node": {str(name): None for name in left}}
        passes = replace(recipe, passes=passes).with_params("gptq", bits)
        why = f"{recipe.why}; the {count} most sensitive layers in float"
        return replace(recipe, name=f"{recipe.name}-mixed-{count}", why=why, passes=passes)

    def _choose(self) -> Candidate:
        """The best of those that hold; where none does, the one that comes nearest, for the gate to say so."""
        objective, times = self.setting.search.objective, self.setting.judge.arena.times
        holding = self._holding()
        if not holding:
            return self._nearest()
        chosen = self._fastest() if times else holding[0]
        others = [c for c in self._holding() if c is not chosen]
        for other in others:
            other.reason = f"holds, but {chosen.name} is better by the objective ({objective})"
        chosen.outcome = "chosen"
        chosen.reason = f"the best of {1 + len(others)} that hold, by the objective ({objective})"
        return chosen

    def _nearest(self) -> Candidate:
        judged = [c for c in self.candidates if c.selection is not None]
        if not judged:
            raise self._nothing_made()
        nearest = min(judged, key=lambda c: (-c.chance, c.foreseen_worst, self._rank(c)))
        if self.setting.judge.arena.times:  # the gate may pass it after all, and then it must not be slow either
            self._time(nearest)
            if not self._is_fit(nearest):
                raise self._none_is_fast()
        nearest.outcome, nearest.reason = "chosen", f"none holds; this one comes nearest ({nearest.reason})"
        return nearest

    def _nothing_made(self) -> EdgepackError:
        """The reason where all share one, else all of them."""
        reasons = list(dict.fromkeys(c.reason for c in self.candidates if c.outcome != "not tried"))
        text = reasons[0] if len(reasons) == 1 else "; ".join(f"{c.name}: {c.reason}" for c in self.candidates)
        if any(c.outcome == "failed" for c in self.candidates):
            return DefectError(text)
        if self.setting.budget_mib is not None and any(c.bytes is not None for c in self.candidates):
            return GateMissedError(f"the model does not fit its budget: {text}: nothing was packed")
        return UnsupportedError(text)

    def _fastest(self) -> Candidate:
        """The best of those that hold and are proved to be as fast as fp32; bytes alone need no such proof.

        Where none of them is, what was not tried for their sake is tried, unless it computes as one that was timed
        does. Raises where none of that is fast either.
        """
        while holding := self._holding():
            fit = self._time_some(holding)
            if fit:
                return min(fit, key=self._rank)
            timed = {c.arithmetic: c for c in self.candidates if c.speed is not None}
            for candidate in [c for c in self.candidates if c.outcome == "not tried"]:
                alike = timed.get(candidate.arithmetic)
                if alike is None:
                    self._try(candidate)
                else:
                    candidate.reason = f"computes as {alike.name} does, which is not as fast as fp32"
        raise self._none_is_fast()

    def _time_some(self, holding: Sequence[Candidate]) -> list[Candidate]:
        """Time the cheapest, and where none of them is fit the others, until one is; gives those that are."""
        first = TIMED if self.setting.search.objective != "size" else 1
        fit: list[Candidate] = []
        for place, candidate in enumerate(holding):
            if place >= first and fit:
                break
            self._time(candidate)
            if self._is_fit(candidate):
                fit.append(candidate)
            else:
                candidate.outcome, candidate.reason = "dropped", candidate.slowness
        return fit

    def _is_fit(self, candidate: Candidate) -> bool:
        return self.setting.search.objective == "size" or (candidate.speed is not None and candidate.speed.never_slower)

    def _time(self, candidate: Candidate) -> None:
        setting, judge = self.setting, self.setting.judge
        assert candidate.record is not None
        made = Made(plan=candidate.plan, record=candidate.record)
        candidate.speed = judge.speed(setting.baseline, made)

    def _none_is_fast(self) -> GateMissedError | GateUnresolvedError:
        timed = [(c, c.speed) for c in self.candidates if c.speed is not None]
        lines = "; ".join(f"{c.name} is {c.slowness}" for c, _ in timed)
        where = self.setting.judge.arena.where
        if all(speed.verdict == "slower" for _, speed in timed):
            return GateMissedError(f"slower than fp32 on {where}, so nothing ships: {lines}; --objective size ships it")
        return GateUnresolvedError(
            f"not one candidate is proved to be as fast as fp32 on {where}: {lines}; build again on a quieter machine, "
            "or with --device none, which leaves the speed unmeasured"
        )


def _is_refined(candidate: Candidate) -> bool:
    """Whether the search goes on from it: static int8 of edgepack's own, in whatever runtime."""
    return candidate.is_static or price_of(candidate.plan.recipe) is not None
