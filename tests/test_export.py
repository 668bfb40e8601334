"""An exported run gives what the run gives, wherever torch is; a damaged or poisoned file is refused."""

import copy
import hashlib
import io
import json
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import shop
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.inference.modules import quantize_inference_model
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mtcl_torchrec import MTCL, SharedBottom, WeightedMean
from mtcl_torchrec.config import parse_run
from mtcl_torchrec.data.preprocessing import Preprocessor
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.modules.embeddings import with_own_tables
from mtcl_torchrec.schema import ConfigError, DataError, Task
from mtcl_torchrec.serving.archive import write_archive
from mtcl_torchrec.serving.artefact import NETWORK, Artefact, portable
from mtcl_torchrec.serving.export import export_run, sample_inputs
from mtcl_torchrec.serving.network import ServingEnsemble, ServingNetwork, network_inputs, serving_network
from mtcl_torchrec.serving.recommender import Recommender
from mtcl_torchrec.serving.tables import StackedTables
from mtcl_torchrec.training.build import build_model
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.precision import set_precision

# Half a unit in the last place of fp16 near 0.1, and half a step of int8 over ±0.1, through a small network.
TOLERANCE = {"fp32": 1e-6, "fp16": 1e-3, "int8": 1e-2}


def untrained(text=shop.RUN):
    """A run whose weights are random: enough to compare one way of computing with another."""
    frame, config = shop.log(600), parse_run(text)
    preprocessor = Preprocessor(config.data_schema, config.statistics)
    preprocessor.fit(Rows(frame))
    model = build_model(config.model, preprocessor.encoder, config.fusion, table_device="cpu", seed=3)
    for table in model.embedding_bag_collection.parameters():
        torch.nn.init.uniform_(table, -0.5, 0.5)
    return FinishedRun(config, preprocessor, model.eval(), None)


@pytest.fixture(scope="module")
def run():
    return untrained()


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    return export_run(run, tmp_path_factory.mktemp("export") / "int8.mtcl", tables="int8", compiled="no")


@pytest.fixture(scope="module")
def artefact(made):
    return Artefact.load(made.path, sha256=made.sha256)


def encoded(run, rows=40):
    return run.encode(shop.log(900, seed=1).tail(rows))


def outputs(run, rows):
    batch = rows.batch()
    with torch.no_grad():
        return run.model(batch.dense_features, batch.sparse_features)


def compare(artefact, run, rows, tolerance):
    expected = outputs(run, rows)
    for number in (1, 2, len(rows)):
        inputs = network_inputs(rows.slice(0, number), artefact.features, artefact.inputs)
        got = artefact.network(**inputs)
        assert set(expected) <= set(got)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value[:number], atol=tolerance, rtol=tolerance)
    return got


# ---------------------------------------------------------------- tables


def tables():
    configs = [
        EmbeddingBagConfig(name="a", num_embeddings=50, embedding_dim=8, feature_names=["x", "y"]),
        EmbeddingBagConfig(name="b", num_embeddings=9, embedding_dim=4, feature_names=["z"], pooling=PoolingType.MEAN),
        EmbeddingBagConfig(name="c", num_embeddings=20, embedding_dim=8, feature_names=["v"]),
    ]
    return EmbeddingBagCollection(tables=with_own_tables(configs, ["click"], ["a"]))


def bags(seed=0, rows=13):
    draw = np.random.default_rng(seed)
    sizes = {"x": 50, "y": 50, "z": 9, "v": 20}
    lengths = {name: torch.from_numpy(draw.integers(0, 4, rows)) for name in sizes}
    values = {name: torch.from_numpy(draw.integers(0, sizes[name], int(lengths[name].sum()))) for name in sizes}
    return values, lengths


def stacked(tables, values, lengths):
    order = tables.features
    return tables(torch.cat([values[n] for n in order]), torch.stack([lengths[n] for n in order]))


def kjt(values, lengths):
    return KeyedJaggedTensor(list(values), torch.cat(list(values.values())), lengths=torch.cat(list(lengths.values())))


def test_stacked_tables_pool_as_the_collection_does():
    collection = tables()
    values, lengths = bags()
    expected = collection(kjt(values, lengths)).to_dict()
    pooled = stacked(StackedTables(collection), values, lengths)
    assert set(pooled) == set(expected) == {"x@a", "y@a", "z", "v", "x@a@click", "y@a@click"}
    for key, value in expected.items():
        torch.testing.assert_close(pooled[key], value)


