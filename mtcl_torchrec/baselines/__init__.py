"""What a run is compared with: popularity, collaborative filtering, linear models, trees, and its own network taken
apart; all of them tuned on the validation split with the same budget."""

from mtcl_torchrec.baselines.kinds import BASELINES, Baseline
from mtcl_torchrec.baselines.run import run_baselines
from mtcl_torchrec.baselines.search import Budget
from mtcl_torchrec.baselines.store import read_entries
from mtcl_torchrec.baselines.table import print_baselines

__all__ = ["BASELINES", "Baseline", "Budget", "print_baselines", "read_entries", "run_baselines"]
