"""Metrics while training: those of TorchRec's module and ours, beside the final ones on the same rows."""

from pathlib import Path

import numpy as np
import pytest
import shop
import torch
from ranks import run_ranks
from rich.console import Console

from mtcl_torchrec.config import TrainingMetricsConfig, parse_run
from mtcl_torchrec.evaluation.metrics import auc, gauc, task_metrics
from mtcl_torchrec.evaluation.predict import predict
from mtcl_torchrec.schema import ConfigError, Task
from mtcl_torchrec.training import loop
from mtcl_torchrec.training.progress import TrainingProgress
from mtcl_torchrec.training.rec_metric_kinds import grouped_auc
from mtcl_torchrec.training.rec_metrics import TrainingMetrics
from mtcl_torchrec.training.run import train_run
from mtcl_torchrec.training.sharding import ranks

# Nothing moves and nothing is drawn: each batch is predicted by the weights that the run begins with, which tell
# apart what they see.  Labels are missing, masked, and zeros of a chain.
FROZEN = (
    shop.RUN.replace("lr: 0.1}", "lr: 1.0e-30, init_scale: 0.5}").replace("lr: 0.01", "lr: 1.0e-30")
    .replace("gate_dropout: 0.1", "gate_dropout: 0.0").replace("epochs: 4", "epochs: 1")
    .replace("{name: buy, kind: binary, mask: click, weight: 0.5}",
             "{name: buy, kind: binary, mask: click, weight: 0.5, negative_rate: 0.5}\n"
             "    - {name: order, kind: binary, label: ordered, after: click, chain: esmm}")
    .replace("patience: 0}", "patience: 0, metrics: {every: 7, window: 100_000, ranked_window: 100_000}}")
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    frame = shop.log(1500)
    draw = np.random.default_rng(5)
    frame["ordered"] = np.where(frame["click"] == 1, frame["buy"], np.nan)  # a zero where there was no click
    frame.loc[draw.random(len(frame)) < 0.1, "click"] = np.nan
    frame.to_parquet(folder / "log.parquet", index=False)
    return folder


def seen_and_judged(folder: Path, batch_size: int):
    """The readings of a run whose weights stand still, the final metrics on the same rows, and what the progress was
    told in each step."""
    readings, told, final = [], [], {}
    read, step, epoch = TrainingMetrics.read, TrainingProgress.step, loop._train_epoch

    def reading(self):
        readings.append(read(self))
        return readings[-1]

    def stepping(self, **given):
        told.append(given["metrics"])
        return step(self, **given)

    def training(pipeline, state, rows, config, where, **options):
        waited = epoch(pipeline, state, rows, config, where, **options)
        loop._let_go(pipeline)
        plain, encoded = loop.plain_model(state.model), rows.rows
        predictions = predict(plain, encoded, batch_size=64, device=where.device)
        users = encoded.ids[:, [k for k in encoded.keys if k not in encoded.bags].index("user_id")].numpy()
        users, labels = np.where(users > 0, users.astype(float), np.nan), encoded.labels.numpy()
        for i, task in enumerate(plain.tasks):
            final[task.name] = task_metrics(task, labels[:, i], predictions[task.name], users)
        return waited

    TrainingMetrics.read, TrainingProgress.step, loop._train_epoch = reading, stepping, training
    try:
        run = parse_run(FROZEN.replace("batch_size: 32", f"batch_size: {batch_size}"), folder=folder)
        train_run(run, folder / f"run{batch_size}", existing="overwrite", device="cpu", console=Console(quiet=True))
    finally:
        TrainingMetrics.read, TrainingProgress.step, loop._train_epoch = read, step, epoch
    return readings, final, told


def check(readings, expected):
    last = readings[-1]
    assert set(last) == {"click", "buy", "order", "taste", "stars"}
    compared = 0
    for task, of in expected.items():
        for name in ("count", "auc", "gauc", "ne", "calibration", "mse", "r2", "top1"):
            if name in of and not (task == "taste" and name == "count"):
                assert last[task][name] == pytest.approx(of[name], rel=1e-5), (task, name)
                compared += 1
    assert compared == 3 * 5 + 3 + 2
    assert expected["order"]["count"] > expected["buy"]["count"]  # the chain's zeros count
    assert expected["stars"]["count"] < expected["click"]["count"] < 1500


def test_with_weights_that_stand_still_they_are_the_final_metrics(data):
    readings, expected, told = seen_and_judged(data, 32)
    check(readings, expected)
    assert len(readings) == 1 + 33 // 7
    assert [step for step, given in enumerate(told, 1) if given is not None] == [7, 14, 21, 28, 33]
    assert told[-1] == readings[-1]


def on_two_ranks(folder):
    return seen_and_judged(folder, 16)[:2]


def test_two_ranks_tell_the_same(data):
    (here, expected), (there, _) = run_ranks(on_two_ranks, 2, data)
    assert here == there
    check(here, expected)


def test_a_run_learns_the_same_with_them_and_without(data):
    text = shop.RUN.replace("epochs: 4", "epochs: 1")
    histories = []
    for every in (0, 3):
        run = parse_run(text.replace("patience: 0", f"patience: 0, metrics: {{every: {every}}}"), folder=data)
        result = train_run(run, data / f"every{every}", device="cpu", console=Console(quiet=True))
        histories.append(result.history.epochs)
    assert histories[0] == histories[1]


# ---------------------------------------------------------------- alone


def test_grouped_auc_is_that_of_scikit_learn_also_with_ties():
    draw = np.random.default_rng(0)
    for size, levels in ((1, 2), (7, 2), (400, 5), (400, 10**6)):
        y, p = (draw.random(size) < 0.3).astype(np.float32), draw.integers(0, levels, size).astype(np.float32) / levels
        groups, counts = draw.integers(-1, 30, size), draw.random(size) < 0.8
        rows = [torch.from_numpy(a) for a in (p, y, counts.astype(np.float32), groups)]
        of = np.where(groups < 0, np.nan, groups)[counts]
        assert grouped_auc(*rows).item() == pytest.approx(gauc(y[counts], p[counts], of), nan_ok=True)
        rows[-1] = torch.zeros(size, dtype=torch.int64)
        assert grouped_auc(*rows).item() == pytest.approx(auc(y[counts], p[counts]), nan_ok=True)


TASKS = [Task.binary("click"), Task.multiclass("taste", 3), Task.regression("stars", mean=3.0, std=2.0)]


def some_steps(count=20, rows=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    for _ in range(count):
        logits = {"click": torch.randn(rows, generator=g), "taste": torch.randn(rows, 3, generator=g),
                  "stars": torch.randn(rows, generator=g)}  # fmt: skip
        click = (torch.rand(rows, generator=g) < 0.5).float()
        labels = torch.stack([click, torch.randint(0, 3, (rows,), generator=g).float(), 3 + click], 1)
        yield logits, labels


@pytest.fixture
def group():
    with ranks("cpu") as where:
        yield where


def final(steps):
    logits, labels = zip(*steps, strict=True)
    y = torch.cat(labels).numpy()
    of = {name: torch.cat([one[name] for one in logits]) for name in logits[0]}
    return {
        "click": task_metrics(TASKS[0], y[:, 0], of["click"].sigmoid().numpy()),
        "taste": task_metrics(TASKS[1], y[:, 1], of["taste"].softmax(1).numpy()),
        "stars": task_metrics(TASKS[2], y[:, 2], (3 + 2 * of["stars"]).numpy()),
    }


def test_old_rows_leave_their_window(group):
    seen = TrainingMetrics(TASKS, TrainingMetricsConfig(window=60, ranked_window=30), group, batch_size=10)
    steps = list(some_steps())
    for logits, labels in steps:
        seen.add(logits, labels, torch.zeros(()))
    told, window, ranked = seen.read(), final(steps[-6:]), final(steps[-3:])
    assert told["click"]["ne"] == pytest.approx(window["click"]["ne"])
    assert told["click"]["auc"] == pytest.approx(ranked["click"]["auc"])
    assert told["click"]["count"] == 60
    assert told["taste"]["ne"] == pytest.approx(window["taste"]["ne"], rel=1e-5)
    assert told["taste"]["top1"] == pytest.approx(window["taste"]["top1"])
    assert told["stars"]["mse"] == pytest.approx(window["stars"]["mse"], rel=1e-6)
    seen.reset()
    for logits, labels in steps[:2]:
        seen.add(logits, labels, torch.zeros(()))
    assert seen.read()["click"]["auc"] == pytest.approx(final(steps[:2])["click"]["auc"])


def test_a_batch_that_was_skipped_counts_nowhere(group):
    seen = TrainingMetrics(TASKS, TrainingMetricsConfig(), group, batch_size=10)
    steps = list(some_steps(3))
    flag = torch.zeros(())
    for i, (logits, labels) in enumerate(steps):
        if i == 1:
            labels = labels.clone()
            labels[0, 2], logits["click"][1] = 3e38, float("nan")
        flag.fill_(float(i == 1))  # as the loss does, in the same tensor
        seen.add(logits, labels, flag)
    told, expected = seen.read(), final([steps[0], steps[2]])
    for task, name in (("click", "auc"), ("click", "ne"), ("stars", "mse"), ("taste", "ne")):
        assert told[task][name] == pytest.approx(expected[task][name], rel=1e-5)


def test_what_is_not_defined_is_left_out(group):
    seen = TrainingMetrics(TASKS, TrainingMetricsConfig(), group, batch_size=10)
    assert {task: of for task, of in seen.read().items() if set(of) - {"count"}} == {}
    logits, labels = next(some_steps(1))
    labels[:, 0], labels[:, 2] = 0.0, float("nan")
    seen.add(logits, labels, torch.zeros(()))
    told = seen.read()
    assert told["click"] == {"count": 10.0}
    assert told["stars"] == {"count": 0.0}
    assert 0 < told["taste"]["ne"] < 5


def test_they_draw_nothing_at_random(group):
    state = torch.get_rng_state()
    seen = TrainingMetrics(TASKS, TrainingMetricsConfig(), group, batch_size=10)
    for logits, labels in some_steps(3):
        seen.add(logits, labels, torch.zeros(()))
    seen.read()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{every: 0, window: 5}", "training.metrics: window does nothing: every is 0, which is off"),
        ("{kinds: [ne], ranked_window: 5}", "training.metrics: ranked_window belongs to auc and gauc"),
        ("{kinds: [nee]}", "did you mean 'ne'"),
        ("{kinds: [top1]}", "training.metrics.kinds: top1 is of a multiclass task, and there is none"),
        ("{kinds: [gauc]}", "training.metrics.kinds: gauc needs schema.user, and an id feature of that column"),
        ("{evry: 5}", "unknown key 'training.metrics.evry' \\(did you mean 'every'"),
    ],
)
def test_mistakes_are_named(given, message):
    text = (
        "data: {log: a.parquet}\n"
        "schema: {time: t, features: [{name: u, group: user}], tasks: [{name: c, kind: binary}]}\n"
        f"training: {{metrics: {given}}}"
    )
    with pytest.raises(ConfigError, match=message):
        parse_run(text)
