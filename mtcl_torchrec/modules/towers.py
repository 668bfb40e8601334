"""Everything between the pooled embeddings and the logits: the part of a model that holds no table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import nn

from mtcl_torchrec.modules.balance.cut import Cut
from mtcl_torchrec.modules.chains import Chains
from mtcl_torchrec.modules.dot_product import DotHead, vector_names
from mtcl_torchrec.modules.embeddings import Pooled, PooledConcat, input_blocks, visible_columns
from mtcl_torchrec.modules.experts import BatchedExperts
from mtcl_torchrec.modules.freezing import stop_where_frozen
from mtcl_torchrec.modules.gates import EPNet, PPNet
from mtcl_torchrec.modules.guard import stop_gradient_if
from mtcl_torchrec.modules.heads import starting_logits
from mtcl_torchrec.modules.losses import Logits
from mtcl_torchrec.modules.sequences import HistoryInput
from mtcl_torchrec.modules.sequences.lstm_towers import LSTMTowers
from mtcl_torchrec.modules.trunks import ExpertLevel, TrunkInputs, check_representations, prepare_trunk
from mtcl_torchrec.schema import GROUPS, ConfigError, Group, Task

Precision = Literal["fp32", "bf16"]


class Alike(NamedTuple):
    """Which of B rows have the same user and context columns: R kinds of rows.

    Args:
        of_row: (B,) int64, the kind of each row, from 0 to R - 1.
        first: (R,) int64, the number of one row of each kind.
    """

    of_row: torch.Tensor
    first: torch.Tensor


class MultiTaskTower(nn.Module):
    """Everything between the pooled embeddings and the logits: interaction, trunk, towers, heads.

    It holds no embedding table, so TorchRec's pipelines treat it as one leaf and it may branch as it likes.

    Dot heads read the concatenated embeddings themselves: trunk and towers are built for the tasks that have a tower,
    and not at all where there are none.  A task with both has the sum of the two logits, which start at the base rate
    together.

    Args:
        dims: key of each pooled embedding -> its width.
        precision: ``"bf16"`` computes it under autocast, but for the heads; its parameters and logits stay float32.
        histories: those that `lstm_towers` may read.
        others: see `mtcl_torchrec.MTCL`.
    """

    def __init__(
        self,
        dims: Mapping[str, int],
        dense_in_features: int,
        trunk: nn.Module,
        tasks: Sequence[Task],
        *,
        interaction: Callable[[int], nn.Module] | None,
        tower_layers: Sequence[int],
        embedding_dropout: float,
        dense_dropout: float,
        dense_noise: float,
        tower_dropout: float,
        feature_groups: Mapping[str, Sequence[Group]] | None,
        dense_groups: Sequence[Sequence[Group]] | None,
        precision: Precision = "fp32",
        epnet: EPNet | None = None,
        ppnet: PPNet | None = None,
        lstm_towers: LSTMTowers | None = None,
        histories: Mapping[str, HistoryInput] | None = None,
        base_rates: Mapping[str, float | Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        if precision not in get_args(Precision):
            raise ValueError(f"precision is one of {', '.join(get_args(Precision))}, not {precision!r}")
        self.precision = precision
        self.tasks = tuple(tasks)
        self.dense_in_features = dense_in_features
        width = sum(dims.values()) + dense_in_features
        self.concat = PooledConcat(
            dims, embedding_dropout=embedding_dropout, dense_dropout=dense_dropout, dense_noise=dense_noise
        )
        if interaction and getattr(trunk, "separates_columns", False):
            raise ValueError(
                f"{type(trunk).__name__} keeps the tasks' columns apart, an interaction before it would mix them"
            )
        groups = _groups_of_inputs(feature_groups, histories or {})
        blocks = input_blocks(dims, dense_in_features, tasks, groups, dense_groups)
        # Task numbers, in the order in which the trunk numbers them.
        self.trunk_tasks = tuple(number for number, task in enumerate(self.tasks) if task.in_trunk)
        self.interaction = interaction(width) if interaction else nn.Identity()
        hidden = 1
        if self.trunk_tasks:
            prepare_trunk(trunk, width, TrunkInputs(tuple(self.tasks[i] for i in self.trunk_tasks), blocks))
            hidden = int(trunk.out_features)  # type: ignore[arg-type]
        elif interaction or epnet or ppnet or lstm_towers:
            named = "interaction" if interaction else "epnet" if epnet else "ppnet" if ppnet else "an LSTM"
            raise ConfigError(f"every task has a dot head, which reads the embeddings themselves: {named} does nothing")
        if ppnet is not None:
            ppnet.wrap(trunk, self.interaction, blocks, len(self.trunk_tasks), tower_layers)
            trunk, self.interaction = ppnet, nn.Identity()
        if epnet is not None:
            epnet.build(blocks)
            self.interaction = nn.Sequential(epnet, self.interaction)
        self.trunk = trunk
        self._levels = tuple(module for module in trunk.modules() if isinstance(module, ExpertLevel))
        # Tasks that may see the same inputs go through the trunk together.
        self._views: list[tuple[str, list[int]]] = []
        self._sees_all = all(set(self.tasks[number].inputs) == set(GROUPS) for number in self.trunk_tasks)
        for number in self.trunk_tasks:
            task = self.tasks[number]
            name = "sees_" + "_".join(sorted(task.inputs))
            if not hasattr(self, name):
                visible = visible_columns(task.inputs, dims, dense_in_features, groups, dense_groups)
                self.register_buffer(name, visible, persistent=False)
                self._views.append((name, []))
            next(numbers for view, numbers in self._views if view == name).append(number)
        self._of_request = {name for name, of in self._views if "item" not in self.tasks[of[0]].inputs}
        self.lstm_towers = lstm_towers
        if lstm_towers is not None:
            of_trunk = [self.tasks[number] for number in self.trunk_tasks]
            if not of_trunk:
                raise ConfigError("every task has a dot head, which has no tower: the LSTM towers do nothing")
            lstm_towers.build(of_trunk, dims, histories or {}, feature_groups or {})
            hidden += lstm_towers.hidden
        self.towers: nn.Module | None = None
        if tower_layers and self.trunk_tasks:
            count = len(self.trunk_tasks)
            self.towers = BatchedExperts(hidden, tower_layers, count, reads=range(count), dropout=tower_dropout)
            hidden = tower_layers[-1]
        self.chains = Chains(self.tasks, hidden)
        # A list, not a dict by name: a task may be called what an attribute of ModuleDict is called ("items").
        heads = [nn.Linear(hidden, task.out_features) if task.in_trunk else nn.Identity() for task in self.tasks]
        starts = starting_logits(self.tasks, base_rates or {})
        with torch.no_grad():
            for head, task in zip(heads, self.tasks, strict=True):
                if isinstance(head, nn.Linear) and task.name in starts:
                    head.bias.copy_(starts[task.name])
                elif isinstance(head, nn.Linear) and task.conditional_name is None:
                    head.bias.sub_(task.logit_shift)  # even odds in what the task's loss sees
            for (
                place,
                imputing,
            ) in self.chains.imputing.items():  # of the child's label where the parent's event happened
                if isinstance(imputing, nn.Linear) and (name := self.tasks[int(place)].name) in starts:
                    imputing.bias.copy_(starts[name])
        self.heads = nn.ModuleList(heads)
        self.dot_heads = nn.ModuleDict(
            {
                str(number): DotHead(task, blocks, torch.zeros(1) if task.in_trunk else starts.get(task.name))
                for number, task in enumerate(self.tasks)
                if task.has_dot
            }
        )

    def forward(
        self,
        dense_features: torch.Tensor,
        pooled: Pooled,
        skip: torch.Tensor | None = None,
        frozen: torch.Tensor | None = None,
        cut: Cut | None = None,
        alike: Alike | None = None,
    ) -> Logits:
        """Logits by task, float32: (B,), or (B, num_classes) for a multiclass task; and those that `Chains` adds.

        Args:
            dense_features: (B, D) float.
            pooled: what the embedding-bag collection returned.
            skip: () bool: the embeddings' gradient is exactly zero where this is True by the time of backward.
            frozen: (T,) bool: the tasks that move nothing but their tower and head.
            cut: where the tasks' gradients are combined, see `GradientSurgery`.
            alike: rows of one user and context, for which tasks that may not see the item are computed once.
        """
        if dense_features.shape[1] != self.dense_in_features:
            raise ValueError(
                f"dense_features have {dense_features.shape[1]} columns, the model was built with "
                f"dense_in_features={self.dense_in_features}"
            )
        states = None
        if self.lstm_towers is not None:
            of_row = None if alike is None else alike.of_row
            states = self.lstm_towers(pooled, skip, self._of_trunk(frozen), of_row)
        if cut is not None:
            pooled = cut.embeddings(pooled)
        x = self.concat(dense_features, pooled)
        if skip is not None:
            x = stop_gradient_if(x, skip)
        if self.precision == "fp32":
            return self.chains(self._logits(x, frozen, cut, alike, states), frozen)
        # bf16 has float32's range, so nothing scales the loss (GradScaler): tables whose optimizer is fused into
        # backward would step with the scaled gradient.
        with torch.autocast(x.device.type, torch.bfloat16):
            logits = self._logits(x, frozen, cut, alike, states)
        return self.chains({name: value.float() for name, value in logits.items()}, frozen)

    def expert_levels(self) -> tuple[ExpertLevel, ...]:
        """The levels of experts in the trunk, in the order data meets them; none in a trunk of one's own."""
        return self._levels

    @property
    def has_views_of_the_request(self) -> bool:
        """Whether there is something that is the same in all rows of one user and context: what a task without the
        item sees, or the user's vector of a dot head."""
        return bool(self._of_request or self.dot_heads)

    def _logits(
        self,
        x: torch.Tensor,
        frozen: torch.Tensor | None,
        cut: Cut | None,
        alike: Alike | None = None,
        states: torch.Tensor | None = None,
    ) -> Logits:
        """Logits from the concatenated inputs (B, Σ dims + D)."""
        for level in self._levels:
            level.forget_mixes()
        inputs = []
        for name, _ in self._views:
            rows = x if alike is None or name not in self._of_request else x[alike.first]
            inputs.append(self.interaction(rows if self._sees_all else rows * getattr(self, name)))
        tasks = [numbers for _, numbers in self._views]
        places = [[self.trunk_tasks.index(number) for number in numbers] for numbers in tasks]
        of_dots = [int(number) for number in self.dot_heads]
        if cut is None:
            of_views = [self.trunk(seen, numbers) for seen, numbers in zip(inputs, places, strict=True)]
            reads = [x] * len(of_dots)
        else:
            of_views = cut.through(self.trunk, inputs, tasks, places, (x, of_dots) if of_dots else None)
            reads = list(of_views.pop()) if of_dots else []
        h = self._of_tasks(of_views, inputs, frozen, alike, states)
        if self.precision == "fp32":
            logits = self._of_heads(h)
        else:  # heads are small, and the 8 bits of a bf16 logit would tie rows that differ
            with torch.autocast(x.device.type, enabled=False):
                logits = self._of_heads(h.float())
        for number, read in zip(of_dots, reads, strict=True):
            of_dot = self._of_dot(number, read if frozen is None else stop_gradient_if(read, frozen[number]), alike)
            name = self.tasks[number].name
            if name in logits:
                of_dot[name] = logits[name] + of_dot[name]
            logits |= of_dot
        return logits

    def _of_heads(self, h: torch.Tensor) -> Logits:
        """Logits of the tasks that go through the trunk, from what their heads read (T, B, H)."""
        logits = self.chains.imputed(h) if self.trunk_tasks else {}
        for number in self.trunk_tasks:
            task, out = self.tasks[number], self.heads[number](h[number])
            logits[task.name] = out if task.kind == "multiclass" else out.squeeze(1)
        return logits

    def _of_trunk(self, frozen: torch.Tensor | None) -> torch.Tensor | None:
        """Of the flags of all tasks, those of the tasks that go through the trunk."""
        if frozen is None or len(self.trunk_tasks) == len(self.tasks):
            return frozen
        return torch.stack([frozen[number] for number in self.trunk_tasks])

    def _of_dot(self, number: int, x: torch.Tensor, alike: Alike | None) -> Logits:
        """A dot head's logit, and its vectors where the loss reads them."""
        task = self.tasks[number]
        out = self.dot_heads[str(number)](x, *(alike or ()))
        if task.head.l2 or task.head.sampled_softmax:
            return {task.name: out.logit, **dict(zip(vector_names(task), out[1:], strict=True))}
        return {task.name: out.logit}

    def _of_tasks(
        self,
        of_views: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        frozen: torch.Tensor | None,
        alike: Alike | None,
        states: torch.Tensor | None,
    ) -> torch.Tensor:
        """What the tasks' heads read, (T, B, H), from what the trunk made of each view; empty without a trunk."""
        if not self.trunk_tasks:
            return torch.empty(0)
        shared: dict[int, torch.Tensor] = {}
        for seen, representations, (name, numbers) in zip(inputs, of_views, self._views, strict=True):
            check_representations(self.trunk, representations, seen.shape[0], len(numbers))
            if alike is not None and name in self._of_request:
                representations = representations[alike.of_row]
            for place, number in enumerate(numbers):
                shared[number] = representations[:, place]
        h = torch.stack([shared[number] for number in self.trunk_tasks])
        h = stop_where_frozen(h, self._of_trunk(frozen))
        factors = None
        if isinstance(self.trunk, PPNet):
            h, factors = self.trunk.apart(h)
        if states is not None:
            h = torch.cat([h, states.to(h.dtype)], dim=2)
        if self.towers is not None:
            h = self.towers(h, factors=factors)
        if len(self.trunk_tasks) < len(self.tasks):  # chains look tasks up by their numbers; a dot head has no tower
            nothing, of = torch.zeros_like(h[0]), dict(zip(self.trunk_tasks, h, strict=True))
            h = torch.stack([of.get(number, nothing) for number in range(len(self.tasks))])
        return self.chains.transfer(h, frozen)


def _groups_of_inputs(
    feature_groups: Mapping[str, Sequence[Group]] | None, histories: Mapping[str, HistoryInput]
) -> Mapping[str, Sequence[Group]] | None:
    """Feature -> its groups; a history that the candidate attends to is of the item, too, and would tell a task that
    may not see the item what it is."""
    if feature_groups is None:
        return None
    attended = {
        name: tuple(dict.fromkeys((*feature_groups.get(name, ()), *feature_groups.get(str(of.candidate), ("item",)))))
        for name, of in histories.items()
        if of.attends
    }
    return {**feature_groups, **attended}
