"""Every kind of fused score through the public entry point: from YAML, on one rank and on two, read back and edited."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
import shop
import torch
import yaml
from ranks import run_ranks
from rich.console import Console

from mtcl_torchrec.config import FusionConfig, dump_run, parse_run
from mtcl_torchrec.data.source import read_rows
from mtcl_torchrec.evaluation.metrics import auc
from mtcl_torchrec.evaluation.predict import predict, whole_requests
from mtcl_torchrec.modules.fusion import DeepEnsemble
from mtcl_torchrec.schema import ConfigError, DataError, Task
from mtcl_torchrec.serving.recommender import Recommender
from mtcl_torchrec.training.ensemble import load_ensemble
from mtcl_torchrec.training.finished import FinishedRun, RunWarning
from mtcl_torchrec.training.fused import build_fused_score
from mtcl_torchrec.training.run import train_run
from mtcl_torchrec.training.sharding import ranks

RUN = """
data: {train: train.parquet, val: val.parquet}
schema:
  user: user_id
  item: product_id
  features:
    - {name: user_id, group: user, embedding_dim: 4}
    - {name: product_id, group: item, embedding_dim: 4}
    - {name: genre, group: item, embedding_dim: 4}
    - {name: price, group: item, kind: dense, transform: log}
    - {name: age, group: user, kind: dense}
    - {name: hour, group: context, embedding_dim: 4}
  tasks:
    - {name: click, kind: binary}
    - {name: buy, kind: binary, mask: click}
    - {name: stars, kind: regression}
model: {trunk: {kind: shared_bottom, expert_layers: [8]}, tower_layers: [4]}
optimizers: {tables: {lr: 0.2}, dense: {lr: 0.03}}
training: {epochs: 1, batch_size: 32, eval_batch_size: 70, warmup_steps: 5, patience: 0, log_every: 1}
"""
WEIGHTS = "weights: {click: 1, buy: 4, stars: -0.5}"
TRAIN = "train: {reward: {click: 1, buy: 4}, missing: zero"
KINDS = {
    "geometric": f"{{kind: weighted_geometric_mean, {WEIGHTS}, floor: 1e-4, {TRAIN}, heads: through}}}}",
    "product": "{kind: power_product, weights: {click: 1, stars: 2}, bases: {stars: 2}, exponents: {stars: -1}}",
    "value": "{kind: expected_value, weights: {click: 1, buy: 0.1}, given: {buy: click}, numbers: {buy: price}}",
    "soft": f"{{kind: soft_voting, {WEIGHTS}, thresholds: {{buy: 0.2}}, temperature: 0.2, {TRAIN}, heads: through}}}}",
    "hard": f"{{kind: hard_voting, {WEIGHTS}, thresholds: {{buy: 0.2}}}}",
    "top_k": f"{{kind: top_k_voting, {WEIGHTS}, k: 3, temperature: 0.1}}",
    "borda": f"{{kind: borda, {WEIGHTS}}}",
    "rank": f"{{kind: reciprocal_rank, {WEIGHTS}, k: 5}}",
    "stacking": "{kind: stacking, train: {reward: worth}}",
    "monotone": f"{{kind: monotone_network, signs: {{click: 1, buy: 1, stars: -1}}, hidden: [6], {TRAIN}}}}}",
    "gated": "{kind: context_gated_mean, weights: {click: 1, buy: 1}, features: [hour, age], hidden: [4], "
    "train: {reward: click, weight: 2, loss: pairwise, heads: through}}",
    "own": "{kind: 'own_score:Powers', options: {tasks: [click, buy]}, train: {reward: click}}",
}
COMPARING = ("top_k", "borda", "rank")
# Their training is that of a weighted mean, or of another that is trained: trained by `make test-full` alone.
SLOW = ("product", "soft", "hard", "rank", "top_k", "own")
QUICK = tuple(kind for kind in KINDS if kind not in SLOW)
OWN = """
import torch

class Powers(torch.nn.Module):
    def __init__(self, tasks):
        super().__init__()
        self.tasks, self.powers = tuple(tasks), torch.nn.Parameter(torch.ones(len(tasks)))

    def forward(self, parts):
        return torch.stack([parts[t] ** p.exp() for t, p in zip(self.tasks, self.powers)], 1).mean(1)
