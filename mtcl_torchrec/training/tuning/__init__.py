"""The choice of a run's settings on its validation split: `mtcl tune`."""

from typing import TYPE_CHECKING

from mtcl_torchrec.lazy import lazily

if TYPE_CHECKING:
    from mtcl_torchrec.training.tuning.objective import Objective
    from mtcl_torchrec.training.tuning.outcome import TuningResult, print_tuning
    from mtcl_torchrec.training.tuning.run import tune_run
    from mtcl_torchrec.training.tuning.space import Space, default_space, read_space

__all__ = ["Objective", "Space", "TuningResult", "default_space", "print_tuning", "read_space", "tune_run"]

# The space is looked at without torch.
__getattr__, __dir__ = lazily(
    __name__,
    {
        "mtcl_torchrec.training.tuning.objective": ["Objective"],
        "mtcl_torchrec.training.tuning.outcome": ["TuningResult", "print_tuning"],
        "mtcl_torchrec.training.tuning.run": ["tune_run"],
        "mtcl_torchrec.training.tuning.space": ["Space", "default_space", "read_space"],
    },
)
