"""Loss weighting: TorchJD's numbers, the same on every rank, and nothing learnt from what is not there."""

import io
import math
import sys

import numpy as np
import pytest
import shop
import torch
import torchjd.scalarization as oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from rich.console import Console
from test_distributed import PENALTIES, TASKS, rows, train_module
from test_faults import state_of
from test_guard import poisoned, snapshot
from torch import nn
from torchrec.datasets.utils import Batch

from mtcl_torchrec import MTCLTrain
from mtcl_torchrec.config import (
    DenseOptimizerConfig,
    LossWeightingConfig,
    OptimizersConfig,
    TableOptimizerConfig,
    dump_run,
    parse_run,
)
from mtcl_torchrec.data.batch import global_batches, iterate
from mtcl_torchrec.modules.balance.weighting import (
    DWA,
    FAMO,
    IMTLL,
    GeometricMean,
    SmoothTchebycheff,
    UncertaintyWeighting,
)
from mtcl_torchrec.modules.losses import MultiTaskLoss
from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.training.build import build_loss_weighting
from mtcl_torchrec.training.checkpoint.store import newest_checkpoint, read_about
from mtcl_torchrec.training.loop import build_pipeline, parallelise, train_module_of
from mtcl_torchrec.training.progress import TrainingProgress
from mtcl_torchrec.training.run import train_run
from mtcl_torchrec.training.sharding import ranks

# By kind, with windows and step sizes that a dozen steps show something of.
OPTIONS = {
    "uncertainty": {"lr": 0.05},
    "imtl_l": {"lr": 0.05},
    "dwa": {"window": 2},
    "famo": {"lr": 0.1},
    "tchebycheff": {"mu": 0.2},
    "geometric_mean": {},
}
ALL = torch.ones(3, dtype=torch.bool)


def made(kind, num_tasks=3, **options):
    return build_loss_weighting(LossWeightingConfig(kind=kind, **(OPTIONS[kind] | options)), num_tasks)


# ---------------------------------------------------------------- the methods


class Oracle:
    """TorchJD's scalarizer, used as its documentation says."""

    def __init__(self, kind):
        o = OPTIONS[kind]
        self.kind, self.seen = kind, 0
        self.of = {
            "uncertainty": lambda: oracle.UW(3),
            "imtl_l": lambda: oracle.IMTLL(3),
            "dwa": lambda: oracle.DWA(2.0),
            "famo": lambda: oracle.FAMO(3, lr=o["lr"]),
            "tchebycheff": lambda: oracle.STCH(o["mu"]),
            "geometric_mean": oracle.GeometricMean,
        }[kind]()

    def __call__(self, values):
        if self.kind == "famo" and self.seen:
            self.of.update(values)
        if self.kind == "dwa" and self.seen and self.seen % OPTIONS["dwa"]["window"] == 0:
            self.of.step()
        self.seen += 1
        leaf = values.clone().requires_grad_()
        combined = self.of(leaf)
        (weights,) = torch.autograd.grad(combined, leaf, retain_graph=True)
        return combined, weights


