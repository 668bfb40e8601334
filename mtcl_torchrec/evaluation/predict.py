"""A model's predictions for encoded rows, gathered from all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mtcl_torchrec.data.batch import EncodedRows, global_batches, iterate
from mtcl_torchrec.evaluation.progress import Progress, quiet
from mtcl_torchrec.models import MTCL

PREDICTING = "predicting rows"
_BEFORE = "uncalibrated "


@torch.no_grad()
def predict(
    model: MTCL,
    rows: EncodedRows,
    *,
    batch_size: int = 8192,
    device: torch.device | None = None,
    before: dict[str, np.ndarray] | None = None,
    progress: Progress = quiet,
) -> dict[str, np.ndarray]:
    """Predictions and scores for all rows, in their order.

    Where the fused score compares the candidates of a request, each batch holds whole requests, however large they are.
    With several ranks, each scores its part and every rank gets the whole.  Tables must be sharded over the same ranks.

    Args:
        model: plain or with sharded tables; its mode (train / eval) is restored afterwards.
        rows: N rows.
        batch_size: rows a step and rank.
        device: where the model is; the default is the CPU.
        before: is given the tasks' predictions before calibration, in the form of what is returned; nothing where the
            model has none.  Not of an ensemble, whose members are calibrated one by one.
        progress: told of the rows of this rank.

    Returns:
        task name -> (N,) or (N, C) float32; the conditional predictions of chains; and ``"score"`` (N,).
    """
    device = device or torch.device("cpu")
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    compares = compares_candidates(model)
    indices = (
        whole_requests(rows, batch_size, rank=rank, world_size=world_size)
        if compares
        else global_batches(len(rows), batch_size, rank=rank, world_size=world_size)
    )
    was_training = model.training
    model.eval()
    parts: dict[str, list[np.ndarray]] = {}
    calibration = None if before is None or hasattr(model, "members") else model.output.calibration
    given: list[dict[str, torch.Tensor]] = []
    seen = None if calibration is None else calibration.register_forward_pre_hook(lambda _, of: given.append(of[0]))
    done, total = 0, sum(map(len, indices))
    try:
        progress(PREDICTING, 0, total)
        for batch, index in zip(iterate(rows, indices), indices, strict=True):
            batch = batch.to(device)
            out = model(batch.dense_features, batch.sparse_features, batch.requests if compares else None)
            uncalibrated = {_BEFORE + name: value for name, value in given.pop().items()} if given else {}
            for name, value in (out | uncalibrated).items():
                parts.setdefault(name, []).append(value[: len(index)].float().cpu().numpy())
            done += len(index)
            progress(PREDICTING, done, total)
    finally:
        model.train(was_training)
        if seen is not None:
            seen.remove()
    found = {name: np.concatenate(values) for name, values in parts.items()}
    if world_size > 1 or compares:
        found = _in_order(found, indices, len(rows), world_size)
    if before is not None:
        before |= {name.removeprefix(_BEFORE): of for name, of in found.items() if name.startswith(_BEFORE)}
    return {name: of for name, of in found.items() if not name.startswith(_BEFORE)}


def compares_candidates(model: MTCL) -> bool:
    """Whether the model's fused score, or that of a member of an ensemble, compares the candidates of a request, which
    must then be scored together."""
    members: Any = getattr(model, "members", [model])
    return any(getattr(member.output.fused_score, "within_request", False) for member in members)


def whole_requests(rows: EncodedRows, batch_size: int, *, rank: int = 0, world_size: int = 1) -> list[torch.Tensor]:
    """Row numbers of the batches of one rank, none of which cuts a request apart.

    Args:
        rows: where they name no requests, all of them are one.
        batch_size: a batch has no more rows than that, unless one request has.

    Returns:
        As many tensors (b,) int64 on every rank, some of which may be empty.

    Example:
        >>> rows = EncodedRows(torch.empty(5, 0), (), torch.empty(5, 0), torch.empty(5, 0),
        ...                    requests=torch.tensor([7, 8, 7, -1, 8]))
        >>> [b.tolist() for b in whole_requests(rows, 3)]
        [[3, 0, 2], [1, 4]]
    """
    if rows.requests is None:
        ends, order = torch.tensor([len(rows)]), torch.arange(len(rows))
    else:
        order = torch.argsort(rows.requests, stable=True)
        ordered = rows.requests[order]
        last = torch.ones(len(rows), dtype=torch.bool)
        last[:-1] = (ordered[1:] != ordered[:-1]) | (ordered[1:] < 0)
        ends = torch.nonzero(last).flatten() + 1
    batches, start, stop = [], 0, 0
    for end in ends.tolist():
        if end - start > batch_size and stop > start:
            batches.append(order[start:stop])
            start = stop
        stop = end
    batches.append(order[start:stop])
    batches += [order[:0]] * (-len(batches) % world_size)
    return batches[rank::world_size]


def _in_order(
    local: dict[str, np.ndarray], indices: Sequence[torch.Tensor], total: int, world_size: int
) -> dict[str, np.ndarray]:
    gathered = [(local, torch.cat(list(indices)).numpy())] * world_size
    if world_size > 1:
        dist.all_gather_object(gathered, gathered[0])
    whole = {}
    for name, value in local.items():
        whole[name] = np.empty((total, *value.shape[1:]), np.float32)
        for part, index in gathered:
            whole[name][index] = part[name]
    return whole
