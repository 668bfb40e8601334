"""Who is compared by `peers.py`: each trains one pass over the same file and says when each step was done.

All train an MMoE of the same sizes, by Adagrad on tables and Adam on everything else:

- ``ours``: the training loop of `mtcl train`, on its stream of Parquet, with the metrics that are on by default;
- ``torchrec``: the same model by hand on TorchRec: an EmbeddingBagCollection under DistributedModelParallel with the
  optimizer fused into backward, `TrainPipelineSparseDist`, row groups read one ahead on a thread;
- ``pytorch``: the same model by hand on ``nn.Embedding(sparse=True)``, row groups read alike;
- ``torchrec_bf16``: the loop by hand under bf16 autocast;
- ``ours_bf16``: ours with `training.precision: bf16`, which is the default on machines that are fast in it;
- ``ours_bf16_compiled``: the same with `training.compile: dense`;
- ``rechub``, ``deepctr``: the MMoE of torch-rechub and of deepctr-torch, each with its own trainer and loader, fed as
  its documentation says: the file as a data frame, the frame as arrays.  ReLU and batch normalisation instead of SiLU
  and layer normalisation, which cost about as much.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from peer_cases import Case
from peer_packages import deepctr, rechub
from peer_runs import DENSE_LR, EPS, TABLE_LR, Adagrads, Ran, Stamps
from rich.console import Console
from torch import nn
from torch.nn import functional as F

# ---------------------------------------------------------------------- ours


def our_run(case: Case, train: Path, val: Path, seed: int, **training: Any) -> Any:
    """What one would write into run.yaml."""
    from mtcl_torchrec.config import parse_run

    features = [
        {"name": c, "group": "item", "encoding": "index", "vocabulary_size": case.table_rows, "embedding_dim": case.dim}
        for c in case.columns
    ]
    trunk = {"kind": "mmoe", "num_experts": case.experts, "expert_layers": list(case.expert_layers)}
    trunk |= {} if case.normed else {"norm": "none"}
    raw = {
        "data": {"train": [str(train)], "val": [str(val)], "stream": True, "window": 65_536},
        "schema": {"features": features, "tasks": [{"name": t, "kind": "binary"} for t in case.labels]},
        "model": {"trunk": trunk, "tower_layers": list(case.tower_layers), "cross_layers": 0},
        "optimizers": {"tables": {"kind": "adagrad", "lr": TABLE_LR, "eps": EPS},
                       "dense": {"kind": "adam", "lr": DENSE_LR}},
        "training": {"epochs": 1, "batch_size": case.batch_size, "warmup_steps": 0, "decay": "none", "seed": seed,
                     **training},
    }  # fmt: skip
    return parse_run(yaml.safe_dump(raw))


def ours(case: Case, train: Path, val: Path, seed: int, precision: str = "fp32", part: str = "none") -> Ran:
    """This package: `mtcl train` without a run directory; `part` is what `training.compile` names."""
    from mtcl_torchrec.evaluation.predict import predict
    from mtcl_torchrec.models import MTCLTrain
    from mtcl_torchrec.training.build import build_model
    from mtcl_torchrec.training.checkpoint.state import TrainingState
    from mtcl_torchrec.training.loop import Validation, fit, parallelise, plain_model
    from mtcl_torchrec.training.memory import keep_freed_memory
    from mtcl_torchrec.training.optimizers import build_schedule
    from mtcl_torchrec.training.progress import TrainingProgress
    from mtcl_torchrec.training.rec_metrics import build_training_metrics
    from mtcl_torchrec.training.run_data import load_data
    from mtcl_torchrec.training.sharding import ranks

    class Progress(TrainingProgress):
        """Notes when a step is done."""

        def step(self, **of: Any) -> None:
            stamps.note()
            super().step(**of)

    stamps = Stamps()
    keep_freed_memory()
    with ranks("cpu") as where, tempfile.TemporaryDirectory() as folder:
        run, started = our_run(case, train, val, seed, precision=precision, compile=part), time.perf_counter()
        data = load_data(run, where, say=lambda _: None)
        read_s = time.perf_counter() - started
        model = build_model(
            run.model, data.preprocessor.encoder, run.fusion, seed=seed, precision=run.training.precision,
            base_rates=data.splits.base_rates,
        )  # fmt: skip
        sharded, optimizer = parallelise(
            MTCLTrain(model, seed=seed), where, run.optimizers, sharding=run.sharding, batch_size=case.batch_size
        )
        schedule = build_schedule(optimizer, 0, case.steps, "none")
        metrics = build_training_metrics(
            model.tasks, run.data_schema, run.training.metrics, where, batch_size=case.batch_size
        )
        ready_s, console = time.perf_counter() - started, Console(quiet=True)
        state = TrainingState(sharded, optimizer, schedule)
        rows = data.splits.encoded["val"]
        with Progress(
            active=where.first, total_steps=case.steps, log_dir=Path(folder), console=console, done=0
        ) as progress:
            fit(state, data.splits.train, Validation(rows), run.training, where, save=lambda *_, **__: None,
                progress=progress, metrics=metrics)  # fmt: skip
        plain = plain_model(state.model)
        found = predict(plain, rows, batch_size=8192, device=where.device)
        predictions = np.stack([found[name] for name in case.labels], 1)
        dense = sum(p.numel() for p in plain.tower.parameters())
        tables = sum(value.numel() for value in plain.embedding_bag_collection.state_dict().values())
    return Ran(predictions, tables, dense, ready_s, read_s, stamps)


# ---------------------------------------------------------------------- by hand


class MMoE(nn.Module):
    """Everything after the embeddings, as one would write it: (B, D) to logits (B, T)."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        width = case.features * case.dim
        self.experts = nn.ModuleList(_mlp(width, case.expert_layers, case.normed) for _ in range(case.experts))
        self.gates = nn.ModuleList(nn.Linear(width, case.experts, bias=False) for _ in range(case.tasks))
        self.towers = nn.ModuleList(_mlp(case.expert_layers[-1], case.tower_layers) for _ in range(case.tasks))
        self.heads = nn.ModuleList(nn.Linear(case.tower_layers[-1], 1) for _ in range(case.tasks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        logits = []
        for gate, tower, head in zip(self.gates, self.towers, self.heads, strict=True):
            mixed = torch.bmm(torch.softmax(gate(x), 1).unsqueeze(1), outputs).squeeze(1)
            logits.append(head(tower(mixed)))
        return torch.cat(logits, 1)


def _mlp(width: int, layers: tuple[int, ...], normed: bool = True) -> nn.Sequential:
    parts: list[nn.Module] = []
    for out in layers:
        parts += [nn.Linear(width, out), *([nn.LayerNorm(out)] if normed else []), nn.SiLU()]
        width = out
    return nn.Sequential(*parts)


def row_groups(path: Path, case: Case, seed: int | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids (F, n) int64 and labels (n, T) float32 of each row group, the next one read on a thread meanwhile.

    Args:
        seed: of the order of groups and of the rows in each; None keeps the file's.
    """
    draw = None if seed is None else np.random.default_rng(seed)

    def load(group: int) -> tuple[torch.Tensor, torch.Tensor]:
        with pq.ParquetFile(path) as file:
            table = file.read_row_group(group, use_threads=False)
        ids = np.stack([table[c].to_numpy() for c in case.columns])
        labels = np.stack([table[c].to_numpy() for c in case.labels], 1).astype(np.float32)
        if draw is not None:
            order = draw.permutation(len(labels))
            ids, labels = ids[:, order], labels[order]
        return torch.from_numpy(ids), torch.from_numpy(labels)

    with pq.ParquetFile(path) as file:
        groups = list(range(file.num_row_groups))
    if draw is not None:
        draw.shuffle(groups)
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(load, groups[0])
        for following in [*groups[1:], None]:
            found = ahead.result()
            if following is not None:
                ahead = pool.submit(load, following)
            yield found


def batches(path: Path, case: Case, seed: int | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids (F, B) and labels (B, T)."""
    for ids, labels in row_groups(path, case, seed):
        for start in range(0, len(labels), case.batch_size):
            rows = slice(start, start + case.batch_size)
            yield ids[:, rows], labels[rows]


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(0).sum()


def _predicted(forward: Callable[[torch.Tensor], torch.Tensor], val: Path, case: Case) -> np.ndarray:
    with torch.no_grad():
        return torch.cat([torch.sigmoid(forward(ids)) for ids, _ in batches(val, case, None)]).numpy()


def pytorch(case: Case, train: Path, val: Path, seed: int) -> Ran:
    """Plain PyTorch with sparse gradients."""
    started = time.perf_counter()
    torch.manual_seed(seed)
    tables = nn.ModuleList(nn.Embedding(case.table_rows, case.dim, sparse=True) for _ in case.columns)
    for table in tables:
        nn.init.uniform_(table.weight, -(case.table_rows**-0.5), case.table_rows**-0.5)
    dense = MMoE(case)
    optimizer = Adagrads(nn.ModuleList([tables, dense]), case.table_rows, sparse=True)

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return dense(torch.cat([table(of) for table, of in zip(tables, ids, strict=True)], 1))

    ready_s = time.perf_counter() - started
    for ids, labels in batches(train, case, seed):
        optimizer.zero_grad()
        _loss(forward(ids), labels).backward()
        optimizer.step()
    return Ran(_predicted(forward, val, case), optimizer.tables, optimizer.dense, ready_s, 0.0, optimizer.stamps)


def torchrec(case: Case, train: Path, val: Path, seed: int, *, bf16: bool = False) -> Ran:
    """Plain TorchRec; with `bf16` under autocast, as one would add it by hand."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    ran = _trained_by_torchrec(case, train, val, seed, bf16)
    gc.collect()  # gloo's threads may abort the interpreter where tensors outlive the group
    dist.destroy_process_group()
    return ran


def _trained_by_torchrec(case: Case, train: Path, val: Path, seed: int, bf16: bool) -> Ran:
    import torchrec.optim
    from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
    from torchrec.datasets.utils import Batch
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
    from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
    from torchrec.optim.optimizers import in_backward_optimizer_filter

    class Model(nn.Module):
        """With its loss, as the pipeline calls it."""

        def __init__(self) -> None:
            super().__init__()
            self.tables = EmbeddingBagCollection(
                device=torch.device("meta"),
                tables=[
                    EmbeddingBagConfig(
                        name=c, num_embeddings=case.table_rows, embedding_dim=case.dim, feature_names=[c]
                    )
                    for c in case.columns
                ],
            )
            self.dense = Dense()

        def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
            return self.dense(self.tables(batch.sparse_features), batch.labels)

    class Dense(nn.Module):
        """A leaf of the pipeline's tracer."""

        def __init__(self) -> None:
            super().__init__()
            self.mmoe = MMoE(case)

        def forward(self, pooled: Any, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = self.mmoe(torch.cat([pooled[c] for c in case.columns], 1)).float()
            return _loss(logits, labels), logits.detach()

    def batch(ids: torch.Tensor, labels: torch.Tensor) -> Batch:
        lengths = torch.ones(ids.numel(), dtype=torch.int64)
        sparse = KeyedJaggedTensor(case.columns, ids.reshape(-1), lengths=lengths)
        return Batch(torch.empty(len(labels), 0), sparse, labels)

    started, stamps = time.perf_counter(), Stamps()
    device = torch.device("cpu")
    torch.manual_seed(seed)
    module = Model()
    for table in module.tables.embedding_bags.values():
        apply_optimizer_in_backward(torchrec.optim.Adagrad, list(table.parameters()), {"lr": TABLE_LR, "eps": EPS})
    model = DistributedModelParallel(module, device=device)
    rest = dict(in_backward_optimizer_filter(model.named_parameters()))
    dense = {name: p for name, p in rest.items() if "embedding_bags" not in name}
    parts = [KeyedOptimizerWrapper(dense, lambda params: torch.optim.Adam(params, lr=DENSE_LR, fused=True))]
    if model.fused_optimizer.params:
        parts.append(model.fused_optimizer)
    if unfused := {name: p for name, p in rest.items() if name not in dense}:  # the planner copies small tables
        parts.append(KeyedOptimizerWrapper(unfused, lambda params: torch.optim.Adagrad(params, lr=TABLE_LR, eps=EPS)))
    optimizer = CombinedOptimizer(parts)
    pipeline = TrainPipelineSparseDist(model, optimizer, device, execute_all_batches=True)
    model.train()
    ready_s, fed = time.perf_counter() - started, (batch(*of) for of in batches(train, case, seed))
    for _ in range(case.steps):
        pipeline.progress(fed)
        stamps.note()
    pipeline.detach()

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return model(batch(ids, torch.zeros(ids.shape[1], case.tasks)))[1]

    numbers = (case.features * case.table_rows * case.dim, sum(p.numel() for p in dense.values()))
    return Ran(_predicted(forward, val, case), *numbers, ready_s, 0.0, stamps)


CONTENDERS: dict[str, Callable[[Case, Path, Path, int], Ran]] = {
    "ours": ours,
    "torchrec": torchrec,
    "pytorch": pytorch,
    "rechub": rechub,
    "deepctr": deepctr,
    "torchrec_bf16": partial(torchrec, bf16=True),
    "ours_bf16": partial(ours, precision="bf16"),
    "ours_bf16_compiled": partial(ours, precision="bf16", part="dense"),
}
