"""A run directory made by hand, with everything that a report can show, so that a test can take any of it away."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from mtcl_torchrec.evaluation.metrics import task_metrics
from mtcl_torchrec.evaluation.predictions_file import write_predictions
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable
from mtcl_torchrec.evaluation.report import evaluate_predictions
from mtcl_torchrec.schema import Task
from mtcl_torchrec.training.history import finite

TASKS = [
    Task.binary("click"),
    Task.binary("like"),
    Task.binary("report"),
    Task.multiclass("taste", 4),
    Task.regression("minutes"),
]
WEIGHTS = {"click": 1.0, "like": 5.0, "report": -10.0}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def table(rows=1500, seed=0, noise=0.3, tasks=TASKS, off=1.0, split="test"):
    """Rows whose labels follow logits; predictions see them through noise, and before calibration `off` times too
    strong."""
    draw = np.random.default_rng(seed)  # of the rows
    blur = np.random.default_rng((seed, round(1000 * noise)))  # of who predicts them
    user, item = draw.integers(0, 150, rows), draw.integers(0, 80, rows)
    frame = {
        "user": [f"u{u}" for u in user],
        "item": [f"i{i}" for i in item],
        "popularity": (80.0 - item).astype(np.float32),
        "popular": (1 - item / 80).astype(np.float32),
        **{f"popular.{task.name}": (1 - item / 80).astype(np.float32) for task in tasks if task.kind == "binary"},
        "item_seen": item < 75,
        "segment.hour": draw.integers(0, 3, rows),
    }
    classes, predictions, labels = {}, {}, []
    for number, task in enumerate(tasks):
        logit = draw.normal(size=rows) * 1.5 - number + 0.4 * (user % 3) - 0.01 * item
        seen = logit + noise * blur.normal(size=rows)
        if task.kind == "multiclass":
            scores = draw.normal(size=(rows, 4))
            label = scores.argmax(1).astype(float)
            p = np.exp(scores + noise * blur.normal(size=(rows, 4)))
            classes[f"p.{task.name}"] = (p / p.sum(1, keepdims=True)).astype(np.float32)
            predictions[task.name] = classes[f"p.{task.name}"]
        elif task.kind == "regression":
            label, predictions[task.name] = logit + draw.normal(size=rows), seen
        else:
            label = (draw.random(rows) < sigmoid(logit)).astype(float)
            predictions[task.name] = sigmoid(seen)
            frame[f"uncalibrated.{task.name}"] = sigmoid(off * seen + (off - 1)).astype(np.float32)
        label[draw.random(rows) < 0.1] = np.nan
        labels.append(label)
        frame[f"label.{task.name}"] = label.astype(np.float32)
        if task.kind != "multiclass":
            frame[f"p.{task.name}"] = predictions[task.name].astype(np.float32)
    parts = [w * predictions[t] for t, w in WEIGHTS.items() if t in predictions]
    frame["score"] = (np.sum(parts, axis=0) / 16 + 0.6).astype(np.float32)
    thresholds = {task.name: 0.4 for task in tasks if task.kind == "binary"}
    return PredictionsTable(pd.DataFrame(frame), tuple(tasks), split, classes, thresholds)


def evaluation(of, tasks=TASKS):
    """As metrics.json holds it, of a table."""
    predictions = {task.name: of.predicted(task.name) for task in tasks} | {"score": of.score}
    labels = np.stack([of.labels(task.name) for task in tasks], axis=1)
    found = evaluate_predictions(tuple(tasks), predictions, labels, of.users, of.popular_for, list(WEIGHTS))
    return finite({"kinds": found.kinds, "tasks": found.tasks, "ranking": found.ranking, "rows": found.rows})


def about(history, tasks=TASKS):
    """What stands beside a checkpoint."""
    plan = {
        "table_user": {"shards": [{"rank": 0, "row": 0, "column": 0, "rows": 100, "columns": 8},
                                  {"rank": 1, "row": 100, "column": 0, "rows": 51, "columns": 8}]},
        "table_item": {"shards": [{"rank": r, "row": 0, "column": 0, "rows": 80, "columns": 4} for r in (0, 1)]},
    }  # fmt: skip
    return {
        "format": 1, "step": 40, "history": history, "rows": "memory, 9000 rows, seed 0, 0123abcd", "ranks": 2,
        "batch_size": 64, "plan": plan, "versions": {"mtcl_torchrec": "0.1.0", "torch": "2.13.0", "fbgemm-gpu": None},
    }  # fmt: skip


def history_of(tasks=TASKS, epochs=3):
    of = [table(600, seed=5, noise=2.0 - 0.5 * e, tasks=tasks) for e in range(epochs)]
    metrics = [
        {t.name: finite(task_metrics(t, x.labels(t.name), x.predicted(t.name), x.users)) for t in tasks} for x in of
    ]
    return {
        "epochs": metrics, "best_epoch": epochs - 1 or epochs, "best_auc": 0.7, "best_step": 40,
        "seconds": [2.0 + e for e in range(epochs)], "stopped_early": False, "frozen": {}, "skipped_steps": 0,
    }  # fmt: skip


def balance_of(tasks=TASKS):
    gates = [{"level": 1, "gate": t.name, "weights": [0.2 + 0.1 * n, None if n else 0.5, 0.8 - 0.1 * n], "entropy": 0.9,
              "native": [1] if n == 0 else []} for n, t in enumerate(tasks)]  # fmt: skip
    names = [t.name for t in tasks]
    cosine = [
        [1.0 if i == j else (-0.2 if {i, j} == {0, 2} else 0.1) for j in range(len(tasks))] for i in range(len(tasks))
    ]
    gradients = [{"cut": "trunk", "tasks": names, "cosine": cosine, "conflicting": cosine, "weights": {}, "steps": 40,
                  "clamped": 0.0, "degenerate": 0.0}]  # fmt: skip
    return {"readings": 9, "loss_weights": None, "gates": gates, "gradients": gradients}


def fitted_report():
    """fusion/report.json as `mtcl fuse` writes it, of two tasks."""
    named = [
        ("weighted_mean, search", 0.72, 0.02, 0.05),
        ("head click", 0.7197, 0, 0.12),
        ("head like", 0.7198, 0.1, 0),
    ]
    drawn = [("", 0.7198 + 0.0002 * x, 0.1 * x, 0.1 - 0.1 * x) for x in np.random.default_rng(1).random(20).tolist()]
    front = [
        {"name": n, "target": t, "loss click": a, "loss like": b, "front": bool(n)} for n, t, a, b in named + drawn
    ]
    tried = [
        {
            "name": n,
            "target": t,
            "std": 0.01,
            "error": 0.01,
            "better": t - 0.7198,
            "better_error": 0.00005,
            "better_half": 0.0001,
            "broken": "",
        }
        for n, t in [*((n, t) for n, t, _, _ in named), ("popularity", 0.4)]
    ]
    return {
        "combiner": "weighted_mean", "method": "search", "target": "value@5", "weights": {"click": 1.0, "like": 4.0},
        "influence": {"click": 0.3, "like": 0.7}, "tried": tried, "front": front,
    }  # fmt: skip


def make(folder, *, tasks=TASKS, baselines=True, fitted=True, calibrated=True, name="made"):
    """Write the whole run directory."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    test = table(tasks=tasks, off=1.6)
    if not calibrated:
        test = PredictionsTable(
            test.frame[[c for c in test.frame if not c.startswith("uncalibrated.")]], test.tasks, test.split,
            test.classes, test.thresholds,
        )  # fmt: skip
    write_predictions(folder / "predictions/test.parquet", test)
    history, balance = history_of(tasks), balance_of(tasks)
    metrics = {
        "history": history, "balance": balance, "diagnosis": ["nothing stands out in the use of experts"],
        "evaluations": {"test": evaluation(test, tasks)},
        "cost": {"samples_per_second": 4321.0, "peak_memory_gb": 1.5, "peak_device_memory_gb": None,
                 "dense_parameters": 12345, "device": "cpu", "ranks": 2},
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics))
    schema = {"tasks": [{"name": t.name, "kind": t.kind} for t in tasks]}
    weights = {t: w for t, w in WEIGHTS.items() if t in [task.name for task in tasks]}
    run = {"name": name, "schema": schema, "fusion": {"weights": weights}}
    (folder / "run.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
    checkpoint = folder / "checkpoints/step_000000040"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps(about({**history, "balance": balance}, tasks)))
    if fitted:
        (folder / "fusion").mkdir()
        (folder / "fusion/fusion.yaml").write_text(
            yaml.safe_dump({"format": 1, "fusion": {"weights": {"click": 1.0, "like": 4.0}}})
        )
        (folder / "fusion/report.json").write_text(json.dumps(fitted_report()))
    if baselines:
        noises = {"popularity": None, "logistic": 1.5, "single_task": 1.2, "trees": 0.9}
        about_them = {n: {"settings": {"c": 1.0}, "trials": 10, "seconds": 3.0, "metrics": {}} for n in noises}
        (folder / "baselines.json").write_text(json.dumps(about_them))
        for n, noise in noises.items():
            of = table(noise=noise or 0.3, tasks=tasks)
            if noise is None:
                kept = [c for c in of.frame if not c.startswith(("p.", "uncalibrated."))]
                of = PredictionsTable(of.frame[kept].assign(score=of.popularity), of.tasks)
            write_predictions(folder / f"baselines/{n}/predictions/test.parquet", of)
    return folder
