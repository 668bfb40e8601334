"""What a trunk is: the signature that the model relies on, for trunks of ours and of one's own."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from mtcl_torchrec.modules.embeddings import InputBlock
from mtcl_torchrec.schema import ConfigError, Task

ParameterSlices = list[tuple[nn.Parameter, list[int] | None]]


class Shared(NamedTuple):
    """What n tasks share just before they part: every path from a task's loss to what is shared leads through it.

    Args:
        common: tensors of any shape that several tasks read.  `Trunk.split` also takes them with a leading dimension n,
            a copy for each task.
        own: tensors (n, ...), the slice of each read by one task alone.
    """

    common: tuple[torch.Tensor, ...]
    own: tuple[torch.Tensor, ...] = ()


class TrunkInputs(NamedTuple):
    """What a trunk may know of the model that it is built into.

    Args:
        tasks: in their order; task number t of the trunk is ``tasks[t]``.
        blocks: what the columns of the trunk's input are, in their order.
    """

    tasks: tuple[Task, ...]
    blocks: tuple[InputBlock, ...]


class Trunk(nn.Module):
    """Base of the trunks here: built when the model knows its input width and number of tasks."""

    out_features: int

    @abstractmethod
    def build(self, in_features: int, num_tasks: int, inputs: TrunkInputs | None = None) -> None:
        """Create the parameters.

        Args:
            in_features: D, width of the trunk's input.
            num_tasks: T.
            inputs: what the tasks and the columns are; a model always tells it.
        """

    @abstractmethod
    def shared(self, x: torch.Tensor, tasks: Sequence[int]) -> Shared:
        """What the n tasks share before they part, from the input x (B, D)."""

    @abstractmethod
    def split(self, shared: Shared, tasks: Sequence[int]) -> torch.Tensor:
        """Representations (B, n, H) of the tasks, from what `shared` returned for the same tasks."""

    def forward(self, x: torch.Tensor, tasks: Sequence[int]) -> torch.Tensor:
        """Representations (B, len(tasks), H) of the tasks from the input x (B, D)."""
        return self.split(self.shared(x, tasks), tasks)

    def shared_parameters(self) -> ParameterSlices:
        """See `shared_parameters`."""
        return [(parameter, None) for parameter in self.parameters()]


def shared_parameters(trunk: nn.Module) -> ParameterSlices:
    """The parameters of a trunk that the gradients of several tasks reach before the tasks part.

    Each comes with the indices of its first dimension that are shared, None for all of them: the experts of a level are
    one parameter, and some of them may be a task's own.  What only one task's gradient ever reaches (its gate in the
    last level, an expert that nobody else learns) is left out.

    Args:
        trunk: built.  One without a method ``shared_parameters`` shares all its parameters.

    Example:
        >>> from mtcl_torchrec.modules.trunks import PLE
        >>> trunk = PLE(shared_experts=1, task_experts=1, expert_layers=[8], levels=1)
        >>> trunk.build(in_features=4, num_tasks=2)
        >>> [(tuple(parameter.shape), shared) for parameter, shared in shared_parameters(trunk)][:1]
        [((3, 8, 4), [2])]
    """
    told = getattr(trunk, "shared_parameters", None)
    return [(parameter, None) for parameter in trunk.parameters()] if told is None else told()


def prepare_trunk(trunk: nn.Module, in_features: int, inputs: TrunkInputs) -> None:
    """Build a trunk for a model, and see that it keeps the contract as far as that shows without data.

    Args:
        trunk: ours or one's own; without a method ``build`` it is taken as it is.
        in_features: D.
        inputs: given to a ``build`` that has a parameter of that name.

    Raises:
        ConfigError: it is no nn.Module, has no ``forward`` or no ``out_features``, or was built for a model before.
    """
    name = type(trunk).__name__
    if not isinstance(trunk, nn.Module):
        raise ConfigError(f"a trunk is an nn.Module, not {name if not isinstance(trunk, type) else trunk.__name__}")
    if type(trunk).forward is nn.Module.forward:
        raise ConfigError(f"trunk {name} has no forward(x, tasks): x (B, D), n task numbers -> (B, n, out_features)")
    build = getattr(trunk, "build", None)
    if build is not None:
        if getattr(trunk, "built_for_a_model", False):
            raise ConfigError(f"this {name} is part of a model already; make one for each model")
        told = {"inputs": inputs} if "inputs" in inspect.signature(build).parameters else {}
        build(in_features, len(inputs.tasks), **told)
        trunk.built_for_a_model = True  # type: ignore[assignment]
    width = getattr(trunk, "out_features", None)
    if not isinstance(width, int) or width < 1:
        raise ConfigError(f"trunk {name} has no out_features: an int, the width of a task's representation")


def check_representations(trunk: nn.Module, representations: torch.Tensor, rows: int, num_tasks: int) -> None:
    """See that a trunk returned what it must; looks at shapes only, so nothing waits for the device.

    Raises:
        ConfigError: `representations` is no tensor (rows, num_tasks, out_features).
    """
    expected = (rows, num_tasks, trunk.out_features)
    given = tuple(representations.shape) if isinstance(representations, torch.Tensor) else None
    if given != expected:
        raise ConfigError(
            f"trunk {type(trunk).__name__} returned {given or type(representations).__name__}, expected {expected}: "
            "rows, tasks, out_features"
        )
