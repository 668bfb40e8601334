"""Tasks that are frozen: they no longer move what tasks share, while the rest go on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mtcl_torchrec.modules.guard import stop_gradient_if
from mtcl_torchrec.schema import nearest


class FrozenTasks(nn.Module):
    """Which tasks are frozen, as a flag on the device that travels in the checkpoint.

    The gradient of a frozen task ends at its tower's input: embeddings, interaction and trunk, its own experts and
    gates among them, do not feel it any more.  Its tower and head go on, at the weight they had, since what they read
    goes on changing with the other tasks; a tower that stood still would get worse by that.

    Args:
        tasks: names, in the order of the label columns.

    Example:
        >>> tasks = FrozenTasks(["click", "like"])
        >>> tasks.freeze("like")
        >>> tasks.names()
        ('like',)
    """

    frozen: torch.Tensor

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.register_buffer("frozen", torch.zeros(len(self.tasks), dtype=torch.bool))

    def freeze(self, *tasks: str) -> None:
        """Freeze tasks.

        Raises:
            ValueError: an unknown task.
        """
        self._set(tasks, True)

    def unfreeze(self, *tasks: str) -> None:
        """Let tasks take part again."""
        self._set(tasks, False)

    def _set(self, tasks: Sequence[str], value: bool) -> None:
        for task in tasks:
            if task not in self.tasks:
                raise ValueError(f"no task {task!r}{nearest(task, self.tasks)}")
        for task in tasks:
            self.frozen[self.tasks.index(task)] = value

    def names(self) -> tuple[str, ...]:
        """The frozen tasks.  It waits for the device."""
        return tuple(task for task, frozen in zip(self.tasks, self.frozen.tolist(), strict=True) if frozen)

    def forward(self, like: torch.Tensor) -> torch.Tensor:
        """(T,) bool: which tasks are frozen now.

        Args:
            like: anything; TorchRec's tracer wants an input.
        """
        return self.frozen


def stop_where_frozen(representations: torch.Tensor, frozen: torch.Tensor | None) -> torch.Tensor:
    """The tasks' representations (T, B, H); the gradient of frozen ones is exactly zero.

    Args:
        frozen: (T,) bool, or None where none is.
    """
    return representations if frozen is None else stop_gradient_if(representations, frozen.view(-1, 1, 1))
