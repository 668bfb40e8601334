"""Embedding tables for serving: stacked, quantised if wanted, looked up with plain tensor operations."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, get_args

import torch
from torch import nn
from torch.nn import functional as F
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, get_embedding_names_by_table

from mtcl_torchrec.config.commands import TablePrecision


class _Lookup(NamedTuple):
    """One feature read in one table."""

    key: str  # of the pooled embedding
    feature: str
    table: EmbeddingBagConfig
    precision: TablePrecision


class _Run(NamedTuple):
    """Neighbouring features, each read in one table of one stack.

    Args:
        start: number of the first feature.
        stack: number of the stack.
        keys: of the pooled embeddings.
        mean: whether any of them is a mean.
    """

    start: int
    stack: int
    keys: tuple[str, ...]
    mean: bool


def quantise_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in eight bits: w ≈ q · scale + bias, each row with a scale and a bias of its own.

    Args:
        weight: (R, dim) float.

    Returns:
        q (R, dim) uint8, and scale and bias (R, 2) float32.  A row whose numbers are all the same is kept exactly; of
        any other a number is off by at most half a step, (max - min) / 510.

    Example:
        >>> quantise_rows(torch.tensor([[0.0, 1.0, 255.0], [0.5, 0.5, 0.5]]))
        (tensor([[  0,   1, 255],
                [  0,   0,   0]], dtype=torch.uint8), tensor([[1.0000, 0.0000],
                [1.0000, 0.5000]]))
    """
    weight = weight.float()
    low = weight.amin(1, keepdim=True)
    step = (weight.amax(1, keepdim=True) - low) / 255
    step = torch.where(step > 0, step, 1.0)
    return ((weight - low) / step).round().clamp(0, 255).to(torch.uint8), torch.cat([step, low], dim=1)


