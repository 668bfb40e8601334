"""What came of fitting a fused score: its weights, everything that was tried, and what each task lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from mtcl_torchrec.config import FusionConfig
from mtcl_torchrec.evaluation.worth import Verdict
from mtcl_torchrec.fusing.combiners import Combiner, Setting, Weights
from mtcl_torchrec.fusing.held_out import HeldOut
from mtcl_torchrec.fusing.pareto import draw_front
from mtcl_torchrec.fusing.targets import Target, ranking_auc


@dataclass
class Tried:
    """One way to rank, judged on folds that it was not fitted on.

    Args:
        combiner: its name; empty for a ranking that is no combiner, such as popularity.
        method: how it came to its weights.
        mean: the target on the folds left out: over their requests, or where it is no mean over requests, over folds.
        std: its standard deviation over folds.
        error: standard error of the target over users or requests; NaN where the target is no mean over requests.
        half: half of its 95 % interval; NaN where it has none, as of too few events.
        scores: (N,) of each row while its fold was left out.
        of_fold: (folds,) the target on each.
        setting: fitted on all rows; None of what has nothing to fit.
        weights_std: the weights' standard deviation over folds, at the same absolute sum.
        kept: constraint -> what it came to on all rows.
        broken: constraints not kept to.
        against: the best single head.
        better, better_error, better_half: by how much this is better than that head, request by request (where the
            target is no mean over requests, fold by fold), the standard error, and half of the interval.
    """

    combiner: str
    method: str
    mean: float
    std: float
    error: float
    half: float
    scores: np.ndarray = field(repr=False)
    of_fold: np.ndarray = field(repr=False)
    setting: Setting | None = field(default=None, repr=False)
    weights_std: Weights = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    against: str = ""
    better: float = float("nan")
    better_error: float = float("nan")
    better_half: float = float("nan")

    @property
    def weights(self) -> Weights:
        """Task -> weight, fitted on all rows."""
        return {} if self.setting is None else self.setting.weights

    @property
    def name(self) -> str:
        """For tables."""
        if self.method.startswith("head ") or not self.combiner:
            return self.method
        return f"{self.combiner}, {self.method}"


@dataclass
class FittedFusion:
    """A fused score fitted on held-out predictions.

    Args:
        combiner: the kind chosen, with its knobs where they were found best.
        method: how it came to its weights.
        weights: task -> weight, fitted on all rows.
        weights_std: their standard deviation over folds, at the same absolute sum.
        fused_score: ready to be put into a model: ``model.output.fused_score = fitted.fused_score``.
        target: what was fitted for.
        tried: everything that was tried.
        influence: task -> its share of the ranking; None where that cannot be told.
        values: task -> what its event is worth.
        seed, folds: as they were given.
        about: what it was fitted on and how.
        front: what each task loses, one row for each ranking drawn; see `pareto_front`.
        left_for_values: what was better on the folds left out, but not by more than chance, so that the values stay the
            weights: its name, its lead, half of the 95 % interval of that; None where nothing was.
        pays: the fused score on the folds left out against the best single head and popularity.
        pays_in_target: the same in what was fitted for, where `pays` is of the realised value instead.
    """

    combiner: Combiner
    method: str
    weights: Weights
    weights_std: Weights
    fused_score: nn.Module
    target: Target
    tried: list[Tried]
    influence: Weights | None
    values: dict[str, float]
    seed: int
    folds: int
    about: dict[str, Any]
    front: pd.DataFrame | None = None
    left_for_values: tuple[str, float, float] | None = None
    pays: Verdict | None = None
    pays_in_target: Verdict | None = None

    @property
    def chosen(self) -> Tried:
        """The line of `tried` that was chosen."""
        return next(t for t in self.tried if t.combiner == self.combiner.name and t.method == self.method)

    @property
    def config(self) -> FusionConfig | None:
        """How a run's YAML says it, but for what it has learnt; None of a combiner that cannot be saved."""
        return None if self.combiner.config is None else self.combiner.config(self.weights)

    @property
    def options(self) -> dict[str, Any]:
        """What it has besides weights: thresholds, exponents, chains and the like."""
        declared = {} if self.config is None else self.config.model_dump(exclude_unset=True, exclude_none=True)
        return {name: value for name, value in declared.items() if name not in ("kind", "weights")}

    def table(self) -> pd.DataFrame:
        """Everything that was tried, best first: the target on folds left out, and how much better than the best head.

        Columns: name, target, std (over folds), error, half (of the 95 % interval), better, better_error, better_half,
        broken (constraints not kept to).
        """
        rows = [
            {
                "name": t.name, "target": t.mean, "std": t.std, "error": t.error, "half": t.half,
                "better": t.better, "better_error": t.better_error, "better_half": t.better_half,
                "broken": "; ".join(t.broken),
            }
            for t in self.tried
        ]  # fmt: skip
        return pd.DataFrame(rows).sort_values("target", ascending=False, kind="stable").reset_index(drop=True)

    def compare(self, held_out: HeldOut) -> pd.DataFrame:
        """The fused score beside each task's own head and the other rankings, on rows that nothing was fitted on.

        Returns:
            One line each, the fused score first: name, target, error, half (of its 95 % interval), and how much better
            than this line the fused score is, request by request: better, better_error, better_half.
        """
        return compare(held_out, self.fused_score, self.target, list(self.weights), self.values)

    def task_losses(self, held_out: HeldOut) -> pd.DataFrame:
        """AUC of each task's own head and of the fused score, for the same labels: over all rows, within requests."""
        scores = held_out.scores(self.fused_score)
        lines = []
        for task in self.weights:
            if task not in held_out.labels:
                continue
            line: dict[str, Any] = {"task": task}
            for kind in ("auc", "gauc"):
                line[f"{kind} own"] = ranking_auc(held_out, held_out.parts[task], task, kind)
                line[f"{kind} fused"] = ranking_auc(held_out, scores, task, kind)
            lines.append(line)
        return pd.DataFrame(lines)

    def report(self) -> dict[str, Any]:
        """All of it as JSON; what is not defined is null."""
        return _plain(
            {
                "combiner": self.combiner.name, "method": self.method, "target": self.target.name,
                **self.about, "influence_asked": self.about.get("influence"),
                "weights": self.weights, "weights_std": self.weights_std, "influence": self.influence,
                "options": self.options, "values": self.values, "seed": self.seed, "folds": self.folds,
                "tried": self.table().to_dict("records"),
                "constraints_kept": self.chosen.kept,
                "pays": None if self.pays is None else self.pays.to_json(),
                "pays_in_target": None if self.pays_in_target is None else self.pays_in_target.to_json(),
                "front": None if self.front is None else self.front.to_dict("records"),
            }
        )  # fmt: skip

    def plot(self, path: str | Path) -> None:
        """Draw the Pareto front as a PNG.

        Raises:
            ConfigError: it was not computed, or matplotlib is not installed.
        """
        draw_front(self, path)


def compare(
    held_out: HeldOut, fused_score: nn.Module, target: Target, tasks: list[str], values: Mapping[str, float]
) -> pd.DataFrame:
    """A fused score beside each task's own head and the other rankings; see `FittedFusion.compare`.

    Args:
        tasks: whose heads it is compared with.
        values: task -> what its event is worth; the head of what costs something ranks the other way round.
    """
    scores = held_out.scores(fused_score)
    heads = {f"head {t}": (-1.0 if values.get(t, 0.0) < 0 else 1.0) * held_out.parts[t] for t in tasks}
    lines = []
    sure, sure_of_lead = (target.support(held_out, paired=paired).quantile for paired in (False, True))
    for name, other in {"fused": scores, **heads, **held_out.rankings}.items():
        mean, error = target.with_error(held_out, other)
        better, better_error = target.difference(held_out, scores, other)
        lines.append(
            {"name": name, "target": mean, "error": error, "half": sure * error, "better": better,
             "better_error": better_error, "better_half": sure_of_lead * better_error}
        )  # fmt: skip
    return pd.DataFrame(lines)


def _plain(value: Any) -> Any:
    """For JSON."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