@pytest.mark.parametrize("kind", OPTIONS)
def test_values_and_weights_are_those_of_torchjd_over_many_steps(kind):
    ours, theirs = made(kind), Oracle(kind)
    learnt = [p for m in (ours, theirs.of) for p in m.parameters() if kind != "famo"]
    optimizer = torch.optim.Adam(learnt, lr=0.05) if learnt else None
    draw, seen = torch.Generator().manual_seed(1), []
    for step in range(40):
        values = torch.tensor([0.7, 0.2, 1.5]) * torch.rand(3, generator=draw).add(0.5) * torch.tensor(
            [0.95**step, 0.99**step, 1.0]
        )  # fmt: skip
        expected, expected_weights = theirs(values)
        combined, weights = ours(values, ALL)
        torch.testing.assert_close(combined, expected)
        torch.testing.assert_close(weights, expected_weights, rtol=2e-5, atol=1e-6)
        seen.append(weights)
        if optimizer is not None:
            optimizer.zero_grad()
            (combined + expected).backward()
            optimizer.step()
    assert int(ours.clamped.sum()) == 0
    assert ours.seen.tolist() == [40] * 3
    assert len({tuple(w.tolist()) for w in seen}) > 5  # they move
    torch.testing.assert_close(ours.mean_weights, torch.stack(seen).mean(0))  # of less than a hundred steps


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_task_that_is_absent_has_weight_0_and_the_others_the_weights_they_have_without_it(kind):
    """As if there were two tasks, up to the constants that hold T."""
    three, two = made(kind, 3), made(kind, 2)
    draw = torch.Generator().manual_seed(3)
    values = torch.rand(6, 3, generator=draw) + 0.1
    for step in range(6):
        _, weights = three(torch.where(torch.arange(3) == 1, math.nan, values[step]), torch.arange(3) != 1)
        _, expected = two(values[step, [0, 2]], torch.ones(2, dtype=torch.bool))
        assert weights[1] == 0
        if kind == "tchebycheff":  # λ = 1/T stays what it is
            expected = torch.softmax(values[step, [0, 2]] / 3 / 0.2, 0) / 3
        if kind == "dwa":  # so does T, and the absent task counts as one that stands still
            assert step < 4 or weights[0] != weights[2]
            expected = expected / expected[0] * weights[0]
        torch.testing.assert_close(weights[[0, 2]], expected)
    assert three.seen.tolist() == [6, 0, 6]


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_batch_without_labels_changes_nothing_and_neither_does_evaluation(kind):
    weighting = made(kind)
    for _ in range(5):
        weighting(torch.rand(3) + 0.1, ALL)
    before = {name: value.clone() for name, value in weighting.state_dict().items()}
    combined, weights = weighting(torch.full((3,), math.nan), ~ALL)
    assert combined == 0
    assert weights.tolist() == [0, 0, 0]
    assert all((p.grad == 0).all() for p in _with_gradients(weighting, combined))
    evaluated, _ = weighting.eval()(torch.rand(3), ALL)
    with torch.no_grad():
        weighting(torch.rand(3), ALL)
    assert torch.isfinite(evaluated)
    for name, value in weighting.state_dict().items():
        assert torch.equal(value, before[name]), name


def _with_gradients(weighting, combined):
    parameters = list(weighting.parameters())
    if parameters:
        combined.backward()
    return parameters


@pytest.mark.parametrize("kind", OPTIONS)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_weights_are_finite_and_in_their_range_whatever_the_losses(kind, data):
    weighting = made(kind)
    number = st.one_of(st.sampled_from([0.0, 1e-30, 1e30, 3e-9]), st.floats(0, 100, width=32))
    for _ in range(4):
        values = torch.tensor(data.draw(st.lists(number, min_size=3, max_size=3)))
        active = torch.tensor(data.draw(st.lists(st.booleans(), min_size=3, max_size=3)))
        combined, weights = weighting(values, active)
        assert torch.isfinite(combined)
        assert (weights[~active] == 0).all()
        assert ((weights[active] >= weighting.lowest) & (weights[active] <= weighting.highest)).all()
    for name, value in weighting.state_dict().items():
        assert torch.isfinite(value.double()).all(), name


def test_weights_out_of_their_range_are_held_and_counted():
    weighting = made("geometric_mean", 2, max_factor=10)
    both = torch.ones(2, dtype=torch.bool)
    _, weights = weighting(torch.tensor([1e-6, 1.0]), both)
    assert weights.tolist() == pytest.approx([5.0, 0.05])
    assert weighting.clamped.tolist() == [1, 1]
    weighting(torch.tensor([0.5, 0.5]), both)
    assert (weighting.clamped.tolist(), weighting.seen.tolist()) == ([1, 1], [2, 2])


def test_negative_values_count_as_zero_where_there_is_a_logarithm():
    for kind in ("famo", "geometric_mean"):
        a, b = made(kind), made(kind)
        _, negative = a(torch.tensor([-0.5, 0.3, 1.0]), ALL)
        _, zero = b(torch.tensor([0.0, 0.3, 1.0]), ALL)
        assert torch.isfinite(negative).all()
        torch.testing.assert_close(negative[1:], zero[1:])


@pytest.mark.parametrize("kind", OPTIONS)
def test_nothing_waits_for_the_device(kind):
    """On the meta device there is nothing that could be read."""
    weighting = made(kind).to("meta")
    for _ in range(4):
        combined, weights = weighting(torch.rand(3, device="meta"), ALL.to("meta"))
    assert (combined.shape, weights.shape) == ((), (3,))
    with pytest.raises((RuntimeError, NotImplementedError)):  # what TorchJD's geometric mean does
        oracle.GeometricMean()(torch.rand(3, device="meta"))


def test_famo_raises_the_weight_of_a_task_that_does_not_fall():
    weighting = FAMO(2, lr=0.1)
    for step in range(30):
        weighting(torch.tensor([0.9**step, 1.0]), torch.ones(2, dtype=torch.bool))
    assert weighting.logits[1] > weighting.logits[0] + 1


