"""What `mtcl tune` may change: paths, values, conditions, and the space that a run gets by itself."""

import pytest
import shop

from mtcl_torchrec.config import RunConfig, dump_run, parse_run
from mtcl_torchrec.config.paths import model_at, put, resolve, value_at
from mtcl_torchrec.config.tuning import ParameterConfig
from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.training.tuning import Objective, Space, default_space, read_space
from mtcl_torchrec.training.tuning.space import complete

RUN = parse_run(shop.RUN)
WHOLE = complete(RUN)


def space(text, run=RUN):
    return Space.of(run, parse_run(shop.RUN + "tuning:\n" + text).tuning)


class Chosen:
    """In the place of an optuna trial: takes what it is told."""

    def __init__(self, **values):
        self.values = values

    def suggest_categorical(self, name, options):
        assert self.values[name] in options
        return self.values[name]

    def suggest_float(self, name, low, high, log=False):
        assert low <= self.values[name] <= high
        return self.values[name]

    suggest_int = suggest_float


# ---------------------------------------------------------------- paths


@pytest.mark.parametrize(
    ("path", "places"),
    [
        ("optimizers.dense.lr", [("optimizers", "dense", "lr")]),
        ("schema.tasks.buy.weight", [("schema", "tasks", "buy", "weight")]),
        ("schema.tasks.1.weight", [("schema", "tasks", "buy", "weight")]),
        ("statistics.0.smoothing", [("statistics", 0, "smoothing")]),
        ("model.epnet.hidden", [("model", "epnet", "hidden")]),
        ("sharding.tables.user_id.kinds", [("sharding", "tables", "user_id", "kinds")]),
        ("optimizers.tables.lr_of.genre", [("optimizers", "tables", "lr_of", "genre")]),
        ("fusion.weights.*", [("fusion", "weights", t) for t in ("click", "buy", "taste", "stars")]),
        ("schema.tasks.*.weight", [("schema", "tasks", t, "weight") for t in ("click", "buy", "taste", "stars")]),
    ],
)
def test_a_path_is_found(path, places):
    assert resolve(path, RunConfig, WHOLE) == places


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("optimizers.dens.lr", "no key 'dens' in optimizers \\(did you mean 'dense'"),
        ("optimiser.dense.lr", "no key 'optimiser' in the run \\(did you mean 'optimizers'"),
        ("schema.tasks.clik.weight", "no 'clik' in schema.tasks \\(did you mean 'click'"),
        ("optimizers.dense.lr.x", "optimizers.dense.lr holds nothing inside it, so there is no 'x'"),
        ("sharding.tables.*.kinds", "sharding.tables has no keys for '\\*'"),
    ],
)
def test_a_path_that_is_none_is_named(path, message):
    with pytest.raises(ConfigError, match=f"^{path.replace('*', '[*]')}: {message}"):
        Space.of(RUN, {path: ParameterConfig(choices=[1])})


def test_values_are_put_where_they_are_read():
    values = {"schema": {"tasks": [{"name": "a"}, {"name": "b", "weight": 2}]}}
    for keys, value in ((("schema", "tasks", "a", "weight"), 3), (("model", "epnet", "hidden"), 8)):
        assert value_at(values, keys) is None
        put(values, keys, value)
        assert value_at(values, keys) == value
    assert model_at(("model", "trunk"), RunConfig).__name__ == "TrunkConfig"
    assert model_at(("schema", "tasks", "click"), RunConfig).__name__ == "Task"
    assert model_at(("optimizers", "dense", "lr"), RunConfig) is None


# ---------------------------------------------------------------- spaces


def test_the_runs_own_settings_are_found_among_the_values():
    found = space(
        """
  optimizers.dense.lr: {log: [1e-4, 1e-1]}
  optimizers.tables.lr: {log: [1e-4, 1e-3]}
  model.trunk.expert_layers: [[8], [16]]
  model.trunk: [{kind: ple, expert_layers: [16]}, {kind: mmoe, num_experts: 3, expert_layers: [16], gate_dropout: 0.1}]
  schema.features.*.embedding_dim: {times: [0.5, 1]}
  schema.tasks.*.weight: {uniform: [0.1, 2]}
  model.cross_layers: {integer: [0, 3]}
"""
    )
    own = found.own()
    assert own["optimizers.dense.lr"] == 0.01
    assert "optimizers.tables.lr" not in own  # 0.1
    assert own["model.trunk.expert_layers"] == "[16]"
    assert '"mmoe"' in own["model.trunk"]
    assert own["schema.features.*.embedding_dim"] == 1.0
    assert "schema.tasks.*.weight" not in own  # they differ
    assert own["model.cross_layers"] == 1
    assert complete(found.with_values(own)) == WHOLE
    assert found.suggest(Chosen(**own), own=True) == own


