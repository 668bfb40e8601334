"""From the tasks' predictions to one score in [0, 1].

A fused score of your own is any `nn.Module` with ``forward(parts)``, parts a dict of task name -> (B,) in [0, 1], that
returns (B,) in [0, 1], and an attribute ``tasks``, the names it needs.  With the attribute ``needs_context = True`` it
is called as ``forward(parts, context)``, see `RowContext`; with ``within_request = True`` it is given whole requests,
see `FusedScore`, which also says what else it may declare.
"""

from mtcl_torchrec.modules.fusion.contract import FusedScore, RowContext, contributions, fuse
from mtcl_torchrec.modules.fusion.ensemble import DeepEnsemble
from mtcl_torchrec.modules.fusion.joint import FusedLoss
from mtcl_torchrec.modules.fusion.learned import ContextGatedMean, MonotoneNetwork, Stacking
from mtcl_torchrec.modules.fusion.means import PowerProduct, WeightedGeometricMean, WeightedMean
from mtcl_torchrec.modules.fusion.value import DenseNumber, ExpectedValue
from mtcl_torchrec.modules.fusion.votes import Borda, HardVoting, ReciprocalRankFusion, SoftVoting, TopKVoting

__all__ = [
    "Borda",
    "ContextGatedMean",
    "DeepEnsemble",
    "DenseNumber",
    "ExpectedValue",
    "FusedLoss",
    "FusedScore",
    "HardVoting",
    "MonotoneNetwork",
    "PowerProduct",
    "ReciprocalRankFusion",
    "RowContext",
    "SoftVoting",
    "Stacking",
    "TopKVoting",
    "WeightedGeometricMean",
    "WeightedMean",
    "contributions",
    "fuse",
]
