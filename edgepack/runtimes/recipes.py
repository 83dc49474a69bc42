"""What each runtime takes: the recipes that lead to it, the options it runs with, and how it is judged here.

A recipe is a list of passes with what they do differently from their own defaults. `proposals` gives those that a
search may try on a target, the plain one first; which is best there, the search finds out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from edgepack.errors import UnsupportedError
from edgepack.runtimes.npu_compiler import WITHOUT
from edgepack.spec.project import Objective
from edgepack.spec.target import Dtype, Target
from edgepack.store import Json

Precision = Literal[
    "int8", "int8-dynamic", "int8-weights", "int4-weights", "fp16-weights", "bf16", "fp16", "fp32", "as-is"
]
"""What a model computes in; `-weights`: stored so, float32 arithmetic; `as-is`: what the model that was given has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """One pass in a recipe."""

    name: str
    params: Mapping[str, Json] = field(default_factory=dict)
    """Instead of what the pass takes from project and target."""
    optional: bool = False
    """Left out where the model has nothing for it."""

    def to_json(self) -> dict[str, Json]:
        return {"pass": self.name, "params": {**self.params}, "optional": self.optional}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a model becomes one that a runtime runs on a target."""

    name: str
    """Of the candidate: `int8`, `int8-w4`, `half`."""
    why: str
    runtime: str
    precision: Precision
    passes: tuple[Use, ...]
    model_format: Literal["onnx", "openvino-ir", "tflite"]
    device_options: dict[str, Json]
    """Runtime options on the device; nothing is left to a default that a version may change."""
    judge_options: dict[str, Json]
    """Runtime options here, for the judge."""
    judged_on: str
    note: str | None = None
    """What the reader of a verdict must know."""
    emulate_saturation: bool = False
    """Judged by judge/saturation.py: sums of 8-bit products can pass 16 bits on the target, and may not do so here."""

    def with_params(self, pass_name: str, params: Mapping[str, Json]) -> tuple[Use, ...]:
        """The passes, with more params for one of them."""
        return tuple(
            replace(use, params={**use.params, **params}) if use.name == pass_name else use for use in self.passes
        )


ONNXRUNTIME_OPTIONS: dict[str, Json] = {"allow_spinning": False, "arena": True}
"""Spinning threads heat a Pi for nothing between inferences; the arena keeps buffers between runs."""

OPENVINO_CPU: dict[str, Json] = {"device": "CPU", "precision": "f32"}
"""Pinned: left alone, OpenVINO computes in bf16 where the processor has it, and says nothing."""

OPENVINO_HALVES: dict[Dtype, tuple[Precision, dict[str, Json]]] = {
    "bfloat16": ("bf16", {"device": "CPU", "precision": "bf16"}),
    "float16": ("fp16", {"device": "CPU", "precision": "f16"}),
}
"""By what a target says that its processor computes in (`numerics.dtypes`): only then, and never in the other's place.

