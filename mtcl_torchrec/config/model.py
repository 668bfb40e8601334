"""The model: trunk and towers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, field_validator, model_validator

from mtcl_torchrec.config.base import Fraction, Part, known_kind
from mtcl_torchrec.config.sequences import SequenceOrKind, TowerConfig, TowerOrKind, check_sequences
from mtcl_torchrec.schema import Feature, Schema, check_groups, check_unique, nearest, own_table

TrunkKind = Literal["shared_bottom", "single_task", "mmoe", "ple", "adatt", "home", "stem"]
KINDS: tuple[TrunkKind, ...] = get_args(TrunkKind)

# Options that only some kinds have.  A kind given by its import path has `options` instead.
_BELONGS: dict[str, set[str]] = {
    "num_experts": {"mmoe"},
    "shared_experts": {"ple", "adatt", "home", "stem"},
    "task_experts": {"ple", "adatt", "home", "stem"},
    "group_experts": {"home"},
    "levels": {"ple", "adatt", "stem"},
    "gate_dropout": {"mmoe", "ple", "adatt", "home", "stem"},
    "groups": {"home"},
    "feature_rank": {"home"},
    "own_tables": {"stem"},
    "expert_layers": set(KINDS),
    "dropout": set(KINDS),
    "norm": set(KINDS),
}


class TrunkConfig(Part):
    """The shared part of the model; see `mtcl_torchrec.modules.trunks`.

    Args:
        kind: one of ours, or the import path of an `nn.Module` of your own, such as ``my_package.my_module:MyTrunk``.
            The module must be importable (installed, or on PYTHONPATH), and is imported whenever the model is built,
            also when a finished run is read back: such a YAML is code, to be trusted like code.
        expert_layers: widths of an expert.
        num_experts: of MMoE.
        shared_experts, task_experts: in each level.  The default is 1, but 2 shared experts in PLE and none in AdaTT.
        group_experts: of HoME, for each group in each level.
        levels: the default is 2, but 1 in STEM.
        groups: of HoME: lists of task names; the default groups the tasks by kind.
        feature_rank: of HoME's feature gates; 0 is none.
        own_tables: of STEM: the tables of which each task has one of its own, called ``<table>@<task>``; the default is
            all of them but those that histories look up, which are always shared.
        options: of a trunk of your own: arguments of its constructor.
    """

    kind: str = "mmoe"
    expert_layers: Annotated[list[PositiveInt], Field(min_length=1)] = Field(default_factory=lambda: [128, 64])
    num_experts: PositiveInt = 4
    shared_experts: NonNegativeInt | None = None
    task_experts: PositiveInt | None = None
    group_experts: PositiveInt = 1
    levels: PositiveInt | None = None
    dropout: Fraction = 0.0
    gate_dropout: Fraction = 0.0
    norm: Literal["layer", "rms", "none"] = "layer"
    groups: Annotated[list[list[str]], Field(min_length=1)] | None = None
    feature_rank: NonNegativeInt = 8
    own_tables: Annotated[list[str], Field(min_length=1)] | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        return known_kind(kind, KINDS, "MyTrunk")

    @model_validator(mode="after")
    def _fitting(self) -> TrunkConfig:
        for field, kinds in _BELONGS.items():
            if field in self.model_fields_set and self.kind not in kinds:
                own = "; give a trunk of your own its arguments as options" if self.import_path else ""
                raise ValueError(f"{field} belongs to {' and '.join(sorted(kinds))}, not to {self.kind}{own}")
        if self.options and not self.import_path:
            raise ValueError(f"options belong to a trunk given by its import path, not to {self.kind}")
        if self.shared_experts == 0 and self.kind != "adatt":
            raise ValueError(f"{self.kind} needs at least one of shared_experts")
        return self

    @property
    def import_path(self) -> str | None:
        """Where a trunk of one's own is, None for a kind of ours."""
        return self.kind if ":" in self.kind else None


class GateConfig(Part):
    """One of PEPNet's gates; see `mtcl_torchrec.modules.gates`.

    Args:
        features: names of the sparse features that it reads.  The default is every sparse feature of the context alone
            for ``epnet``, every sparse feature for ``ppnet``.
        hidden: width of a gate's hidden layer.
    """

    features: Annotated[list[str], Field(min_length=1)] | None = None
    hidden: PositiveInt = 32


