"""What the data is: features in groups (user, item, context), the tasks to predict, and who is who.

A `Schema` is built in Python or read from the `schema:` part of a run's YAML.  Nothing here touches
data or tensors; every other room of the package is told by these objects what to do.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

Group = Literal["user", "item", "context"]
GROUPS: tuple[Group, ...] = ("user", "item", "context")
_FOR_BINARY = ("negative_rate", "pos_weight", "focal_gamma", "pairwise")  # fields of a task


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(dict.fromkeys(value)) if isinstance(value, list) else value


GroupSet = Annotated[tuple[Group, ...], BeforeValidator(_as_tuple)]


class DataError(ValueError):
    """The data does not fit the schema; the message names the column, row or label."""


class ConfigError(ValueError):
    """The configuration is wrong; the message names the key and, if there is one, the nearest right one."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """A hint for a mistyped name.

    Example:
        >>> nearest("is_clik", ["is_click", "long_view"])
        " (did you mean 'is_click'?)"
    """
    found = difflib.get_close_matches(name, [str(c) for c in candidates], n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def own_table(table: str, task: str) -> str:
    """Name of the copy of an embedding table that one task alone trains.

    Example:
        >>> own_table("user_id", "click")
        'user_id@click'
    """
    return f"{table}@{task}"


class _Declared(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Feature(_Declared):
    """One input column.

    Args:
        name: name of the feature, and of its column unless `column` says otherwise.
        group: whose property it is: ``"user"``, ``"item"`` or ``"context"``.  A feature of a pair
            (how this user likes this tag) belongs to several groups, and a task restricted by
            `Task.inputs` sees it only if it may see all of them.
        kind: ``"id"`` (one categorical value a row), ``"bag"`` (a list of them: a Parquet list
            column, or a string split at `separator`) or ``"dense"`` (a number).
        vocabulary_size: rows of the embedding table, row 0 (unknown or missing) included.  May be left out
            where ``encoding="vocabulary"``: the training split decides.
        embedding_dim: width of the embedding, a multiple of 4.
        pooling: how the embeddings of a bag become one vector.
        encoding: how a value becomes a row: ``"index"`` (it already is an integer in
            [0, vocabulary_size)), ``"vocabulary"`` (values of the training split are numbered
            from 1, any other takes row 0) or ``"hash"`` (into 1 … vocabulary_size - 1).
        min_count: values rarer than this in the training split take row 0 (`vocabulary` only).
        table: features that name the same table share its rows; the default is a table of its own.
        data_type: number format of the embedding table's weights.  Shorter ones than fp32 need a fused optimizer, bf16
            needs CUDA.
        transform: of a dense feature before it is standardised: ``"none"``, ``"log"``
            (sign(x)·log(1 + |x|)) or ``"logit"`` (for rates in [0, 1]).
        clip: a standardised dense value is cut at ± this many standard deviations.
        mark_missing: whether a dense feature that is missing in some training rows gets a second column that says so.

    Example:
        >>> Feature(name="city", group="user", kind="id", vocabulary_size=1000).rows_from
        'city'
    """

    name: str
    group: Annotated[GroupSet, Field(min_length=1)]
    kind: Literal["id", "bag", "dense"] = "id"
    column: str | None = None
    vocabulary_size: PositiveInt | None = None
    embedding_dim: PositiveInt = 16
    pooling: Literal["sum", "mean"] = "mean"
    encoding: Literal["index", "vocabulary", "hash"] = "vocabulary"
    min_count: PositiveInt = 1
    separator: Annotated[str, Field(min_length=1)] = "|"
    table: str | None = None
    data_type: Literal["fp32", "fp16", "bf16"] = "fp32"
    transform: Literal["none", "log", "logit"] = "none"
    clip: Annotated[float, Field(gt=0)] = 5.0
    mark_missing: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> Feature:
        if self.kind == "dense":
            embedding_only = self.model_fields_set & {
                "vocabulary_size", "embedding_dim", "pooling", "encoding", "min_count", "table", "separator",
                "data_type",
            }  # fmt: skip
            if embedding_only:
                raise ValueError(f"feature {self.name!r} is dense and has no {sorted(embedding_only)[0]}")
        else:
            if self.model_fields_set & {"transform", "clip", "mark_missing"}:
                raise ValueError(
                    f"feature {self.name!r} is no dense feature: transform, clip and mark_missing do nothing"
                )
            if self.encoding != "vocabulary" and self.vocabulary_size is None:
                raise ValueError(f"feature {self.name!r}: encoding {self.encoding!r} needs vocabulary_size")
            if self.embedding_dim % 4:
                raise ValueError(f"feature {self.name!r}: embedding_dim is a multiple of 4 (FBGEMM's kernels need it)")
            if "@" in self.name:
                raise ValueError(f"feature {self.name!r}: TorchRec takes no '@' in a name; use `column` to rename it")
            if self.vocabulary_size is not None and self.vocabulary_size < 2:
                raise ValueError(f"feature {self.name!r}: vocabulary_size must be at least 2 (row 0 is 'unknown')")
        return self

    @property
    def rows_from(self) -> str:
        """The column this feature is read from."""
        return self.column or self.name

    @property
    def table_name(self) -> str:
        """The embedding table this feature looks up."""
        return self.table or self.name


ChainKind = Literal["esmm", "escm2_ips", "escm2_dr", "aitm"]
# The kinds that each option of a chain belongs to.
_CHAIN_OPTIONS: dict[str, tuple[ChainKind, ...]] = {
    "joint_weight": ("escm2_ips", "escm2_dr"),
    "conditional_weight": ("escm2_ips", "escm2_dr"),
    "min_propensity": ("escm2_ips", "escm2_dr"),
    "self_normalised": ("escm2_ips",),
    "imputation_weight": ("escm2_dr",),
    "calibrator_weight": ("aitm",),
}


class Chain(_Declared):
    """How a task learns from the event that it comes after; see `mtcl_torchrec.modules.chains`.

    Args:
        kind: ``"esmm"`` (the product of the probabilities, learnt over the whole space), ``"escm2_ips"`` and
            ``"escm2_dr"`` (and the conditional probability from weighted rows), or ``"aitm"`` (the parent's tower
            tells the child's).
        joint_weight: λ_g of ESCM²: of the loss of the event over the whole space.
        conditional_weight: λ_c of ESCM²: of the loss of the conditional probability.
        min_propensity: ESCM² weights a row at most by one over this.
        self_normalised: whether those weights are divided by their mean over the global batch; of ``"escm2_ips"``.
        imputation_weight: of the loss of the imputed errors, within `conditional_weight`; of ``"escm2_dr"``.
        calibrator_weight: α of AITM: of the excess of the child's probability over its parent's.

    Example:
        >>> Task.binary("buy", after="click", chain={"kind": "escm2_ips", "min_propensity": 0.1}).chain.min_propensity
        0.1
    """

    kind: ChainKind = "esmm"
    joint_weight: NonNegativeFloat = 1.0
    conditional_weight: NonNegativeFloat = 0.1
    min_propensity: Annotated[float, Field(gt=0, le=1)] = 0.05
    self_normalised: bool = False
    imputation_weight: NonNegativeFloat = 1.0
    calibrator_weight: NonNegativeFloat = 0.6


class Task(_Declared):
    """One event or quantity to predict.

    Make one with `Task.binary`, `Task.multiclass` or `Task.regression`.

    Args:
        name: name of the task; its prediction's key in the model's output.
        kind: decides the head and the loss: BCE with logits, cross-entropy, or MSE / Huber.
        label: label column; the default is `name`.  Binary labels are 0 or 1, classes are integers in
            [0, num_classes).  A missing label (NaN) trains nothing and is counted nowhere.
        weight: wᵢ in L = Σ wᵢ Lᵢ + λR.
        num_classes: of a multiclass task.  May be left out in a schema where there is an `item_class`.
        item_class: id feature that holds the candidate item's own class; the fused score takes the predicted
            probability of that class.  In a schema, the labels are values of that feature then: its table's rows are
            the classes, and row 0, unknown, is no label.
        mask: a column; the task's label counts only where it is true (``long_view`` only where
            ``is_click``).
        sample_weight: a column of non-negative weights for this task's loss.
        inputs: feature groups that the task may see; the rest is zero on its way through the
            trunk.  The default is all of them.
        loss: of a regression task.
        huber_delta: where Huber's loss turns from square to linear, in standard deviations of the label.
        mean, std: of a regression task's label: the head predicts the standardised label.  Training
            from files takes them from the training split when they are left out.
        after: the binary task whose event comes before this one in a chain (``buy`` after ``click``): this event cannot
            happen without that one.  The task then predicts the probability of its event over *all* rows.  Its label is
            0 where the parent's is 0, also where it is missing there (or hidden by `mask`); 1 beside a parent's 0 is an
            error in the data.
        chain: of a task that comes after another: the name of a kind, or a mapping with the options of `Chain`; the
            default is ``"esmm"``.
        negative_rate: r in (0, 1], of a binary task: each of its negatives trains with probability r, drawn anew in
            every step; the row stays for the other tasks.  Predictions are corrected exactly, see `logit_shift`.
        pos_weight: w, of a binary task: its positives weigh w times in the loss; corrected likewise.
        focal_gamma: γ of the focal loss, of a binary task; 0 is the plain one.  Its predictions rank, but they are
            pulled towards ½ and no probabilities (see `calibrated`).
        pairwise: weight, in this binary task's loss, of a logistic loss over pairs of a positive and a negative row of
            one request (see `Schema.request`); for tasks so sparse that a row alone says little.  Rows of a request
            that lie in different batches, or on different ranks, are not compared.

    Example:
        >>> Task.binary("click", weight=2.0).label_column
        'click'
        >>> Task.binary("buy", after="click").conditional_name
        'buy|click'
        >>> round(Task.binary("like", negative_rate=0.1, pos_weight=2.0).logit_shift, 4)
        2.9957
        >>> Task.multiclass("category", num_classes=18).kind
        'multiclass'
    """

    name: str
    kind: Literal["binary", "multiclass", "regression"]
    label: str | None = None
    weight: Annotated[float, Field(ge=0)] = 1.0
    num_classes: Annotated[int, Field(ge=2)] | None = None
    item_class: str | None = None
    mask: str | None = None
    sample_weight: str | None = None
    inputs: Annotated[GroupSet, Field(min_length=1)] = GROUPS
    loss: Literal["mse", "huber"] = "mse"
    huber_delta: Annotated[float, Field(gt=0)] = 1.0
    mean: float | None = None
    std: Annotated[float, Field(gt=0)] | None = None
    after: str | None = None
    chain: Chain = Field(default_factory=Chain)

    @field_validator("chain", mode="before")
    @classmethod
    def _a_kind_alone(cls, value: Any, info: ValidationInfo) -> Any:
        value = {"kind": value} if isinstance(value, str) else value
        kind, kinds = value.get("kind", "esmm") if isinstance(value, dict) else "esmm", get_args(ChainKind)
        if kind not in kinds:
            raise ValueError(
                f"task {info.data.get('name')!r}: no chain {kind!r}{nearest(str(kind), kinds)}; "
                f"there are {', '.join(kinds)}"
            )
        return value

    negative_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    pos_weight: Annotated[float, Field(gt=0)] = 1.0
    focal_gamma: Annotated[float, Field(ge=0)] = 0.0
    pairwise: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        if self.kind == "multiclass" and self.num_classes is None and self.item_class is None:
            raise ValueError(f"task {self.name!r}: a multiclass task needs num_classes")
        if self.kind != "multiclass" and self.num_classes is not None:
            raise ValueError(f"task {self.name!r}: num_classes belongs to multiclass tasks")
        if self.kind != "multiclass" and self.item_class is not None:
            raise ValueError(f"task {self.name!r}: item_class belongs to multiclass tasks")
        if self.kind != "regression" and self.model_fields_set & {"loss", "huber_delta", "mean", "std"}:
            raise ValueError(f"task {self.name!r}: loss, huber_delta, mean and std belong to regression tasks")
        if self.kind != "binary" and (given := [f for f in _FOR_BINARY if f in self.model_fields_set]):
            raise ValueError(f"task {self.name!r}: {given[0]} belongs to binary tasks")
        if self.name == "score":
            raise ValueError("'score' is the key of the fused score and cannot name a task")
        if not self.name:
            raise ValueError("a task needs a name")
        self._check_chain()
        return self

    def _check_chain(self) -> None:
        """Raise ValueError where `after` and `chain` do not fit this task or each other."""
        if self.after is None:
            if "chain" in self.model_fields_set:
                raise ValueError(f"task {self.name!r}: chain needs after, the task whose event comes before")
            return
        if self.kind != "binary":
            raise ValueError(f"task {self.name!r}: after belongs to binary tasks")
        if self.after == self.name:
            raise ValueError(f"task {self.name!r}: after: a task cannot come after itself")
        for option, kinds in _CHAIN_OPTIONS.items():
            if option in self.chain.model_fields_set and self.chain.kind not in kinds:
                raise ValueError(
                    f"task {self.name!r}: chain.{option} belongs to {' and '.join(kinds)}, not to {self.chain.kind}"
                )
        if self.chain.joint_weight == self.chain.conditional_weight == 0:
            raise ValueError(
                f"task {self.name!r}: chain.joint_weight and chain.conditional_weight are both 0: nothing trains it"
            )

    @classmethod
    def binary(cls, name: str, **options: Any) -> Task:
        """A yes/no event, predicted as its probability."""
        return cls(name=name, kind="binary", **options)

    @classmethod
    def multiclass(cls, name: str, num_classes: int, **options: Any) -> Task:
        """One of `num_classes` classes, predicted as a probability for each."""
        return cls(name=name, kind="multiclass", num_classes=num_classes, **options)

    @classmethod
    def regression(cls, name: str, **options: Any) -> Task:
        """A number, predicted in the label's own unit."""
        return cls(name=name, kind="regression", **options)

    @property
    def label_column(self) -> str:
        """The column this task's label is read from."""
        return self.label or self.name

    @property
    def out_features(self) -> int:
        """Logits of the task's head."""
        return self.num_classes or 1

    @property
    def conditional_name(self) -> str | None:
        """Key of the prediction given the parent's event, ``"buy|click"``; None where no head predicts that."""
        return f"{self.name}|{self.after}" if self.after and self.chain.kind != "aitm" else None

    @property
    def logit_shift(self) -> float:
        """log w - log r: by how much the log-odds lie higher in what the loss sees than in all rows.

        Where a negative trains with probability r and a positive weighs w, a probability p becomes
        p' = w p / (w p + r (1 - p)), and logit p' = logit p + log w - log r.  The model's logits are those of p, and
        the loss adds the shift: every prediction, and the fused score, is that of all rows.
        """
        return math.log(self.pos_weight) - math.log(self.negative_rate)

    @property
    def calibrated(self) -> bool:
        """Whether the prediction estimates a probability, class probabilities or mean; a focal loss's does not."""
        return self.focal_gamma == 0


