"""Where the gradients of several tasks are caught in one backward pass, and what goes on from there.

A `Cut` belongs to one step.  Its fork hands each task a copy of what the tasks share, views that take no memory, so
that autograd brings the gradients of all tasks to one node at once.  That node asks for the tasks' weights and lets the
weighted sum go on: whatever lies below, tables whose optimizer is fused into backward included, sees one gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mtcl_torchrec.modules.balance.gramian import combine, gramian, squared_norms
from mtcl_torchrec.modules.balance.tables import TableLookups, dense_gramian, table_gramian
from mtcl_torchrec.modules.embeddings import Pooled
from mtcl_torchrec.modules.mixing import Factored
from mtcl_torchrec.modules.trunks import Shared

CutAt = Literal["trunk", "embeddings", "both", "tables"]
CUTS: tuple[CutAt, ...] = get_args(CutAt)


class Columns(NamedTuple):
    """Which columns of the concatenated pooled embeddings form a group.

    Args:
        runs: [start, end) of each stretch of neighbouring columns.
    """

    runs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Plan:
    """What is cut, the same in every step.

    Args:
        at: see `GradientSurgery`.
        keys: of the KeyedTensor, in the order of the columns.
        num_tasks: T.
        groups: of columns, each with weights of its own.
        lookups: which features look up which table.
        parameters: dense parameters that the tasks may share, and which indices of their first dimension (None: all).
    """

    at: CutAt
    keys: tuple[str, ...]
    num_tasks: int
    groups: tuple[Columns, ...]
    lookups: TableLookups
    parameters: tuple[tuple[nn.Parameter, list[int] | None], ...]


# (P, T, T) Gramians of this rank, and the step's losses (T,) and which tasks take part (T,), None where nobody told
# them, to weights (P, T) that are equal on all ranks.
Weigh = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]


class Cut:
    """The gradients of one step.

    Args:
        plan: what is cut.
        weigh: from this rank's Gramians to the weights.
        sparse_features: the batch's.
        group: the ranks that share a global batch, or None where there is one.

    Attributes:
        losses: (T,) each task's loss of this rank, detached; set by the loss, before backward.
        taking_part: (T,) bool, the same on every rank: which tasks have labels in the global batch and are not frozen;
            set likewise.  What else comes back through a task's copies, from a penalty on its gate, is none of its own.
    """

    def __init__(
        self,
        plan: Plan,
        weigh: Weigh,
        sparse_features: KeyedJaggedTensor,
        group: Any = None,
    ) -> None:
        self.plan, self.weigh, self.group = plan, weigh, group
        self.sparse_features = sparse_features
        self.losses: torch.Tensor | None = None
        self.taking_part: torch.Tensor | None = None
        self._read: torch.Tensor | None = None  # pooled embeddings as the trunk reads them
        self._handed: torch.Tensor | None = None  # the same; its gradient is what the tables get besides

    def embeddings(self, pooled: Pooled) -> Pooled:
        """What the rest of the tower reads instead of `pooled`.

        Args:
            pooled: what the embedding-bag collection returned.

        Returns:
            `pooled` where the embeddings do not matter, else a (B, Σ dims) tensor in the order of the plan's keys.

        Raises:
            ValueError: the tables are not trained.
        """
        if self.plan.at == "trunk":
            return pooled
        if isinstance(pooled, tuple):
            pooled = pooled[0]
        if not isinstance(pooled, torch.Tensor):
            pooled = torch.cat([pooled[key] for key in self.plan.keys], dim=1)
        if not pooled.requires_grad:
            raise ValueError(f"gradient surgery at {self.plan.at!r} needs tables that are trained")
        if self.plan.at == "tables":
            self._read = pooled
        else:
            self._read, self._handed = _HandOver.apply(pooled)
        return self._read

    def through(
        self,
        trunk: nn.Module,
        inputs: Sequence[torch.Tensor],
        tasks: Sequence[Sequence[int]],
        places: Sequence[Sequence[int]] | None = None,
        past: tuple[torch.Tensor, Sequence[int]] | None = None,
    ) -> list[torch.Tensor]:
        """What ``trunk(x, numbers)`` returns for each view of the inputs, with all gradients caught at one node.

        Args:
            trunk: with ``shared`` and ``split``; without them the gradients are caught where it ends.
            inputs: (B, D) for each view.
            tasks: the numbers of the tasks that have this view.
            places: the same tasks by the trunk's own numbers; None where they are the same.
            past: what n tasks read past the trunk, (B, D), and their numbers; one more view, for which (n, B, D) is
                returned as the last: a copy for each.
        """
        parts: Any = trunk if can_split(trunk) else _Whole(trunk)
        places = tasks if places is None else places
        views = [parts.shared(x, of) for x, of in zip(inputs, places, strict=True)]
        if past is not None:
            views, tasks = [*views, Shared((past[0],))], [*tasks, past[1]]
        forked = self._fork(views, tasks)
        out = [parts.split(shared, of) for shared, of in zip(forked, places, strict=False)]
        return out if past is None else [*out, forked[-1].common[0]]

    def _fork(self, views: list[Shared], tasks: Sequence[Sequence[int]]) -> list[Shared]:
        commons = [t for shared in views for t in shared.common]
        owns = [t for shared in views for t in shared.own]
        about = _Fork(
            cut=self,
            tasks=tuple(tuple(of) for of in tasks),
            commons=tuple(len(shared.common) for shared in views),
            owns=tuple(len(shared.own) for shared in views),
        )
        read, handed = self._read, self._handed
        self._read = self._handed = None  # the graph holds them as long as it lasts
        forked = iter(_ForkNode.apply(about, read, handed, *commons, *owns))
        copies = [tuple(next(forked) for _ in shared.common) for shared in views]
        return [
            Shared(common, tuple(next(forked) for _ in shared.own))
            for common, shared in zip(copies, views, strict=True)
        ]


def can_split(trunk: nn.Module) -> bool:
    """Whether a trunk says what its tasks share before they part."""
    return callable(getattr(trunk, "shared", None)) and callable(getattr(trunk, "split", None))


class _Whole:
    """A trunk that does not say what its tasks share: each representation is a task's own."""

    def __init__(self, trunk: nn.Module) -> None:
        self.trunk = trunk

    def shared(self, x: torch.Tensor, tasks: Sequence[int]) -> Shared:
        return Shared((), (self.trunk(x, tasks).transpose(0, 1),))

    def split(self, shared: Shared, tasks: Sequence[int]) -> torch.Tensor:
        return shared.own[0].transpose(0, 1)


