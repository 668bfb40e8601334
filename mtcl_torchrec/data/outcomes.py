"""What happens in a synthetic world: its tasks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Column = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class Outcome(BaseModel):
    """One task of a world.

    Args:
        name: of the task and of its label column.
        kind: ``"event"`` (0 or 1), ``"content"`` (the category turned to next, 1 … categories), ``"stars"`` (1 … 5) or
            ``"amount"`` (a positive number).
        mean: of the label wherever there can be one: in a chain, where the parent is 1.  Not of content.
        after: the event that must be 1 for this one to happen, declared before it.
        moment: whether the user and the moment alone decide it, whatever the item (a task of context).
        opposed: whether it is one of the tasks that `World.conflict` turns against the others.
        number_effect: how much one standard deviation of the item's log number (price, duration) adds to the logit.
        fused: weight in the fused score; 0 leaves it out.
        delay: of an event, times `World.delay`: how long after its row, or after its parent, it is recorded on average.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: Column
    kind: Literal["event", "content", "stars", "amount"] = "event"
    mean: Annotated[float, Field(ge=1e-6)] = 0.1
    after: str | None = None
    moment: bool = False
    opposed: bool = False
    number_effect: float = 0.0
    fused: float = 0.0
    delay: Annotated[float, Field(ge=0)] = 1.0

    @model_validator(mode="after")
    def _possible(self) -> Outcome:
        if self.kind == "event" and not self.mean < 1:
            raise ValueError(f"{self.name}: the mean of an event lies between 0 and 1")
        if self.kind == "stars" and not 1 < self.mean < 5:
            raise ValueError(f"{self.name}: the mean of stars lies between 1 and 5")
        if self.kind == "content" and (self.after or self.moment or self.opposed):
            raise ValueError(f"{self.name}: content comes after nothing, and is neither moment nor opposed")
        return self

    @property
    def needs_a_look(self) -> bool:
        """Whether it happens to nothing that is not looked at: it is about the item, and no event comes before it."""
        return self.kind != "content" and self.after is None and not self.moment
