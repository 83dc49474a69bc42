"""Which operators a runtime computes in another precision than the model means them to be computed in.

Read from the runtime's own execution graph, never inferred from speed. (ONEDNN_VERBOSE is no way to do it: with it
set, OpenVINO's CPU plugin failed to run primitives.)
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from edgepack.protocol import Kernel, Kernels
from edgepack.store import Json

INTEGER = ("i8", "u8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Downgrade:
    """A product that is quantised in the model and is not computed in integers."""

    name: str
    type: str
    ran_in: str | None
    """"f32"; None where the execution graph does not name the operator."""
    kernel: str | None

    def __str__(self) -> str:
        if self.ran_in is None:
            return f"{self.type} {self.name}: planned in int8, not named in the execution graph"
        return f"{self.type} {self.name}: planned in int8, runs in {self.ran_in} ({self.kernel})"


def downgrades(kernels: Kernels) -> tuple[Downgrade, ...]:
    """The planned int8 products that run otherwise, in the model's order; empty where all run in integers."""
    found = []
    for product in kernels.quantised:
        node = next((each for each in kernels.nodes if _stands_for(each, product.name)), None)
        if node is None or not _in_integers(node):
            found.append(
                Downgrade(
                    name=product.name,
                    type=product.type,
                    ran_in=node.precision if node else None,
                    kernel=node.kernel if node else None,
                )
            )
    return tuple(found)


def evidence(kernels: Kernels) -> dict[str, Json]:
    """For a manifest: how many nodes run in which kernel, and every downgrade."""
    counts = Counter(f"{node.type} {node.precision} {node.kernel}" for node in kernels.nodes)
    return {
        "kernels": dict(sorted(counts.items())),
        "planned_int8": len(kernels.quantised),
        "downgraded": [str(each) for each in downgrades(kernels)],
    }


def _stands_for(node: Kernel, layer: str) -> bool:
    """A MatMul comes back as the multiplication that dequantises it: `NAME/DequantizationMultiply`."""
    return any(each == layer or each.startswith(f"{layer}/Dequantization") for each in node.layers)


def _in_integers(node: Kernel) -> bool:
    return node.precision in INTEGER and node.kernel.endswith("I8")