class StackedTables(nn.Module):
    """The tables of an EmbeddingBagCollection, those of one width and precision stacked into one matrix.

    All features of a stack are looked up at once, which takes a fraction of the time of a look-up for each.  It holds
    nothing but tensors and needs no operator beyond torch's own, so it can be exported.  A row number outside of its
    table is read as 0, the row of unknown values.

    Args:
        collection: in this process, unsharded; None where there is none.
        precision: of the stored rows; None keeps each table's own.  Pooled embeddings are float32 in any case.
        others: features that others look up; their values are passed over.
        unread: keys of pooled embeddings that nobody reads; they are left out.

    Raises:
        TypeError: another kind of collection.

    Attributes:
        features: in the order in which `forward` takes them.

    Example:
        >>> table = EmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=4, feature_names=["a", "b"])
        >>> tables = StackedTables(EmbeddingBagCollection(tables=[table]))
        >>> values, lengths = torch.tensor([1, 2, 3, 4]), torch.tensor([[1, 1], [2, 0]])
        >>> {key: tuple(pooled.shape) for key, pooled in tables(values, lengths).items()}
        {'a': (2, 4), 'b': (2, 4)}
    """

    def __init__(
        self,
        collection: nn.Module | None,
        precision: TablePrecision | None = None,
        others: Sequence[str] = (),
        unread: Collection[str] = (),
    ) -> None:
        super().__init__()
        if collection is not None and not isinstance(collection, EmbeddingBagCollection):
            raise TypeError(f"a {type(collection).__name__} cannot be exported; expected an EmbeddingBagCollection")
        if precision is not None and precision not in get_args(TablePrecision):
            raise ValueError(f"tables are one of {', '.join(get_args(TablePrecision))}, not {precision!r}")
        weights = {name: bag.weight.detach() for name, bag in collection.embedding_bags.items()} if collection else {}
        lookups = _lookups(collection.embedding_bag_configs(), weights, precision) if collection else []
        lookups = [lookup for lookup in lookups if lookup.key not in unread]
        self.features = tuple(dict.fromkeys([*(lookup.feature for lookup in lookups), *others]))
        self._stacks: list[TablePrecision] = []
        self._runs: list[_Run] = []
        first_row = self._stack(lookups, weights)
        for start, stack, of in _runs(lookups, self.features):
            number = len(self._runs)
            means = [lookup.table.pooling == PoolingType.MEAN for lookup in of]
            self._runs.append(_Run(start, stack, tuple(lookup.key for lookup in of), any(means)))
            # Of the features before and after the run: no row at all.
            rest = (start, len(self.features) - start - len(of))
            base = torch.tensor([first_row[lookup.table.name] for lookup in of])
            size = torch.tensor([lookup.table.num_embeddings for lookup in of])
            self.register_buffer(f"base_{number}", F.pad(base, rest))
            self.register_buffer(f"size_{number}", F.pad(size, rest))
            self.register_buffer(f"mean_{number}", torch.tensor(means).view(-1, 1))

    def _stack(self, lookups: list[_Lookup], weights: dict[str, torch.Tensor]) -> dict[str, int]:
        """Make the stacks; the first row of each table in its stack."""
        first_row: dict[str, int] = {}
        tables = {lookup.table.name: lookup for lookup in lookups}
        for kind in _kinds(lookups):
            of = [name for name, lookup in tables.items() if _kind(lookup) == kind]
            rows = 0
            for name in of:
                first_row[name] = rows
                rows += len(weights[name])
            precision, number = kind[1], len(self._stacks)
            whole = torch.cat([weights[name] for name in of])
            if precision == "int8":
                quantised, scale = quantise_rows(whole)
                self.register_buffer(f"rows_{number}", quantised)
                self.register_buffer(f"scale_{number}", scale)
            else:
                self.register_buffer(
                    f"rows_{number}", whole.to({"fp32": torch.float32, "fp16": torch.float16}[precision])
                )
            self._stacks.append(precision)
        return first_row

    def forward(self, values: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pooled embeddings (B, dim) float32 by their key.

        Args:
            values: (V,) int64 row numbers: those of the first feature's B rows, then of the second's, and so on.
            lengths: (F, B) int64, how many each feature has in each row.
        """
        width = lengths.shape[1]
        offsets = F.pad(lengths.flatten().cumsum(0), (1, 0))
        pooled: dict[str, torch.Tensor] = {}
        count = lengths.sum(1)
        for number, run in enumerate(self._runs):
            stop = run.start + len(run.keys)
            # Values of other features are read as row 0, and what is pooled of them is dropped: to cut them out would
            # need sizes that only the data tells, which a graph can hold, but not quickly.
            size = getattr(self, f"size_{number}").repeat_interleave(count, output_size=values.shape[0])
            base = getattr(self, f"base_{number}").repeat_interleave(count, output_size=values.shape[0])
            rows = base + torch.where((values >= 0) & (values < size), values, 0)
            summed = self._pooled(run.stack, rows, offsets).view(len(self.features), width, -1)[run.start : stop]
            if run.mean:
                divisor = lengths[run.start : stop].clamp(min=1)
                summed = summed / torch.where(getattr(self, f"mean_{number}"), divisor, 1).unsqueeze(-1)
            pooled.update(zip(run.keys, summed.unbind(0), strict=True))
        return pooled

    def _pooled(self, stack: int, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Sums (bags, dim) of a stack's rows."""
        table = getattr(self, f"rows_{stack}")
        if self._stacks[stack] == "fp32":
            return F.embedding_bag(rows, table, offsets, mode="sum", include_last_offset=True)
        read = table[rows].float()
        if self._stacks[stack] == "int8":
            scale = getattr(self, f"scale_{stack}")[rows]
            read = read * scale[:, :1] + scale[:, 1:]
        places = torch.arange(rows.shape[0], device=rows.device)
        return F.embedding_bag(places, read, offsets, mode="sum", include_last_offset=True)


def _lookups(
    configs: list[EmbeddingBagConfig], weights: dict[str, torch.Tensor], precision: TablePrecision | None
) -> list[_Lookup]:
    """All look-ups, those of one kind together, so that their features are neighbours."""
    lookups = []
    for table, keys in zip(configs, get_embedding_names_by_table(configs), strict=True):
        own: TablePrecision = "fp16" if weights[table.name].dtype == torch.float16 else "fp32"
        for key, feature in zip(keys, table.feature_names, strict=True):
            lookups.append(_Lookup(key, feature, table, precision or own))
    kinds = _kinds(lookups)
    return sorted(lookups, key=lambda lookup: kinds.index(_kind(lookup)))


def _kind(lookup: _Lookup) -> tuple[int, TablePrecision]:
    return lookup.table.embedding_dim, lookup.precision


def _kinds(lookups: list[_Lookup]) -> list[tuple[int, TablePrecision]]:
    return list(dict.fromkeys(map(_kind, lookups)))


def _runs(lookups: list[_Lookup], features: tuple[str, ...]) -> list[tuple[int, int, list[_Lookup]]]:
    """Look-ups of one kind whose features are neighbours: (number of the first feature, of the kind, look-ups)."""
    kinds, runs = _kinds(lookups), list[tuple[int, int, list[_Lookup]]]()
    for lookup in lookups:
        at, kind = features.index(lookup.feature), kinds.index(_kind(lookup))
        if runs and runs[-1][1] == kind and runs[-1][0] + len(runs[-1][2]) == at:
            runs[-1][2].append(lookup)
        else:
            runs.append((at, kind, [lookup]))
    return runs
