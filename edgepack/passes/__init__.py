"""The compression passes, by name; a new one is one module and one line here."""

from __future__ import annotations

from edgepack.passes.canonicalise import Canonicalise
from edgepack.passes.cluster_weights import ClusterWeights
from edgepack.passes.code import Code
from edgepack.passes.compact import Compact
from edgepack.passes.contract import Pass
from edgepack.passes.equalise import Equalise
from edgepack.passes.gptq import Gptq
from edgepack.passes.half import Half
from edgepack.passes.keep import Keep
from edgepack.passes.litert import ConvertLitert, QuantiseLitert
from edgepack.passes.low_rank import LowRank
from edgepack.passes.observe import Observe
from edgepack.passes.openvino import CompileNpu, ConvertOpenvino, QuantiseNncf
from edgepack.passes.prune_channels import PruneChannels
from edgepack.passes.prune_weights import PruneWeights
from edgepack.passes.quantise_dynamic import QuantiseDynamic
from edgepack.passes.quantise_static import QuantiseStatic
from edgepack.passes.resolution import Resolution
from edgepack.passes.smooth import Smooth
from edgepack.passes.weight_only import WeightOnly, WeightOnlyInt4

PASSES: dict[str, Pass] = {
    each.name: each
    for each in (
        Canonicalise(),
        Keep(),
        Resolution(),
        PruneChannels(),
        LowRank(),
        PruneWeights(),
        ClusterWeights(),
        Equalise(),
        Smooth(),
        Gptq(),
        Observe(),
        QuantiseStatic(),
        QuantiseDynamic(),
        WeightOnly(),
        WeightOnlyInt4(),
        Half(),
        Compact(),
        Code(),
        ConvertOpenvino(),
        QuantiseNncf(),
        CompileNpu(),
        ConvertLitert(),
        QuantiseLitert(),
    )
}
