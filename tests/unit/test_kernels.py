"""What runs in another precision than planned, on execution graphs made by hand and on a real one."""

from __future__ import annotations

from edgepack.judge.kernels import downgrades, evidence
from edgepack.protocol import Kernel, Kernels, Loaded, Product

LOADED = Loaded(source="model", note=None, driver=None)


def graph(*nodes: tuple[str, str, str, tuple[str, ...]], quantised: tuple[str, ...]) -> Kernels:
    return Kernels(
        nodes=tuple(
            Kernel(name=n, type="Convolution", precision=p, kernel=k, layers=layers) for n, p, k, layers in nodes
        ),
        quantised=tuple(Product(name=name, type="Convolution") for name in quantised),
        loaded=LOADED,
    )


def test_a_product_in_an_integer_kernel_is_as_planned_also_below_the_name_of_its_dequantisation() -> None:
    found = graph(
        ("a", "u8", "brgconv_avx512_I8", ("a", "a/relu")),
        ("b", "i8", "brgemm_avx512_I8", ("b/DequantizationMultiply", "y")),
        quantised=("a", "b"),
    )
    assert downgrades(found) == ()
    assert evidence(found)["downgraded"] == []


def test_a_planned_int8_product_in_a_float_kernel_is_named_with_what_it_runs_in() -> None:
    found = graph(
        ("a", "u8", "brgconv_avx512_I8", ("a",)),
        ("b", "f32", "brgconv_avx512_f32", ("b", "b/relu")),
        ("c", "u8", "jit_gemm_f32", ("c",)),
        quantised=("a", "b", "c", "gone"),
    )
    assert [str(each) for each in downgrades(found)] == [
        "Convolution b: planned in int8, runs in f32 (brgconv_avx512_f32)",
        "Convolution c: planned in int8, runs in u8 (jit_gemm_f32)",
        "Convolution gone: planned in int8, not named in the execution graph",
    ]


def test_a_name_that_only_begins_alike_is_another_layer() -> None:
    assert len(downgrades(graph(("ab", "u8", "x_I8", ("ab",)), quantised=("a",)))) == 1


def test_the_evidence_counts_kernels() -> None:
    found = graph(("a", "u8", "k_I8", ("a",)), ("b", "u8", "k_I8", ("b",)), quantised=("a", "b"))
    assert evidence(found) == {"kernels": {"Convolution u8 k_I8": 2}, "planned_int8": 2, "downgraded": []}
