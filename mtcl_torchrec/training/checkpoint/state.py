"""Everything that changes while a model trains, as named tensors that any sharding can read."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.shards_wrapper import LocalShardsWrapper
from torchrec.optim.keyed import CombinedOptimizer

from mtcl_torchrec.data.item_totals import ItemTotals
from mtcl_torchrec.data.position import Position
from mtcl_torchrec.training.averaging import WeightAverage
from mtcl_torchrec.training.checkpoint.reader import AVERAGE, WEIGHTS, read_tensors, saved_tensors
from mtcl_torchrec.training.history import TrainingHistory
from mtcl_torchrec.training.sharding import Ranks, local_shards, tables_of

OPTIMIZER = "optimizer."
DENSE = "dense."  # what the dense optimizer's names begin with after it
RANDOM = "random."
ITEMS = "items."  # what each rank has counted of items
# What may begin anew in a run that goes on -> how its tensors in an MTCLTrain begin.
_BALANCE = {"weighting": "loss.weighting.", "surgery": "surgery."}
# FBGEMM's names of optimizer states, by the number of states the optimizer has.
_FUSED_NAMES = {1: {"momentum1": "sum"}, 2: {"momentum1": "exp_avg", "momentum2": "exp_avg_sq"}}


@dataclass
class TrainingState:
    """What a checkpoint holds, beside the configuration.

    Args:
        model: sharded.
        optimizer: over all of it.
        schedule: of the learning rates, which follow from `step`.
        average: of the weights, or None.
        position: in the training rows.
        step: steps done, over all epochs.
        scheduled: steps of the schedule that were behind when training started; other than `step` where ranks or batch
            size had changed.
        averaged: steps that the average knows.
        history: of the epochs that are over.
        items: what items get, while this rank counts it.
        random_restored: whether the random generators go on where a checkpoint left them.
    """

    model: DistributedModelParallel
    optimizer: CombinedOptimizer
    schedule: LambdaLR
    average: WeightAverage | None = None
    position: Position = field(default_factory=Position)
    step: int = 0
    scheduled: int = 0
    averaged: int = 0
    history: TrainingHistory = field(default_factory=TrainingHistory)
    items: ItemTotals | None = None
    random_restored: bool = False

    def tensors(self, where: Ranks, *, copy: bool = False) -> dict[str, Any]:
        """Weights, their averages, optimizer states, this rank's random generators and what it has counted of items.

        Args:
            copy: True for tensors of their own, to be written while training goes on; else those of the model.
        """
        tensors = {WEIGHTS + n: v for n, v in self.model.state_dict().items()}
        tensors |= {OPTIMIZER + n: v for n, v in optimizer_tensors(self.model, self.optimizer).items()}
        tensors |= _random_states(where)
        if self.items is not None:
            tensors |= _items_of(self.items, where.rank)
        if copy:
            tensors = {n: _copied(v) for n, v in tensors.items()}
        if self.average is not None:
            self.average.swap()
            tensors |= {AVERAGE + n: _copied(v) for n, v in self.model.state_dict().items()}
            self.average.swap()
        return tensors

    def load(self, folder: Path, where: Ranks, *, anew: Collection[str] = ()) -> None:
        """Read a checkpoint's tensors; the number of ranks and the sharding may be others than those that wrote it.

        The numbers beside them (`step`, `position`, `history`) are set by the caller before.

        Args:
            anew: ``"weighting"`` or ``"surgery"``: parts that are not read and stay as they begin.

        Raises:
            DataError: the checkpoint does not fit this model.
        """
        saved = saved_tensors(folder)
        skipped = tuple(_BALANCE[part] for part in anew)

        def wanted(prefix: str, tensors: dict[str, Any]) -> dict[str, Any]:
            return {prefix + n: v for n, v in tensors.items() if not n.removeprefix(DENSE).startswith(skipped)}

        self._materialise_optimizer()
        if self.average is not None and any(n.startswith(AVERAGE) for n in saved):
            self.average.swap()
            read_tensors(wanted(AVERAGE, self.model.state_dict()), folder)
            self.average.swap()
        state = self.model.state_dict()
        weights = wanted(WEIGHTS, state)
        of_optimizer = optimizer_tensors(self.model, self.optimizer)
        states = wanted(OPTIMIZER, of_optimizer)
        for name, value in of_optimizer.items():
            if OPTIMIZER + name not in states and name.endswith("/step"):
                value.zero_()  # making the states has counted one
        # A fused optimizer counts no steps for each table, an unfused one does.
        uncounted = [n for n in states if n.endswith("/step") and n not in saved]
        for name in uncounted:
            states.pop(name).fill_(self.step)
        random = _random_states(where) if _ranks_of(saved) == where.world_size else {}
        read_tensors({**weights, **states, **random}, folder)
        self.model.load_state_dict(state)  # whose tensors were filled in place
        if self.average is not None:
            if any(n.startswith(AVERAGE) for n in saved):
                self.average.steps = self.averaged
            else:
                self.average.restart()
        if self.items is not None and self.position.taken:
            self._load_items(folder, _ranks_of(saved), where)
        _restore_random(random, where)
        self.random_restored = bool(random)
        self._set_learning_rates()
        for module in self.model.modules():  # FBGEMM's own count, for the bias correction of its fused Adam
            if hasattr(module, "set_optimizer_step"):
                module.set_optimizer_step(self.step)

    def _load_items(self, folder: Path, ranks: int, where: Ranks) -> None:
        """This rank's counts; where there were other ranks, rank 0 goes on with the counts of all of them."""
        assert self.items is not None
        mine, same = self.items.tensors(), ranks == where.world_size
        for rank in range(ranks):
            counted = {name: torch.zeros_like(tensor) for name, tensor in mine.items()}
            read_tensors({f"{ITEMS}{rank}.{name}": tensor for name, tensor in counted.items()}, folder)
            if rank == where.rank if same else where.first:
                for name, tensor in mine.items():
                    tensor += counted[name]

    def _materialise_optimizer(self) -> None:
        """Ordinary optimizers make their states in their first step; without them a load would restart them."""
        for _, optimizer in self.optimizer._optims:
            if optimizer is not self.model.fused_optimizer:
                optimizer.init_state()
                optimizer.zero_grad()

    def _set_learning_rates(self) -> None:
        self.schedule.last_epoch = self.scheduled
        for group, base, factor in zip(
            self.schedule.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(self.scheduled)


def optimizer_tensors(model: DistributedModelParallel, optimizer: CombinedOptimizer) -> dict[str, Any]:
    """The optimizer's states as ``parameter/state``, named alike for fused and ordinary optimizers.

    A table's state is a DTensor of the table's first dimension, cut as the table is; an ordinary optimizer over a
    sharded table keeps plain tensors of the local rows, which would be taken for the whole.
    """
    tables = tables_of(model)
    named: dict[str, Any] = {}
    for key, states in optimizer.state_dict()["state"].items():
        table = next((name for name in tables if key == name or key.endswith("." + name)), None)
        if table is None:
            named |= {f"{key}/{state}": value for state, value in states.items()}
            continue
        short = {state.rsplit(".", 1)[-1]: value for state, value in states.items()}
        names = _FUSED_NAMES.get(len(short), {}) if any("momentum" in state for state in short) else {}
        for state, value in short.items():
            named[f"{table}/{names.get(state, state)}"] = _like_table(value, tables[table])
    return named


def _like_table(value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """A state of a table's rows, (rows, dim) or (rows,), cut as the table is; a scalar stays what it is."""
    if isinstance(value, DTensor) or value.dim() == 0:
        return value
    if value.dim() == 2 and value.shape[1] == 1 and table.shape[1] != 1:
        value = value.view(-1)  # one number a row
    if not isinstance(table, DTensor):
        return value
    shards, pieces = local_shards(table), [value]
    if len(shards) > 1:  # several cuts of columns on one rank lie one behind the other in one parameter
        flat = value.view(-1).split([shard.numel() for shard, _, _ in shards])
        pieces = [piece.view(shard.shape) for piece, (shard, _, _) in zip(flat, shards, strict=True)]
    offsets = [(row, column)[: value.dim()] for _, row, column in shards]
    shape = table.shape[: value.dim()]
    return DTensor.from_local(
        LocalShardsWrapper(pieces, offsets),
        table.device_mesh,
        table.placements,
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )


def _copied(value: Any) -> Any:
    """A copy on the CPU, cut as it was."""
    if not isinstance(value, DTensor):
        return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
    local: Any = value.to_local()
    return DTensor.from_local(
        LocalShardsWrapper([t.detach().cpu().clone() for t in local.local_shards()], local.local_offsets()),
        value.device_mesh,
        value.placements,
        run_check=False,
        shape=value.shape,
        stride=value.stride(),
    )


def _random_states(where: Ranks) -> dict[str, torch.Tensor]:
    """The states of this rank's random generators; a key for each rank, since equal keys would be written once."""
    states = {f"{RANDOM}{where.rank}.cpu": torch.get_rng_state()}
    if where.device.type == "cuda":
        states[f"{RANDOM}{where.rank}.cuda"] = torch.cuda.get_rng_state(where.device)
    return states


def _items_of(items: ItemTotals, rank: int) -> dict[str, torch.Tensor]:
    return {f"{ITEMS}{rank}.{name}": tensor for name, tensor in items.tensors().items()}


def counts_items(folder: Path) -> bool:
    """Whether a checkpoint holds what its ranks had counted of items."""
    return any(name.startswith(ITEMS) for name in saved_tensors(folder))


def _ranks_of(saved: Any) -> int:
    """How many ranks wrote the checkpoint: random streams of another number of ranks cannot be continued."""
    return sum(name.startswith(RANDOM) and name.endswith(".cpu") for name in saved)


def _restore_random(states: dict[str, torch.Tensor], where: Ranks) -> None:
    for name, state in states.items():
        if name.endswith(".cpu"):
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, where.device)


def load_weights(model: DistributedModelParallel, folder: Path) -> None:
    """Read a checkpoint's weights, averaged ones where there are, into a model with sharded tables."""
    kind = AVERAGE if any(name.startswith(AVERAGE) for name in saved_tensors(folder)) else WEIGHTS
    state = model.state_dict()
    # What balances the tasks predicts nothing, and may have begun after this checkpoint.
    balance = tuple(_BALANCE.values())
    read_tensors({kind + n: v for n, v in state.items() if not n.startswith(balance)}, folder)
    model.load_state_dict(state)  # whose tensors were filled in place