@pytest.mark.parametrize(("precision", "dtype"), [("int8", torch.int8), ("fp16", torch.float16)])
def test_quantised_tables_are_those_of_torchrec(precision, dtype):
    collection = tables()
    values, lengths = bags()
    quantised = quantize_inference_model(
        torch.nn.Sequential(copy.deepcopy(collection)),
        per_table_weight_dtype={t.name: dtype for t in collection.embedding_bag_configs()},
    )
    expected = quantised(kjt(values, lengths)).to_dict()
    pooled = stacked(StackedTables(collection, precision), values, lengths)
    plain = stacked(StackedTables(collection), values, lengths)
    for key, value in expected.items():
        # The library rounds fp16 sums and, in int8, scale and bias as well.
        torch.testing.assert_close(pooled[key], value.float(), atol=3e-3, rtol=0)
        assert not torch.equal(pooled[key], plain[key])


def test_a_row_number_outside_of_its_table_is_unknown():
    collection = tables()
    stacks = StackedTables(collection)
    values, lengths = bags()
    values["z"][0], values["v"][0] = 9, -1
    pooled = stacked(stacks, values, lengths)
    values["z"][0], values["v"][0] = 0, 0
    for key, value in stacked(stacks, values, lengths).items():
        torch.testing.assert_close(pooled[key], value)


def test_other_collections_are_refused():
    with pytest.raises(TypeError, match="a Linear cannot be exported"):
        StackedTables(torch.nn.Linear(1, 1))


# ---------------------------------------------------------------- the network


def test_what_only_the_user_decides_is_computed_once_and_the_same(run):
    network = ServingNetwork(run.model)
    assert {"alike", "first"} <= set(network.inputs)  # task taste may not see the item
    inputs = sample_inputs(network, run.preprocessor.encoder, 9)
    assert len(inputs["first"]) == 5
    rows, seen = torch.arange(9), list[int]()
    with (
        torch.no_grad(),
        network.tower.trunk.register_forward_pre_hook(lambda trunk, given: seen.append(len(given[0]))),
    ):
        together = network(**inputs)
        assert sorted(seen) == [5, 9]  # what may not see the item, and the rest
        apart = network(**{**inputs, "alike": rows, "first": rows})
        assert sorted(seen[2:]) == [9, 9]
    for name, value in apart.items():
        torch.testing.assert_close(together[name], value, atol=1e-6, rtol=1e-5)


def test_the_parts_of_a_weighted_mean_add_up_to_the_score(run):
    network = ServingNetwork(run.model)
    with torch.no_grad():
        out = network(**sample_inputs(network, run.preprocessor.encoder, 20))
    total = sum(value for name, value in out.items() if name.startswith("part:"))
    torch.testing.assert_close(total, out["score"])
    run.model.output.fused_score.set_weights({"buy": 0.0})
    with torch.no_grad():
        changed = network(**sample_inputs(network, run.preprocessor.encoder, 20))
    run.model.output.fused_score.set_weights({"buy": 3.0})
    assert (changed["part:buy"] == 0).all()
    assert not torch.equal(changed["score"], out["score"])


def test_negative_weights_take_away():
    score = WeightedMean({"click": 3.0, "report": -1.0})
    parts = {"click": torch.tensor([0.5, 0.1]), "report": torch.tensor([0.0, 0.8])}
    told = score.contributions(parts)
    assert (told["report"] <= 0).all()
    torch.testing.assert_close(sum(told.values()) + 0.25, score(parts))


def test_an_ensemble_is_the_mean_of_its_members_and_tells_their_spread():
    members = [untrained() for _ in range(2)]
    torch.nn.init.normal_(members[1].model.tower.heads[0].weight)
    holder = torch.nn.Module()
    holder.members = torch.nn.ModuleList([m.model for m in members])
    network = serving_network(holder)
    assert isinstance(network, ServingEnsemble)
    inputs = sample_inputs(network, members[0].preprocessor.encoder, 6)
    with torch.no_grad():
        out, each = network(**inputs), [ServingNetwork(m.model)(**inputs) for m in members]
    torch.testing.assert_close(out["click"], (each[0]["click"] + each[1]["click"]) / 2)
    torch.testing.assert_close(out["score_std"], (each[0]["score"] - each[1]["score"]).abs() / 2)


