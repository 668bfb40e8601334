"""A YAML text becomes a run, or one readable line for each mistake in it."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mtcl_torchrec.config import RunConfig, dump_run, load_run, parse_run
from mtcl_torchrec.schema import ConfigError

TEXT = """
name: small
data: {train: train.parquet, val: [a.csv, /data/b.csv]}
schema:
  features:
    - {name: user_id, group: user}
    - {name: tag, group: item, kind: bag, vocabulary_size: 50, encoding: hash}
    - {name: age, group: user, kind: dense, transform: log}
  tasks:
    - {name: click, kind: binary, weight: 2}
    - {name: watch, kind: regression, loss: huber}
  time: t
statistics: {keys: [user_id, [user_id, tag]], outcomes: [click]}
model: {trunk: {kind: ple, levels: 1}, tower_layers: [16]}
optimizers: {tables: {lr: 0.1}}
training: {epochs: 2}
fusion: {weights: {click: 1, watch: 0.5}}
"""


def base():
    return yaml.safe_load(TEXT)


def changed(path, value):
    """The YAML of TEXT with one key set (or, for `del`, taken away)."""
    raw = base()
    at = raw
    *outer, last = path
    for part in outer:
        at = at.setdefault(part, {}) if isinstance(at, dict) else at[part]
    if value is del_:
        del at[last]
    else:
        at[last] = value
    return yaml.safe_dump(raw)


del_ = object()


def error_of(text, **options):
    with pytest.raises(ConfigError) as caught:
        parse_run(text, **options)
    return str(caught.value)


def test_every_part_arrives_with_defaults_where_nothing_is_said():
    run = parse_run(TEXT)
    assert run.data.train == ["train.parquet"]
    assert run.data.val == ["a.csv", "/data/b.csv"]
    assert run.data.test is None
    assert [f.name for f in run.data_schema.features] == ["user_id", "tag", "age"]
    assert run.statistics[0].keys == [["user_id"], ["user_id", "tag"]]
    assert (run.model.trunk.kind, run.model.trunk.levels, run.model.cross_layers) == ("ple", 1, 0)
    assert (run.optimizers.tables.lr, run.optimizers.dense.lr) == (0.1, 1e-3)
    assert (run.training.epochs, run.training.batch_size) == (2, 1024)
    assert run.fusion.weights == {"click": 1.0, "watch": 0.5}


def test_dumped_run_reads_back_equal_and_says_no_more_than_was_set():
    run = parse_run(TEXT)
    text = dump_run(run)
    assert parse_run(text) == run
    assert yaml.safe_load(text)["training"] == {"epochs": 2}
    assert "data_schema" not in text


def test_values_assigned_after_reading_are_dumped():
    # None of these parts is in the text, so none counts as set before.
    raw = {k: v for k, v in base().items() if k not in ("training", "model", "optimizers")}
    run = parse_run(yaml.safe_dump(raw))
    run.training.epochs = 7
    run.model.trunk.num_experts = 3
    again = parse_run(dump_run(run))
    assert again == run
    assert (again.training.epochs, again.model.trunk.num_experts) == (7, 3)
    assert "optimizers" not in dump_run(run)


@settings(max_examples=30, deadline=None)
@given(
    name=st.from_regex(r"[a-zA-Z0-9_][a-zA-Z0-9_ .-]{0,7}", fullmatch=True),
    lr=st.floats(1e-6, 10),
    layers=st.lists(st.integers(1, 512), min_size=1, max_size=3),
    weights=st.dictionaries(st.sampled_from(["click", "watch"]), st.floats(0.1, 9), min_size=1),
)
def test_round_trip_holds_for_any_name_rate_layers_and_weights(name, lr, layers, weights):
    raw = base() | {"name": name, "fusion": {"weights": weights}}
    raw["optimizers"] = {"dense": {"lr": lr}}
    raw["model"] = {"tower_layers": layers}
    run = RunConfig.model_validate(raw)
    again = parse_run(dump_run(run))
    assert again == run
    assert (again.name, again.optimizers.dense.lr, again.fusion.weights) == (name, lr, weights)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("traning",), "unknown key 'traning' (did you mean 'training'?)"),
        (("data", "vall"), "unknown key 'data.vall' (did you mean 'val'?)"),
        (("training", "epoch"), "unknown key 'training.epoch' (did you mean 'epochs'?)"),
        (("model", "trunk", "level"), "unknown key 'model.trunk.level' (did you mean 'levels'?)"),
        (("optimizers", "dense", "wd"), "unknown key 'optimizers.dense.wd'"),
        (
            ("schema", "features", 1, "vocab_size"),
            "unknown key 'schema.features.1.vocab_size' (did you mean 'vocabulary_size'?)",
        ),
        (
            ("schema", "tasks", 0, "wieght"),
            "unknown key 'schema.tasks.0.wieght' (did you mean 'weight'?)",
        ),
        (("fusion", "weight"), "unknown key 'fusion.weight' (did you mean 'weights'?)"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_right_one(path, line):
    assert error_of(changed(path, 1)) == line


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("data",), "missing key 'data'"),
        (("schema",), "missing key 'schema'"),
        (("schema", "tasks"), "missing key 'schema.tasks'"),
        (("schema", "features", 2, "group"), "missing key 'schema.features.2.group'"),
        (("fusion", "weights"), "fusion: weighted_mean needs weights"),
    ],
)
def test_a_missing_key_is_named(path, line):
    assert error_of(changed(path, del_)) == line


@pytest.mark.parametrize(
    ("path", "value", "starts", "contains"),
    [
        (("training", "epochs"), "many", "training.epochs: ", "(given: 'many')"),
        (("training", "epochs"), 0, "training.epochs: ", "greater than 0 (given: 0)"),
        (("training", "epochs"), 1.5, "training.epochs: ", "(given: 1.5)"),
        (("training",), [1], "training: ", "(given: [1])"),
        (("training", "averaging"), 1.0, "training.averaging: ", "less than 1"),
        (("training", "regularisers"), {"l2_dense": float("inf")}, "training.regularisers.l2_dense: ", "finite"),
        (("model", "trunk", "kind"), "moe", "model.trunk.kind: ", "'mmoe'"),
        (("model", "trunk", "expert_layers"), [], "model.trunk.expert_layers: ", "at least 1"),
        (("model", "tower_layers", 0), -4, "model.tower_layers.0: ", "greater than 0"),
        (("model", "trunk", "num_experts"), 3, "model.trunk: ", "num_experts belongs to mmoe"),
        (("data", "train"), 5, "data.train: ", "(given: 5)"),
        (("data", "train"), [], "data.train: ", "at least 1 item"),
        (("data", "val"), del_, "data: ", "'train' needs 'val'"),
        (("data", "log"), "x.csv", "data: ", "give either 'train' and 'val'"),
        (("data",), {"log": "x.csv", "test": "y.csv"}, "data: ", "a log is split by time"),
        (("data",), {"log": "x.csv", "val_fraction": 0}, "data: ", "must be above 0"),
        (
            ("data",),
            {"log": "x.csv", "val_fraction": 0.5, "test_fraction": 0.5},
            "data: ",
            "leave nothing to train on",
        ),
        (("data",), {}, "data: ", "give either 'train' and 'val'"),
        (("fusion", "weights", "clik"), 1, "fusion.weights: ", "(did you mean 'click'?)"),
        (("fusion", "weights"), {"click": 0}, "fusion: ", "at least one weight that is not 0"),
        (("fusion", "weights"), {"click": float("nan")}, "fusion.weights.click: ", "finite"),
        (("schema", "features", 0, "group"), "usr", "schema.features.0.group.0: ", "'user'"),
        (("schema", "features", 2, "table"), "x", "schema.features.2: ", "dense and has no table"),
        (("balance",), {"surgery": {"kind": "upgrade"}}, "balance.surgery.kind: ", "(did you mean 'upgrad'?)"),
        (
            ("balance",),
            {"surgery": {"kind": "upgrad", "cut": "embeddings", "groups": ["user_id"]}},
            "balance.surgery.groups: each group is a list",
            "[[user_id, age], [item_id]]",
        ),
        (("schema", "tasks", 0, "name"), True, "schema.tasks.0.name: ", "string (given: True)"),
        (("schema", "tasks", 1, "name"), "click", "schema: ", "task 'click' is declared twice"),
        (("schema", "time"), del_, "statistics need schema.time", "strictly earlier"),
        (("statistics", "keys"), [[]], "statistics.0.keys.0: ", "at least 1 item"),
        (("statistics", "keys"), ["a", "a"], "statistics.0: ", "key 'a' is declared twice"),
        (("statistics", "keys"), [["a", "a"]], "statistics.0: ", "column 'a' is declared twice"),
        (("statistics", "outcomes"), ["c", "c"], "statistics.0: ", "outcome 'c' is declared twice"),
        (("statistics", "smoothing"), 0, "statistics.0.smoothing: ", "greater than 0"),
        (("statistics", "groups"), {"tag": "itm"}, "statistics.0.groups.tag: ", "'item'"),
    ],
)
def test_a_wrong_value_is_one_line_that_starts_with_its_place(path, value, starts, contains):
    said = error_of(changed(path, value))
    assert said.startswith(starts)
    assert contains in said
    assert "\n" not in said


def test_a_log_needs_the_time_column():
    raw = base() | {"data": {"log": "x.csv"}}
    del raw["statistics"], raw["schema"]["time"]
    assert error_of(yaml.safe_dump(raw)) == "data.log needs schema.time: the log is split by time"


def test_each_of_several_mistakes_has_its_line_with_the_file():
    raw = base()
    raw["training"] = {"epochs": -1, "sed": 3}
    del raw["schema"]["tasks"]
    lines = error_of(yaml.safe_dump(raw), name="run.yaml").splitlines()
    assert sorted(lines) == [
        "run.yaml: missing key 'schema.tasks'",
        "run.yaml: training.epochs: Input should be greater than 0 (given: -1)",
        "run.yaml: unknown key 'training.sed' (did you mean 'seed'?)",
    ]


def test_a_long_wrong_value_is_cut():
    said = error_of(changed(("training",), ["x" * 500]))
    assert said.endswith("xxx...)")
    assert len(said) < 200


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [1, 2", "no valid YAML"),
        ("a: b: c", "no valid YAML"),
        ("\tname: x", "no valid YAML"),
        # PyYAML's own constructors raise other errors than its YAMLError for these.
        ("name: 2024-13-45", "no valid YAML"),
        ("name: !!timestamp soon", "no valid YAML"),
        ("name: !!int many", "no valid YAML"),
        ("[" * 3000, "no valid YAML"),
        ("a\x00b: 1", "no valid YAML"),
        ("- data\n- schema", "found list"),
        ("", "found NoneType"),
        ("hello", "found str"),
        ("&a {data: *a}", "missing key 'schema'"),
        ("1: x", "Keys should be strings"),
    ],
)
def test_texts_that_hold_no_run_are_config_errors_of_single_lines(text, part):
    lines = error_of(text, name="x.yaml").splitlines()
    assert any(part in line for line in lines)
    assert all(line.startswith("x.yaml: ") for line in lines)


def test_relative_paths_start_at_the_folder_of_the_file(tmp_path):
    (tmp_path / "run.yaml").write_text(TEXT)
    run = load_run(tmp_path / "run.yaml")
    assert run.data.train == [str(tmp_path / "train.parquet")]
    assert run.data.val == [str(tmp_path / "a.csv"), "/data/b.csv"]
    # What was made absolute stays so, wherever the dump is read.
    assert parse_run(dump_run(run), folder=tmp_path / "elsewhere") == run


def test_unreadable_files_are_config_errors_that_name_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"no such file: .*none\.yaml"):
        load_run(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80PAR1")
    with pytest.raises(ConfigError, match=r"binary\.yaml: cannot be read as text"):
        load_run(tmp_path / "binary.yaml")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        load_run(tmp_path)
    (tmp_path / "wrong.yaml").write_text("data: {lgo: x}")
    with pytest.raises(ConfigError, match=r"wrong\.yaml: unknown key 'data\.lgo' \(did you mean"):
        load_run(str(tmp_path / "wrong.yaml"))


def test_column_wise_sharding_is_refused_where_it_would_be_another_optimizer():
    said = error_of(changed(("sharding",), {"kinds": "column_wise"}))
    assert "column_wise would make row-wise Adagrad another optimizer" in said


def test_a_key_that_stands_twice_is_refused():
    with pytest.raises(ConfigError, match="key 'epochs' stands there twice"):
        parse_run("training:\n  epochs: 1\n  epochs: 2\n")
