"""A run's configuration: data, schema, statistics, model, optimizers, training, balance, fusion."""

from mtcl_torchrec.config.balance import BalanceConfig, LossWeightingConfig, SurgeryConfig
from mtcl_torchrec.config.calibration import CalibrationConfig, CalibratorConfig
from mtcl_torchrec.config.data import DataConfig, HistoryConfig, NextLabelConfig, StatisticsConfig, SyntheticConfig
from mtcl_torchrec.config.evaluation import EvaluationConfig
from mtcl_torchrec.config.fusion import FusedLossConfig, FusionConfig
from mtcl_torchrec.config.model import GateConfig, ModelConfig, TrunkConfig
from mtcl_torchrec.config.run import RunConfig, dump_run, load_run, parse_run
from mtcl_torchrec.config.sequences import SequenceConfig, TowerConfig
from mtcl_torchrec.config.sharding import ShardingConfig, TableShardingConfig
from mtcl_torchrec.config.training import (
    CheckpointConfig,
    DenseOptimizerConfig,
    OptimizersConfig,
    RegularisersConfig,
    TableOptimizerConfig,
    TrainingConfig,
)

__all__ = [
    "BalanceConfig",
    "CalibrationConfig",
    "CalibratorConfig",
    "CheckpointConfig",
    "DataConfig",
    "DenseOptimizerConfig",
    "EvaluationConfig",
    "FusedLossConfig",
    "FusionConfig",
    "GateConfig",
    "HistoryConfig",
    "LossWeightingConfig",
    "ModelConfig",
    "NextLabelConfig",
    "OptimizersConfig",
    "RegularisersConfig",
    "RunConfig",
    "SequenceConfig",
    "ShardingConfig",
    "StatisticsConfig",
    "SurgeryConfig",
    "SyntheticConfig",
    "TableOptimizerConfig",
    "TableShardingConfig",
    "TowerConfig",
    "TrainingConfig",
    "TrunkConfig",
    "dump_run",
    "load_run",
    "parse_run",
]