"""


def configured(folder, fusion, change=lambda raw: None):
    raw = yaml.safe_load(RUN) | {"fusion": yaml.safe_load(fusion)}
    change(raw)
    return parse_run(yaml.safe_dump(raw), folder=folder)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fused")
    frame = shop.log(900)
    frame["worth"] = np.where(frame.index % 5 == 0, np.nan, (frame["click"] + 4 * frame["buy"]) / 5)
    frame[:600].to_parquet(folder / "train.parquet", index=False)
    frame[600:].to_parquet(folder / "val.parquet", index=False)
    (folder / "own_score.py").write_text(OWN)
    return folder


def quiet():
    return Console(file=io.StringIO(), width=200)


def trained(log, root, kinds):
    """Each kind's validation metrics and fused score's ranking."""
    sys.path.insert(0, str(log))
    found = {}
    with ranks("cpu"):
        for kind in kinds:
            result = train_run(configured(log, KINDS[kind]), root / kind, device="cpu", console=quiet())
            found[kind] = result.evaluations["val"].ranking["fused"], result.history.epochs
    return found


@pytest.fixture(scope="module")
def two(log, tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    return root, run_ranks(trained, 2, log, root, QUICK)


def test_every_kind_trains_on_two_ranks_and_ranks_alike_when_it_is_read_back(two, log, monkeypatch):
    ranks_alike(two[0], two[1], QUICK, log, monkeypatch)


@pytest.mark.full
def test_the_other_kinds_do_so_too(log, tmp_path, monkeypatch):
    ranks_alike(tmp_path, run_ranks(trained, 2, log, tmp_path, SLOW), SLOW, log, monkeypatch)


def ranks_alike(root, results, kinds, log, monkeypatch):
    """The scores of whole requests do not depend on which rank had them."""
    first, second = results
    monkeypatch.syspath_prepend(str(log))
    for kind in kinds:
        assert first[kind][0] == second[kind][0]
        run = FinishedRun.load(root / kind)
        rows = run.preprocessor.encode(run.preprocessor.conform(read_rows([str(log / "val.parquet")])))
        assert (rows.requests is None) == (kind not in (*COMPARING, "gated"))
        out = predict(run.model, rows, batch_size=77)
        assert out["score"].min() >= 0
        assert out["score"].max() <= 1
        known = ~np.isnan(rows.labels[:, 0].numpy())
        ranked = auc(rows.labels[known, 0].numpy(), out["score"][known])
        assert ranked == pytest.approx(first[kind][0]["auc click"], abs=1e-6), kind
        best = Recommender(run).recommend("u3", k=5)
        assert best["score"].is_monotonic_decreasing


def test_one_rank_trains_the_same_fused_score_as_two(two, log, tmp_path, monkeypatch):
    """Global batches are equal: one rank's are as large as those of two together."""
    root, _ = two
    monkeypatch.syspath_prepend(str(log))

    def twice(raw):
        raw["training"]["batch_size"] *= 2

    for kind in ("geometric", "stacking", "monotone", "borda"):
        train_run(configured(log, KINDS[kind], twice), tmp_path / kind, device="cpu", console=quiet())
        one, other = (FinishedRun.load(folder / kind).model for folder in (tmp_path, root))
        expected = one.state_dict()
        for name, value in other.state_dict().items():
            torch.testing.assert_close(value, expected[name], atol=2e-4, rtol=2e-3, msg=f"{kind} {name}")


def test_what_learns_has_learnt_and_its_loss_is_told(two, log):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    root, _ = two
    stacking = FinishedRun.load(root / "stacking").model.output.fused_score
    assert (stacking.weights - 1 / 3).abs().max() > 0.05
    gated = FinishedRun.load(root / "gated").model.output.fused_score
    assert gated.gate.weight.abs().max() > 0.01
    events = EventAccumulator(str(root / "stacking/tensorboard"))
    events.Reload()
    losses = [e.value for e in events.Scalars("loss/score")]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert "loss/score" not in EventAccumulator(str(root / "borda/tensorboard")).Reload().Tags()["scalars"]


def test_the_price_is_read_in_its_own_unit(two, log):
    run = FinishedRun.load(two[0] / "value")
    frame = read_rows([str(log / "val.parquet")])
    known = frame.frame["price"].notna().to_numpy()
    rows = run.preprocessor.encode(frame)
    price = run.model.output.fused_score.numbers["buy"].read(rows.dense).numpy()
    np.testing.assert_allclose(price[known], frame.frame["price"][known], rtol=1e-4)
    out = predict(run.model, rows)
    value = (out["click"] + 0.1 * price * out["click"] * out["buy"]) / 1.1
    scale = run.model.output.fused_score.scale.item()
    np.testing.assert_allclose(out["score"], value / (scale + value), rtol=1e-4)