def test_arguments_that_make_no_sense_are_refused():
    for make in (lambda: DWA(2, temperature=0), lambda: DWA(2, window=0), lambda: SmoothTchebycheff(2, mu=0),
                 lambda: GeometricMean(2, max_factor=0.5)):  # fmt: skip
        with pytest.raises(ValueError, match=r"temperature|max_factor|mu"):
            make()
    with pytest.raises(ValueError, match="made for 2 tasks, not for 3"):
        MultiTaskLoss(TASKS, weighting=FAMO(2))


def test_without_torchjd_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd", None)
    for make in (UncertaintyWeighting, IMTLL, SmoothTchebycheff):
        with pytest.raises(ImportError, match=r"pip install 'mtcl_torchrec\[balance\]'"):
            make(2)
    with pytest.raises(ConfigError, match=r"balance.weighting.kind imtl_l: .*mtcl_torchrec\[balance\]"):
        made("imtl_l")
    made("famo"), made("dwa"), made("geometric_mean")


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("{kind: famo, temperature: 1}", "temperature belongs to dwa, not to famo"),
        ("{kind: dwa, mu: 1}", "mu belongs to tchebycheff, not to dwa"),
        ("{kind: dwa, lr: 1}", "lr belongs to uncertainty and imtl_l and famo, not to dwa"),
        ("{window: 10}", "window belongs to dwa, not to sum"),
        ("{max_factor: 10}", "max_factor holds weights that move"),
        ("{kind: femo}", "famo"),
        ("{kind: dwa, windw: 3}", "did you mean 'window'"),
        ("{kind: dwa, temperature: 0}", "greater than 0"),
    ],
)
def test_options_of_another_kind_are_refused(yaml, message):
    with pytest.raises(ConfigError, match=message):
        parse_run(shop.RUN + f"balance: {{weighting: {yaml}}}")


# ---------------------------------------------------------------- in the loss


def loss_and_gradients(module, batch):
    module.zero_grad()
    loss, _ = module(batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def a_batch(number=0):
    return list(iterate(rows(), global_batches(90, 30)))[number]


def test_by_default_the_loss_and_its_gradients_are_those_of_the_weighted_sum():
    module = MTCLTrain(train_module("cpu").model)
    loss, gradients = loss_and_gradients(module, a_batch())
    parts = module.loss.last_task_losses
    assert torch.equal(loss, (torch.tensor([1.0, 3.0, 1.0]) * parts).sum())
    assert not any("weighting" in name for name in [*module.state_dict(), *gradients])


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_model_is_trained_by_the_weighted_sum_of_its_losses(kind):
    """The gradient is that of Σ aᵢ wᵢ Lᵢ + λR, and learnt weights get theirs from S."""
    plain = train_module("cpu")
    module = MTCLTrain(plain.model, regularisers=PENALTIES, loss_weighting=made(kind))
    reference, batch = made(kind), a_batch()
    for _ in range(2):
        loss, gradients = loss_and_gradients(module, batch)
    losses = module.loss.last_task_losses
    for _ in range(2):
        combined, weights = reference(torch.tensor([1.0, 3.0, 1.0]) * losses, ALL)
    plain.loss.task_weights.copy_(torch.tensor([1.0, 3.0, 1.0]) * weights)
    weighted_sum, expected = loss_and_gradients(plain, batch)
    penalty = weighted_sum - (plain.loss.task_weights * losses).sum()
    torch.testing.assert_close(loss, combined.detach() + penalty)
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-4, atol=1e-7)
    combined.backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[f"loss.weighting.{name}"], parameter.grad)
    assert weights.unique().numel() > 1 or kind in ("uncertainty", "imtl_l", "dwa")


def test_a_task_of_weight_0_has_no_say():
    module = train_module("cpu")
    module = MTCLTrain(module.model, loss_weighting=GeometricMean(3))
    module.loss.task_weights[1] = 0.0
    loss, gradients = loss_and_gradients(module, a_batch())
    click, _, seconds = module.loss.last_task_losses
    torch.testing.assert_close(loss, (click * seconds).sqrt())
    assert (gradients["model.tower.heads.1.weight"] == 0).all()


