"""What a processor's instructions mean for numbers: the numerics of a descriptor, from /proc/cpuinfo's flags."""

from __future__ import annotations

from edgepack.spec.target import Dtype, Numerics

TOLD_APART = {
    "x86_64": (
        *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx_vnni"),
        *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    ),
    "aarch64": ("fp", "asimd", "fphp", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
    "armv7l": ("neon", "vfpv4"),
}
"""The instructions that runtimes pick kernels by. A descriptor asks for those of them that the machine has, and not
for the hundred others, which would turn the next machine of the same kind away."""
VNNI = frozenset({"avx512_vnni", "avx_vnni"})
"""vpdpbusd sums u8 x s8 in 32 bits; without it vpmaddubsw sums pairs in 16 bits with saturation."""
HALF = {"x86_64": {"avx512_fp16"}, "aarch64": {"asimdhp"}, "armv7l": set[str]()}
BRAIN = {"x86_64": {"avx512_bf16", "amx_bf16"}, "aarch64": {"bf16"}, "armv7l": set[str]()}


def required_flags(machine: str, flags: frozenset[str]) -> tuple[str, ...]:
    """Those of `flags` that a bundle built for this very machine may rely on."""
    return tuple(flag for flag in TOLD_APART.get(machine, ()) if flag in flags)


def numerics_of(machine: str, flags: frozenset[str]) -> Numerics:
    """How numbers behave on such a processor."""
    is_x86 = machine == "x86_64"
    saturates = is_x86 and not flags & VNNI
    dtypes: list[Dtype] = ["float32"]
    dtypes += ["float16"] if flags & HALF.get(machine, set()) else []
    dtypes += ["bfloat16"] if flags & BRAIN.get(machine, set()) else []
    dtypes += ["int8", "uint8"] if is_x86 else ["int8"]
    return Numerics(
        activation_dtype="uint8" if is_x86 else "int8",
        weight_bits=7 if saturates else 8,
        saturates=saturates,
        shapes="static" if machine == "armv7l" else "dynamic",  # tflite-runtime's own
        dtypes=tuple(dtypes),
    )
