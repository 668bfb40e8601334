"""What makes a task's logit: a tower on top of the trunk, the product of a user's and an item's vector, or both."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from mtcl_torchrec.schema.declared import Declared

HeadKind = Literal["tower", "dot", "tower_dot"]
HEADS: tuple[HeadKind, ...] = get_args(HeadKind)


class SampledSoftmax(Declared):
    """A softmax over the items of the global batch, beside a dot head's own loss; see
    `mtcl_torchrec.modules.sampled_softmax`.

    Args:
        weight: of it in the task's loss.
        temperature: the products of the vectors are divided by it.
        correction: ``"logq"`` undoes that popular items are negatives more often, ``"none"`` lets it be.
        item: id feature that tells items apart.  In a schema, the default is the feature of its item column.

    Example:
        >>> SampledSoftmax(weight=0.1).correction
        'logq'
    """

    weight: PositiveFloat = 1.0
    temperature: PositiveFloat = 1.0
    correction: Literal["logq", "none"] = "logq"
    item: str | None = None


class Head(Declared):
    """Where a task's logit comes from.

    Args:
        kind: ``"tower"`` (trunk, tower, linear head); ``"dot"``, matrix factorisation over the shared embeddings, see
            `mtcl_torchrec.modules.dot_product`; or ``"tower_dot"``, the sum of both logits.
        dim: width of the vectors of a dot head.
        factors: features of a dot head whose embeddings, of width `dim`, enter the product as they are: p_u and q_i of
            matrix factorisation, beside what linear maps make of the other columns.
        bilinear: the product of `factors` is pᵀ W q, with a matrix W (`dim`, `dim`) that the task learns: tasks that
            share the embeddings then each see their own sides of them.
        l2: λ of λ(‖u‖² + ‖v‖² + b_u² + b_v²), averaged over the task's rows, in a dot head's loss.
        sampled_softmax: what else trains a dot head's vectors.

    Example:
        >>> Head(kind="dot", dim=16).l2
        0.0
        >>> Head(dim=16)
        Traceback (most recent call last):
            ...
        pydantic_core._pydantic_core.ValidationError: ...dim belongs to head dot, not to tower...
    """

    kind: HeadKind = "tower"
    dim: PositiveInt = 32
    factors: tuple[str, ...] = ()
    bilinear: bool = False
    l2: Annotated[NonNegativeFloat, Field(le=1e6)] = 0.0
    sampled_softmax: SampledSoftmax | None = None

    @model_validator(mode="after")
    def _fitting(self) -> Head:
        if self.kind == "tower" and (given := sorted(self.model_fields_set - {"kind"})):
            raise ValueError(f"{given[0]} belongs to head dot, not to tower")
        if self.bilinear and not self.factors:
            raise ValueError("bilinear needs factors, the features whose embeddings are multiplied")
        return self
