"""What `mtcl tune` may change: paths, values, conditions, and the space that a run gets by itself."""

import math
import re

import numpy as np
import pytest
import shop

from mtcl_torchrec.config import RunConfig, dump_run, parse_run
from mtcl_torchrec.config.paths import model_at, put, resolve, value_at
from mtcl_torchrec.config.tuning import ParameterConfig
from mtcl_torchrec.evaluation.metrics import task_metrics
from mtcl_torchrec.schema import ConfigError, Task
from mtcl_torchrec.training.history import TrainingHistory
from mtcl_torchrec.training.tuning import Objective, Space, default_space, read_space
from mtcl_torchrec.training.tuning.hints import hints
from mtcl_torchrec.training.tuning.objective import skill
from mtcl_torchrec.training.tuning.space import complete
from mtcl_torchrec.training.tuning.study import Finished

RUN = parse_run(shop.RUN)
WHOLE = complete(RUN)


def space(text, run=RUN):
    return Space.of(run, parse_run(shop.RUN + "tuning:\n" + text).tuning.space)


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
    found = Space.of(RUN, read_space(tmp_path / "space.yaml").space)
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
    assert [t.name for t in Objective.named("mean_skill", RUN).tasks] == ["click", "buy", "taste", "stars"]
    assert Objective.named("mse:stars", RUN).direction == "minimize"
    for name, message in (
        ("auc:clik", "did you mean 'auc:click'"),
        ("auk:click", "no metric 'auk' of binary task 'click' \\(did you mean 'auc'"),
        ("auc", "neither mean_skill nor a metric and its task, such as auc:click"),
    ):
        with pytest.raises(ConfigError, match=message):
            Objective.named(name, RUN)


def test_mean_skill_is_one_scale_for_every_kind_of_task():
    """What the metrics' own definitions say of predictions that are perfect, know nothing, or lie between."""
    history = TrainingHistory(
        epochs=[
            {"click": {"auc": 1.0}, "buy": {"auc": 1.0}, "taste": {"ne": 0.0}, "stars": {"r2": 1.0}},
            {"click": {"auc": 0.5}, "buy": {"auc": 0.5}, "taste": {"ne": 1.0}, "stars": {"r2": 0.0}},
            {"click": {"auc": 0.8}, "buy": {"auc": None}, "taste": {"ne": 0.9}, "stars": {"r2": -0.5}},
        ],
        best_epoch=3,
    )
    objective = Objective.named("mean_skill", RUN)
    assert [objective.of_epoch(history, epoch) for epoch in (1, 2)] == [1.0, 0.0]
    assert objective.kept(history) == pytest.approx((0.6 + 0.1 - 0.5) / 3)  # buy is not defined there
    watching = parse_run(shop.RUN.replace("training: {", "training: {watch: [taste, click], "))
    assert Objective.named("mean_skill", watching).kept(history) == pytest.approx((0.6 + 0.1) / 2)
    nothing = TrainingHistory(epochs=[{t.name: {} for t in RUN.data_schema.tasks}], best_epoch=1)
    assert math.isnan(objective.kept(nothing))


def test_a_handful_of_events_does_not_count_in_the_mean():
    epoch = {"click": {"auc": 0.8}, "buy": {"auc": 0.99}, "taste": {"ne": 0.9}, "stars": {"r2": 0.2}}
    few = {"buy": "too few events (7)", "stars": "too few labels (5)"}
    history = TrainingHistory(epochs=[epoch], best_epoch=1, unsure=few)
    objective = Objective.named("mean_skill", RUN)
    assert objective.left_out(history) == few
    assert objective.kept(history) == pytest.approx((0.6 + 0.1) / 2)
    # What is named counts, however few its events; and all do where none has enough.
    assert Objective.named("auc:buy", RUN).kept(history) == 0.99
    assert Objective.named("auc:buy", RUN).left_out(history) == {}
    watching = Objective.named("mean_skill", parse_run(shop.RUN.replace("training: {", "training: {watch: [buy], ")))
    assert (watching.kept(history), watching.left_out(history)) == (pytest.approx(0.98), {})
    none = TrainingHistory(epochs=[epoch], best_epoch=1, unsure=dict.fromkeys(epoch, "a single user"))
    assert objective.left_out(none) == {}
    assert objective.kept(none) == pytest.approx((0.6 + 0.98 + 0.1 + 0.2) / 4)