class Schema(_Declared):
    """Features, tasks, and the columns that name the user, the item and the time.

    Args:
        features: the input columns.
        tasks: what is predicted.
        user: column that names the user (metrics within a user, `recommend --user`).
        item: column that names the item.
        time: column of the event's time; a number or a timestamp.
        request: column that names the request whose rows `Task.pairwise` compares; the default is the user.

    Example:
        >>> schema = Schema(
        ...     features=[Feature(name="user_id", group="user"), Feature(name="price", group="item", kind="dense")],
        ...     tasks=[Task.binary("buy")],
        ...     user="user_id",
        ... )
        >>> [f.name for f in schema.sparse_features], [f.name for f in schema.dense_features]
        (['user_id'], ['price'])
    """

    features: Annotated[tuple[Feature, ...], Field(min_length=1)]
    tasks: Annotated[tuple[Task, ...], Field(min_length=1)]
    user: str | None = None
    item: str | None = None
    time: str | None = None
    request: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Schema:
        check_unique("feature", [f.name for f in self.features])
        check_unique("task", [t.name for t in self.tasks])
        chain_links(self.tasks)
        sparse = {f.name: f for f in self.sparse_features}
        for task in self.tasks:
            if task.item_class is not None and task.item_class not in sparse:
                raise ValueError(
                    f"task {task.name!r}: item_class {task.item_class!r} is no id feature"
                    f"{nearest(task.item_class, sparse)}"
                )
        paired = next((t.name for t in self.tasks if t.pairwise), None)
        if paired is not None and (self.request or self.user) is None:
            raise ValueError(f"task {paired!r}: pairwise compares rows of one request, and needs request or user")
        if paired is None and self.request is not None:
            raise ValueError("request says which rows `pairwise` compares, and no task has a pairwise term")
        check_unique("table (dots and underscores are the same)", [t.replace(".", "_") for t in self.tables()])
        for table, features in self.tables().items():
            for field in ("embedding_dim", "pooling", "encoding", "vocabulary_size", "min_count", "data_type"):
                if len({getattr(f, field) for f in features}) > 1:
                    names = " and ".join(f.name for f in features)
                    raise ValueError(f"features {names} share table {table!r} and must agree on {field}")
        return self

    @property
    def sparse_features(self) -> tuple[Feature, ...]:
        """Features looked up in embedding tables, in declaration order."""
        return tuple(f for f in self.features if f.kind != "dense")

    @property
    def dense_features(self) -> tuple[Feature, ...]:
        """Numeric features, in declaration order."""
        return tuple(f for f in self.features if f.kind == "dense")

    def tables(self) -> dict[str, list[Feature]]:
        """Embedding table name -> features that look it up."""
        tables: dict[str, list[Feature]] = {}
        for feature in self.sparse_features:
            tables.setdefault(feature.table_name, []).append(feature)
        return tables

    @property
    def request_column(self) -> str | None:
        """The column that names the request, where some task compares rows of one."""
        return (self.request or self.user) if any(t.pairwise for t in self.tasks) else None

    def label_columns(self) -> list[str]:
        """Every column that the tasks read, once."""
        columns: list[str] = []
        for task in self.tasks:
            columns += [c for c in (task.label_column, task.mask, task.sample_weight) if c]
        if self.request_column is not None:
            columns.append(self.request_column)
        return list(dict.fromkeys(columns))