def test_values_change_what_they_name_and_nothing_else():
    found = space(
        """
  model.trunk.kind: [shared_bottom, mmoe, home]
  model.trunk.num_experts: {choices: [2, 4], when: {model.trunk.kind: mmoe}}
  model.trunk.group_experts: {integer: [1, 2], when: {model.trunk.kind: [home, ple]}}
  schema.features.*.embedding_dim: {times: [0.5, 1, 2]}
  schema.tasks.stars.weight: {log: [1e-2, 1]}
"""
    )
    chosen = {"model.trunk.kind": "home", "model.trunk.group_experts": 2, "schema.features.*.embedding_dim": 2.0,
              "schema.tasks.stars.weight": 0.5}  # fmt: skip
    assert found.suggest(Chosen(**chosen)) == chosen
    run = found.with_values(chosen)
    assert (run.model.trunk.kind, run.model.trunk.group_experts, run.model.trunk.gate_dropout) == ("home", 2, 0.1)
    assert run.model.trunk.model_fields_set == {"kind", "expert_layers", "gate_dropout", "group_experts"}
    dims = {f.name: f.embedding_dim for f in run.data_schema.features}
    assert dims == {"user_id": 16, "product_id": 16, "genre": 8, "topics": 8, "hour": 8, "price": 16, "age": 16}
    assert [t.weight for t in run.data_schema.tasks] == [1.0, 0.5, 1.0, 0.5]
    plain = found.suggest(Chosen(**{**chosen, "model.trunk.kind": "shared_bottom"}))
    assert set(plain) == set(chosen) - {"model.trunk.group_experts"}
    assert found.with_values(plain).model.trunk.model_fields_set == {"kind", "expert_layers"}
    assert RUN.model.trunk.kind == "mmoe"
    halved = found.with_values({"schema.features.*.embedding_dim": 0.5})
    assert {f.embedding_dim for f in halved.data_schema.sparse_features} == {4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("  optimizers.dense.lr: {log: [1e-4, 1e-2], choices: [1]}", "say one of .* \\(found: choices and log\\)"),
        ("  optimizers.dense.lr: {log: [1e-2, 1e-4]}", "the first number is the lowest"),
        ("  optimizers.dense.lr: {log: [0, 1]}", "greater than 0"),
        ("  optimizers.dense.lr: 0.1", "tuning.optimizers.dense.lr"),
        ("  optimizers.dense.lr: {lgo: [1, 2]}", "unknown key .*lgo"),
        ("  optimizers.dense.lr: [-1]", "tuning of optimizers.dense.lr to -1: optimizers.dense.lr: Input should be gr"),
        ("  model.tower_dropout: {uniform: [0, 1]}", "tuning of model.tower_dropout to 1.0: .* less than 1"),
        ("  model.trunk.kind: [mmoe, plee]", "tuning of model.trunk.kind to plee: .*did you mean 'ple'"),
        ("  model.trunk.levels: [1, 2]", "tuning of model.trunk.levels to 1: .*levels belongs to"),
        ("  model.trunk.levels: {choices: [1], when: {model.trunk.kind: ple}}", "model.trunk.levels: when is never so"),
        ("  model.trunk.kind: {times: [2]}", "times multiplies numbers, and the run has 'mmoe'"),
        ("  schema.features.*.trainable: {uniform: [0, 1]}", "nothing in the run has it"),
    ],
)  # fmt: skip
def test_mistakes_are_named(text, message):
    with pytest.raises(ConfigError, match=message):
        space(text)


def test_a_space_in_a_file_is_that_of_a_run(tmp_path):
    (tmp_path / "space.yaml").write_text("model.trunk.kind: [mmoe, ple]\nmodel.cross_layers: {integer: [0, 2]}\n")
    found = Space.of(RUN, read_space(tmp_path / "space.yaml"))
    assert found.as_json() == {
        "model.cross_layers": {"integer": [0, 2]}, "model.trunk.kind": {"choices": ["mmoe", "ple"]},
    }  # fmt: skip
    (tmp_path / "space.yaml").write_text("model.cross_layers: {integr: [0, 2]}\n")
    with pytest.raises(ConfigError, match=r"space.yaml: model.cross_layers.integr"):
        read_space(tmp_path / "space.yaml")
    with pytest.raises(ConfigError, match="nothing\\.yaml"):
        read_space(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trunk: {kind: mmoe, num_experts: 3, expert_layers: [16], gate_dropout: 0.1}": "trunk: {kind: home}"},
        {"lr: 0.1}": "lr: 0.1, lr_of: {user_id: 0.01}}", "cross_layers: 1": "embedding_dropout: 0.7"},
        {"training: {": "balance: {weighting: {kind: famo}}\ntraining: {"},
        {"training: {": "training: {regularisers: {gate_balance: 0.1}, "},
    ],
    ids=lambda c: ",".join(c.values())[:40],
)
def test_any_run_gets_a_space_in_which_it_is_itself(changes):
    text = shop.RUN
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    run = parse_run(text)
    found = Space.of(run, default_space(run))
    own = found.own()
    applying = [p for p in found.parameters if p.applies(complete(run))]
    assert set(own) == {p.path for p in applying}
    assert complete(found.with_values(own)) == complete(run)
    assert {"optimizers.dense.lr", "optimizers.tables.lr", "schema.features.*.embedding_dim"} <= set(own)
    assert ("schema.tasks.buy.weight" in own) == ("famo" not in text)
    kinds = next((p.config.choices for p in found.parameters if p.path == "model.trunk.kind"), [])
    assert ("shared_bottom" in kinds) == ("gate_balance" not in text)
    assert parse_run(dump_run(run)) == run


def test_objectives():
    assert [t.name for t in Objective.named("mean_auc", RUN).tasks] == ["click", "buy", "taste", "stars"]
    assert Objective.named("stars.mse", RUN).direction == "minimize"
    for name, message in (
        ("clik.auc", "did you mean 'click.auc'"),
        ("click.auk", "no metric 'auk' of binary task 'click' \\(did you mean 'auc'"),
        ("auc", "neither mean_auc nor a task and its metric, such as click.auc"),
    ):
        with pytest.raises(ConfigError, match=message):
            Objective.named(name, RUN)
