"""A model as it serves: plain tensors in, a dict of plain tensors out; eager, or as what `torch.export` takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import JaggedTensor

from mtcl_torchrec.data.batch import EncodedRows
from mtcl_torchrec.models import MTCL
from mtcl_torchrec.modules.embeddings import pooled_by_key
from mtcl_torchrec.modules.fusion import RowContext, contributions
from mtcl_torchrec.modules.output import FusedOutput
from mtcl_torchrec.modules.towers import Alike
from mtcl_torchrec.serving.histories import ServedHistories, UserHistories
from mtcl_torchrec.serving.tables import StackedTables, TablePrecision
from mtcl_torchrec.serving.vectors import served_lookups

Network = Callable[..., dict[str, torch.Tensor]]
PART = "part:"  # of the score, in the names of outputs
SPREAD = "score_std"  # of an ensemble
INPUTS = ("dense", "values", "lengths", "request", "alike", "first", "histories", "history_lengths")
OWN_CLASS = ":own_class"  # of a multiclass task: the probability of the item's own class


class _Features:
    """The sparse features of B rows by name, as a KeyedJaggedTensor gives them, without asking what its values are.

    Args:
        names: F features.
        values: (V,).
        lengths: (F, B).
        histories: of the users that the rows are of.
    """

    def __init__(
        self,
        names: Sequence[str],
        values: torch.Tensor,
        lengths: torch.Tensor,
        histories: UserHistories | None = None,
    ) -> None:
        self.histories = histories
        self._names, self._values, self._lengths = list(names), values, lengths
        self._offsets = F.pad(lengths.flatten().cumsum(0), (1, 0))

    def keys(self) -> list[str]:
        return self._names

    def __getitem__(self, name: str) -> JaggedTensor:
        at, width = self._names.index(name), self._lengths.shape[1]
        offsets = self._offsets[at * width : (at + 1) * width + 1]
        return JaggedTensor(self._values, lengths=self._lengths[at], offsets=offsets)


class ServingNetwork(nn.Module):
    """Tables, trunk, towers, heads, calibration and fused score of a model, as one function of plain tensors.

    It shares all modules but the tables with the model, so that new weights of the fused score act at once.

    Args:
        model: in eval mode.
        tables: how the rows of tables are stored; None as they are.

    Attributes:
        features: the sparse features, in the order of `lengths`.
        histories: those that are histories, in the order of `history_lengths`.
        inputs: names of the tensors that this model needs.

    Example:
        >>> from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
        >>> from mtcl_torchrec import SharedBottom, WeightedMean
        >>> from mtcl_torchrec.schema import Task
        >>> tables = [EmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=4, feature_names=["user"])]
        >>> model = MTCL(
        ...     EmbeddingBagCollection(tables=tables), 2, SharedBottom([8]), [Task.binary("click")],
        ...     WeightedMean({"click": 1.0}),
        ... )
        >>> network = ServingNetwork(model.eval())
        >>> network.inputs
        ('dense', 'values', 'lengths')
        >>> out = network(torch.zeros(3, 2), torch.tensor([1, 2, 8]), torch.ones(1, 3, dtype=torch.int64))
        >>> {name: tuple(value.shape) for name, value in out.items()}
        {'click': (3,), 'score': (3,), 'part:click': (3,)}
    """

    def __init__(self, model: MTCL, tables: TablePrecision | None = None) -> None:
        super().__init__()
        # What is trained of frozen vectors is put into them, so that its tables are not looked up.
        self.lookups = served_lookups(
            model.lookups, model.embedding_bag_collection, tables, list(model.embedding_collections)
        )
        served = [module for module in self.lookups if isinstance(module, ServedHistories)]
        self.histories = tuple(name for module in served for name in module.histories)
        others = [feature for module in self.lookups for feature in getattr(module, "features", ())]
        unread = set(model.lookups.table_dims) - set(self.lookups.table_dims)
        self.tables = StackedTables(model.embedding_bag_collection, tables, others, unread)
        self.tower, self.output = model.tower, model.output
        self.features = self.tables.features
        self.tasks = model.tasks
        self.within_request = bool(getattr(model.output.fused_score, "within_request", False))
        inputs = ["dense", "values", "lengths"]
        if self.within_request:
            inputs.append("request")
        if self.tower.has_views_of_the_request or self.histories:
            inputs += ["alike", "first"]
        if self.histories:
            inputs += ["histories", "history_lengths"]
        self.inputs = tuple(inputs)

    def forward(
        self,
        dense: torch.Tensor,
        values: torch.Tensor,
        lengths: torch.Tensor,
        request: torch.Tensor | None = None,
        alike: torch.Tensor | None = None,
        first: torch.Tensor | None = None,
        histories: torch.Tensor | None = None,
        history_lengths: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """What the model gives for B rows, and what the score is made of.

        Args:
            dense: (B, D) float32.
            values: (V,) int64, row numbers in the tables: those of the first feature's B rows, then of the second's,
                and so on.
            lengths: (F, B) int64, how many values each feature has in each row.
            request: (B,) int64, equal for rows that are ranked against each other.
            alike: (B,) int64, which rows have the same user and context columns, from 0 to R - 1; what only depends on
                them is computed once.  ``arange(B)`` is always right.
            first: (R,) int64, one row of each kind; ``arange(B)`` with the above.
            histories: (W,) int64, row numbers in the tables, oldest first: those of the first history's R kinds of
                rows, then of the second's, and so on.
            history_lengths: (H, R) int64.

        Returns:
            As `MTCL`; ``"part:<task>"`` (B,) where the fused score tells each task's part of it; and
            ``"<task>:own_class"`` (B,), what a multiclass task gives to the score.
        """
        users = None
        if histories is not None and history_lengths is not None and alike is not None:
            users = UserHistories(histories, history_lengths, alike)
        features: Any = _Features(self.features, values, lengths, users)
        pooled = self.lookups(self.tables(values, lengths), features)
        kinds = None if alike is None or first is None else Alike(alike, first)
        logits = self.tower(dense, pooled, alike=kinds)
        out = self.output(logits, dense, features, pooled, request)
        return {**out, **told_parts(self.output, out, features, dense, pooled, request)}


def told_parts(
    output: FusedOutput,
    predictions: Mapping[str, torch.Tensor],
    features: Any,
    dense: torch.Tensor,
    pooled: Any,
    request: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """What the fused score is made of: ``"part:<task>"`` and ``"<task>:own_class"``, see `ServingNetwork.forward`.

    Args:
        predictions: what `output` returned.
        features, dense, pooled, request: what it was given.
    """
    parts = output.parts(predictions, features)
    own = {name + OWN_CLASS: parts[name] for name, task in output.tasks.items() if task.kind == "multiclass"}
    if output.fused_score is None:
        return own
    rows = RowContext(dense, pooled_by_key(pooled, output.dims), request)
    told = contributions(output.fused_score, parts, rows) or {}
    return {**{PART + name: part for name, part in told.items()}, **own}


class ServingEnsemble(nn.Module):
    """Several networks as one: the mean of what they give, and ``"score_std"`` (B,), how far their scores are apart.

    Args:
        members: networks that read the same features.

    Raises:
        TypeError: they do not.
    """

    def __init__(self, members: Sequence[ServingNetwork]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.features, self.tasks = members[0].features, members[0].tasks
        self.histories = members[0].histories
        if any((member.features, member.histories) != (self.features, self.histories) for member in members):
            raise TypeError("the members of this ensemble read other features, or in tables of other widths")
        self.within_request = any(member.within_request for member in members)
        used = {name for member in members for name in member.inputs}
        self.inputs = tuple(name for name in INPUTS if name in used)

    def forward(
        self,
        dense: torch.Tensor,
        values: torch.Tensor,
        lengths: torch.Tensor,
        request: torch.Tensor | None = None,
        alike: torch.Tensor | None = None,
        first: torch.Tensor | None = None,
        histories: torch.Tensor | None = None,
        history_lengths: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """See `ServingNetwork.forward`."""
        members: Any = self.members
        given = (dense, values, lengths, request, alike, first, histories, history_lengths)
        inputs = dict(zip(INPUTS, given, strict=True))
        outs = [member(**{name: inputs[name] for name in member.inputs}) for member in members]
        found = {name: torch.stack([out[name] for out in outs]) for name in outs[0] if all(name in out for out in outs)}
        mean = {name: values.mean(0) for name, values in found.items()}
        return {**mean, SPREAD: found["score"].std(0, correction=0)} if "score" in found else mean


AnyNetwork = ServingNetwork | ServingEnsemble


def serving_network(model: nn.Module, tables: TablePrecision | None = None) -> AnyNetwork:
    """The network of a model, or of an ensemble of models (a module with ``members``); see `ServingNetwork`."""
    if not hasattr(model, "members"):
        return ServingNetwork(cast(MTCL, model), tables)
    return ServingEnsemble([ServingNetwork(member, tables) for member in cast(Any, model).members])


def network_inputs(
    rows: EncodedRows,
    features: Sequence[str],
    wanted: Sequence[str],
    *,
    histories: Sequence[str] = (),
    request: torch.Tensor | None = None,
    alike: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Encoded rows as the tensors that a `ServingNetwork` takes.

    Args:
        rows: B rows.
        features: the network's sparse features, in its order.
        wanted: names of its inputs.
        histories: its histories, in its order.
        request: (B,) int64; None: all rows are one request.
        alike: (B,) int64, ascending from 0: rows with the same user and context; None: each row has its own.
    """
    size = len(rows)
    id_keys = [key for key in rows.keys if key not in rows.bags]
    columns = [id_keys.index(name) if name not in rows.bags else -1 for name in features]
    if not rows.bags:
        order = slice(None) if columns == list(range(len(columns))) else columns
        values = rows.ids.T[order].reshape(-1)
        lengths = torch.ones(len(features), size, dtype=torch.int64)
    else:
        ids, ones = rows.ids.T, torch.ones(size, dtype=torch.int64)
        pieces = [
            (ids[column], ones) if column >= 0 else rows.bags[name].all()
            for name, column in zip(features, columns, strict=True)
        ]
        values = torch.cat([values for values, _ in pieces])
        lengths = torch.stack([lengths for _, lengths in pieces])
    given = {"dense": rows.dense, "values": values, "lengths": lengths}
    if "request" in wanted:
        given["request"] = torch.zeros(size, dtype=torch.int64) if request is None else request
    if "alike" in wanted:
        own = torch.arange(size)
        given["alike"] = own if alike is None else alike
        new = torch.ones(size, dtype=torch.bool)
        new[1:] = given["alike"].diff() > 0
        given["first"] = own[new]
    if histories:
        taken = [rows.bags[name].take(given["first"]) for name in histories]
        given["histories"] = torch.cat([values for values, _ in taken])
        given["history_lengths"] = torch.stack([lengths for _, lengths in taken])
    return given


def named_outputs(tasks: Sequence[Any], out: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """What a person sees of a row: the score, how far the members of an ensemble are apart in it, each task's
    prediction, each task's part of the score; (B,) each."""
    for name in ("score", SPREAD):
        if name in out:
            yield name, out[name]
    for task in tasks:
        yield task.name, out[task.name + OWN_CLASS] if task.kind == "multiclass" else out[task.name]
    for name, value in out.items():
        if name.startswith(PART):
            yield name, value