class _HandOver(torch.autograd.Function):
    """Two views of the pooled embeddings.  The trunk reads the first, whose gradient is the sum over the tasks by the
    trunk's weights and that of penalties; the gradient of the second is what other weights add to it."""

    @staticmethod
    def forward(ctx: Any, pooled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return pooled.view_as(pooled), pooled.view_as(pooled)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] + grads[1]


@dataclass(frozen=True)
class _Fork:
    """The shape of what is forked.

    Args:
        tasks: numbers of each view's tasks.
        commons, owns: how many tensors of either kind each view has.
    """

    cut: Cut
    tasks: tuple[tuple[int, ...], ...]
    commons: tuple[int, ...]
    owns: tuple[int, ...]


class _ForkNode(torch.autograd.Function):
    """Copies of the common tensors for each task of their view; gradients of all tasks come back together."""

    @staticmethod
    def forward(
        ctx: Any, about: _Fork, read: torch.Tensor | None, handed: torch.Tensor | None, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.about = about
        # Where functions above put gradients of the common tensors that they know by their factors (`hand_over`).
        ctx.factored = {number: [] for number in range(sum(about.commons))}
        if read is not None:
            # Kept by autograd, which lets go of them after backward: below them hangs the graph of the trunk.
            ctx.save_for_backward(read, *tensors)
        sizes = [len(of) for of, count in zip(about.tasks, about.commons, strict=True) for _ in range(count)]
        copies = [t.unsqueeze(0).expand(n, *t.shape) for n, t in zip(sizes, tensors, strict=False)]
        return (*copies, *(t.view_as(t) for t in tensors[len(sizes) :]))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        about: _Fork = ctx.about
        saved = ctx.saved_tensors
        views = _by_view(about, [_joined(g, ctx.factored.get(n, []), dense=bool(saved)) for n, g in enumerate(grads)])
        below = _Below(about, views, saved[0], saved[1:]) if saved else None
        with torch.autocast(grads[0].device.type, enabled=False):
            weights, of_tables = _weights(about.cut, views, below, grads[0].device)
            commons, owns = [], []
            for view in views:
                w = torch.stack([weights[task] for task in view.tasks])
                commons += [combine(w, g) if isinstance(g, torch.Tensor) else g.combine(w) for g in view.common]
                owns += [(g * w.float().view(-1, *[1] * (g.dim() - 1))).to(g.dtype) for g in view.own]
        return (None, None, of_tables, *commons, *owns)


def _joined(gradient: torch.Tensor, handed: list[tuple[int, int, Factored]], *, dense: bool) -> Any:
    """Gradients (n, ...) of the copies of one tensor: what autograd brought, and what came by its factors.

    Returns:
        The factors alone where there is nothing else and `dense` is False, else a tensor.
    """
    now = torch._C._current_graph_task_id()
    of_this_pass = [(empty, factored) for task, empty, factored in handed if task == now]
    handed.clear()
    if len(of_this_pass) == 1 and of_this_pass[0][0] == gradient.data_ptr():
        factored = of_this_pass[0][1]
        return factored.dense().to(gradient.dtype) if dense else factored
    for _, factored in of_this_pass:
        gradient = gradient + factored.dense().to(gradient.dtype)
    return gradient


class _View(NamedTuple):
    """Gradients of what the tasks of one view share: (n, ...) each, `Factored` some of the common ones."""

    tasks: tuple[int, ...]
    common: tuple[Any, ...]
    own: tuple[torch.Tensor, ...]


def _by_view(about: _Fork, grads: Sequence[Any]) -> list[_View]:
    left = iter(grads)
    commons = [tuple(next(left) for _ in range(n)) for n in about.commons]
    owns = [tuple(next(left) for _ in range(n)) for n in about.owns]
    return [_View(*view) for view in zip(about.tasks, commons, owns, strict=True)]


class _Below:
    """What lies below the fork: gradients of one task at a time, from the same forward pass.

    Args:
        read: the pooled embeddings (B, Σ dims).
        tensors: the forked ones, common and own, still part of the graph.
    """

    def __init__(self, about: _Fork, views: list[_View], read: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
        self.about, self.views, self.read, self.tensors = about, views, read, _by_view(about, tensors)

    def gradients(self, task: int, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """This task's gradients of `inputs`; the graph stays as it is."""
        outputs, given = [], []
        for view, tensors in zip(self.views, self.tensors, strict=True):
            if task not in view.tasks:
                continue
            place = view.tasks.index(task)
            outputs += [*tensors.common, *tensors.own]
            given += [g[place] for g in view.common]
            for g in view.own:
                only = torch.zeros_like(g)
                only[place] = g[place]
                given.append(only)
        wanted = [(o, g) for o, g in zip(outputs, given, strict=True) if o.requires_grad]
        if not wanted:
            return [None for _ in inputs]
        of, by = zip(*wanted, strict=True)
        return list(torch.autograd.grad(of, inputs, by, retain_graph=True, allow_unused=True))


def _weights(
    cut: Cut, views: list[_View], below: _Below | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights (T,) of what goes on through the trunk, and the gradient that the tables get besides."""
    plan, parts = cut.plan, []
    if plan.at in ("trunk", "both"):
        parts.append(_trunk_gramian(views, plan.num_tasks, device))
    if below is None:
        return cut.weigh(parts[0].unsqueeze(0), cut.losses, cut.taking_part)[0], None
    if plan.at == "tables":
        parts.append(_gramian_of_parameters(cut, below))
        return cut.weigh(torch.stack(parts), cut.losses, cut.taking_part)[0], None
    of_task = _pooled_gradients(below, plan.num_tasks)
    for group in plan.groups:
        parts.append(torch.stack([gramian(of_task[:, :, a:b]) for a, b in group.runs]).sum(0))
    weights = cut.weigh(torch.stack(parts), cut.losses, cut.taking_part)
    through_trunk = weights[0] if plan.at == "both" else torch.ones_like(weights[0])
    handed = torch.empty_like(below.read)
    for group, w in zip(plan.groups, weights[-len(plan.groups) :], strict=True):
        for a, b in group.runs:
            handed[:, a:b] = combine(w - through_trunk, of_task[:, :, a:b])
    return through_trunk, handed


def _trunk_gramian(views: list[_View], num_tasks: int, device: torch.device) -> torch.Tensor:
    """(T, T): Σ ⟨dCᵢ, dCⱼ⟩ over common tensors, and ‖ownᵢ‖² on the diagonal.

    Tasks with other inputs have other representations, of which neither has a gradient of the other's: 0.
    """
    total = torch.zeros(num_tasks, num_tasks, dtype=torch.float64, device=device)
    for view in views:
        of_view = torch.zeros(len(view.tasks), len(view.tasks), dtype=torch.float64, device=device)
        for g in view.common:
            of_view += gramian(g) if isinstance(g, torch.Tensor) else g.gramian()
        for g in view.own:
            of_view += squared_norms(g).diag()
        if list(view.tasks) == list(range(num_tasks)):
            total += of_view
        else:
            for row, i in enumerate(view.tasks):
                for column, j in enumerate(view.tasks):
                    total[i, j] += of_view[row, column]
    return total


def _pooled_gradients(below: _Below, num_tasks: int) -> torch.Tensor:
    """(T, B, Σ dims): each task's gradient of the pooled embeddings."""
    found = [below.gradients(task, [below.read])[0] for task in range(num_tasks)]
    return torch.stack([torch.zeros_like(below.read) if g is None else g for g in found])


def _gramian_of_parameters(cut: Cut, below: _Below) -> torch.Tensor:
    """(T, T): of the tables' rows and of the dense parameters below the fork; this rank's part of the exact one."""
    plan = cut.plan
    of_task = below.read.new_zeros(plan.num_tasks, *below.read.shape)
    sizes = [p.numel() if of is None else p[0].numel() * len(of) for p, of in plan.parameters]
    dense = below.read.new_zeros(plan.num_tasks, sum(sizes))
    for task in range(plan.num_tasks):
        pooled, *of_parameters = below.gradients(task, [below.read, *(p for p, _ in plan.parameters)])
        if pooled is not None:
            of_task[task] = pooled
        for (_, of), g, place in zip(plan.parameters, of_parameters, dense[task].split(sizes), strict=True):
            if g is not None:
                place.copy_((g if of is None else g[of]).flatten())
    return table_gramian(of_task, cut.sparse_features, plan.lookups, cut.group) + dense_gramian(dense, cut.group)