An f16 hint turns into bf16 on a processor with AVX512_BF16 alone; the runner reads the hint back and refuses that.
"""

OPENVINO_NPU: dict[str, Json] = {"device": "NPU", "precision": "f16"}
"""An NPU has no float32 arithmetic: what is not int8 runs in float16 there."""

LITERT_OPTIONS: dict[str, Json] = {"xnnpack": True}
"""Without XNNPACK int8 convolutions take the reference kernels."""

NPU_NOTE = (
    "judged on OpenVINO's CPU plugin in float32 and int8 arithmetic; no NPU has run this bundle, and an NPU computes "
    "what is not int8 in float16"
)

SATURATION_NOTE = "judged by exact emulation of the target's 16-bit saturating sums (vpmaddubsw)"

BIT_PRICES = (0.04, 0.01, 0.0025, 0.0006)
"""Of a bit a weight, as error at the outputs (passes/gptq_sweep.py): each takes about a bit more than the one before.
Between the first that holds and the one before it, a search goes on by halves."""


def rung(price: float) -> str:
    """The name of the recipe whose bits have this price."""
    return f"int8-p{price:.2g}"


RUNGS = tuple(map(rung, BIT_PRICES))

STATIC_ORDER: dict[Objective, tuple[str, ...]] = {
    "latency": ("int8", "int8-percentile", "int8-mse", "int8-gptq", "int8-equalised", "int8-smooth"),
    "balanced": ("int8", *RUNGS, "int8-percentile", "int8-mse", "int8-gptq", "int8-smooth"),
    "size": (*RUNGS, "int8", "int8-percentile", "int8-gptq", "int8-mse", "int8-smooth"),
}
"""Static int8 in the order in which it is tried. Ranges: ADR 13. Equalisation is last, as it proved nothing there."""

ONE_RUNTIME_ORDER: dict[Objective, tuple[str, ...]] = {
    "latency": ("int8", "int8-gptq"),
    "balanced": ("int8", *RUNGS, "int8-gptq"),
    "size": (*RUNGS, "int8", "int8-gptq"),
}
"""Static int8 for targets that run LiteRT or OpenVINO alone; the rest of what each offers comes behind it."""

OTHER_RANGES = ("int8-percentile", "int8-mse")
"""Plain int8 but for the ranges of activations."""

OTHER_ORDER = ("int8-dynamic", "weights-int4", "weights-int8", "half")


BUILT_FOR = ("onnxruntime", "openvino", "litert", "tflite-runtime")


def runtime_of(target: Target) -> str:
    """The first runtime that the target accepts and that this version can build for. Raises UnsupportedError."""
    for runtime in target.runtimes:
        if runtime in BUILT_FOR:
            return runtime
    raise UnsupportedError(
        f"target {target.name}: none of its runtimes can be built for: {', '.join(target.runtimes)}; "
        f"this version knows {', '.join(BUILT_FOR)}"
    )


def baseline_recipe(target: Target, *, npu_compiler: bool = False) -> Recipe:
    """The fp32 model in the runtime that ships: what candidates are compared with. Raises UnsupportedError.

    `npu_compiler`: whether this machine can compile for an NPU; if not, the bundle carries no blob, and says so.
    """
    runtime = runtime_of(target)
    if runtime == "onnxruntime":
        return _onnxruntime("fp32", "the model as it is", "fp32", ())
    plain = (
        _litert(runtime, "fp32", "the model as it is", "fp32", None)
        if runtime in LITERT
        else _openvino(target, "fp32", "the model as it is", "fp32", (), npu_compiler=npu_compiler)
    )
    return replace(plain, passes=tuple(use for use in plain.passes if use != CODE))


def as_is_recipe(target: Target, *, npu_compiler: bool = False) -> Recipe:
    """The model as it was given, for one that is quantised already. Raises UnsupportedError.

    `npu_compiler` as of `baseline_recipe`.
    """
    base = baseline_recipe(target, npu_compiler=npu_compiler)
    passes = (Use(name="keep"), *base.passes[1:], CODE)
    return replace(base, name="as-is", why="the model as it was given", precision="as-is", passes=passes)


def proposals(target: Target, objective: Objective, *, npu_compiler: bool = False) -> tuple[Recipe, ...]:
    """What a search may try, in this order; sensitivity adds mixed precision later. Raises UnsupportedError.

    `npu_compiler` as of `baseline_recipe`.
    """
    runtime = runtime_of(target)
    if runtime in LITERT:
        return _litert_recipes(runtime, objective, target.numerics.weight_bits)
    if runtime == "openvino" and target.accelerator is None:
        return _openvino_alone(target, objective)
    if runtime == "openvino":
        why, nncf = "weights and activations in int8 (NNCF)", (Use(name="quantise-nncf"),)
        return (_openvino(target, "int8", why, "int8", nncf, npu_compiler=npu_compiler),)
    known = _static_recipes(target)
    chosen = [known[name] for name in STATIC_ORDER[objective]]
    if "openvino" in target.runtimes:
        first, *others = _openvino_cpu(target)
        chosen.insert(chosen.index(known["int8"]) + 1, first)
        chosen += others if objective != "size" else []
    if target.numerics.saturates:
        chosen.append(_eight_bits_where_they_may_saturate(known["int8"]))
    return (*chosen, *(_float_recipes()[name] for name in OTHER_ORDER))


def _static_recipes(target: Target) -> dict[str, Recipe]:
    bits = target.numerics.weight_bits
    return {
        **{name: _static(name, why, _gptq(bits, price)) for name, (price, why) in _CHOSEN.items()},
        "int8": _static("int8", "int8, ranges from smallest to largest value"),
        "int8-percentile": _static("int8-percentile", "int8, ranges that cover 99.99 %", ranges="percentile"),
        "int8-mse": _static("int8-mse", "int8, ranges of least squared error", ranges="mse"),
        "int8-equalised": _static("int8-equalised", "int8 after cross-layer equalisation", Use(name="equalise")),
        "int8-smooth": _static("int8-smooth", "int8 after SmoothQuant", Use(name="smooth")),
    }


def _why_priced(price: float) -> str:
    return f"int8, weights chosen for a short code (GPTQ, {price:.2g} a bit)"


_CHOSEN: dict[str, tuple[float | None, str]] = {
    "int8-gptq": (None, "int8, weights chosen by GPTQ, biases corrected"),
    **{rung(price): (price, _why_priced(price)) for price in BIT_PRICES},
}
"""Static int8 whose integers GPTQ chooses, by name: the price of a bit, and why. The higher it is, the fewer bytes."""


def _gptq(bits: int, price: float | None) -> Use:
    return Use(name="gptq", params={"bits": bits} if price is None else {"bits": bits, "bit_price": price})


def price_of(recipe: Recipe) -> float | None:
    """The price of a bit in a recipe that has one."""
    found = next((use.params.get("bit_price") for use in recipe.passes if use.name == "gptq"), None)
    return found if isinstance(found, float) else None


def repriced(recipe: Recipe, price: float) -> Recipe:
    """One that has a price of a bit, at another: for the same runtime."""
    passes = recipe.with_params("gptq", {"bit_price": price})
    old = price_of(recipe)
    assert old is not None
    name, why = recipe.name.replace(rung(old), rung(price)), recipe.why.replace(_why_priced(old), _why_priced(price))
    return replace(recipe, name=name, why=why, passes=passes)


def ranges_of(recipe: Recipe) -> str:
    """How it finds the ranges of activations; empty where it says nothing of its own."""
    return next((str(use.params.get("range", "")) for use in recipe.passes if use.name == "observe"), "")


def with_ranges(recipe: Recipe, ranges: str) -> Recipe:
    """The same weights, with ranges of activations that are found otherwise."""
    passes = recipe.with_params("observe", {"range": ranges})
    return replace(recipe, name=f"{recipe.name}-{ranges}", why=f"{recipe.why}; ranges by {ranges}", passes=passes)


def narrowed(recipe: Recipe, macs_share: float) -> Recipe:
    """The same after taking out channels, until so much of the arithmetic is left."""
    canonical, *others = recipe.passes
    prune = Use(name="prune-channels", params={"macs_share": macs_share})
    why = f"{recipe.why}; channels taken out, {macs_share:.0%} of the arithmetic left"
    return replace(recipe, name=f"{recipe.name}-m{macs_share:.2g}", why=why, passes=(canonical, prune, *others))


def smaller_input(recipe: Recipe, share: float) -> Recipe:
    """The same on an input that is resized, inside the model, to so much of its height and width."""
    canonical, *others = recipe.passes
    why = f"{recipe.why}; input seen at {share:.3g} of its height and width"
    passes = (canonical, Use(name="resolution", params={"share": share}), *others)
    return replace(recipe, name=f"{recipe.name}-r{share:.2g}", why=why, passes=passes)


def _static(name: str, why: str, *before: Use, ranges: str = "min-max") -> Recipe:
    """Static int8; what it leaves in float is stored in int8."""
    rest = Use(name="weight-only", optional=True)
    return _onnxruntime(name, why, "int8", (*before, *_integers(ranges), rest, *TRAVELS))


def _integers(ranges: str = "min-max") -> tuple[Use, ...]:
    return (Use(name="observe", params={"range": ranges}), Use(name="quantise-static"))


def _eight_bits_where_they_may_saturate(plain: Recipe) -> Recipe:
    passes = plain.with_params("quantise-static", {"weight_bits": 8})
    why = "int8 with all 8 bits of weights, whose sums may saturate"
    return replace(plain, name="int8-wide", why=why, passes=passes, note=SATURATION_NOTE, emulate_saturation=True)


CODE = Use(name="code", optional=True)
COMPACT = Use(name="compact")
TRAVELS = (COMPACT, CODE)
"""At the end of every ONNX recipe."""


def _float_recipes() -> dict[str, Recipe]:
    rest = Use(name="weight-only", optional=True)
    return {
        "int8-dynamic": _onnxruntime(
            "int8-dynamic",
            "large products in int8, activations quantised at every run",
            "int8-dynamic",
            (Use(name="quantise-dynamic"), rest, *TRAVELS),
        ),
        "weights-int4": _onnxruntime(
            "weights-int4",
            "weights stored in 4 bits, float arithmetic",
            "int4-weights",
            (Use(name="weight-only-int4"), *TRAVELS),
        ),
        "weights-int8": _onnxruntime(
            "weights-int8",
            "weights stored in 8 bits, float arithmetic",
            "int8-weights",
            (Use(name="weight-only"), *TRAVELS),
        ),
        "half": _onnxruntime(
            "half", "weights stored as float16, float arithmetic", "fp16-weights", (Use(name="half"), *TRAVELS)
        ),
    }


def _onnxruntime(name: str, why: str, precision: Precision, passes: tuple[Use, ...]) -> Recipe:
    return Recipe(
        name=name,
        why=why,
        runtime="onnxruntime",
        precision=precision,
        passes=(Use(name="canonicalise"), *passes),
        model_format="onnx",
        device_options=ONNXRUNTIME_OPTIONS,
        judge_options=ONNXRUNTIME_OPTIONS,
        judged_on="CPU",
    )


def _openvino_alone(target: Target, objective: Objective) -> tuple[Recipe, ...]:
    """With what `_openvino_cpu` has, integers that GPTQ chose: OpenVINO takes them and their scales out of ONNX as they
    are."""
    int8, *others = _openvino_cpu(target)
    bits = target.numerics.weight_bits
    known = {"int8": int8}
    for name, (price, why) in _CHOSEN.items():
        static = (_gptq(bits, price), *_integers(), COMPACT)
        known[name] = _openvino(
            target, f"openvino-{name}", f"{why}; in OpenVINO", "int8", (), npu_compiler=False, before=static
        )
    return (*(known[name] for name in ONE_RUNTIME_ORDER[objective]), *others)


def _openvino_cpu(target: Target) -> tuple[Recipe, ...]:
    """OpenVINO on the processor: int8 first, then what it computes in 16 bits, then float32."""
    nncf = (Use(name="quantise-nncf"),)
    int8 = _openvino(target, "openvino-int8", "int8 in OpenVINO (NNCF)", "int8", nncf, npu_compiler=False)
    fp32 = _openvino(target, "openvino-fp32", "float32 in OpenVINO", "fp32", (), npu_compiler=False)
    halves = [
        replace(
            fp32,
            name=f"openvino-{precision}",
            why=f"{dtype} arithmetic in OpenVINO",
            precision=precision,
            device_options=options,
            judge_options=options,
        )
        for dtype, (precision, options) in OPENVINO_HALVES.items()
        if dtype in target.numerics.dtypes
    ]
    return (int8, *halves, fp32)


def _openvino(
    target: Target,
    name: str,
    why: str,
    precision: Precision,
    passes: tuple[Use, ...],
    *,
    npu_compiler: bool,
    before: tuple[Use, ...] = (),
) -> Recipe:
    """`before` is done to ONNX, `passes` to OpenVINO's own format."""
    npu = target.accelerator is not None and target.accelerator.kind == "npu"
    compiled = (Use(name="compile-npu"),) if npu and npu_compiler else ()
    return Recipe(
        name=name,
        why=why,
        runtime="openvino",
        precision=precision,
        passes=(Use(name="canonicalise"), *before, Use(name="convert-openvino"), *passes, *compiled, CODE),
        model_format="openvino-ir",
        device_options=OPENVINO_NPU if npu else OPENVINO_CPU,
        judge_options=OPENVINO_CPU,
        judged_on="CPU plugin",
        note=None if not npu else NPU_NOTE if npu_compiler else f"{NPU_NOTE}; {WITHOUT}",
    )