# ---------------------------------------------------------------- the file


def test_an_exported_run_gives_what_the_run_gives(run, made, artefact):
    assert not artefact.compiled
    rows = artefact.preprocessor.encode(Rows(shop.log(900, seed=1).tail(40)), with_labels=False)
    own = encoded(run)
    assert torch.equal(rows.dense, own.dense)
    assert torch.equal(rows.ids, own.ids)
    compare(artefact, run, rows, TOLERANCE["int8"])
    assert 0 < max(made.difference.values()) <= TOLERANCE["int8"]


def test_int8_tables_are_a_quarter_of_the_size(run):
    sizes = {
        precision: sum(b.numel() * b.element_size() for n, b in StackedTables(
            run.model.embedding_bag_collection, precision).named_buffers() if n.startswith("rows_"))
        for precision in TOLERANCE
    }  # fmt: skip
    assert sizes["fp32"] == 2 * sizes["fp16"] == 4 * sizes["int8"]


CHAINS = """
    - {name: buy, kind: binary, after: click, chain: escm2_dr, weight: 0.5}
"""


@pytest.mark.full
def test_chains_own_tables_and_gates_are_exported(tmp_path):
    text = shop.RUN.replace("    - {name: buy, kind: binary, mask: click, weight: 0.5}\n", CHAINS.lstrip("\n"))
    text = text.replace("trunk: {kind: mmoe, num_experts: 3, expert_layers: [16], gate_dropout: 0.1}",
                        "trunk: {kind: stem, expert_layers: [8]}\n  epnet: {features: [hour]}")  # fmt: skip
    text = text.replace("  cross_layers: 1\n", "").replace(", inputs: [user, context]", "")
    run = untrained(text)
    made = export_run(run, tmp_path / "m.mtcl", tables="fp32", compiled="no")
    got = compare(Artefact.load(made.path), run, encoded(run), TOLERANCE["fp32"])
    assert "buy|click" in got
    assert "taste:own_class" in got


@pytest.mark.full
@pytest.mark.parametrize("kind", ["shared_bottom", "single_task", "ple", "adatt", "home"])
def test_every_trunk_is_exported(kind, tmp_path):
    extra = ", groups: [[click, buy], [taste, stars]], feature_rank: 2" if kind == "home" else ""
    gates = "" if kind in ("adatt", "home", "ple") else "\n  ppnet: {features: [user_id]}"
    text = shop.RUN.replace(
        "trunk: {kind: mmoe, num_experts: 3, expert_layers: [16], gate_dropout: 0.1}",
        f"trunk: {{kind: {kind}, expert_layers: [8]{extra}}}{gates}",
    )
    run = untrained(text)
    made = export_run(run, tmp_path / "m.mtcl", tables="fp16", compiled="no")
    compare(Artefact.load(made.path), run, encoded(run), TOLERANCE["fp16"])


ALONE = """
import io, json, sys, zipfile

class NoneOfOurs:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mtcl_torchrec", "torchrec", "fbgemm_gpu"):
            raise ImportError(name + " is not to be had here")

sys.meta_path.insert(0, NoneOfOurs())
import torch

file, inputs, outputs = sys.argv[1:]
with zipfile.ZipFile(file) as archive:
    about = json.loads(archive.read("manifest.json"))["network"]
    network = torch.export.load(io.BytesIO(archive.read("network.pt2"))).module()
given = torch.load(inputs, weights_only=True)
assert list(given) == list(about["inputs"])
torch.save(network(**given), outputs)
assert "mtcl_torchrec" not in sys.modules and "torchrec" not in sys.modules
"""


