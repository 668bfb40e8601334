"""What a run is compared with: popularity, collaborative filtering, linear models, trees, and its own network taken
apart; all of them tuned on the validation split with the same budget.

The names below are imported when they are first used: which baselines there are (`ABOUT`) is told without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mtcl_torchrec.baselines.about import ABOUT

if TYPE_CHECKING:
    from mtcl_torchrec.baselines.kinds import BASELINES, Baseline
    from mtcl_torchrec.baselines.run import run_baselines
    from mtcl_torchrec.baselines.search import Budget
    from mtcl_torchrec.baselines.store import read_entries
    from mtcl_torchrec.baselines.table import print_baselines

__all__ = ["ABOUT", "BASELINES", "Baseline", "Budget", "print_baselines", "read_entries", "run_baselines"]
_WHENCE = {
    "BASELINES": "kinds", "Baseline": "kinds", "Budget": "search", "print_baselines": "table",
    "read_entries": "store", "run_baselines": "run",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _WHENCE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHENCE[name]}"), name)