def check_unique(what: str, names: Sequence[str]) -> None:
    """Raise ValueError if a name occurs twice.

    Example:
        >>> check_unique("task", ["click", "click"])
        Traceback (most recent call last):
            ...
        ValueError: task 'click' is declared twice
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{what} {name!r} is declared twice")
        seen.add(name)


def chain_links(tasks: Sequence[Task]) -> list[tuple[int, int]]:
    """(child, parent), numbers of tasks, of each task that comes after another; a parent's own link comes first.

    Raises:
        ValueError: a parent that is missing, not binary or no probability, a circle, a mask that hides what the chain
            is about, or a task called what the conditional prediction of another is called.

    Example:
        >>> chain_links([Task.binary("buy", after="cart"), Task.binary("cart", after="view"), Task.binary("view")])
        [(1, 2), (0, 1)]
    """
    number = {task.name: i for i, task in enumerate(tasks)}
    for task in tasks:
        if task.conditional_name in number:
            raise ValueError(
                f"task {task.conditional_name!r}: the conditional prediction of {task.name!r} is called so"
            )
        if task.after is None:
            continue
        if task.after not in number:
            others = [name for name in number if name != task.name]
            raise ValueError(f"task {task.name!r}: after: no task {task.after!r}{nearest(task.after, others)}")
        parent = tasks[number[task.after]]
        if parent.kind != "binary":
            raise ValueError(f"task {task.name!r}: after: {task.after!r} is a {parent.kind} task, not a binary one")
        if task.chain.kind != "aitm" and not parent.calibrated:
            raise ValueError(
                f"task {task.name!r}: after: the chain reckons with the probability of {task.after!r}, and a focal "
                "loss predicts none; take aitm, or leave focal_gamma out"
            )
        if task.mask == parent.label_column:
            raise ValueError(
                f"task {task.name!r}: mask {task.mask!r} would hide rows that it learns from after {task.after!r}; "
                f"leave mask out: the label counts as 0 where {task.mask!r} is 0"
            )
    links: list[tuple[int, int]] = []
    placed = {i for i, task in enumerate(tasks) if task.after is None}
    while len(placed) < len(tasks):
        ready = [(i, number[t.after]) for i, t in enumerate(tasks) if i not in placed and t.after]
        ready = [(child, parent) for child, parent in ready if parent in placed]
        if not ready:
            circle = ", ".join(repr(task.name) for i, task in enumerate(tasks) if i not in placed)
            raise ValueError(f"after: the tasks {circle} come after each other in a circle")
        links += ready
        placed |= {child for child, _ in ready}
    return links


def check_groups(groups: Sequence[Sequence[str]], tasks: Sequence[str]) -> None:
    """See that groups of tasks hold each task once.

    Raises:
        ValueError: a task is in none, in two, or not known, or a group is empty.

    Example:
        >>> check_groups([["click", "like"]], ["click", "like", "seconds"])
        Traceback (most recent call last):
            ...
        ValueError: groups: task 'seconds' is in none
    """
    placed = [task for group in groups for task in group]
    for task in placed:
        if task not in tasks:
            raise ValueError(f"groups: no task {task!r}{nearest(task, tasks)}")
        if placed.count(task) > 1:
            raise ValueError(f"groups: task {task!r} is in two")
    for task in tasks:
        if task not in placed:
            raise ValueError(f"groups: task {task!r} is in none")
    if not all(groups):
        raise ValueError("groups: one is empty")
