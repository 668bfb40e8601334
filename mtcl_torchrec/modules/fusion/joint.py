"""Joint training: the fused score itself learns what a row was worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn

from mtcl_torchrec.modules.fusion.contract import signed_mean
from mtcl_torchrec.modules.fusion.learned import EPSILON, log_odds
from mtcl_torchrec.modules.heads import in_unit_interval
from mtcl_torchrec.modules.rare import RequestPairs
from mtcl_torchrec.schema import ConfigError, Task, nearest

Heads = Literal["detach", "through"]
Kind = Literal["bce", "pairwise"]
Missing = Literal["mask", "zero"]


class FusedLoss(nn.Module):
    """The loss of the fused score s against a reward r in [0, 1], what the row turned out to be worth.

    r is (Σ vᵢ yᵢ + Σ|v⁻|) / Σ|v| of the tasks' labels yᵢ, as `WeightedMean` does it to their predictions (a regression
    label enters as its logistic standardised value), or the batch's own `reward`.  The loss of a row is

    - ``"bce"``: -r log s - (1 - r) log(1 - s), whose minimum is the expected reward;
    - ``"pairwise"``: for two rows of a request, |rₖ - rₗ| softplus(logit s⁻ - logit s⁺) (RankNet, Burges et al., ICML
      2005, each pair weighing what it would gain), which teaches the order alone.  Rows are compared where they meet in
      a batch of one rank.

    The parts that the score is made of here are those before calibration, which is fitted when training is over: a
    score that learns (`mtcl_torchrec.modules.fusion.learned`) is better fitted after it where a run calibrates.

    It is averaged over the rows (pairs) whose reward is known on *all* ranks, and joins the tasks' losses times
    `weight`, beside any loss weighting.  The parameters of the fused score belong into the dense optimizer.

    Under gradient surgery, what the score asks of a task through its head counts with that task's gradient, and is
    weighed with it; a frozen task's part moves nothing shared.

    Args:
        reward: task -> what its event is worth, not all 0; None: the batch's `reward` (B,), NaN where it is not known.
        weight: of this loss beside the tasks' losses.
        heads: ``"detach"`` trains the fused score alone; ``"through"`` the whole model too, tables included.
        loss: see above.
        missing: ``"mask"`` leaves out a row where the label of any rewarded task is missing; ``"zero"`` only where all
            are, and takes a missing label as one of 0 (no click, so no purchase).

    Raises:
        ConfigError: an unknown option, a reward without value, or a weight that is not above 0.

    Example:
        >>> loss = FusedLoss({"click": 1.0, "report": -3.0})
        >>> loss.build([Task.binary("click"), Task.binary("report")], nn.Linear(2, 1))
        >>> labels = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, float("nan")]])
        >>> loss.targets(labels, ~torch.isnan(labels), None)
        (tensor([1.0000, 0.2500, 0.7500]), tensor([ True,  True, False]))
    """

    values: torch.Tensor

    def __init__(
        self,
        reward: Mapping[str, float] | None = None,
        *,
        weight: float = 1.0,
        heads: Heads = "detach",
        loss: Kind = "bce",
        missing: Missing = "mask",
    ) -> None:
        super().__init__()
        for name, value, known in (("heads", heads, Heads), ("loss", loss, Kind), ("missing", missing, Missing)):
            if value not in get_args(known):
                raise ConfigError(f"{name} is one of {', '.join(get_args(known))}, not {value!r}")
        if not 0 < weight < float("inf"):
            raise ConfigError(f"the weight of the fused score's loss is above 0, not {weight}")
        self.reward = None if reward is None else {task: float(value) for task, value in reward.items()}
        if self.reward is not None and not any(self.reward.values()):
            raise ConfigError("a reward needs at least one value that is not 0")
        self.weight, self.heads, self.kind, self.missing = float(weight), heads, loss, missing
        values = torch.tensor(list((self.reward or {}).values()))
        self.register_buffer("values", values, persistent=False)

    @property
    def detached(self) -> bool:
        """Whether the score's gradient ends at the tasks' logits."""
        return self.heads == "detach"

    def build(self, tasks: Sequence[Task], fused_score: nn.Module | None) -> None:
        """See that it can train this fused score; `MTCLTrain` calls this.

        Raises:
            ConfigError: it cannot, or the reward names no task that has one number as its label.
        """
        check_joint_training(fused_score, self.heads)
        known = {task.name: number for number, task in enumerate(tasks)}
        for name in self.reward or ():
            if name not in known:
                raise ConfigError(f"reward: no task {name!r}{nearest(name, known)}")
            if tasks[known[name]].kind == "multiclass":
                raise ConfigError(f"reward: task {name!r} is multiclass, a class is worth nothing by itself")
        self.columns = [known[name] for name in self.reward or ()]
        self.tasks = [tasks[column] for column in self.columns]

    def targets(self, labels: torch.Tensor, present: torch.Tensor, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The rewards (B,) in [0, 1], and where they are known, (B,) bool.

        Args:
            labels: (B, T).
            present: (B, T) bool, False where a label does not count.
            batch: has `reward` (B,), where no tasks are rewarded.

        Raises:
            ValueError: the batch has none.
        """
        if self.reward is None:
            reward = getattr(batch, "reward", None)
            if reward is None:
                raise ValueError("the fused score is trained against the batch's reward, and the batch has none")
            known = ~torch.isnan(reward)
            return torch.where(known, reward.float(), 0.0).clamp(0, 1), known
        present = present[:, self.columns]
        known = present.all(1) if self.missing == "mask" else present.any(1)
        columns = []
        for place, (task, column) in enumerate(zip(self.tasks, self.columns, strict=True)):
            label = torch.where(present[:, place], labels[:, column], 0.0)
            if task.kind == "regression":
                label = torch.where(present[:, place], in_unit_interval(task, label), 0.0)
            columns.append(label)
        return signed_mean(torch.stack(columns, 1), self.values), known

    def forward(
        self, score: torch.Tensor, labels: torch.Tensor, present: torch.Tensor, batch: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's sum of losses, and of the rows' (pairs') weights: () each.

        Args:
            score: (B,) in [0, 1].
            labels, present, batch: as of `targets`.
        """
        score = score.float()
        reward, known = self.targets(labels, present, batch)
        rows = known.float()
        if self.kind == "pairwise":
            return RequestPairs(batch, "the fused score's loss")(log_odds(score), reward, rows)
        inner = 1 - 2 * EPSILON
        likely, unlikely = torch.log(EPSILON + inner * score), torch.log(EPSILON + inner * (1 - score))
        return -(rows * (reward * likely + (1 - reward) * unlikely)).sum(), rows.sum()


def check_joint_training(fused_score: nn.Module | None, heads: Heads) -> None:
    """See that a fused score can be trained.

    Raises:
        ConfigError: it has no gradient, compares the candidates of a request, or has nothing to be trained.

    Example:
        >>> from mtcl_torchrec.modules.fusion import Borda
        >>> check_joint_training(Borda({"click": 1.0}), "through")
        Traceback (most recent call last):
            ...
        mtcl_torchrec.schema.declared.ConfigError: the fused score cannot be trained: Borda has no gradient
    """
    if fused_score is None:
        raise ConfigError("the fused score cannot be trained: the model has none")
    name = type(fused_score).__name__
    if not getattr(fused_score, "differentiable", True):
        raise ConfigError(f"the fused score cannot be trained: {name} has no gradient")
    if getattr(fused_score, "within_request", False):
        raise ConfigError(
            f"the fused score cannot be trained: {name} compares all candidates of a request, and training batches "
            "hold some of them"
        )
    if heads == "detach" and not any(True for _ in fused_score.parameters()):
        raise ConfigError(
            f"the fused score cannot be trained: {name} has no parameters, so that heads: detach leaves nothing to "
            "train; take heads: through"
        )
