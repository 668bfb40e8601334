"""Rows of all ranks on every rank, with gradients that find their way back."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class RankGather:
    """Puts the ranks' tensors one behind the other, however many rows each has.

    It has process groups of its own, made when it is first needed: others' collectives of the same backward pass may be
    under way.  The numbers of rows go over gloo, from host to host, so that nobody waits for a device.

    Args:
        process_group: the ranks that share a global batch; None is the default group.

    Attributes:
        first: where this rank's rows begin.

    Example:
        >>> gather = RankGather()
        >>> gather.agree(2)
        >>> gather(torch.tensor([[1.0], [2.0]])).shape, gather.first
        (torch.Size([2, 1]), 0)
    """

    def __init__(self, process_group: Any = None) -> None:
        self.process_group = process_group
        self.sizes, self.first = [0], 0
        self._own: tuple[Any, Any, Any] | None = None  # the default group it was made in; for tensors; for hosts

    def agree(self, rows: int) -> None:
        """Tell all ranks how many rows this one has from now on; every rank calls it.

        Args:
            rows: B.
        """
        self.sizes, self.first = [rows], 0
        if not self._several():
            return
        _, _, hosts = self._groups()
        told = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(hosts))]
        dist.all_gather(told, torch.tensor([rows]), group=hosts)
        self.sizes = [int(size) for size in told]
        self.first = sum(self.sizes[: dist.get_rank(hosts)])

    def __call__(self, own: torch.Tensor) -> torch.Tensor:
        """(N, ...) the rows of all ranks, in the order of the ranks, from this rank's (B, ...); every rank calls it.

        The gradient of a rank's rows is the sum of what all ranks' losses have to say of them.
        """
        if not self._several():
            return own
        group = self._groups()[1]
        return _Gathered.apply(own, self.sizes, self.first, group)

    def _several(self) -> bool:
        return dist.is_available() and dist.is_initialized() and dist.get_world_size(self.process_group) > 1

    def _groups(self) -> tuple[Any, Any, Any]:
        default = dist.group.WORLD
        if self._own is None or self._own[0] is not default:
            tensors = self._made(None)
            plain = dist.get_backend(tensors) == "gloo"
            self._own = default, tensors, tensors if plain else self._made("gloo")
        return self._own

    def _made(self, backend: str | None) -> Any:
        if self.process_group is None:
            return dist.new_group(backend=backend)
        ranks = dist.get_process_group_ranks(self.process_group)
        return dist.new_group(ranks, backend=backend, use_local_synchronization=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_own": None}  # a process group cannot be copied


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, sizes: list[int], first: int, group: Any) -> torch.Tensor:
        ctx.place, ctx.group = slice(first, first + len(own)), group
        padded = own.new_zeros(max(sizes), *own.shape[1:])
        padded[: len(own)] = own
        of_ranks = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(of_ranks, padded, group=group)
        return torch.cat([rows[:size] for rows, size in zip(of_ranks, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        gradient = grads[0].contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient[ctx.place], None, None, None
