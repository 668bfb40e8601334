"""The choice of a run's settings on its validation split: `mtcl tune`."""

from mtcl_torchrec.training.tuning.objective import Objective
from mtcl_torchrec.training.tuning.outcome import TuningResult, print_tuning
from mtcl_torchrec.training.tuning.run import tune_run
from mtcl_torchrec.training.tuning.space import Space, default_space, read_space

__all__ = ["Objective", "Space", "TuningResult", "default_space", "print_tuning", "read_space", "tune_run"]
