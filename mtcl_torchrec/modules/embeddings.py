"""From an embedding-bag collection's output to one input matrix, in an order that no sharding plan changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingCollection,
    get_embedding_names_by_table,
)
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mtcl_torchrec.schema import GROUPS, Group, Schema, Task, nearest, own_table

_DATA_TYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16, "bf16": DataType.BF16}
Pooled = Any  # a KeyedTensor, a pipeline's promise of one, a tuple that starts with one, or a (B, width) tensor


def table_module_name(table: str) -> str:
    """A table's name inside the model: torch takes no dot in it, and no name that a ModuleDict's attribute has.

    Example:
        >>> table_module_name("geo.items")
        'table_geo_items'
    """
    return "table_" + table.replace(".", "_")


def build_embedding_bag_collection(
    schema: Schema,
    num_embeddings: Callable[[str], int],
    device: torch.device | str = "meta",
    own_tables: Mapping[str, Sequence[str]] | None = None,
) -> EmbeddingBagCollection:
    """The EmbeddingBagCollection of a schema's sparse features, but those of `build_embedding_collections`.

    Pooled embeddings are float32 whatever the data type of a table.  Where its optimizer steps, FBGEMM rounds an fp16
    weight at random on CUDA, so that small steps count on average, and to the nearest on the CPU, where a step of less
    than 1/4096 of the weight is lost.  An unsharded collection of TorchRec keeps a bf16 table in fp16.

    Args:
        schema: declares features and tables.
        num_embeddings: table name -> its number of rows.
        device: ``"meta"`` for a model that `DistributedModelParallel` will materialise.
        own_tables: table name -> the tasks that have a copy of it for themselves, see `with_own_tables`.
    """
    poolings = {"sum": PoolingType.SUM, "mean": PoolingType.MEAN}
    tables = [
        EmbeddingBagConfig(
            name=table_module_name(table),
            num_embeddings=num_embeddings(table),
            embedding_dim=features[0].embedding_dim,
            feature_names=[f.name for f in features],
            # Of one id, mean and sum are the same, and FBGEMM's sum is several times faster on a CPU.
            pooling=poolings[
                "mean" if any(f.kind == "bag" for f in features) and features[0].pooling == "mean" else "sum"
            ],
            # What is trained of vectors moves by less than fp16 can tell.
            data_type=_DATA_TYPES["fp32" if features[0].kind == "vector" else features[0].data_type],
        )
        for table, features in schema.tables().items()
        if table not in schema.sequence_tables()
    ]
    copied = {table_module_name(table): of for table, of in (own_tables or {}).items()}
    tables += [
        _copy_for(config, task)
        for task in (t.name for t in schema.tasks)
        for config in tables
        if task in copied.get(config.name, ())
    ]
    return EmbeddingBagCollection(tables=tables, device=torch.device(device))


def build_embedding_collections(
    schema: Schema, num_embeddings: Callable[[str], int], device: torch.device | str = "meta"
) -> list[EmbeddingCollection]:
    """The EmbeddingCollections of the tables that histories look up, one for each width of embeddings.

    The id features that share such a table are looked up there too.

    Args:
        schema: declares features and tables.
        num_embeddings: table name -> its number of rows.
        device: ``"meta"`` for a model that `DistributedModelParallel` will materialise.
    """
    by_width: dict[int, list[EmbeddingConfig]] = {}
    for table, features in schema.sequence_tables().items():
        config = EmbeddingConfig(
            name=table_module_name(table),
            num_embeddings=num_embeddings(table),
            embedding_dim=features[0].embedding_dim,
            feature_names=[f.name for f in features],
            data_type=_DATA_TYPES[features[0].data_type],
        )
        by_width.setdefault(config.embedding_dim, []).append(config)
    return [EmbeddingCollection(tables=tables, device=torch.device(device)) for tables in by_width.values()]


def with_own_tables(
    tables: Sequence[EmbeddingBagConfig], tasks: Sequence[Task | str], only: Sequence[str] | None = None
) -> list[EmbeddingBagConfig]:
    """Tables, and for each task a copy of them that looks up the same features: what `STEM` needs.

    A copy is called ``<table>@<task>``, dots of the task as underscores; that is how the model knows whose it is.  It
    starts from other random rows, and is sharded and trained like any other table.  T tasks make T + 1 times the
    memory.

    Args:
        tables: the shared ones.
        tasks: the model's tasks, or their names.
        only: names of the tables that are copied; None is all.

    Raises:
        ValueError: `only` names a table that is not there.

    Example:
        >>> shared = [EmbeddingBagConfig(name="users", num_embeddings=9, embedding_dim=4, feature_names=["user"])]
        >>> [table.name for table in with_own_tables(shared, ["click", "like"])]
        ['users', 'users@click', 'users@like']
    """
    names = [table.name for table in tables]
    for name in only or ():
        if name not in names:
            raise ValueError(f"no table {name!r} to copy{nearest(name, names)}")
    copied = [table for table in tables if only is None or table.name in only]
    return [*tables, *(_copy_for(t, task if isinstance(task, str) else task.name) for task in tasks for t in copied)]


def _copy_for(table: EmbeddingBagConfig, task: str) -> EmbeddingBagConfig:
    return replace(table, name=own_table(table.name, task.replace(".", "_")))


class InputBlock(NamedTuple):
    """Columns of the concatenated input that belong together.

    Args:
        width: how many.
        feature: the sparse feature that they embed; None for a dense column.
        table: where a feature is looked up in several tables, the table's name, without the task whose copy it is.
        task: the one task that has this table for itself; None where it is shared.
        groups: those of the feature or dense column, where they are known.
    """

    width: int
    feature: str | None = None
    table: str = ""
    task: str | None = None
    groups: tuple[Group, ...] = ()


def input_blocks(
    dims: Mapping[str, int],
    dense_in_features: int,
    tasks: Sequence[Task],
    feature_groups: Mapping[str, Sequence[Group]] | None = None,
    dense_groups: Sequence[Sequence[Group]] | None = None,
) -> tuple[InputBlock, ...]:
    """What the columns of the concatenated input are, in their order.

    Args:
        dims: key of each pooled embedding -> its width.
        others: see `mtcl_torchrec.MTCL`.

    Example:
        >>> dims = {"user@t": 4, "hour": 2, "user@t@click": 4}
        >>> [(b.feature, b.table, b.task) for b in input_blocks(dims, 0, [Task.binary("click")])]
        [('user', 't', None), ('hour', '', None), ('user', 't', 'click')]
    """
    of_task = {task.name.replace(".", "_"): task.name for task in tasks}
    blocks = []
    for key, dim in dims.items():
        # TorchRec's key of a feature that is looked up in several tables is feature@table.
        feature, _, table = key.partition("@")
        base, _, task = table.rpartition("@")
        groups = tuple((feature_groups or {}).get(feature, ()))
        owned = bool(base) and task in of_task
        blocks.append(InputBlock(dim, feature, base if owned else table, of_task[task] if owned else None, groups))
    for column in range(dense_in_features):
        known = dense_groups is not None and len(dense_groups) == dense_in_features
        blocks.append(InputBlock(1, groups=tuple(dense_groups[column]) if known and dense_groups else ()))
    return tuple(blocks)


def embedding_dims(embedding_bag_collection: nn.Module) -> dict[str, int]:
    """Width of each pooled embedding, by its key in the KeyedTensor, in table order.

    Raises:
        TypeError: the module has no ``embedding_bag_configs()``.

    Example:
        >>> tables = [EmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=4, feature_names=["a", "b"])]
        >>> embedding_dims(EmbeddingBagCollection(tables=tables))
        {'a': 4, 'b': 4}
    """
    tables = _configs(embedding_bag_collection)
    names = get_embedding_names_by_table(tables)
    return {name: t.embedding_dim for t, of in zip(tables, names, strict=True) for name in of}


def looked_up_features(embedding_bag_collection: nn.Module) -> set[str]:
    """The sparse features that the collection looks up."""
    return {feature for table in _configs(embedding_bag_collection) for feature in table.feature_names}


def rows_of_features(*collections: nn.Module) -> dict[str, int]:
    """Sparse feature -> rows of the first table that it looks up.

    Args:
        collections: EmbeddingBagCollections and EmbeddingCollections, or modules like them.

    Example:
        >>> tables = [EmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=4, feature_names=["a", "b"])]
        >>> rows_of_features(EmbeddingBagCollection(tables=tables))
        {'a': 9, 'b': 9}
    """
    found: dict[str, int] = {}
    for collection in collections:
        told = getattr(collection, "embedding_configs", None)
        for table in told() if told is not None else _configs(collection):
            for feature in table.feature_names:
                found.setdefault(feature, table.num_embeddings)
    return found


def _configs(embedding_bag_collection: nn.Module) -> list[EmbeddingBagConfig]:
    if isinstance(embedding_bag_collection, ManagedCollisionEmbeddingBagCollection):
        embedding_bag_collection = embedding_bag_collection._embedding_module
    configs: Any = getattr(embedding_bag_collection, "embedding_bag_configs", None)
    if configs is None:
        raise TypeError(
            f"{type(embedding_bag_collection).__name__} has no embedding_bag_configs(); "
            "expected a TorchRec EmbeddingBagCollection or a module like it"
        )
    return configs()


def pooled_by_key(pooled: Pooled, dims: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Pooled embeddings (B, dim) by their key.

    Args:
        pooled: a KeyedTensor, a tuple that starts with one, or a ready (B, Σ dims) tensor in the order of `dims`.
        dims: key -> width.

    Example:
        >>> pooled_by_key(torch.tensor([[1.0, 2.0, 3.0]]), {"a": 1, "b": 2})["b"]
        tensor([[2., 3.]])
    """
    if isinstance(pooled, tuple):
        pooled = pooled[0]
    if isinstance(pooled, torch.Tensor):
        return dict(zip(dims, torch.split(pooled, list(dims.values()), dim=1), strict=True))
    by_key = pooled if isinstance(pooled, Mapping) else _parts(pooled)
    return {key: by_key[key] for key in dims}


