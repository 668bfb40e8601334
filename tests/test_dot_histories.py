"""Dot heads beside histories and LSTM towers; and who may see a history that looks at the candidate."""

import pytest
import torch
from test_sequences import batch, model
from torchrec import KeyedJaggedTensor

from mtcl_torchrec import MTCLTrain, Task
from mtcl_torchrec.modules.sequences import DIN, Mean

DOT = Task.binary("liked", head={"kind": "dot", "dim": 4, "sampled_softmax": {"item": "item"}})
TASKS = (Task.binary("click"), DOT, Task.binary("back", inputs=("user", "context")))
GROUPS = {"user": ["user"], "item": ["item"], "clicked": ["user"], "kind": ["user"]}
OPTIONS = {"tasks": TASKS, "feature_groups": GROUPS, "dense_groups": [["user"], ["item"]]}


def with_other_items(data):
    """The same rows, each about another item."""
    ids = data.sparse_features
    rows = ids.stride()
    values = ids.values().clone()
    values[rows : 2 * rows] = (values[rows : 2 * rows] + 7) % 20
    dense = data.dense_features.clone()
    dense[:, 1] += 1
    return dense, KeyedJaggedTensor(ids.keys(), values=values, lengths=ids.lengths())


@pytest.mark.parametrize("lstm", [False, True])
@pytest.mark.parametrize("encoder", [DIN, Mean])
def test_a_task_that_may_not_see_the_item_does_not_see_what_looks_at_it(encoder, lstm):
    of, data = model(encoder(), lstm, **OPTIONS).eval(), batch()
    before = of(data.dense_features, data.sparse_features)
    after = of(*with_other_items(data))
    torch.testing.assert_close(after["back"], before["back"])
    assert (after["click"] - before["click"]).abs().min() > 0
    assert (after["liked"] - before["liked"]).abs().min() > 0


@pytest.mark.parametrize("encoder", [DIN, Mean])
def test_the_users_vector_reads_a_history_that_is_the_users_alone(encoder):
    of = model(encoder(), **OPTIONS)
    head = of.tower.dot_heads["1"]
    widths = of.lookups.dims
    expected = widths["user"] + 1 + (widths["clicked"] if encoder is Mean else 0)
    assert head.user.in_features == expected
    assert head.item.in_features == widths["item"] + 1


@pytest.mark.parametrize("lstm", [False, True])
def test_a_dot_head_and_lstm_towers_train_side_by_side_and_freezing_finds_the_right_ones(lstm):
    train = MTCLTrain(model(Mean(), lstm, **OPTIONS))
    labels = torch.randint(0, 2, (6, 3), generator=torch.Generator().manual_seed(0)).float()
    data = batch(labels=labels)
    train.loss.freeze("click", "back")
    train(data)[0].backward()
    moved = {name for name, p in train.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any(".embeddings.t_items" in name for name in moved)  # through the dot head, which is not frozen
    assert not any(".trunk." in name for name in moved)
    train.zero_grad()
    train.loss.unfreeze("click", "back")
    train.loss.freeze("liked")
    train.loss.task_weights[0] = train.loss.task_weights[2] = 0
    train(data)[0].backward()
    moved = {name for name, p in train.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved
    assert all(".dot_heads." in name for name in moved)
    assert int(train.loss.dot_losses.popularity[0].total) == 12
