"""A task that no longer improves stops moving what is shared; the rest, and its own tower, go on."""

import copy
import io
import math

import pandas as pd
import pytest
import torch
from rich.console import Console
from test_regularisers import batch, train_module

from mtcl_torchrec import PLE, MMoE, Task
from mtcl_torchrec.config import parse_run
from mtcl_torchrec.modules.losses import MultiTaskLoss
from mtcl_torchrec.training.freezing import all_frozen, freeze_stalled, stalled
from mtcl_torchrec.training.history import TrainingHistory
from mtcl_torchrec.training.run import train_run

NAMES = ("click", "like", "stars")


def gradients(train):
    """By the name of each parameter, tables included."""
    train.zero_grad()
    train(batch())[0].backward()
    return {n: p.grad.clone() for n, p in train.named_parameters()}


def of_task(gradients, name, number):
    """The parts of tower and head that belong to a task."""
    if name.startswith("model.tower.towers."):
        return gradients[name][number]
    return gradients[name] if name.startswith(f"model.tower.heads.{number}.") else None


@pytest.mark.parametrize("trunk", [MMoE(3, [6]), PLE(1, 1, [6], levels=2)], ids=["mmoe", "ple"])
def test_a_frozen_task_moves_its_tower_and_nothing_that_is_shared(trunk):
    train = train_module(copy.deepcopy(trunk), {})
    before = gradients(train)
    train.loss.freeze("like")
    assert train.loss.frozen() == ("like",)
    frozen = gradients(train)
    train.loss.unfreeze("like")
    train.loss.task_weights[1] = 0
    without = gradients(train)
    for name in before:
        if ".towers." in name or ".heads." in name:
            for number in range(3):
                if (part := of_task(frozen, name, number)) is not None:
                    assert part.any(), (name, number)
                    assert torch.equal(part, of_task(before, name, number)), (name, number)
        else:
            torch.testing.assert_close(frozen[name], without[name], msg=name)
            assert not torch.allclose(frozen[name], before[name]), name


def test_freezing_changes_no_value_and_an_unknown_task_is_named():
    train = train_module(MMoE(3, [6]), {})
    loss, (_, logits, _) = train(batch())
    train.loss.freeze("click", "stars")
    again, (_, frozen, _) = train(batch())
    assert torch.equal(loss, again)
    assert all(torch.equal(logits[n], frozen[n]) for n in NAMES)
    assert train.loss.frozen() == ("click", "stars")
    with pytest.raises(ValueError, match=r"no task 'clik' \(did you mean 'click'\?\)"):
        train.loss.freeze("clik")


def test_what_is_frozen_travels_in_the_state():
    train, other = (train_module(MMoE(3, [6]), {}) for _ in range(2))
    train.loss.freeze("like")
    other.load_state_dict(train.state_dict())
    assert other.loss.frozen() == ("like",)


# ---------------------------------------------------------------------- when


def history(**of):
    """Epochs from the values of each task, by the metric that judges it."""
    metric = {"click": "auc", "like": "auc", "stars": "r2", "taste": "ne"}
    epochs = range(len(next(iter(of.values()))))
    return TrainingHistory(epochs=[{t: {metric[t]: values[e]} for t, values in of.items()} for e in epochs])


TASKS = [Task.binary("click"), Task.binary("like"), Task.regression("stars"), Task.multiclass("taste", 3)]


@pytest.mark.parametrize(
    ("values", "patience", "expected"),
    [
        ([0.6, 0.7, 0.65], 2, False),
        ([0.6, 0.7, 0.65, 0.69], 2, True),
        ([0.6, 0.7, 0.7], 1, True),  # an equal value is no improvement
        ([0.6, 0.5, 0.61], 1, False),
        ([0.6], 1, False),
        ([], 1, False),
        ([0.7, None, None], 1, False),  # not defined: nothing is decided
        ([None, 0.7, 0.6], 1, True),
        ([math.nan, 0.7, 0.6], 1, True),
    ],
)
def test_a_task_is_frozen_after_so_many_epochs_without_improvement(values, patience, expected):
    assert (stalled(history(like=values), [Task.binary("like")], patience) == ["like"]) == expected


def test_every_kind_of_task_is_judged_by_its_own_metric_and_frozen_once():
    seen = history(click=[0.5, 0.6, 0.7], like=[0.7, 0.6, 0.5], stars=[0.3, 0.2, 0.1], taste=[0.9, 0.8, 0.7])
    loss = MultiTaskLoss(TASKS)
    assert freeze_stalled(loss, seen, 0) == []
    assert freeze_stalled(loss, seen, 2) == [
        "like has not improved for 2 epochs: frozen from epoch 4",
        "stars has not improved for 2 epochs: frozen from epoch 4",
    ]
    assert (loss.frozen(), seen.frozen) == (("like", "stars"), {"like": 4, "stars": 4})
    seen.epochs.append({"click": {"auc": 0.6}, "like": {"auc": 0.9}, "stars": {"r2": 0}, "taste": {"ne": 0.7}})
    assert freeze_stalled(loss, seen, 1) == [
        "click has not improved for 1 epoch: frozen from epoch 5",
        "taste has not improved for 1 epoch: frozen from epoch 5",
    ]
    assert all_frozen(seen, TASKS)
    assert TrainingHistory.from_json(seen.to_json()).frozen == seen.frozen


RUN = """
data: {train: log.parquet, val: val.parquet}
schema:
  features: [{name: item, group: item, embedding_dim: 4}]
  tasks: [{name: click, kind: binary}]
model: {trunk: {kind: shared_bottom, expert_layers: [4]}, tower_layers: []}
optimizers: {tables: {kind: sgd, lr: 1e-30}, dense: {kind: sgd, lr: 1e-30}}
training: {epochs: 9, batch_size: 50, patience: 0, task_patience: 2}
"""


def test_training_stops_when_all_tasks_are_frozen(tmp_path):
    frame = pd.DataFrame({"item": [f"i{n % 7}" for n in range(100)], "click": [int(n % 3 == 0) for n in range(100)]})
    for name in ("log", "val"):
        frame.to_parquet(tmp_path / f"{name}.parquet")
    run, said = parse_run(RUN, folder=tmp_path), io.StringIO()
    result = train_run(run, tmp_path / "run", device="cpu", console=Console(file=said, width=200))
    assert len(result.history.epochs) == 3  # the first is the best, of equal ones
    assert result.history.frozen == {"click": 4}
    assert result.history.stopped_early
    assert "click has not improved for 2 epochs: frozen from epoch 4" in said.getvalue()
    assert "all tasks are frozen: stopping; epoch 1 is kept" in said.getvalue()