LITERT = ("litert", "tflite-runtime")
"""One format and one interpreter, of two ages."""


def _litert_recipes(runtime: str, objective: Objective, bits: int) -> tuple[Recipe, ...]:
    """In the order in which a Cortex-A72 and an A76 gained by them, by instructions: static, mixed, dynamic."""
    static: dict[str, Json] = {"default": "static"}
    mixed: dict[str, Json] = {"default": "static", "operators": {"FULLY_CONNECTED": "dynamic"}}
    known = {"int8": _litert(runtime, "int8", "weights and activations in int8", "int8", static)}
    for name, (price, why) in _CHOSEN.items():
        before = (_gptq(bits, price), Use(name="observe"))
        known[name] = _litert(runtime, name, why, "int8", static, before=before)
    return (
        *(known[name] for name in ONE_RUNTIME_ORDER[objective]),
        _litert(runtime, "int8-mixed", "convolutions in static int8, full connections in dynamic", "int8", mixed),
        _litert(
            runtime,
            "int8-dynamic",
            "int8, activations quantised at every run",
            "int8-dynamic",
            {"default": "dynamic", "operators": {}},
        ),
        _litert(
            runtime,
            "half",
            "weights stored as float16, float arithmetic",
            "fp16-weights",
            {"default": "float16", "operators": {}},
        ),
    )


def _litert(
    runtime: str,
    name: str,
    why: str,
    precision: Precision,
    modes: Mapping[str, Json] | None,
    *,
    before: tuple[Use, ...] = (),
) -> Recipe:
    """`before` is done to ONNX; None for `modes` leaves the model in float."""
    quantise = () if modes is None else (Use(name="quantise-litert", params=modes),)
    return Recipe(
        name=name,
        why=why,
        runtime=runtime,
        precision=precision,
        passes=(Use(name="canonicalise"), *before, Use(name="convert-litert"), *quantise, CODE),
        model_format="tflite",
        device_options=LITERT_OPTIONS,
        judge_options=LITERT_OPTIONS,
        judged_on="CPU",
    )
