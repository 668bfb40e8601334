"""What a run is compared with: popularity, collaborative filtering, linear models, trees, and its own network taken
apart; tuned on the validation split with the same budget each, but for the network, whose trials are trainings and are
counted apart."""

from typing import TYPE_CHECKING

from mtcl_torchrec.lazy import lazily

if TYPE_CHECKING:
    from mtcl_torchrec.baselines.entries import read_entries
    from mtcl_torchrec.baselines.kinds import BASELINES, Baseline
    from mtcl_torchrec.baselines.run import run_baselines
    from mtcl_torchrec.baselines.search import Budget
    from mtcl_torchrec.baselines.table import print_baselines

__all__ = ["BASELINES", "Baseline", "Budget", "print_baselines", "read_entries", "run_baselines"]

# What there is, and what is done already, is listed without torch.
__getattr__, __dir__ = lazily(
    __name__,
    {
        "mtcl_torchrec.baselines.entries": ["read_entries"],
        "mtcl_torchrec.baselines.kinds": ["BASELINES", "Baseline"],
        "mtcl_torchrec.baselines.run": ["run_baselines"],
        "mtcl_torchrec.baselines.search": ["Budget"],
        "mtcl_torchrec.baselines.table": ["print_baselines"],
    },
)