def _parts(pooled: Any) -> dict[str, torch.Tensor]:
    """All of a KeyedTensor or of a promise of one, cut at once.

    Asked for key by key, a promise is looked at anew each time, and backward fills a tensor of all keys for each.
    """
    return dict(zip(pooled.keys(), torch.split(pooled.values(), pooled.length_per_key(), dim=1), strict=True))


def inputs_as_one(pooled: Pooled, keys: Sequence[str]) -> torch.Tensor:
    """(B, Σ widths): inputs side by side, from what `Lookups` or an embedding-bag collection returned.

    Example:
        >>> inputs_as_one({"a": torch.zeros(2, 1), "b": torch.ones(2, 2)}, ["b", "a"])
        tensor([[1., 1., 0.],
                [1., 1., 0.]])
    """
    if isinstance(pooled, tuple):
        pooled = pooled[0]
    if isinstance(pooled, torch.Tensor):
        return pooled
    if not isinstance(pooled, Mapping):
        if list(pooled.keys()) == list(keys):  # in another order under another sharding plan
            return pooled.values()
        pooled = _parts(pooled)
    return torch.cat([pooled[key] for key in keys], dim=1)


class PooledConcat(nn.Module):
    """Concatenates pooled embeddings by key and appends the dense features.

    A KeyedTensor's own ``values()`` follow the sharding plan, so a model that feeds them to a layer is another model on
    another number of ranks.

    Args:
        dims: key of each pooled embedding -> its width, in the order wanted.
        embedding_dropout: while training, the share of features whose whole embedding is zero in a row.
        dense_dropout: dropout of the dense features.
        dense_noise: while training, standard deviation of Gaussian noise added to them.
    """

    owner: torch.Tensor

    def __init__(
        self,
        dims: Mapping[str, int],
        *,
        embedding_dropout: float = 0.0,
        dense_dropout: float = 0.0,
        dense_noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.keys = tuple(dims)
        self.embedding_dropout, self.dense_dropout, self.dense_noise = embedding_dropout, dense_dropout, dense_noise
        # A feature that is left out is left out of all tables that it is looked up in.
        features = list(dict.fromkeys(key.split("@")[0] for key in dims))
        of_key = torch.tensor([features.index(key.split("@")[0]) for key in dims], dtype=torch.int64)
        self.num_features = len(features)
        owner = torch.repeat_interleave(of_key, torch.tensor(list(dims.values()), dtype=torch.int64))
        self.register_buffer("owner", owner, persistent=False)

    def forward(self, dense_features: torch.Tensor, pooled: Pooled) -> torch.Tensor:
        """(B, Σ dims + D) from a KeyedTensor (or a tuple that starts with one, or a ready (B, Σ dims) tensor) and
        (B, D) dense features."""
        embeddings = inputs_as_one(pooled, self.keys) if self.keys else dense_features[:, :0]
        dense = dense_features.to(embeddings.dtype)
        if self.training and self.dense_noise > 0:
            dense = dense + self.dense_noise * torch.randn_like(dense)
        dense = F.dropout(dense, self.dense_dropout, self.training)
        if self.training and self.embedding_dropout > 0:
            kept = F.dropout(embeddings.new_ones(len(embeddings), self.num_features), self.embedding_dropout)
            embeddings = embeddings * kept[:, self.owner]
        return torch.cat([embeddings, dense], dim=1) if dense.shape[1] else embeddings


def visible_columns(
    inputs: Sequence[Group],
    dims: Mapping[str, int],
    dense_in_features: int,
    feature_groups: Mapping[str, Sequence[Group]] | None,
    dense_groups: Sequence[Sequence[Group]] | None,
) -> torch.Tensor:
    """Which columns of the concatenated input a task with these `inputs` may see: (Σ dims + D,) of 0.0 and 1.0.

    A column that belongs to several groups is seen only by a task that may see all of them.

    Raises:
        ValueError: the task is restricted and some column's group is not told.

    Example:
        >>> visible_columns(["user"], {"u": 2, "i": 1}, 1, {"u": ["user"], "i": ["item"]}, [["user", "item"]])
        tensor([1., 1., 0., 0.])
    """
    width = sum(dims.values()) + dense_in_features
    if set(inputs) >= set(GROUPS):
        return torch.ones(width)
    of_feature = feature_groups or {}
    columns: list[float] = []
    for name, dim in dims.items():
        groups = of_feature.get(name, of_feature.get(name.split("@")[0]))
        if groups is None:
            raise ValueError(
                f"a task is restricted to inputs={tuple(inputs)}, so feature_groups must name the group of {name!r}"
            )
        columns += [float(set(groups) <= set(inputs))] * dim
    if dense_in_features:
        if dense_groups is None or len(dense_groups) != dense_in_features:
            raise ValueError(
                f"a task is restricted to inputs={tuple(inputs)}, so dense_groups must name the groups of each of the "
                f"{dense_in_features} dense columns"
            )
        columns += [float(set(groups) <= set(inputs)) for groups in dense_groups]
    return torch.tensor(columns)


def single_value(sparse_features: KeyedJaggedTensor, feature: str) -> torch.Tensor:
    """The first value of a feature in each row (B,), -1 where it has none."""
    jagged = sparse_features[feature]
    offsets, lengths = jagged.offsets(), jagged.lengths()
    padded = torch.cat([jagged.values(), jagged.values().new_full((1,), -1)])
    return torch.where(lengths > 0, padded[offsets[:-1]], -1)