def test_another_fused_score_is_put_into_run_yaml_without_training(two, tmp_path, log):
    folder = shutil.copytree(two[0] / "borda", tmp_path / "run")
    run = yaml.safe_load((folder / "run.yaml").read_text())
    for fusion in ("{weights: {click: 1}}", KINDS["product"], KINDS["rank"], KINDS["hard"]):
        (folder / "run.yaml").write_text(yaml.safe_dump(run | {"fusion": yaml.safe_load(fusion)}))
        assert Recommender.load(folder).recommend("u3", k=3)["score"].between(0, 1).all()


def test_weights_edited_beneath_what_was_learnt_are_not_silently_passed_over(two, tmp_path):
    for kind, before, after in (("gated", "click: 1", "click: 5"), ("monotone", "stars: -1", "stars: 1")):
        folder = shutil.copytree(two[0] / kind, tmp_path / kind)
        text = (folder / "run.yaml").read_text()
        head, fusion = text.split("fusion:")
        assert before in fusion
        (folder / "run.yaml").write_text(f"{head}fusion:{fusion.replace(before, after, 1)}")
        with pytest.warns(
            RunWarning, match=r"run.yaml was changed after it was trained: what .*checkpoints.*(--set|only training)"
        ):
            changed = FinishedRun.load(folder).model.output.fused_score
        expected = FinishedRun.load(two[0] / kind).model.output.fused_score.state_dict()
        for name, value in changed.state_dict().items():
            assert torch.equal(value, expected[name])


def test_an_ensemble_of_run_directories_recommends(two, log, tmp_path):
    root, _ = two
    run = load_ensemble([root / "geometric", root / "stacking", root / "value"])
    assert isinstance(run.model, DeepEnsemble)
    rows = run.preprocessor.encode(read_rows([str(log / "val.parquet")]))
    out, alone = predict(run.model, rows), predict(FinishedRun.load(root / "stacking").model, rows)
    assert set(out) == set(alone) | {"score_std"}
    assert out["score_std"].max() > 0.01
    assert Recommender(run).recommend("u3", k=3)["score"].is_monotonic_decreasing
    other = shutil.copytree(root / "stacking", tmp_path / "other")
    scales = json.loads((other / "preprocessing/encoder/encoder.json").read_text())
    scales["dense"]["age"][0] += 1
    (other / "preprocessing/encoder/encoder.json").write_text(json.dumps(scales))
    with pytest.raises(DataError, match="encodes its rows in another way"):
        load_ensemble([root / "value", other])
    with pytest.raises(ConfigError, match="a run at least"):
        load_ensemble([])


def test_whole_requests_are_never_cut_and_every_rank_takes_as_many_steps(two, log):
    run = FinishedRun.load(two[0] / "borda")
    rows = run.preprocessor.encode(read_rows([str(log / "val.parquet")]))
    for world_size in (1, 2, 3):
        of_ranks = [whole_requests(rows, 40, rank=r, world_size=world_size) for r in range(world_size)]
        assert len({len(batches) for batches in of_ranks}) == 1
        batches = [b for batches in of_ranks for b in batches]
        assert sorted(torch.cat(batches).tolist()) == list(range(len(rows)))
        requests = [set(rows.requests[b].tolist()) for b in batches]
        assert sum(map(len, requests)) == len(set(rows.requests.tolist()))
        assert max(map(len, batches)) <= 40


def test_the_fused_score_comes_back_from_the_runs_own_yaml(log):
    for fusion in KINDS.values():
        run = configured(log, fusion)
        assert parse_run(dump_run(run)) == run
    assert configured(log, KINDS["borda"]).data_schema.request == "user_id"
    assert configured(log, KINDS["stacking"]).data_schema.reward == "worth"


def test_a_reward_column_that_holds_no_rewards_is_refused(log, tmp_path):
    with pytest.raises(DataError, match="a reward is a number from 0 to 1"):
        train_run(
            configured(log, "{kind: stacking, train: {reward: age}}"), tmp_path / "run", device="cpu", console=quiet()
        )


