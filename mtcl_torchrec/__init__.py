"""Multi-task collaborative learning for recommenders, as a plugin to TorchRec."""

try:
    import fbgemm_gpu  # noqa: F401
    import torchrec  # noqa: F401
except ImportError as error:
    raise ImportError(
        "mtcl_torchrec is a plugin to TorchRec and needs torch, torchrec and FBGEMM builds that match each other "
        "(torch 2.13 with torchrec 1.8 and FBGEMM 1.8; torch 2.11 with 1.6).  "
        f"On this machine they do not import: {error}"
    ) from error

from mtcl_torchrec.data.batch import MTBatch
from mtcl_torchrec.models import MTCL, MTCLTrain
from mtcl_torchrec.modules.balance.surgery import GradientSurgery
from mtcl_torchrec.modules.balance.weighting import (
    DWA,
    FAMO,
    IMTLL,
    GeometricMean,
    SmoothTchebycheff,
    UncertaintyWeighting,
)
from mtcl_torchrec.modules.embeddings import with_own_tables
from mtcl_torchrec.modules.fusion import (
    Borda,
    ContextGatedMean,
    DeepEnsemble,
    DenseNumber,
    ExpectedValue,
    FusedLoss,
    FusedScore,
    HardVoting,
    MonotoneNetwork,
    PowerProduct,
    ReciprocalRankFusion,
    RowContext,
    SoftVoting,
    Stacking,
    TopKVoting,
    WeightedGeometricMean,
    WeightedMean,
)
from mtcl_torchrec.modules.gates import EPNet, PPNet
from mtcl_torchrec.modules.trunks import PLE, STEM, AdaTT, HoME, MMoE, SharedBottom, SingleTask
from mtcl_torchrec.schema import Chain, ConfigError, DataError, Feature, Schema, Task

__version__ = "0.1.0"

__all__ = [
    "DWA",
    "FAMO",
    "IMTLL",
    "MTCL",
    "PLE",
    "STEM",
    "AdaTT",
    "Borda",
    "Chain",
    "ConfigError",
    "ContextGatedMean",
    "DataError",
    "DeepEnsemble",
    "DenseNumber",
    "EPNet",
    "ExpectedValue",
    "Feature",
    "FusedLoss",
    "FusedScore",
    "GeometricMean",
    "GradientSurgery",
    "HardVoting",
    "HoME",
    "MMoE",
    "MTBatch",
    "MTCLTrain",
    "MonotoneNetwork",
    "PPNet",
    "PowerProduct",
    "ReciprocalRankFusion",
    "RowContext",
    "Schema",
    "SharedBottom",
    "SingleTask",
    "SmoothTchebycheff",
    "SoftVoting",
    "Stacking",
    "Task",
    "TopKVoting",
    "UncertaintyWeighting",
    "WeightedGeometricMean",
    "WeightedMean",
    "with_own_tables",
]
