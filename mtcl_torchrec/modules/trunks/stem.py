"""Embedding tables of a task's own beside the shared ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from mtcl_torchrec.modules.embeddings import InputBlock
from mtcl_torchrec.modules.experts import Norm
from mtcl_torchrec.modules.trunks.contract import TrunkInputs
from mtcl_torchrec.modules.trunks.graph import ExpertGraph, LevelMask
from mtcl_torchrec.modules.trunks.mixtures import owners, stacked


class STEM(ExpertGraph):
    """Shared and task-specific embeddings (Su et al., *STEM*, AAAI 2024): tables of each task's own, read by experts of
    its own, beside shared tables and shared experts.

    Task t's gate mixes the experts of all tasks and the shared ones, but its gradient reaches only its own experts and
    the shared ones, and so only its own tables and the shared ones (all forward, task-specific backward).  Tasks that
    disagree about an id can each keep what they hold of it, and still read what the others hold.

    Task t's experts read its stream: the columns of its own tables, and shared columns where it has no table of its
    own.  Its gate reads the sum of its stream and the shared one.  With several levels, the gate between them that
    mixes all experts into the shared stream learns from shared experts alone, lest a task's gradient should reach
    another's tables through it.

    The model's tables come from `with_own_tables`, or, in YAML, from ``own_tables``.  There is no interaction before
    this trunk: one would mix the columns of all tasks.

    Args:
        expert_layers: widths of an expert.
        task_experts: experts of each task's own in each level.
        shared_experts: shared experts in each level.
        levels: how many.
        norm: ``"layer"``, ``"rms"`` or ``"none"``.
        dropout: after each activation.
        gate_dropout: while training, the share of experts a gate leaves out.

    Example:
        >>> trunk = STEM([8])
        >>> trunk.build(in_features=4, num_tasks=3)  # without inputs, all streams are the whole input
        >>> trunk(torch.randn(5, 4), tasks=[0, 1, 2]).shape
        torch.Size([5, 3, 8])
    """

    separates_columns = True

    def __init__(
        self,
        expert_layers: Sequence[int],
        *,
        task_experts: int = 1,
        shared_experts: int = 1,
        levels: int = 1,
        norm: Norm = "layer",
        dropout: float = 0.0,
        gate_dropout: float = 0.0,
    ) -> None:
        super().__init__(expert_layers, norm=norm, dropout=dropout, gate_dropout=gate_dropout)
        if min(task_experts, shared_experts, levels) < 1:
            raise ValueError(f"STEM needs one of each at least: {task_experts=}, {shared_experts=}, {levels=}")
        self.task_experts, self.shared_experts, self.num_levels = task_experts, shared_experts, levels

    def build(self, in_features: int, num_tasks: int, inputs: TrunkInputs | None = None) -> None:
        """See `Trunk.build`.

        Raises:
            ValueError: no task has a table of its own, or one is no copy of a shared table.
        """
        whole = [[(0, in_features)]] * (num_tasks + 1)
        ranges = whole if inputs is None else stream_columns([task.name for task in inputs.tasks], inputs.blocks)
        # Cut x once at every boundary; each stream is then put together from pieces.
        ends = sorted({edge for stream in ranges for start, width in stream for edge in (start, start + width)} - {0})
        ends = ends if ends[-1:] == [in_features] else [*ends, in_features]
        self._widths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        starts = list(accumulate(self._widths, initial=0))
        self._pieces = [
            [piece for start, width in stream for piece in range(starts.index(start), starts.index(start + width))]
            for stream in ranges
        ]
        super().build(sum(width for _, width in ranges[0]), num_tasks, inputs)

    def streams(self, x: torch.Tensor) -> torch.Tensor:
        """(T + 1, B, D'): the stream of each task, then the shared one, from the input x (B, D)."""
        pieces = x.split(self._widths, dim=1)
        together = torch.cat([pieces[piece] for stream in self._pieces for piece in stream], dim=1)
        return together.view(x.shape[0], len(self._pieces), -1).transpose(0, 1)

    def masks(self, num_tasks: int, inputs: TrunkInputs | None) -> list[LevelMask]:
        """See the class."""
        owner, gates = owners(num_tasks, self.task_experts, self.shared_experts)
        learns = (owner == gates) | (owner == num_tasks)
        levels = stacked(LevelMask(torch.ones_like(learns), learns), owner, num_tasks, self.num_levels)
        # The shared gate reads its stream twice: the same gate, with weights of half the size.
        return [
            mask._replace(expert_reads=owner.tolist(), gate_reads=range(len(mask.sees)), gates_also_read=num_tasks)
            for mask in levels
        ]


def stream_columns(tasks: Sequence[str], blocks: Sequence[InputBlock]) -> list[list[tuple[int, int]]]:
    """The columns of each task's stream, and then of the shared one: runs of (first column, width).

    Raises:
        ValueError: no task has a table of its own, or one has no shared table beside it, or another width.

    Example:
        >>> blocks = [InputBlock(4, "user", "t"), InputBlock(2, "hour"), InputBlock(4, "user", "t", task="click")]
        >>> stream_columns(["click", "like"], blocks)  # "like" has no table of its own
        [[(6, 4), (4, 2)], [(0, 6)], [(0, 6)]]
    """
    starts = list(accumulate((block.width for block in blocks), initial=0))
    placed = list(zip(starts, blocks, strict=False))
    own: dict[tuple[str | None, str | None, str], tuple[int, InputBlock]] = {
        (block.task, block.feature, block.table): (start, block) for start, block in placed if block.task
    }
    if not own:
        raise ValueError(
            "STEM: no task has an embedding table of its own; make the EmbeddingBagCollection of "
            "with_own_tables(tables, tasks), which copies them, or take PLE"
        )
    shared = [(start, block) for start, block in placed if block.task is None]
    known = {(block.feature, block.table): block.width for _, block in shared}
    for (owner, feature, table), (_, block) in own.items():
        width = known.get((feature, table))
        if width != block.width:
            raise ValueError(
                f"STEM: table {table!r} of task {owner!r} has {block.width} columns for feature {feature!r}, "
                f"the shared table has {'none' if width is None else width}"
            )
    streams = []
    for task in (*tasks, None):
        runs: list[tuple[int, int]] = []
        for place in shared:
            start, block = own.get((task, place[1].feature, place[1].table), place)
            if runs and sum(runs[-1]) == start:
                runs[-1] = (runs[-1][0], runs[-1][1] + block.width)
            else:
                runs.append((start, block.width))
        streams.append(runs)
    return streams