@pytest.mark.parametrize(
    ("fusion", "message"),
    [
        ("{kind: bord, weights: {click: 1}}", r"fusion.kind: 'bord' is none of .* \(did you mean 'borda'"),
        ("{kind: borda}", "borda needs weights"),
        ("{kind: borda, weights: {click: 1}, k: 3}", "k belongs to reciprocal_rank and top_k_voting, not to borda"),
        ("{weights: {click: 1}, floor: 0.1}", "floor belongs to weighted_geometric_mean, not to weighted_mean"),
        ("{weights: {click: 1}, options: {a: 1}}", "options belong to a fused score given by its import path"),
        ("{kind: 'own:Score', weights: {click: 1}}", "weights belongs to kinds with weights, not to own:Score; give"),
        ("{kind: monotone_network, weights: {click: 1}}", "weights belongs to kinds with weights"),
        ("{kind: monotone_network}", "needs signs"),
        ("{kind: monotone_network, signs: {clik: 1}, train: {reward: click}}", "fusion.signs: no task 'clik'"),
        ("{kind: soft_voting, weights: {click: 1}, thresholds: {buy: 0.1}}", "thresholds: task 'buy' has no weight"),
        ("{kind: expected_value, weights: {buy: 1}, given: {buy: click}}", "given: task 'click' has no weight"),
        ("{kind: expected_value, weights: {buy: 1}, numbers: {buy: prize}}", r"no dense feature 'prize' \(did you"),
        ("{kind: power_product, weights: {click: -2}}", "a positive weight and a negative exponent"),
        ("{kind: stacking}", "stacking learns from a reward, and train says none"),
        ("{kind: context_gated_mean, weights: {click: 1}}", "needs features"),
        ("{kind: context_gated_mean, weights: {click: 1}, features: [our], train: {reward: click}}",
         r"fusion.features: no feature 'our' \(did you mean 'hour'"),
        ("{weights: {click: 1}, train: {reward: click}}", "weighted_mean has no parameters, so that detach leaves"),
        ("{kind: hard_voting, weights: {click: 1}, train: {reward: click}}", "hard_voting has no gradient"),
        ("{kind: top_k_voting, weights: {click: 1}, temperature: 1, train: {reward: click}}", "hold some of them"),
        ("{kind: stacking, train: {reward: {clik: 1}}}", r"fusion.train.reward: no task 'clik' \(did you mean"),
        ("{kind: stacking, train: {reward: {click: 0}}}", "at least one value that is not 0"),
        ("{kind: stacking, train: {reward: worth, missing: zero}}", "a reward of one column has no missing parts"),
        ("{kind: stacking, train: {reward: click, head: detach}}", r"fusion.train.head' \(did you mean 'heads'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_named(log, fusion, message):
    with pytest.raises(ConfigError, match=message):
        configured(log, fusion)


def test_what_does_not_fit_to_the_schema_is_refused(log):
    def nobody(raw):
        del raw["schema"]["user"]

    with pytest.raises(ConfigError, match=r"fusion.kind borda compares rows of one request: schema.request or"):
        configured(log, KINDS["borda"], nobody)
    with pytest.raises(ConfigError, match=r"fusion.train.loss pairwise compares rows of one request"):
        configured(log, KINDS["gated"], nobody)

    def chained(raw):
        raw["schema"]["tasks"][1] = {"name": "buy", "kind": "binary", "after": "click"}

    with pytest.raises(ConfigError, match=r"fusion.given: task 'buy' comes after another in the schema"):
        configured(log, KINDS["value"], chained)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["click", "by"]}, r"needs task 'by', which the run lacks \(did you mean 'buy'"),
        ({"tasks": ["click"]}, r"fails on parts of 5 rows \(KeyError: 'buy'\)"),
        ({"times": 3.0}, r"gives scores outside of \[0, 1\]: \["),
        ({"mean": True}, r"gives \(\) for parts of 5 rows; a fused score gives \(5,\)"),
    ],
)
def test_a_fused_score_of_ones_own_that_gives_no_scores_is_refused_before_training(options, message):
    tasks = [Task.binary("click"), Task.binary("buy")]
    with pytest.raises(ConfigError, match=rf"^fusion.kind: own_fused:Product {message}"):
        build_fused_score(FusionConfig(kind="own_fused:Product", options=options), tasks)
    before = torch.get_rng_state()
    made = build_fused_score(FusionConfig(kind="own_fused:Product", options={"times": 0.5}), tasks)
    assert made.training
    assert torch.equal(torch.get_rng_state(), before)


def test_a_fused_score_of_ones_own_must_say_its_tasks(log, tmp_path):
    run = configured(log, "{kind: 'torch.nn:Identity'}")
    with pytest.raises(ConfigError, match=r"fusion.kind: torch.nn:Identity makes a module without an attribute tasks"):
        train_run(run, tmp_path / "run", device="cpu", console=quiet())
    run = configured(log, "{kind: 'mtcl_torchrec:WeightdMean'}")
    with pytest.raises(ConfigError, match=r"fusion.kind: .* has no 'WeightdMean' \(did you mean 'WeightedMean'"):
        train_run(run, tmp_path / "run", device="cpu", console=quiet())
