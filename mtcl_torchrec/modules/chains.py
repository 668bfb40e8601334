"""Chains of events: one cannot happen without the one before it (view → click → cart → buy).

A task that comes after another (`Task.after`) predicts the probability of its event over the *whole space*, all rows,
whether the parent's event happened or not: in ``out["buy"]``, in metrics, in the fused score.  Where the kind has a
head for it, ``out["buy|click"]`` is the probability *given* the parent's event.  A parent may be a child itself; then
p(parent) is that of its event over the whole space, too.

| kind | head of the child | loss of the child, averaged over the rows whose label is known |
|---|---|---|
| ``esmm`` | q = p(child given parent) | BCE of p = p(parent) · q |
| ``escm2_ips`` | the same | λ_g · that + λ_c · BCE of q where the parent happened, by 1 / p(parent) |
| ``escm2_dr`` | the same, and one that imputes | the same, with the errors of all other rows imputed |
| ``aitm`` | p(child), after `InformationTransfer` | BCE of p + α · max(p(child) - p(parent), 0) |

Sources: ESMM: Ma et al., *Entire Space Multi-Task Model*, SIGIR 2018, eq. 1–3.  ESCM²: Wang et al., *Entire Space
Counterfactual Multi-Task Model*, SIGIR 2022.  AITM: Xi et al., *Modeling the Sequential Dependence among Audience
Multi-step Conversions*, KDD 2021, eq. 3–10.

None of this makes unbiased what the inputs do not explain: 1 / p(parent) is right where p(parent) is calibrated and
nothing but the inputs decides on both events.  ESMM corrects nothing by itself: its gain is that the rows without the
parent's event, too, train what the towers share.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from mtcl_torchrec.modules.guard import stop_gradient_if
from mtcl_torchrec.schema import Task, chain_links

Logits = dict[str, torch.Tensor]


def event_logit(parent: torch.Tensor, conditional: torch.Tensor) -> torch.Tensor:
    """Logit of p(parent) · p(child given parent), from the logits a and b of the two.

    (1 - p) / p = e⁻ᵃ + e⁻ᵇ + e⁻ᵃ⁻ᵇ, so the logit is -logsumexp(-a, -b, -a-b).  BCE with this logit is that of the
    product, without a probability ever being formed: it neither overflows nor loses its gradient, whatever the logits.

    Args:
        parent, conditional: (B,) float.

    Returns:
        (B,), below both.

    Example:
        >>> torch.sigmoid(event_logit(torch.tensor([0.0]), torch.tensor([0.0])))
        tensor([0.2500])
    """
    return -torch.logsumexp(torch.stack([-parent, -conditional, -parent - conditional]), dim=0)


class InformationTransfer(nn.Module):
    """What a task takes over from the tower of the event before it (AITM, eq. 3–7).

    z = Σ_u w_u h₁(u) over u ∈ {p, q}: q is the task's own representation, p = SiLU(g(z_parent)) what the parent tells,
    w the softmax of ⟨h₂(u), h₃(u)⟩ / √H.

    Args:
        width: H.

    Example:
        >>> InformationTransfer(8)(torch.randn(5, 8), torch.randn(5, 8)).shape
        torch.Size([5, 8])
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tell = nn.Linear(width, width)
        self.value, self.query, self.key = (nn.Linear(width, width) for _ in range(3))

    def forward(self, parent: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """(B, H) from the parent's representation, itself after its transfer, and the task's own, (B, H) each."""
        both = torch.stack([F.silu(self.tell(parent)), own])
        scores = (self.query(both) * self.key(both)).sum(-1, keepdim=True) / both.shape[-1] ** 0.5
        return (torch.softmax(scores, dim=0) * self.value(both)).sum(0)


class Chains(nn.Module):
    """The parts of a tower that chains need; without a chain it has no parameters and changes nothing.

    Args:
        tasks: all tasks.
        width: H of the representations that the heads read.

    Raises:
        ValueError: see `mtcl_torchrec.schema.chain_links`.

    Example:
        >>> chains = Chains([Task.binary("click"), Task.binary("buy", after="click")], width=8)
        >>> out = chains({"click": torch.zeros(1), "buy": torch.zeros(1)})
        >>> {name: round(torch.sigmoid(logit).item(), 2) for name, logit in out.items()}
        {'click': 0.5, 'buy': 0.25, 'buy|click': 0.5}
    """

    def __init__(self, tasks: Sequence[Task], width: int) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.links = chain_links(tasks)
        kinds = {child: tasks[child].chain.kind for child, _ in self.links}
        self.transfers = nn.ModuleDict({str(i): InformationTransfer(width) for i, k in kinds.items() if k == "aitm"})
        self.imputing = nn.ModuleDict({str(i): nn.Linear(width, 1) for i, k in kinds.items() if k == "escm2_dr"})

    def transfer(self, representations: torch.Tensor, frozen: torch.Tensor | None = None) -> torch.Tensor:
        """The representations (T, B, H), those of AITM's tasks with what their parents tell.

        Args:
            frozen: (T,) bool: children that do not move their parents.
        """
        if not self.transfers:
            return representations
        of = list(representations.unbind(0))
        for child, parent in self.links:
            if str(child) in self.transfers:
                of[child] = self.transfers[str(child)](_unmoved(of[parent], frozen, child), of[child])
        return torch.stack(of)

    def imputed(self, representations: torch.Tensor) -> Logits:
        """`imputed_name` -> logit (B,) of the child's label that would be seen if the parent's event happened."""
        return {
            imputed_name(self.tasks[int(i)]): head(representations[int(i)]).squeeze(1)
            for i, head in self.imputing.items()
        }

    def forward(self, logits: Logits, frozen: torch.Tensor | None = None) -> Logits:
        """Logits of the heads to logits of the events.

        Args:
            logits: task name -> float32 logit; of a task with a conditional prediction, of that.
            frozen: (T,) bool: children that do not move their parents.

        Returns:
            The same; such a task's logit is that of its event over all rows, and `Task.conditional_name` is the key of
            the conditional one.
        """
        out = dict(logits)
        for child, parent in self.links:
            task = self.tasks[child]
            if task.conditional_name is not None:
                out[task.conditional_name] = logits[task.name]
                out[task.name] = event_logit(_unmoved(out[self.tasks[parent].name], frozen, child), logits[task.name])
        return out


def _unmoved(parent: torch.Tensor, frozen: torch.Tensor | None, child: int) -> torch.Tensor:
    return parent if frozen is None else stop_gradient_if(parent, frozen[child])


def imputed_name(task: Task) -> str:
    """Key of the imputed label's logit among the logits of a tower."""
    return f"{task.conditional_name} imputed"


# ---------------------------------------------------------------------- losses


def fill_known_zeros(
    links: Sequence[tuple[int, int]], labels: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Labels in which an event that could not happen is 0 instead of missing.

    Args:
        links: from `chain_links`.
        labels: (B, T), NaN where missing.
        mask: (B, T) bool, False where a label must not count, or None; an event is known not to have happened where its
            label is 0 and counts, or its parent's is.

    Returns:
        (B, T).

    Example:
        >>> nan = float("nan")
        >>> fill_known_zeros([(1, 0)], torch.tensor([[0.0, nan], [1.0, nan], [nan, nan]]))
        tensor([[0., 0.],
                [1., nan],
                [nan, nan]])
    """
    if not links:
        return labels
    zero = labels == 0 if mask is None else (labels == 0) & mask.bool()
    never, columns = list(zero.unbind(1)), list(labels.unbind(1))
    for child, parent in links:
        columns[child] = torch.where(torch.isnan(columns[child]) & never[parent], 0.0, columns[child])
        never[child] = never[child] | never[parent]
    return torch.stack(columns, dim=1)


def excess(task: Task, child: torch.Tensor, parent: torch.Tensor) -> torch.Tensor:
    """α · max(p(child) - p(parent), 0), AITM's behavioural expectation calibrator (eq. 10).

    Args:
        task: the child.
        child, parent: (B,) logits of the events.

    Returns:
        (B,) float32.

    Example:
        >>> excess(Task.binary("buy", after="click", chain="aitm"), torch.tensor([0.0, 0.0]), torch.tensor([0.0, -9e9]))
        tensor([0.0000, 0.3000])
    """
    return task.chain.calibrator_weight * F.relu(torch.sigmoid(child.float()) - torch.sigmoid(parent.float()))


def conditional_risk(
    task: Task, logits: Logits, labels: torch.Tensor, happened: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """ESCM²'s risk of q = p(child given parent) over the whole space, from rows in which the parent's event happened.

    With o = 1 where it happened, p̂ = max(p(parent), min_propensity) without gradient, e the BCE of q:

    - IPS: Σ o e / p̂ over all rows, divided by their number, or by Σ o / p̂ if ``self_normalised``.
    - DR: ê + o (e - ê) / p̂ + μ o (e - ê)² / p̂, μ = ``imputation_weight``.  ê is the BCE of q against an imputed
      label, which a head of its own predicts.  So ê follows q, and rows in which the parent's event did not happen have
      their part in the gradient of q (Wang et al., *Doubly Robust Joint Learning*, ICML 2019): it is right if either
      the propensities or the imputed labels are.  An error predicted without q in it would leave the gradient of IPS.
      The first two terms train q and the last one the imputing head, each seeing the other's prediction as it is.
      (ESCM²'s imputation tower predicts the error itself, and public code lets the square train q, too.)

    Args:
        task: the child.
        logits: of the tower.
        labels: (B,) of the child, no NaN.
        happened: (B,) bool, where the parent's label is 1 and counts.

    Returns:
        ``(rows, counts)``, (B,) float32 each: the risk is Σ v · rows / Σ v · counts with sample weights v.

    Example:
        >>> task = Task.binary("buy", after="click", chain="escm2_ips")
        >>> logits = {"click": torch.tensor([0.0, 0.0]), "buy|click": torch.tensor([0.0, 0.0])}
        >>> conditional_risk(task, logits, torch.tensor([1.0, 0.0]), torch.tensor([True, False]))
        (tensor([1.3863, 0.0000]), tensor([1., 1.]))
    """
    assert task.after is not None
    assert task.conditional_name is not None
    propensity = torch.sigmoid(logits[task.after].detach().float()).clamp(min=task.chain.min_propensity)
    weights = happened / propensity
    q = logits[task.conditional_name].float()
    error = F.binary_cross_entropy_with_logits(q, labels, reduction="none")
    if task.chain.kind == "escm2_ips":
        return weights * error, weights if task.chain.self_normalised else torch.ones_like(weights)
    imputed = torch.sigmoid(logits[imputed_name(task)].float())
    imputed_error = F.binary_cross_entropy_with_logits(q, imputed.detach(), reduction="none")
    # e - ê = (imputed label - label) · q, since both are BCE with one and the same logit.
    miss = (imputed - labels) * q.detach()
    rows = imputed_error + weights * (error - imputed_error) + task.chain.imputation_weight * weights * miss.square()
    return rows, torch.ones_like(weights)


class ChainLoss:
    """What chains change in the loss of all tasks; without a chain, nothing.

    Args:
        tasks: all tasks, in the order of the label columns.

    Attributes:
        links: see `chain_links`.
        names: of the second parts C of some tasks' losses, those of the conditional predictions.

    Raises:
        ValueError: see `chain_links`.

    Example:
        >>> ChainLoss([Task.binary("click"), Task.binary("buy", after="click", chain="escm2_dr")]).names
        ['buy|click']
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tuple(tasks)
        self.links = chain_links(tasks)
        self._risks = [(i, parent) for i, parent in self.links if tasks[i].chain.kind in ("escm2_ips", "escm2_dr")]
        self.names = [tasks[i].conditional_name or "" for i, _ in self._risks]

    def labels(self, labels: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """(B, T) labels with the zeros that are known, see `fill_known_zeros`."""
        return fill_known_zeros(self.links, labels, mask)

    def rows(self, task: Task, rows: torch.Tensor, logits: Logits) -> torch.Tensor:
        """(B,): a task's loss of each row, with what its chain adds to it or weights it by."""
        if task.after is None:
            return rows
        if task.chain.kind == "aitm":
            return rows + excess(task, logits[task.name], logits[task.after])
        return task.chain.joint_weight * rows

    def conditional(
        self, logits: Logits, labels: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The second parts of this rank: their sums (C,), and what divides them after a sum over ranks (C,).

        Args:
            logits: of the tower.
            labels: (B, T), 0 where missing or masked out: nothing is known to have happened there.
            weights: (B, T), 0 there.
        """
        sums, counts = [weights.new_zeros(0)], [weights.new_zeros(0)]
        for child, parent in self._risks:
            rows, counted = conditional_risk(self.tasks[child], logits, labels[:, child], labels[:, parent] == 1)
            sums.append((weights[:, child] * rows).sum().reshape(1))
            counts.append((weights[:, child] * counted).sum().reshape(1))
        return torch.cat(sums), torch.cat(counts)

    def per_task(self, averages: torch.Tensor, conditional: torch.Tensor) -> torch.Tensor:
        """(T,) losses of the tasks, from the averages of their first parts (T,) and of the second ones (C,)."""
        if not self._risks:
            return averages
        of = list(averages.unbind())
        for (child, _), average in zip(self._risks, conditional.unbind(), strict=True):
            of[child] = of[child] + self.tasks[child].chain.conditional_weight * average
        return torch.stack(of)