def test_skill_orders_binary_predictions_as_auc_and_regressions_as_squared_error_does():
    draw = np.random.default_rng(0)
    labels, values = draw.integers(0, 2, 200).astype(float), draw.normal(size=200)
    scores = [labels + draw.normal(size=200) * noise for noise in (0.5, 1.0, 4.0)]
    skills = [skill(Task.binary("a"), task_metrics(Task.binary("a"), labels, 1 / (1 + np.exp(-s)))) for s in scores]
    positives, negatives = labels == 1, labels == 0
    for score, found in zip(scores, skills, strict=True):  # Somers' D: pairs in order less pairs in the wrong one
        pairs = np.sign(score[positives][:, None] - score[negatives][None]).mean()
        assert found == pytest.approx(pairs, abs=1e-6)
    task = Task.regression("b")
    assert skill(task, task_metrics(task, values, np.full(200, values.mean()))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("0.0", {"": {"choices": [0.0, 1e-5, 1e-4, 1e-3, 1e-2, 0.1]}}),
        ("0.01", {"": {"log": (0.001, 0.1)}}),
        (
            "{user_id: 0.04, genre: 0.0, topics: 0.5}",
            {".user_id": {"log": (0.004, 0.4)}, ".topics": {"log": (0.05, 5)}},
        ),
    ],
)
def test_the_l2_of_embeddings_is_searched_around_what_the_run_has(given, expected):
    text = shop.RUN.replace("training: {", f"training: {{regularisers: {{l2_embedding: {given}}}, ")
    run = parse_run(text)
    path = "training.regularisers.l2_embedding"
    found = Space.of(run, {p: c for p, c in default_space(run).items() if p.startswith(path)})
    for parameter in found.parameters:
        values = expected.pop(parameter.path.removeprefix(path))
        assert parameter.config.choices == values.get("choices")
        assert parameter.config.log == (None if "choices" in values else pytest.approx(values["log"]))
    assert not expected
    first = found.parameters[0]
    changed = found.with_values({first.path: first.examples[-1]}).training.regularisers.l2_embedding
    assert first.examples[-1] in ([changed] if isinstance(changed, float) else changed.values())
    assert first.own in ([0.0, 0.01] if given[0] != "{" else [0.04, 0.5])


def test_an_objective_stands_beside_the_space_and_is_written_back():
    run = parse_run(shop.RUN + "tuning: {objective: ne:buy, optimizers.dense.lr: {log: [1e-3, 1e-2]}}")
    assert (run.tuning.objective, list(run.tuning.space)) == ("ne:buy", ["optimizers.dense.lr"])
    assert parse_run(dump_run(run)) == run
    with pytest.raises(ConfigError, match=r"tuning.objective: .* valid string"):
        parse_run(shop.RUN + "tuning: {objective: [ne, buy]}")


# ---------------------------------------------------------------------- hints


HINTED = [
    ("optimizers.dense.lr: {log: [1e-3, 0.1]}", 0.099, "the best, 0.099, is at the edge .*0.001 to 0.1.: widen it"),
    ("optimizers.dense.lr: {log: [1e-3, 0.1]}", 0.00105, "the best, 0.00105, is at the edge"),
    ("optimizers.dense.lr: {log: [1e-3, 0.1]}", 0.01, None),
    ("model.tower_dropout: {uniform: [0, 0.4]}", 0.01, None),  # no less than none
    ("model.tower_dropout: {uniform: [0, 0.4]}", 0.4, "model.tower_dropout: the best, 0.4, is at the edge"),
    ("model.tower_dropout: {uniform: [0, 0.99]}", 0.98, None),  # and no more than all
    ("model.cross_layers: {integer: [1, 3]}", 3, "the best, 3, is at the edge"),
    ("model.cross_layers: {integer: [1, 3]}", 2, None),
    ("model.trunk.num_experts: [2, 3, 4]", 4, "the best, 4, is at the edge of what was searched .2, 3, 4.: widen it"),
    ("model.trunk.num_experts: [2, 3, 4]", 3, None),
    ("model.trunk.num_experts: [3, 4]", 4, None),  # a choice of two is no range
    ("model.trunk.expert_layers: {times: [0.5, 1, 2]}", 2.0, "the best, ×2, is at the edge"),
    ("training.regularisers.l2_embedding: [0, 0.001, 0.01]", 0, None),
    ("model.trunk.kind: [mmoe, ple, shared_bottom]", "ple", None),
]


@pytest.mark.parametrize(("values", "value", "message"), HINTED)
def test_a_best_value_at_the_edge_of_its_range_is_told_where_there_is_more(values, value, message):
    searched = space("  " + values)
    trials = [Finished(n, {searched.parameters[0].path: value}, "complete", 0.5, {}, "", 1.0) for n in range(8)]
    own, best = trials[0], trials[5]
    found = [hint for hint in hints(searched, trials, best) if "widen" in hint]
    assert len(found) == (message is not None)
    assert not found or re.search(message, found[0])
    assert hints(searched, trials, own) == []  # the run's own settings were not found in the range
    few = hints(searched, trials[:6], best)  # in a search of so few, the edge is where a draw happened to fall
    assert few == [
        "6 complete trials say little of 1 settings: which of them matter, and where their ranges are too narrow, is "
        "told from 8 on; go on with --trials 8"
    ]


def test_trials_that_still_improve_and_those_that_failed_are_told():
    searched = space("  optimizers.dense.lr: {log: [1e-3, 1e-1]}")
    trials = [Finished(n, {"optimizers.dense.lr": 0.01}, "complete", n / 10, {}, "", 1.0) for n in range(10)]
    assert hints(searched, trials, trials[8]) == [
        "the best is trial 8 of 10: trials still improve; go on with --trials 15"
    ]
    more = "none of the last 4 complete trials was better than trial 5: more pay little"
    assert hints(searched, trials, trials[5]) == [more]
    assert "say little" in hints(searched, trials[:6], trials[5])[0]  # too few to tell
    failed = [Finished(10 + n, {}, "failed", None, {}, why, 1.0) for n, why in enumerate(["no memory", "NaN", "NaN"])]
    assert hints(searched, [*trials, *failed], trials[5]) == [more, "2 trials failed: NaN", "1 trial failed: no memory"]
