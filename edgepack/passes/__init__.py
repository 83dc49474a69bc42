"""The compression passes, by name; a new one is one module and one line here."""

from __future__ import annotations

from edgepack.passes.canonicalise import Canonicalise
from edgepack.passes.contract import Pass
from edgepack.passes.keep import Keep
from edgepack.passes.openvino import ConvertOpenvino, QuantiseNncf
from edgepack.passes.quantise_static import QuantiseStatic

PASSES: dict[str, Pass] = {
    each.name: each for each in (Canonicalise(), Keep(), QuantiseStatic(), ConvertOpenvino(), QuantiseNncf())
}