def test_it_runs_where_there_is_nothing_but_torch(run, made, artefact, tmp_path):
    rows = encoded(run)
    inputs = network_inputs(rows, artefact.features, artefact.inputs)
    torch.save(inputs, tmp_path / "in.pt")
    subprocess.run(
        [sys.executable, "-c", ALONE, str(made.path), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")],
        check=True, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    got = torch.load(tmp_path / "out.pt", weights_only=True)
    for name, value in artefact.network(**inputs).items():
        torch.testing.assert_close(got[name], value)
    for name, value in outputs(run, rows).items():
        torch.testing.assert_close(got[name], value, atol=TOLERANCE["int8"], rtol=TOLERANCE["int8"])


def test_the_file_says_what_it_takes_and_gives(made, artefact):
    about = artefact.manifest["network"]
    assert about["inputs"]["lengths"] == {"shape": ["F", "B"], "dtype": "int64"}
    assert about["outputs"]["taste"] == {"shape": ["B", 5], "dtype": "float32"}
    assert set(about["features"]) == {"user_id", "product_id", "genre", "topics", "hour"}
    assert {t.name: t.kind for t in artefact.tasks}["stars"] == "regression"
    assert artefact.preprocessor.declared.user == "user_id"
    with zipfile.ZipFile(made.path) as archive:
        text = archive.read("manifest.json").decode()
        assert "log.parquet" not in text  # nothing of where it was trained
        kinds = {name.rpartition(".")[2] for name in archive.namelist()}
    assert kinds == {"json", "parquet", "pt2"}


@pytest.mark.parametrize("compiled", ["no", pytest.param("yes", marks=pytest.mark.full)])
def test_a_run_in_bf16_is_exported_as_it_is(compiled, tmp_path):
    run = untrained()
    set_precision(run.model, "bf16")
    rows = encoded(run)
    made = export_run(run, tmp_path / "m.mtcl", tables="fp32", compiled=compiled)
    assert made.compiled == (compiled == "yes")
    # Code that is compiled rounds elsewhere; the graph alone computes what the run computes.
    got = compare(Artefact.load(made.path), run, rows, 2e-2 if made.compiled else TOLERANCE["fp32"])
    set_precision(run.model, "fp32")
    assert any(not torch.equal(got[name], value) for name, value in outputs(run, rows).items())


@pytest.mark.full
def test_machine_code_gives_the_same(run, tmp_path):
    made = export_run(run, tmp_path / "m.mtcl", tables="int8", compiled="yes")
    artefact = Artefact.load(made.path)
    assert made.compiled
    assert artefact.compiled
    compare(artefact, run, encoded(run), TOLERANCE["int8"])
    assert not Artefact.load(made.path, compiled=False).compiled


def test_machine_code_of_another_machine_is_not_run(run, made, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="compiled for None"):
        Artefact.load(made.path, compiled=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="needs a C\\+\\+ compiler"):
        export_run(run, tmp_path / "m.mtcl", compiled="yes")


class CountsItsRows(SharedBottom):
    def forward(self, x, tasks=None):
        return super().forward(x, tasks) * (len(x) / x.shape[0])


def test_a_trunk_that_fixes_the_number_of_rows_is_refused(run, tmp_path):
    config = EmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=4, feature_names=["hour"])
    text = shop.RUN[: shop.RUN.index("  features:")] + "  features: [{name: hour, group: context, embedding_dim: 4}]\n"
    parsed = parse_run(text + "  tasks: [{name: click, kind: binary}]\nfusion: {weights: {click: 1}}\n")
    preprocessor = Preprocessor(parsed.data_schema)
    preprocessor.fit(Rows(shop.log(100)))
    model = MTCL(EmbeddingBagCollection(tables=[config]), 0, CountsItsRows([4]), [Task.binary("click")],
                 WeightedMean({"click": 1.0}))  # fmt: skip
    with pytest.raises(ConfigError, match=r"x.shape\[0\] instead of len\(x\)"):
        export_run(FinishedRun(parsed, preprocessor, model.eval(), None), tmp_path / "m.mtcl", compiled="no")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- damage and malice


def changed(source, target, *, replace=None, drop=(), add=None):
    """A copy of an archive with other members."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            if name not in drop:
                new.writestr(name, (replace or {}).get(name, old.read(name)))
        for name, content in (add or {}).items():
            new.writestr(name, content)
    return target


def test_a_damaged_file_is_refused(made, tmp_path):
    good = made.path
    with zipfile.ZipFile(good) as archive:
        keys = archive.read("preprocessing/keys.json")
        manifest = json.loads(archive.read("manifest.json"))
    bad = tmp_path / "bad.mtcl"
    cases = {
        "does not match the SHA-256": {"replace": {"preprocessing/keys.json": keys.replace(b"t", b"f", 1)}},
        "bytes instead of": {"replace": {"preprocessing/keys.json": keys + b" "}},
        "in the file or in its manifest alone": {"drop": ["preprocessing/keys.json"]},
        "manifest.json is missing": {"drop": ["manifest.json"]},
        "'extra' is in the file": {"add": {"extra": b"1"}},
        "its format is mtcl model 99": {"replace": {"manifest.json": json.dumps({**manifest, "version": 99})}},
        "names no members": {"replace": {"manifest.json": "[]"}},
        "damaged one": {"replace": {"manifest.json": "{"}},
    }
    for message, change in cases.items():
        with pytest.raises(DataError, match=message):
            Artefact.load(changed(good, bad, **change))
    bad.write_bytes(good.read_bytes()[:-2000])
    with pytest.raises(DataError, match="no exported model"):
        Artefact.load(bad)
    with pytest.raises(DataError, match="no such file"):
        Artefact.load(tmp_path / "nowhere.mtcl")
    with pytest.raises(DataError, match="another file, or was changed"):
        Artefact.load(good, sha256="0" * 64)


def test_a_member_cannot_be_written_elsewhere(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "x").write_text("1")
    write_archive(tmp_path / "a.mtcl", folder, {"format": "mtcl model", "version": 1})
    with zipfile.ZipFile(tmp_path / "a.mtcl") as archive:
        manifest = json.loads(archive.read("manifest.json"))
    manifest["members"] = {"../out": manifest["members"]["x"]}
    evil = changed(tmp_path / "a.mtcl", tmp_path / "b.mtcl", drop=["x"], add={"../out": "1"},
                   replace={"manifest.json": json.dumps(manifest)})  # fmt: skip
    with pytest.raises(DataError, match="no name of a member"):
        Artefact.load(evil)
    assert not (tmp_path / "out").exists()


class _Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was run')",))


@pytest.mark.parametrize("where", ["data/sample_inputs/model.pt", "data/weights/model.pt", "data/constants/model.pt"])
def test_a_network_with_a_pickle_is_refused_before_it_is_opened(made, tmp_path, where):
    with zipfile.ZipFile(made.path) as archive:
        inner = archive.read(NETWORK)
    network = tmp_path / NETWORK
    with zipfile.ZipFile(io.BytesIO(inner)) as old, zipfile.ZipFile(network, "w", zipfile.ZIP_STORED) as new:
        top = old.namelist()[0].split("/")[0]
        for name in old.namelist():
            if name != f"{top}/{where}":
                new.writestr(name, old.read(name))
        new.writestr(f"{top}/{where}", pickle.dumps(_Evil()))
    with pytest.raises(DataError, match="is a pickle, which is not loaded"):
        portable(network)


def test_a_weight_stored_as_a_pickle_is_refused(made, tmp_path):
    with zipfile.ZipFile(made.path) as archive:
        inner = archive.read(NETWORK)
    network = tmp_path / NETWORK
    with zipfile.ZipFile(io.BytesIO(inner)) as old, zipfile.ZipFile(network, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("weights_config.json"):
                config = json.loads(content)
                next(iter(config["config"].values()))["use_pickle"] = True
                content = json.dumps(config)
            new.writestr(name, content)
    with pytest.raises(DataError, match="stored as a pickle"):
        portable(network)


def poisoned(folder, made, edit):
    """A network whose members `edit` (name without its root, content) has changed, dropped or doubled."""
    network = folder / NETWORK
    with zipfile.ZipFile(made.path) as archive:
        inner = archive.read(NETWORK)
    with zipfile.ZipFile(io.BytesIO(inner)) as old, zipfile.ZipFile(network, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            root, _, what = name.partition("/")
            for changed_name, content in edit(root, what, old.read(name)):
                new.writestr(changed_name, content)
    return network


def evil_bytes():
    buffer = io.BytesIO()
    torch.save(_Evil(), buffer)
    return buffer.getvalue()


def opaque(root, what, content):
    """torch unpickles whatever is called so, also where the configuration says no pickle."""
    if what == "data/constants/model_constants_config.json":
        config = json.loads(content)
        of_a_tensor = next(iter(config["config"].values()))
        config["config"]["evil"] = {**of_a_tensor, "path_name": "opaque_obj_0"}
        yield f"{root}/data/constants/opaque_obj_0", pickle.dumps(_Evil())
        content = json.dumps(config)
    yield f"{root}/{what}", content


def of_an_older_torch(root, what, content):
    """No folder: torch falls back to a kind of file that is pickles altogether."""
    if what == "models/model.json":
        version = torch._export.serde.schema.SCHEMA_VERSION
        yield "version", ".".join(map(str, version))
        yield "serialized_exported_program.json", content
        for name in ("state_dict", "constants", "example_inputs"):
            yield f"serialized_{name}.pt", evil_bytes()


def in_capitals(root, what, content):
    """torch finds members whatever the case of their names."""
    if what == "data/sample_inputs/model.pt":
        yield f"{root}/data/sample_inputs/model.PT", evil_bytes()
    else:
        yield f"{root}/{what}", content


def with_machine_code(root, what, content):
    yield f"{root}/{what}", content
    if what == "byteorder":
        yield f"{root}/data/aotinductor/model/evil.so", b"ELF"


@pytest.mark.parametrize("edit", [opaque, of_an_older_torch, in_capitals, with_machine_code])
def test_what_torch_would_unpickle_or_run_unasked_is_refused(made, tmp_path, edit):
    with pytest.raises(DataError, match=r"is stored as a pickle|does not belong into a network"):
        portable(poisoned(tmp_path, made, edit))
    assert [p.name for p in tmp_path.iterdir()] == [NETWORK]


def test_a_few_bytes_do_not_become_many(made, tmp_path):
    with zipfile.ZipFile(made.path) as archive:
        manifest = json.loads(archive.read("manifest.json"))
    manifest["members"]["bomb"] = {"bytes": 50_000_000, "sha256": hashlib.sha256(bytes(50_000_000)).hexdigest()}
    bomb = changed(made.path, tmp_path / "b.mtcl", replace={"manifest.json": json.dumps(manifest)})
    with zipfile.ZipFile(bomb, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(50_000_000))
    assert bomb.stat().st_size < 1_000_000
    with pytest.raises(DataError, match="'bomb' is compressed"):
        Artefact.load(bomb)
    # Members that lie over each other: the same bytes, read many times.
    with zipfile.ZipFile(made.path) as archive:
        copies = [copy.copy(archive.getinfo(NETWORK)) for _ in range(3)]
        manifest["members"].pop("bomb")
    overlapping = changed(made.path, tmp_path / "o.mtcl")
    with zipfile.ZipFile(overlapping, "a") as archive:
        whole = archive.getinfo(NETWORK)
        for number, one in enumerate(copies):
            one.filename, one.header_offset = f"copy{number}", whole.header_offset
            archive.filelist.append(one)
            archive.NameToInfo[one.filename] = one
        archive.writestr("more", b"")
    with pytest.raises(DataError, match="say to be larger than the file"):
        Artefact.load(overlapping)


def test_a_manifest_that_says_something_else_is_one_clear_error(made, tmp_path, monkeypatch):
    monkeypatch.setattr("mtcl_torchrec.serving.artefact.portable", lambda path: None)
    with zipfile.ZipFile(made.path) as archive:
        text = archive.read("manifest.json")
    for change in (
        lambda m: m.pop("compiled_for") or m.pop("schema"),
        lambda m: m.pop("compiled_for") or m.update(network=[]),
        lambda m: m["schema"].update(features=3),
        lambda m: m.update(tasks=[{"name": 1}]),
        lambda m: m.update(statistics=[{"keys": 1}]),
        lambda m: m.update(members={**m["members"], NETWORK: 7}),
        lambda m: m["network"].pop("within_request"),
    ):
        change(manifest := json.loads(text))
        bad = changed(made.path, tmp_path / "b.mtcl", replace={"manifest.json": json.dumps(manifest)})
        with pytest.raises(DataError, match="damaged"):
            Artefact.load(bad)


def test_without_a_catalogue_it_cannot_recommend(artefact):
    with pytest.raises(ConfigError, match="no catalogue"):
        Recommender(artefact)


def test_writing_leaves_nothing_half_done(made, tmp_path, monkeypatch):
    target = tmp_path / "m.mtcl"
    target.write_bytes(b"before")

    def fails(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(zipfile.ZipFile, "write", fails)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x").write_text("1")
    with pytest.raises(OSError, match="disk full"):
        write_archive(target, tmp_path / "in", {})
    assert target.read_bytes() == b"before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "m.mtcl"]
