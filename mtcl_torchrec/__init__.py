"""Multi-task collaborative learning for recommenders, as a plugin to TorchRec."""

from typing import TYPE_CHECKING

from mtcl_torchrec.lazy import lazily

if TYPE_CHECKING:
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

# Where each name lives: it is imported from there when it is first used, since torch and TorchRec take seconds to load.
_HOMES = {
    "mtcl_torchrec.data.batch": ("MTBatch",),
    "mtcl_torchrec.models": ("MTCL", "MTCLTrain"),
    "mtcl_torchrec.modules.balance.surgery": ("GradientSurgery",),
    "mtcl_torchrec.modules.balance.weighting": (
        "DWA",
        "FAMO",
        "IMTLL",
        "GeometricMean",
        "SmoothTchebycheff",
        "UncertaintyWeighting",
    ),
    "mtcl_torchrec.modules.embeddings": ("with_own_tables",),
    "mtcl_torchrec.modules.fusion": (
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
    ),
    "mtcl_torchrec.modules.gates": ("EPNet", "PPNet"),
    "mtcl_torchrec.modules.trunks": ("PLE", "STEM", "AdaTT", "HoME", "MMoE", "SharedBottom", "SingleTask"),
    "mtcl_torchrec.schema": ("Chain", "ConfigError", "DataError", "Feature", "Schema", "Task"),
}

__getattr__, __dir__ = lazily(__name__, _HOMES)
