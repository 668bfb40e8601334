"""The contenders of `peers.py` from other packages, each with its own trainer and loader; see `contenders.py`."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from peer_cases import Case
from peer_runs import Adagrads, Ran


def _arrays(path: Path, case: Case) -> tuple[dict[str, np.ndarray], np.ndarray]:
    frame = pd.read_parquet(path)
    # Contiguous, or torch-rechub goes through strides row by row.
    ids = {c: np.ascontiguousarray(frame[c].to_numpy()) for c in case.columns}
    return ids, np.ascontiguousarray(frame[case.labels].to_numpy(dtype=np.float32))


def rechub(case: Case, train: Path, val: Path, seed: int) -> Ran:
    """torch-rechub's MMoE and its MTLTrainer."""
    from torch_rechub.basic.features import SparseFeature
    from torch_rechub.models.multi_task import MMOE
    from torch_rechub.trainers import MTLTrainer
    from torch_rechub.utils.data import DataGenerator

    started = time.perf_counter()
    (x, y), (x_val, y_val) = _arrays(train, case), _arrays(val, case)
    read_s = time.perf_counter() - started
    torch.manual_seed(seed)
    kinds = ["classification"] * case.tasks
    features = [SparseFeature(c, vocab_size=case.table_rows, embed_dim=case.dim) for c in case.columns]
    towers = [{"dims": list(case.tower_layers)} for _ in kinds]
    model = MMOE(features, kinds, case.experts, {"dims": list(case.expert_layers)}, towers)
    loader, *_ = DataGenerator(x, y).generate_dataloader(
        x_val=x_val, y_val=y_val, x_test=x_val, y_test=y_val, batch_size=case.batch_size
    )
    optimizer = Adagrads(model, case.table_rows)
    trainer = MTLTrainer(model, kinds, optimizer_fn=lambda *_, **__: optimizer, optimizer_params={})
    ready_s = time.perf_counter() - started
    trainer.train_one_epoch(loader)
    model.eval()
    with torch.no_grad():
        predictions = model({c: torch.from_numpy(of) for c, of in x_val.items()}).numpy()
    return Ran(predictions, optimizer.tables, optimizer.dense, ready_s, read_s, optimizer.stamps)


def deepctr(case: Case, train: Path, val: Path, seed: int) -> Ran:
    """deepctr-torch's MMOE and its fit."""
    from deepctr_torch.inputs import SparseFeat
    from deepctr_torch.models import MMOE

    started = time.perf_counter()
    (x, y), (x_val, _) = _arrays(train, case), _arrays(val, case)
    read_s = time.perf_counter() - started
    columns = [SparseFeat(c, vocabulary_size=case.table_rows, embedding_dim=case.dim) for c in case.columns]
    model = MMOE(
        columns, num_experts=case.experts, expert_dnn_hidden_units=case.expert_layers, gate_dnn_hidden_units=(),
        tower_dnn_hidden_units=case.tower_layers, l2_reg_linear=0, l2_reg_embedding=0, dnn_use_bn=case.normed,
        task_types=["binary"] * case.tasks, task_names=case.labels, seed=seed,
    )  # fmt: skip
    optimizer = Adagrads(model, case.table_rows)
    model.compile(optimizer, loss=["binary_crossentropy"] * case.tasks)
    ready_s = time.perf_counter() - started
    model.fit(x, y, batch_size=case.batch_size, epochs=1, verbose=0)
    return Ran(model.predict(x_val, 8192), optimizer.tables, optimizer.dense, ready_s, read_s, optimizer.stamps)
