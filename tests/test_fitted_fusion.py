"""Weights set by hand, of every kind of fused score, in the model and in the run directory; no training."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from mtcl_torchrec.config import FusionConfig
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.models import MTCL
from mtcl_torchrec.modules.embeddings import build_embedding_bag_collection, embedding_dims
from mtcl_torchrec.modules.trunks import SharedBottom
from mtcl_torchrec.schema import ConfigError, DataError, Feature, Schema, Task
from mtcl_torchrec.training.fitted_fusion import load_fusion, save_fusion, set_weights
from mtcl_torchrec.training.fused import build_fused_score

TASKS = [Task.binary("click"), Task.binary("buy"), Task.binary("report")]
ROWS = pd.DataFrame({"tab": ["a", "b"], "price": [1.0, 9.0], "click": [0, 1], "buy": [1, 0], "report": [0, 1]})
WEIGHTS = {"click": 1, "buy": 0.3}
KINDS = [
    {"weights": WEIGHTS},
    {"kind": "weighted_geometric_mean", "weights": WEIGHTS, "floor": 0.01},
    {"kind": "power_product", "weights": WEIGHTS, "bases": {"buy": 0.5}, "exponents": {"click": 2, "buy": -3}},
    {"kind": "expected_value", "weights": WEIGHTS, "numbers": {"buy": "price"}, "given": {"buy": "click"}},
    {"kind": "soft_voting", "weights": WEIGHTS, "thresholds": {"buy": 0.2}, "temperature": 0.3},
    {"kind": "hard_voting", "weights": WEIGHTS, "thresholds": {"buy": 0.2}},
    {"kind": "top_k_voting", "weights": WEIGHTS, "k": 2},
    {"kind": "borda", "weights": WEIGHTS},
    {"kind": "reciprocal_rank", "weights": WEIGHTS, "k": 7},
    {"kind": "stacking", "weights": WEIGHTS},
    {"kind": "stacking"},  # what it has learnt stands in no YAML
    {"kind": "context_gated_mean", "weights": WEIGHTS, "features": ["tab"]},
]


@pytest.fixture(scope="module")
def encoder():
    features = [Feature(name="tab", group="context"), Feature(name="price", group="item", kind="dense")]
    return FeatureEncoder(Schema(features=features, tasks=TASKS)).fit(Rows(ROWS))


def model_of(config, encoder):
    tables = build_embedding_bag_collection(encoder.schema, encoder.num_embeddings, "cpu")
    fused = build_fused_score(config, TASKS, encoder=encoder, dims=embedding_dims(tables))
    return MTCL(tables, len(encoder.dense_groups), SharedBottom([2]), TASKS, fused).eval()


def learnt(config, encoder):
    """A model whose fused score has learnt something."""
    torch.manual_seed(0)
    model = model_of(config, encoder)
    for parameter in model.output.fused_score.parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("given", KINDS, ids=lambda given: str(given.get("kind")))
def test_what_is_not_set_stays_as_it_was_also_when_it_is_read_back(given, encoder, tmp_path):
    config = FusionConfig.model_validate(given)
    model = learnt(config, encoder)
    before = {name: value.clone() for name, value in model.output.fused_score.state_dict().items()}
    now = set_weights(model, config, {"buy": 2}, encoder)
    save_fusion(tmp_path, model, now, {})
    fresh = model_of(config, encoder)
    assert load_fusion(tmp_path, fresh, encoder) == now.model_copy(update={"weights": load_weights(tmp_path)})
    fused = fresh.output.fused_score
    place = fused.tasks.index("buy")
    for name, value in fused.state_dict().items():
        expected = before[name].clone()
        if name == "weights":
            expected[place] = 2.0
        torch.testing.assert_close(value, expected, rtol=0, atol=0, msg=f"{given.get('kind')} {name}")


def load_weights(folder):
    return yaml.safe_load((folder / "fusion/fusion.yaml").read_text())["fusion"]["weights"]


def test_a_task_may_join_and_the_options_stay(encoder):
    for given in KINDS[:-1]:
        config = FusionConfig.model_validate(given)
        if config.weights is None:
            continue
        model = learnt(config, encoder)
        bias = getattr(model.output.fused_score, "bias", None)
        now = set_weights(model, config, {"report": -0.25}, encoder)
        weight = 0.25 if config.kind == "power_product" else -0.25
        fused = model.output.fused_score
        assert dict(zip(fused.tasks, fused.weights.tolist(), strict=True))["report"] == weight
        assert now.weights["report"] == weight
        for option in ("floor", "bases", "thresholds", "temperature", "k", "numbers", "given"):
            assert getattr(now, option) == getattr(config, option)
        if bias is not None:
            assert fused.bias == bias


def test_in_a_product_a_negative_weight_turns_the_exponent(encoder):
    config = FusionConfig.model_validate(KINDS[2])
    model = model_of(config, encoder)
    now = set_weights(model, config, {"click": -4, "buy": 5}, encoder)
    assert now.weights == {"click": 4, "buy": 5}
    assert now.exponents == {"click": -2, "buy": -3}  # a task that lowers the score goes on lowering it
    assert model.output.fused_score.exponents.tolist() == [-2, -3]
    assert model.output.fused_score.bases.tolist() == [1, 0.5]


def test_weights_that_were_never_declared(encoder):
    model = model_of(None, encoder)
    assert set_weights(model, None, {"buy": 3}, encoder).weights == {"click": 1, "buy": 3, "report": 1}


@pytest.mark.parametrize(
    ("given", "weights", "said"),
    [
        (KINDS[0], {"clck": 1}, "no task 'clck' \\(did you mean 'click'"),
        (KINDS[0], {"click": 0, "buy": 0}, "at least one weight that is not 0"),
        (KINDS[2], {"click": 0, "buy": 0}, "at least one"),
        (KINDS[-1], {"report": 1}, "context_gated_mean has no weight of report"),
        ({"kind": "monotone_network", "signs": {"click": 1}}, {"click": 1}, "monotone_network has no weight of click"),
    ],
)
def test_what_cannot_be_set_is_told(given, weights, said, encoder):
    config = FusionConfig.model_validate(given)
    with pytest.raises(ConfigError, match=said):
        set_weights(model_of(config, encoder), config, weights, encoder)


class Killed(BaseException):
    """Nothing is tidied up after it."""


def test_killed_at_any_moment_a_fusion_is_the_old_one_or_the_new_one(encoder, tmp_path, monkeypatch):
    """Each change of the file system may be the last."""
    lives, before = 0, None

    def mortal(owner, name):
        done = getattr(owner, name)

        def call(*arguments, **options):
            nonlocal lives
            lives -= 1
            if lives == 0:
                raise Killed
            return done(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((Path, "mkdir"), (Path, "write_text"), (Path, "rename"), (np, "savez"), (shutil, "rmtree"),
                        (shutil, "copytree")):  # fmt: skip
        mortal(owner, name)
    died, number = 0, 0
    while True:
        config = FusionConfig(weights={"click": 1.0, "buy": float(number)})
        lives, number = died + 1, number + 1
        try:
            save_fusion(tmp_path, model_of(config, encoder), config, {"number": number})
        except Killed:
            died += 1
        else:
            break
        finally:
            lives = 0
        found = load_fusion(tmp_path, model_of(None, encoder), encoder)
        assert found in (before, config)
        before = found
    assert died > 8
    assert load_fusion(tmp_path, model_of(None, encoder), encoder) == config
    assert [p.name for p in tmp_path.iterdir()] == ["fusion"]
    assert (tmp_path / "fusion/former/1").is_dir()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"weights": {"click": 1e39}}, "fusion: a fused score needs finite weights"),
        ({"kind": "borda", "weights": {"click": 3e38, "buy": 3e38}}, "fusion: a fused score needs finite weights"),
        ({"kind": "power_product", "weights": {"click": 1e-12}}, "fusion: the logarithm of the product"),
        ({"kind": "expected_value", "weights": WEIGHTS, "given": {"click": "buy", "buy": "click"}}, "given: .*circle"),
    ],
)  # fmt: skip
def test_numbers_that_make_no_score_are_named_with_the_key(given, said):
    with pytest.raises(ConfigError, match=said):
        build_fused_score(FusionConfig.model_validate(given), TASKS)


def test_a_weight_that_is_no_number_is_told_with_the_file(encoder, tmp_path):
    config = FusionConfig(weights=WEIGHTS)
    where = save_fusion(tmp_path, model_of(config, encoder), config, {}) / "fusion.yaml"
    where.write_text(where.read_text().replace("0.3", ".inf"))
    with pytest.raises(DataError, match=r"fusion\.yaml: .*finite"):
        load_fusion(tmp_path, model_of(config, encoder), encoder)
    assert np.isinf(load_weights(tmp_path)["buy"])
