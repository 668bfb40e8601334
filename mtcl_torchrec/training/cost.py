"""What a run cost: speed, memory, parameters."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from mtcl_torchrec.models import MTCL
from mtcl_torchrec.training.history import TrainingHistory
from mtcl_torchrec.training.memory import peak_memory
from mtcl_torchrec.training.sharding import Ranks


def cost_of(model: MTCL, history: TrainingHistory, rows_per_epoch: int, where: Ranks) -> dict[str, Any]:
    """What `metrics.json` keeps under ``cost``; of this rank, where ranks differ.

    Args:
        model: with its tables sharded or not.
        rows_per_epoch: of the training split, all ranks together.

    Returns:
        ``samples_per_second`` of the median epoch, all ranks together, evaluation left out (None without an epoch;
        the epoch in which a run was resumed counts what was left of it); ``waiting_for_data``, the share of the median
        epoch that went into waiting for batches; ``peak_memory_gb`` of this process's memory
        and ``peak_device_memory_gb`` of its GPU (None on a CPU), in 10⁹ bytes; ``dense_parameters``, those that are in
        no table; ``device``, ``ranks``.
    """
    seconds = statistics.median(history.seconds) if history.seconds else 0.0
    on_gpu = where.device.type == "cuda"
    return {
        "samples_per_second": rows_per_epoch / seconds if seconds > 0 else None,
        "waiting_for_data": statistics.median(history.waiting) if history.waiting else None,
        "peak_memory_gb": peak_memory() / 1e9,
        "peak_device_memory_gb": torch.cuda.max_memory_allocated(where.device) / 1e9 if on_gpu else None,
        "dense_parameters": dense_parameters(model),
        "device": torch.cuda.get_device_name(where.device) if on_gpu else "cpu",
        "ranks": where.world_size,
    }


def dense_parameters(model: MTCL) -> int:
    """How many numbers are learnt outside of the tables."""
    return sum(p.numel() for part in (model.tower, model.lookups) for p in part.parameters())