def test_torchrecs_own_batch_and_evaluation_without_gradients_work():
    module = MTCLTrain(train_module("cpu").model, loss_weighting=FAMO(3)).eval()
    batch = a_batch()
    with torch.no_grad():
        loss, _ = module(Batch(batch.dense_features, batch.sparse_features, batch.labels))
    with torch.inference_mode():
        again, _ = module(Batch(batch.dense_features, batch.sparse_features, batch.labels))
    assert torch.equal(loss, again)
    assert module.loss.weighting.seen.tolist() == [0, 0, 0]


# ---------------------------------------------------------------- on several ranks


STEPS, GLOBAL_BATCH, BAD = 7, 8, 4


def train_kinds(kinds, with_bad_batch):
    """Of each kind: snapshots of everything on this rank after the steps, and the loss weights of every rank."""
    with ranks("cpu") as where:
        found = {}
        for kind in kinds:
            config = OptimizersConfig(
                tables=TableOptimizerConfig(kind="sgd", lr=0.05),
                dense=DenseOptimizerConfig(kind="adamw", lr=0.01, weight_decay=0.5),
            )
            module = train_module()
            module = MTCLTrain(module.model, regularisers={"l2_embedding": 0.01}, loss_weighting=made(kind))
            model, optimizer = parallelise(module, where, config, seed=3)
            pipe = build_pipeline(model, optimizer, where.device)
            model.train()
            of_rank = {"rank": where.rank, "world_size": where.world_size}
            data = list(iterate(rows(), global_batches(90, GLOBAL_BATCH // where.world_size, **of_rank)))[:STEPS]
            if with_bad_batch:
                bad = poisoned(data[1], "input") if where.rank == where.world_size - 1 else data[1]
                data.insert(BAD, bad)
            batches, taken, losses = iter(data), [], []
            for _ in data:
                losses.append(where.gather(pipe.progress(batches)[0].item()))
                taken.append({n: v for n, v in snapshot(model, optimizer).items() if "embedding_bags" not in n})
            weighting = train_module_of(model).loss.weighting
            state = {n: v.detach().numpy().copy() for n, v in weighting.state_dict().items()}
            found[kind] = taken, losses, where.gather(state)
            learnt = list(weighting.parameters())
            groups = [g for g in optimizer.param_groups if any(p is q for p in g["params"] for q in learnt)]
            assert [(g["weight_decay"], g["lr"]) for g in groups] == ([(0.0, 0.05)] if learnt else [])
            del pipe, model, optimizer
        return found


LEARNING = ["uncertainty", "dwa", "famo"]  # the others have as much state, or none


@pytest.fixture(scope="module", params=[LEARNING, pytest.param([*OPTIONS], marks=pytest.mark.full)], ids=str)
def on_two_ranks(request):
    return run_ranks(train_kinds, 2, request.param, True)


def test_weights_are_the_same_on_every_rank_and_a_bad_batch_changes_none_of_them(on_two_ranks):
    present = [~np.isnan(b.labels.numpy()).all(0) for b in iterate(rows(), global_batches(90, GLOBAL_BATCH))]
    for kind, (taken, losses, states) in [case for found in on_two_ranks for case in found.items()]:
        for name, value in states[0].items():
            np.testing.assert_array_equal(states[1][name], value, err_msg=name)
        # Of what is absent from every label of a batch, nothing is counted; nor of the bad batch.
        assert states[0]["seen"].tolist() == np.sum(present[:STEPS], 0).tolist()
        assert 0 < states[0]["seen"][1] < STEPS
        assert np.isnan(losses[BAD]).any()
        assert np.isfinite([loss for step, loss in enumerate(losses) if step != BAD]).all()
        for name, value in taken[BAD - 1].items():
            np.testing.assert_array_equal(taken[BAD][name], value, err_msg=name)
        moved = {n for n in taken[-1] if "weighting" in n and not np.array_equal(taken[-1][n], taken[BAD][n])}
        assert any("seen" in n for n in moved)
        assert any("log_" in n for n in moved) == (kind in ("uncertainty", "imtl_l"))


def test_two_ranks_weigh_and_train_as_one(on_two_ranks):
    (one,) = run_ranks(train_kinds, 1, list(on_two_ranks[0]), False)
    for kind, (taken, losses, (state,)) in one.items():
        of_two, losses_of_two, states = on_two_ranks[0][kind]
        for name, value in state.items():
            np.testing.assert_allclose(states[0][name], value, rtol=2e-4, atol=2e-5, err_msg=f"{kind} {name}")
        for name, value in taken[-1].items():
            if ".tower." in name and "exp_avg" not in name:
                np.testing.assert_allclose(of_two[-1][name], value, rtol=1e-3, atol=2e-4, err_msg=f"{kind} {name}")
        losses_of_two = [loss for step, loss in enumerate(losses_of_two) if step != BAD]
        np.testing.assert_allclose(np.mean(losses_of_two, 1), np.mean(losses, 1), rtol=1e-3, atol=1e-5, err_msg=kind)


# ---------------------------------------------------------------- through the public entry point


RUN = """
data: {train: log.parquet, val: val.parquet}
schema:
  features: [{name: user_id, group: user, embedding_dim: 4}, {name: genre, group: item, embedding_dim: 4}]
  tasks: [{name: click, kind: binary}, {name: buy, kind: binary, mask: click, weight: 0.5},
          {name: stars, kind: regression, weight: 0.2}]
model: {trunk: {kind: mmoe, num_experts: 2, expert_layers: [8], gate_dropout: 0.1}, tower_layers: []}
optimizers: {tables: {lr: 0.1}, dense: {lr: 0.01}}
training: {epochs: 1, batch_size: 16, warmup_steps: 2, log_every: 3, checkpoint: {every_steps: 6}}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weighting")
    shop.log(300).to_parquet(folder / "log.parquet", index=False)
    shop.log(300, seed=1).to_parquet(folder / "val.parquet", index=False)
    return folder


class Interruption(KeyboardInterrupt):
    pass


def run_kind(yaml, folder, existing="refuse", stop=None):
    step, said = TrainingProgress.step, io.StringIO()

    def interrupted(self, **now):
        if now["step"] == stop:
            raise Interruption

    if stop is not None:
        TrainingProgress.step = interrupted
    try:
        train_run(parse_run(yaml), folder, existing=existing, device="cpu", console=Console(file=said, width=200))
    except Interruption:
        pass
    finally:
        TrainingProgress.step = step
    return said.getvalue()


def run_and_resume(data, folder, resumed):
    with ranks("cpu") as where:
        said = {}
        for kind, options in OPTIONS.items():
            run = parse_run(RUN, folder=data)
            run.balance.weighting = LossWeightingConfig(kind=kind, **options)
            yaml = dump_run(run)
            said[kind] = run_kind(yaml, folder / kind)
            if kind in resumed:
                run_kind(yaml, folder / f"{kind}_stopped", stop=8)
                where.barrier()
                assert read_about(newest_checkpoint(folder / f"{kind}_stopped/checkpoints"))["step"] == 6
                run_kind(yaml, folder / f"{kind}_stopped", "resume")
        return said


@pytest.mark.parametrize(
    "resumed",  # parameters and moments; windows
    [["uncertainty", "famo"], pytest.param([*OPTIONS], marks=pytest.mark.full)],
)
def test_every_kind_trains_and_a_run_that_was_interrupted_ends_bit_equal(data, tmp_path, resumed):
    said, silent = run_ranks(run_and_resume, 2, data, tmp_path, resumed)
    assert set(silent.values()) == {""}
    for kind in OPTIONS:
        tensors, about = state_of(tmp_path / kind)
        assert about["step"] == 10
        assert ("the weights of the tasks cancel out" in said[kind]) == (kind not in ("dwa", "tchebycheff"))
        assert "diagnosis:" in said[kind]
        weighting = {n for n in tensors if ".weighting." in n}
        assert {"mean_weights", "seen", "clamped"} <= {n.rsplit(".", 1)[1] for n in weighting}
        mean = about["history"]["balance"]["loss_weights"]["mean"]
        assert set(mean) == {"click", "buy", "stars"}
        assert len(set(mean.values())) == 3  # they have moved
        assert all(np.isfinite(of["log_loss"]) for of in about["history"]["epochs"][0].values() if "log_loss" in of)
        if kind in resumed:
            again, about_again = state_of(tmp_path / f"{kind}_stopped")
            assert about_again["history"] == about["history"]
            assert set(again) == set(tensors)
            for name, value in tensors.items():
                assert torch.equal(again[name], value), name
    assert any("log_var" in n and "optimizer" in n for n in state_of(tmp_path / "uncertainty")[0])


def test_a_weighting_of_ones_own_is_any_subclass():
    class Halves(GeometricMean):
        def scalarize(self, values, active):
            return torch.where(active, values, 0.0).sum() / 2

    module = MTCLTrain(train_module("cpu").model, loss_weighting=Halves(3))
    loss, _ = module(a_batch())
    torch.testing.assert_close(loss, (torch.tensor([1.0, 3.0, 1.0]) * module.loss.last_task_losses).sum() / 2)
    assert isinstance(module.loss.weighting, nn.Module)
