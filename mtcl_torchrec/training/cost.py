"""What a run cost: speed, memory, parameters."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from mtcl_torchrec.config import TrainingConfig
from mtcl_torchrec.models import MTCL
from mtcl_torchrec.training.history import TrainingHistory
from mtcl_torchrec.training.memory import peak_memory
from mtcl_torchrec.training.sharding import Ranks


def cost_of(model: MTCL, history: TrainingHistory, config: TrainingConfig, where: Ranks) -> dict[str, Any]:
    """What `metrics.json` keeps under ``cost``; of this rank, where ranks differ.

    Args:
        model: with its tables sharded or not.
        config: with the precision that the dense part computed with.

    Returns:
        ``samples_per_second`` of the median epoch, all ranks together, without its first step and evaluation (None
        where no epoch had a second step); ``first_step_s``, the longest first step of an epoch, in which a compiled run
        compiles; ``waiting_for_data``, the share of the median epoch that went into waiting for batches;
        ``peak_memory_gb`` of this process's memory and ``peak_device_memory_gb`` of its GPU (None on a CPU), in 10⁹
        bytes; ``dense_parameters``, those that are in no table; and what speed depends on: ``device``, ``ranks``,
        ``threads`` and ``batch_size`` of each rank, ``precision``, ``compile``.
    """
    speeds = [speed for speed in history.samples_per_second if speed is not None]
    first_steps = [seconds for seconds in history.first_step if seconds is not None]
    on_gpu = where.device.type == "cuda"
    return {
        "samples_per_second": statistics.median(speeds) if speeds else None,
        "first_step_s": max(first_steps, default=None),
        "waiting_for_data": statistics.median(history.waiting) if history.waiting else None,
        "peak_memory_gb": peak_memory() / 1e9,
        "peak_device_memory_gb": torch.cuda.max_memory_allocated(where.device) / 1e9 if on_gpu else None,
        "dense_parameters": dense_parameters(model),
        "device": torch.cuda.get_device_name(where.device) if on_gpu else "cpu",
        "ranks": where.world_size,
        "threads": torch.get_num_threads(),
        "batch_size": config.batch_size,
        "precision": config.precision,
        "compile": config.compile,
    }


def dense_parameters(model: MTCL) -> int:
    """How many numbers are learnt outside of the tables."""
    return sum(p.numel() for part in (model.tower, model.lookups) for p in part.parameters())


def runs_on(config: TrainingConfig, where: Ranks) -> str:
    """What speed depends on, in words.

    Args:
        config: with the precision that the dense part computes with.
    """
    ranks, threads = where.world_size, torch.get_num_threads()
    parts = [f"{ranks} rank{'s' * (ranks > 1)} on {where.device.type}", config.precision]
    if where.device.type == "cpu":
        parts.append(f"{threads} thread{'s' * (threads > 1)}{' each' * (ranks > 1)}")
    return ", ".join(parts + ["compiled"] * (config.compile != "none"))
