"""A model's predictions for encoded rows, gathered from all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from mtcl_torchrec.data.batch import EncodedRows, global_batches, iterate
from mtcl_torchrec.models import MTCL


@torch.no_grad()
def predict(
    model: MTCL, rows: EncodedRows, *, batch_size: int = 8192, device: torch.device | None = None
) -> dict[str, np.ndarray]:
    """Predictions and scores for all rows, in their order.

    With several ranks, each scores its part and every rank gets the whole.  Tables must be sharded over the same ranks.

    Args:
        model: plain or with sharded tables; its mode (train / eval) is restored afterwards.
        rows: N rows.
        batch_size: rows a step and rank.
        device: where the model is; the default is the CPU.

    Returns:
        task name -> (N,) or (N, C) float32; the conditional predictions of chains; and ``"score"`` (N,).
    """
    device = device or torch.device("cpu")
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    indices = global_batches(len(rows), batch_size, rank=rank, world_size=world_size)
    was_training = model.training
    model.eval()
    parts: dict[str, list[np.ndarray]] = {}
    try:
        for batch, index in zip(iterate(rows, indices), indices, strict=True):
            batch = batch.to(device)
            out = model(batch.dense_features, batch.sparse_features)
            for name, value in out.items():
                parts.setdefault(name, []).append(value[: len(index)].float().cpu().numpy())
    finally:
        model.train(was_training)
    local = {name: np.concatenate(values) for name, values in parts.items()}
    if world_size == 1:
        return local
    return _in_order(local, indices, len(rows), world_size)


def _in_order(
    local: dict[str, np.ndarray], indices: Sequence[torch.Tensor], total: int, world_size: int
) -> dict[str, np.ndarray]:
    gathered: list[tuple[dict[str, np.ndarray], np.ndarray]] = [({}, np.empty(0))] * world_size
    dist.all_gather_object(gathered, (local, torch.cat(list(indices)).numpy()))
    whole = {}
    for name, value in local.items():
        whole[name] = np.empty((total, *value.shape[1:]), np.float32)
        for part, index in gathered:
            whole[name][index] = part[name]
    return whole
