"""What is predicted, and which event comes after which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, NonNegativeFloat, ValidationInfo, field_validator, model_validator

from mtcl_torchrec.schema.declared import GROUPS, Declared, GroupSet, nearest
from mtcl_torchrec.schema.heads import HEADS, Head

# What names of tasks stand beside in predictions and metrics, and would be taken for.
RESERVED = {
    "score": "the fused score",
    "score_std": "the spread of an ensemble's scores",
    "ranking": "the metrics of rankings",
}
_FOR_BINARY = ("negative_rate", "pos_weight", "focal_gamma", "pairwise")  # fields of a task

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


class Chain(Declared):
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


class Task(Declared):
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
        sample_weight: a column of non-negative weights for this task's loss.  In metrics all rows count alike, unless
            they are called weighted; early stopping, thresholds and calibration go by rows, too.
        inputs: feature groups that the task may see; the rest is zero on its way through the
            trunk.  The default is all of them.
        head: what makes the logit: the name of a kind, or a mapping with the options of `Head`; the default is
            ``"tower"``.  ``"dot"``, of a binary or regression task that sees user and item, is the product of the
            user's and the item's vector: collaborative filtering over the embeddings that all tasks share.
            ``"tower_dot"`` is the sum of both logits, a network beside matrix factorisation.
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
    head: Head = Field(default_factory=Head)
    loss: Literal["mse", "huber"] = "mse"
    huber_delta: Annotated[float, Field(gt=0)] = 1.0
    mean: float | None = None
    std: Annotated[float, Field(gt=0)] | None = None
    after: str | None = None
    chain: Chain = Field(default_factory=Chain)

    @field_validator("head", mode="before")
    @classmethod
    def _a_head_alone(cls, value: Any, info: ValidationInfo) -> Any:
        value = {"kind": value} if isinstance(value, str) else value
        kind = value.get("kind", "tower") if isinstance(value, dict) else "tower"
        if kind not in HEADS:
            raise ValueError(
                f"task {info.data.get('name')!r}: no head {kind!r}{nearest(str(kind), HEADS)}; "
                f"there are {', '.join(HEADS)}"
            )
        return value

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
            raise ValueError(
                f"task {self.name!r}: a multiclass task needs item_class, the id feature whose values are "
                "its classes, or num_classes where the labels are integers"
            )
        if self.kind != "multiclass" and self.num_classes is not None:
            raise ValueError(f"task {self.name!r}: num_classes belongs to multiclass tasks")
        if self.kind != "multiclass" and self.item_class is not None:
            raise ValueError(f"task {self.name!r}: item_class belongs to multiclass tasks")
        if self.kind != "regression" and self.model_fields_set & {"loss", "huber_delta", "mean", "std"}:
            raise ValueError(f"task {self.name!r}: loss, huber_delta, mean and std belong to regression tasks")
        if self.kind != "binary" and (given := [f for f in _FOR_BINARY if f in self.model_fields_set]):
            raise ValueError(f"task {self.name!r}: {given[0]} belongs to binary tasks")
        if self.name in RESERVED:
            raise ValueError(
                f"{self.name!r} is the key of {RESERVED[self.name]} and cannot name a task; name it otherwise, and "
                f"give its column as label: {self.name}"
            )
        if not self.name:
            raise ValueError("a task needs a name")
        self._check_head()
        self._check_chain()
        return self

    def _check_head(self) -> None:
        """Raise ValueError where `head` does not fit this task."""
        if self.head.kind == "tower":
            return
        if self.kind == "multiclass":
            raise ValueError(
                f"task {self.name!r}: head {self.head.kind} gives one logit, and a multiclass task needs several"
            )
        for group in ("user", "item"):
            if group not in self.inputs:
                raise ValueError(
                    f"task {self.name!r}: head {self.head.kind} needs inputs of the {group}, and sees {self.inputs}"
                )
        if self.kind != "binary" and self.head.sampled_softmax is not None:
            raise ValueError(f"task {self.name!r}: head.sampled_softmax belongs to binary tasks")

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
        if self.head.kind == "dot" and self.chain.kind in ("aitm", "escm2_dr"):
            raise ValueError(
                f"task {self.name!r}: chain {self.chain.kind} reads a tower, and head dot has none; take esmm or "
                "escm2_ips"
            )
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
    def event(self) -> tuple[str, str | None, str | None]:
        """What tasks have in common that are different heads for one and the same labels.

        Example:
            >>> Task.binary("click").event == Task.binary("match", label="click").event
            True
        """
        return self.label_column, self.mask, self.after

    @property
    def out_features(self) -> int:
        """Logits of the task's head."""
        return self.num_classes or 1

    @property
    def in_trunk(self) -> bool:
        """Whether the trunk and a tower make the task's logit, alone or with a product of vectors."""
        return self.head.kind != "dot"

    @property
    def has_dot(self) -> bool:
        """Whether the product of a user's and an item's vector makes the task's logit, alone or with a tower."""
        return self.head.kind != "tower"

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
        if task.chain.kind == "aitm" and parent.head.kind == "dot":
            raise ValueError(
                f"task {task.name!r}: after: aitm reads the tower of {task.after!r}, and head dot has none; take esmm"
            )
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


def check_weights(tasks: Sequence[Task]) -> None:
    """See that something is trained.

    Raises:
        ValueError: every task has weight 0.

    Example:
        >>> check_weights([Task.binary("click", weight=0), Task.binary("like", weight=0)])
        Traceback (most recent call last):
            ...
        ValueError: tasks 'click', 'like' all have weight 0: nothing would be trained
    """
    if tasks and not any(task.weight > 0 for task in tasks):
        names = ", ".join(repr(task.name) for task in tasks)
        raise ValueError(
            f"tasks {names} all have weight 0: nothing would be trained"
            if len(tasks) > 1
            else f"task {names} has weight 0: nothing would be trained"
        )


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