class ModelConfig(Part):
    """Everything between the embeddings and the predictions.

    Args:
        trunk: what the tasks share.
        epnet: a gate on the input (PEPNet), with any trunk.
        ppnet: gates on each task's representation and tower (PEPNet), with any trunk.
        sequences: history feature -> how it becomes one vector; those that are left out take ``din``.  A name alone is
            a kind.
        tower: what reads a task's representation before `tower_layers`; ``lstm`` alone is a kind.
        tower_layers: widths of each task's own network on top of the trunk.
        cross_layers, cross_rank: low-rank cross layers (DCN v2) before the trunk; 0 layers is none.
        embedding_dropout: share of features whose whole embedding is left out of a row while training.
        dense_dropout, dense_noise: dropout of dense inputs, and standard deviation of noise added to them in training.
        tower_dropout: dropout in the towers.
    """

    trunk: TrunkConfig = Field(default_factory=TrunkConfig)
    epnet: GateConfig | None = None
    ppnet: GateConfig | None = None
    sequences: dict[str, SequenceOrKind] = Field(default_factory=dict)
    tower: TowerOrKind = Field(default_factory=TowerConfig)
    tower_layers: list[PositiveInt] = Field(default_factory=lambda: [32])
    cross_layers: NonNegativeInt = 0
    cross_rank: PositiveInt = 64
    embedding_dropout: Fraction = 0.0
    dense_dropout: Fraction = 0.0
    dense_noise: NonNegativeFloat = 0.0
    tower_dropout: Fraction = 0.0

    @model_validator(mode="after")
    def _nothing_mixes_the_columns(self) -> ModelConfig:
        if self.trunk.kind == "stem" and self.cross_layers:
            raise ValueError("cross_layers would mix the tasks' own columns before the trunk, which stem keeps apart")
        return self

    def copied_tables(self, schema: Schema) -> dict[str, tuple[str, ...]]:
        """Table -> the tasks that have a table of their own beside it."""
        if self.trunk.kind != "stem":
            return {}
        named = self.trunk.own_tables
        tables = _own_by_default(schema) if named is None else named
        return {table: tuple(task.name for task in schema.tasks if task.in_trunk) for table in tables}

    def tables(self, schema: Schema) -> dict[str, list[Feature]]:
        """Every embedding table of the model, the tasks' own ones included -> the features that look it up."""
        shared = schema.tables()
        copied = self.copied_tables(schema)
        own = {
            own_table(t, task.name): shared[t]
            for task in schema.tasks
            for t in shared
            if task.name in copied.get(t, ())
        }
        return {**shared, **own}

    def check(self, schema: Schema) -> None:
        """See that what is named here is in the schema.

        Raises:
            ValueError: naming the key and, if there is one, the nearest right name.
        """
        if not any(task.in_trunk for task in schema.tasks):
            unread = ("trunk", "tower_layers", "tower_dropout", "cross_layers", "epnet", "ppnet")
            for key in (key for key in unread if key in self.model_fields_set):
                raise ValueError(f"model.{key}: every task has a dot head, which reads the embeddings themselves")
        tables = schema.tables()
        for name in self.trunk.own_tables or ():
            if name not in tables:
                raise ValueError(f"model.trunk.own_tables: no table {name!r}{nearest(name, tables)}")
            if name in schema.sequence_tables():
                raise ValueError(
                    f"model.trunk.own_tables: a history looks up table {name!r}, which is then shared by all tasks"
                )
            if tables[name][0].kind == "vector":
                raise ValueError(f"model.trunk.own_tables: {name!r} adds to vectors that all tasks share")
        check_sequences(self.sequences, self.tower, schema)
        own = [own_table(table, task) for table, of in self.copied_tables(schema).items() for task in of]
        if own:
            names = [name.replace(".", "_") for name in (*tables, *own)]
            check_unique("table (dots and underscores are the same)", names)
        if self.trunk.groups is not None:
            try:
                check_groups(self.trunk.groups, [task.name for task in schema.tasks if task.in_trunk])
            except ValueError as error:
                raise ValueError(f"model.trunk.{error}") from None
        for key, gate in (("epnet", self.epnet), ("ppnet", self.ppnet)):
            if gate is not None:
                _check_gate(f"model.{key}", gate.features, schema, key == "epnet")


def _own_by_default(schema: Schema) -> list[str]:
    """The tables of which a task can have its own: none of vectors, and none that a history looks up."""
    shared = schema.sequence_tables()
    return [t for t, of in schema.tables().items() if of[0].kind != "vector" and t not in shared]


def _check_gate(key: str, features: Iterable[str] | None, schema: Schema, of_context: bool) -> None:
    sparse = {feature.name: feature for feature in schema.sparse_features}
    for name in features or ():
        if name in {feature.name for feature in schema.dense_features}:
            raise ValueError(f"{key}.features: {name!r} is dense, and the gate reads embeddings")
        if name in sparse and sparse[name].beside is not None:
            raise ValueError(f"{key}.features: {name!r} is part of history {sparse[name].beside!r}; name that")
        if name not in sparse:
            raise ValueError(f"{key}.features: no sparse feature {name!r}{nearest(name, sparse)}")
    if features is None and of_context and not any(f.group == ("context",) for f in sparse.values()):
        raise ValueError(f"{key}: no sparse feature is of the group context; name features")
