"""The benchmark of training: what it measures fits together, and taking a step apart does not change the step."""

import copy
import importlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from ranks import run_ranks

from mtcl_torchrec.config import parse_run
from mtcl_torchrec.data import kuairand
from mtcl_torchrec.data.cold_split import cold_split
from mtcl_torchrec.data.synthetic_text import TextWorld
from mtcl_torchrec.models import MTCLTrain
from mtcl_torchrec.training.build import build_model
from mtcl_torchrec.training.loop import build_pipeline, parallelise
from mtcl_torchrec.training.optimizers import build_schedule
from mtcl_torchrec.training.sharding import local_shards, ranks, tables_of

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = {"vocabulary": 500, "batch_size": 64, "steps": 3, "warmup_steps": 1, "apart_steps": 2, "experts": 2,
        "expert_layers": "16,8", "window": 100, "device": "cpu"}  # fmt: skip


def script(name):
    """A benchmark as a module, by the path on which it finds its neighbours."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module(name)


def measured(options):
    training = script("training")
    with ranks("cpu") as where:
        return training.measure(training.Setting(**TINY | options), where)


# Bytes of the shop's tables: 500 users and items of dimension 16, and the small ones; row 0 of each is "unknown".
TABLE_BYTES = 4 * (16 * (501 + 501) + 8 * (9 + 17 + 13) + 4 * (25 + 4 + 9))


@pytest.mark.parametrize(("world_size", "kind", "sharding"), [(1, "memory", "auto"), (2, "generated", "row_wise"),
                                                              (2, "parquet", "table_wise")])  # fmt: skip
def test_figures_fit_together(world_size, kind, sharding):
    results = run_ranks(measured, world_size, {"input": kind, "sharding": sharding})
    result = results[0]
    assert all(other == result for other in results)
    assert result["ranks"] == len(result["of_ranks"]) == world_size
    assert result["samples_per_s"] == pytest.approx(64 * world_size * 1000 / result["step_ms"]["mean"])
    assert 0 < result["step_ms"]["median"] <= result["step_ms"]["p90"]
    assert result["table_bytes"] == TABLE_BYTES
    apart = dict(result["apart_ms"])
    step = apart.pop("step")
    assert list(apart) == list(script("step_parts").PARTS)
    assert sum(apart.values()) == pytest.approx(step)
    assert min(apart.values()) >= 0
    for part in ("input", "embedding forward", "trunk", "heads", "dense backward", "embedding backward", "optimizer"):
        assert apart[part] > 0, part
    if world_size > 1:
        assert min(apart[part] for part in ("input dist", "output dist", "gradient dist", "dense all-reduce")) > 0
    assert apart["other"] < step / 2
    json.dumps(result)


def after_five_steps(kind, by_hand):
    """Tables, dense parameters and learning rates after five steps, the last three by hand or all by the pipeline."""
    training, parts = script("training"), script("step_parts")
    setting = training.Setting(**TINY | {"sharding": kind, "table_optimizer": "adagrad"})
    with ranks("cpu") as where:
        run = training.configured(setting, where.world_size, Path())
        rows, preprocessor = training.training_rows(setting, run, Path(), where)
        train_module = MTCLTrain(build_model(run.model, preprocessor.encoder, run.fusion, seed=0))
        model, optimizer = parallelise(train_module, where, run.optimizers, sharding=run.sharding)
        schedule = build_schedule(optimizer, 2, 9, "linear")
        batches = training.Batches(rows, where, setting.batch_size)
        taken = [next(batches) for _ in range(5)]
        pipeline = build_pipeline(model, optimizer, where.device, "base")
        model.train()
        fed = iter(taken[:2] if by_hand else taken)
        for _ in range(2 if by_hand else 5):
            pipeline.progress(fed)
            schedule.step()
        if by_hand:
            parts.take_apart(model, optimizer, schedule, iter(taken[2:]), where.device, 3)
        assert not train_module.model.tower._forward_hooks
        values = {f"{name} {i}": t.clone() for name, of in tables_of(model).items()
                  for i, (t, *_) in enumerate(local_shards(of))}  # fmt: skip
        values |= {name: value.detach().clone() for name, value in train_module.model.tower.named_parameters()}
        return values | {"learning rates": torch.tensor(schedule.get_last_lr())}


def differing(kind):
    """How many values there are, and the names of those that are not the same both ways."""
    one, other = after_five_steps(kind, False), after_five_steps(kind, True)
    assert one.keys() == other.keys()
    return len(one), [name for name, value in one.items() if not torch.equal(value, other[name])]


@pytest.mark.parametrize(("world_size", "kind"), [(1, "auto"), (2, "row_wise"), (2, "data_parallel")])
def test_steps_that_are_taken_apart_train_as_the_pipeline_does(world_size, kind):
    for values, wrong in run_ranks(differing, world_size, kind):
        assert values > 20
        assert wrong == []


@pytest.mark.full
def test_a_sweep_writes_every_run_and_says_what_failed(tmp_path):
    def sweep(out, *options):
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
        command = [sys.executable, str(BENCHMARKS / "training.py"), *flags, f"--out={tmp_path / out}.jsonl", *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=600)

    done = sweep("good", "--ranks=1,2", "--vocabulary=400,500")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "good.json").read_text())
    assert [(r["what"]["ranks"], r["what"]["setting"]["vocabulary"]) for r in content["results"]] == [
        (1, 400),
        (2, 400),
        (1, 500),
        (2, 500),
    ]
    assert "400 users" in done.stdout
    assert "embedding backward" in done.stdout
    done = sweep("failed", "--ranks=1", "--repeats=2", "--sharding=column_wise")
    assert done.returncode == 1
    assert not (tmp_path / "failed.json").exists()  # nothing was measured
    assert "row-wise Adagrad" in done.stdout


def test_one_setting_is_measured_where_it_is_called(tmp_path, capsys, monkeypatch):
    training = script("training")
    line = {
        "what": {"ranks": 1, "setting": {"input": "memory", "vocabulary": 5}},
        "repeat": 0,
        "samples_per_s": 4.0,
        "step_ms": dict.fromkeys(("mean", "median", "p90", "waiting for input"), 1.0),
        "apart_ms": dict.fromkeys(("step", *script("step_parts").PARTS), 2.0),
        "sent_bytes": {"ids": 3e6},
        "table_bytes": 1,
        "peak_rss_bytes": 1,
        "peak_cuda_bytes": None,
        "setup_s": {"data": 1.0, "model": 1.0},
    }
    both = [line, line | {"what": line["what"] | {"ranks": 2}, "samples_per_s": 6.0}]
    [table] = training.tables(both)
    assert table.heads == ["", "1 rank", "2 ranks"]
    assert table.rows[0] == ["samples/s over 1 rank", "1.00", "1.50"]
    assert ["sent between ranks, MB a step", "3.00", "3.00"] in table.rows
    training.draw(both, tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size > 5000
    monkeypatch.setattr(sys, "argv", ["training.py", "--ranks=1,2"])
    with pytest.raises(SystemExit):
        training.main()
    assert "--out FILE" in capsys.readouterr().err


@pytest.mark.parametrize("data", ["kuairand", "opposed"])
def test_every_method_of_the_benchmark_is_a_run(data, tmp_path, monkeypatch):
    balance = script("balance_methods")
    raw = yaml.safe_load(kuairand.example_run()) if data == "kuairand" else balance.world_run(True, True)
    monkeypatch.setattr(balance, "kuairand_run", lambda *of: copy.deepcopy(raw))
    for method in [*balance.BY_NAME, balance.TWIN]:
        only = "like" if method == balance.TWIN else None
        run = balance.configured(balance.Training(data, method, 0.5, 3, only), True, tmp_path)
        assert run.training.seed == 3
        if method != balance.HELPED:
            assert [t.name for t in run.data_schema.tasks] == (["like"] if only else list(balance.TASKS[data]))


def test_gains_are_relative_to_the_twins(tmp_path, monkeypatch, capsys):
    balance = script("balance")
    aucs = {"single task": {"like": 0.6, "share": 0.7, "hide": 0.9}, "mmoe": {"like": 0.65, "share": 0.7, "hide": 0.86}}
    lines = [
        {"data": "opposed", "method": name, "only": only, "rate": rate, "seed": seed, "train_seconds": 2.0,
         "val": {t: a - (rate == 1) * 0.1 for t, a in of.items() if only in (None, t)},
         "test": {t: a - (rate == 1) * 0.1 for t, a in of.items() if only in (None, t)}}
        for name, of in aucs.items() for only in (of if name == "single task" else [None])
        for rate, seed in ((0.5, 0), (1.0, 0), (0.5, 1))
    ]  # fmt: skip
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"data": "cut o')
    results = balance.read(tmp_path / "r.jsonl")
    assert len(results) == 12
    tables = script("balance_tables")
    twins = tables.twin_aucs(results)
    assert twins == {"like": [0.6, 0.6], "share": [0.7, 0.7], "hide": [0.9, 0.9]}
    assert tables.gain(results[-1], twins) == pytest.approx(100 * (0.5 + 0 - 0.1) / 3)
    (tmp_path / "s.json").write_text('{"mmoe": {"ratio": 1.25}}')
    wanted = ("--show", tmp_path / "r.jsonl", "--steps", tmp_path / "s.json", "--out", tmp_path / "b.jsonl")
    called_as("balance", monkeypatch, *wanted)
    said = capsys.readouterr().out
    assert "13.33 ± 0.00" in said
    assert said.count("↓") == 1
    found = json.loads((tmp_path / "b.json").read_text())
    [table] = found["tables"]
    assert table["rows"][-1][0] == "mmoe"
    assert table["rows"][-1][-1] == "1.25"
    of_mmoe = next(r for r in found["results"] if r["what"]["method"] == "mmoe" and r["what"]["rate"] == 0.5)
    assert (of_mmoe["repeats"], of_mmoe["figures"]["test.like"]["median"]) == (2, 0.65)
    assert (tmp_path / "b.png").stat().st_size > 5000


# ---------------------------------------------------------------------- against others


def test_measurements_are_kept_interleaved_and_never_made_twice(tmp_path):
    measure, asked = script("measure"), []

    def one(what):
        asked.append(what["n"])
        return None if what["n"] == 3 else {"ms": 10.0 * what["n"] + len(asked)}

    out, todo = tmp_path / "r.jsonl", [{"n": 1}, {"n": 2}, {"n": 3}]
    assert [line["ms"] for line in measure.sweep(out, todo[:2], 2, one)] == [11, 22, 13, 24]
    assert asked == [1, 2, 1, 2]
    out.write_text(out.read_text()[:-20])  # broken off while it wrote the last line
    assert [line["repeat"] for line in measure.read(out)] == [0, 0, 1]
    out.write_text(out.read_text().rpartition("\n")[0] + "\n")
    found = measure.sweep(out, todo, 2, one)
    assert asked[4:] == [3, 2, 3]  # what failed is tried again, what is there is not
    assert measure.median([line for line in found if line["what"] == {"n": 1}], "ms") == 12
    about = found[0]["about"]
    assert about["versions"]["torch"] == importlib.metadata.version("torch")
    assert {"machine", "commit", "date", "command", "load"} <= set(about)
    assert f"{about['cores']} cores" in measure.said(found)


def test_calls_take_turns():
    measure, called = script("measure"), []
    ms = measure.alternate({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 2, warm=1)
    assert called == ["a", "b"] * 3
    assert set(ms) == {"a", "b"}
    assert min(ms["a"].values()) >= 0


@pytest.fixture(scope="module")
def tiny_case(tmp_path_factory):
    """A case of the peers' benchmark, in the smallest size that learns, and its files."""
    cases, folder = script("peer_cases"), tmp_path_factory.mktemp("peers")
    case = cases.Case("tiny", 20_000, 3, 50, 4, 2, 2, (8, 6), (5,), batch_size=256, warmup_steps=2)
    return case, cases.files_of(case, folder)


def test_the_rows_of_a_case_can_be_learnt_and_stay(tiny_case):
    import pyarrow.parquet as pq

    case, (train, val) = tiny_case
    frame = pq.read_table(train).to_pandas()
    assert list(frame) == [*case.columns, *case.labels]
    assert len(frame) == case.rows
    assert frame[case.columns].to_numpy().max() < case.table_rows
    assert 0.05 < frame[case.labels].to_numpy().mean() < 0.5
    again = script("peer_cases").files_of(case, train.parent)
    assert again == (train, val)
    assert len(list(train.parent.iterdir())) == 2
    # What an id adds is the same in both files: rates by id go together.
    rates = [pq.read_table(path).to_pandas().groupby("id_0")["task_0"].mean() for path in (train, val)]
    common = rates[0].index.intersection(rates[1].index)
    assert rates[0][common].corr(rates[1][common]) > 0.5


@pytest.mark.parametrize("who", ["ours", "torchrec", "pytorch", "rechub", "deepctr"])
def test_contenders_train_the_same(who, tiny_case):
    if who in ("rechub", "deepctr"):
        pytest.importorskip({"rechub": "torch_rechub", "deepctr": "deepctr_torch"}[who])
    contenders, (case, files) = script("contenders"), tiny_case
    [ran] = run_ranks(trained, 1, who, case, files)
    assert len(ran.stamps.wall) == len(ran.stamps.cpu) == case.steps
    assert ran.table_parameters == 3 * 50 * 4
    by_hand = sum(p.numel() for p in contenders.MMoE(case).parameters())
    assert ran.dense_parameters == pytest.approx(by_hand, rel=0.1)
    if who in ("ours", "torchrec", "pytorch"):
        assert ran.dense_parameters == by_hand
    labels = script("peers").labels_of(files[1], case)
    assert ran.predictions.shape == labels.shape
    # All begin near log 2; the two packages start their tables at almost nothing, and need longer.
    assert script("peers").log_loss(labels, ran.predictions) < (0.68 if who in ("rechub", "deepctr") else 0.58)


@pytest.mark.parametrize("sparse", [False, True])
def test_the_optimizer_of_the_peers_is_adagrad_and_adam_in_their_fastest_form(sparse):
    runs = script("peer_runs")
    modules = [torch.nn.Sequential(torch.nn.Embedding(7, 3, sparse=sparse), torch.nn.Linear(3, 1)) for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    ours = runs.Adagrads(modules[0], 7, sparse=sparse)
    plain = [torch.optim.Adagrad(modules[1][0].parameters(), lr=runs.TABLE_LR, eps=runs.EPS),
             torch.optim.Adam(modules[1][1].parameters(), lr=runs.DENSE_LR)]  # fmt: skip
    assert (ours.tables, ours.dense) == (21, 4)
    assert [bool(part.defaults["fused"]) for part in ours.parts] == [not sparse, True]
    for _ in range(3):
        for module, optimizers in zip(modules, ([ours], plain), strict=True):
            for optimizer in optimizers:
                optimizer.zero_grad()
            module(torch.tensor([1, 4, 4])).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
    for got, wanted in zip(*(module.parameters() for module in modules), strict=True):
        torch.testing.assert_close(got, wanted)


def trained(who, case, files):
    return script("contenders").CONTENDERS[who](case, *files, 0)


def test_peers_are_compared_repeat_by_repeat(tmp_path, capsys):
    peers = script("peers")
    lines = [
        {"what": {"case": case, "rows": 10, "table_rows": size, "contender": who, "threads": None}, "repeat": repeat,
         "samples_per_s": speed * (repeat + 1), "from_file_per_s": speed * (repeat + 1), "step_ms": 1.0,
         "step_cpu_ms": 1.0, "log_loss": 0.5, "table_parameters": 100, "dense_parameters": dense, "ready_s": 1.0,
         "peak_rss_bytes": 1e9, "about": script("measure").about()}
        for case, size, who, speed, dense in (("middle", 5, "ours", 60.0, 1000), ("middle", 5, "rechub", 20.0, 1010),
                                              ("middle", 5, "deepctr", 20.0, 1100), ("growing", 5, "ours", 9.0, 1),
                                              ("growing", 50, "ours", 8.0, 1))
        for repeat in (0, 1)
    ]  # fmt: skip
    for table in peers.tables(lines):
        table.print()
    said = capsys.readouterr().out
    assert "3.00" in said
    assert said.count("NOT EQUAL") == 1
    assert "deepctr has 1,100 parameters" in said
    peers.draw(lines, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_experts_and_input_measure_what_they_say(tmp_path, capsys):
    experts, reading, measure = script("experts"), script("input"), script("measure")
    what = {"experts": 2, "width": 8, "rows": 16, "input": 4, "rounds": 2, "device": "cpu", "compile": False,
            "threads": 1}  # fmt: skip
    lines = [{"what": what, "repeat": 0, **experts.work(what), "about": measure.about()}]
    assert lines[0]["auto"] == "batched"
    [table] = experts.tables(lines)
    assert table.rows[0][0] == "2 × 8"
    assert len(table.heads) == len(table.rows[0]) == 6  # nothing was compiled
    experts.draw(lines, tmp_path / "e.png")
    reading.write(tmp_path / "input-900x2x1.parquet", 900, 2, 1)
    of = {"rows": 900, "ids": 2, "numbers": 1, "batch_size": 128, "threads": 1}
    lines = [
        {"what": of | {"way": way}, "repeat": 0, **reading.work(of | {"way": way}, tmp_path), "about": measure.about()}
        for way in reading.WAYS
    ]
    lines += run_ranks(waited, 1, of | {"way": "training"}, tmp_path)
    assert 0 <= lines[-1]["waiting_share"] <= 1
    for table in reading.tables(lines):
        table.print()
    reading.draw(lines, tmp_path / "i.png")
    said = capsys.readouterr().out
    assert "of pyarrow" in said
    assert "is spent waiting for input" in said
    assert min((tmp_path / name).stat().st_size for name in ("e.png", "i.png")) > 5000


def test_what_has_become_slower_is_named(tmp_path, capsys):
    check, about = script("check"), script("measure").about()

    def line(what, repeat, **figures):
        return json.dumps({"what": what, "repeat": repeat, "about": about, **figures})

    case = {"case": "middle", "rows": 1, "table_rows": 1, "threads": None, "sleeping": True}
    sized = {"experts": 4, "width": 8, "rows": 1, "input": 1, "device": "cpu", "threads": None}
    of_file = {"rows": 1, "ids": 5, "numbers": 0, "threads": None}
    grown = {"case": "stream"}
    lines = {
        "peers": [line(case | {"contender": who}, i, from_file_per_s=speed * (i + 1))
                  for i in (0, 1) for who, speed in (("ours", 3.0), ("torchrec", 2.0), ("ours_bf16", 4.0))],
        "experts": [line(sized, 0, auto="loop", ms={f: {"wall": ms} for f, ms in (("batched", 6.0), ("loop", 4.0))})],
        "input": [line(of_file | {"way": way}, 0, rows_per_s=speed) for way, speed in (("pyarrow", 8), ("batches", 2))],
        "memory": [line(grown | {"rows": n}, 0, peak_rss_bytes=b) for n, b in ((9, 5), (5, 4))],
        "scaling": [line({"kind": "weak", "ranks": n, "setting": {"sharding": "auto", "device": "cpu"}}, 0,
                         samples_per_s=s) for n, s in ((1, 4.0), (2, 7.0))],
        "serving": [line({"way": way}, 0, candidates_per_s=s) for way, s in (("eager", 4.0), ("int8 graph", 5.0))],
    }  # fmt: skip
    for name, of in lines.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(of))
    now, failed = check.measured(tmp_path, {}, 1)
    assert list(now.values()) == [1.5, 2.0, 1.5, 0.25, 0.8, 1.75, 1.25]
    assert check.BF16 in now
    assert not failed
    assert lines.keys() == check.SCRIPTS.keys() == check.OF.keys()
    assert check.compare(now, {name: ratio * 1.2 for name, ratio in now.items()}, 0.25) == []
    first, *_, last = now
    assert check.compare(now, {first: 2.1, last: 0.8, "gone": 1.0}, 0.25) == [
        f"{first}: 2.10 before, 1.50 now, 29% worse", "gone: 1.00 before, not measured now"
    ]  # fmt: skip
    assert "0.71" in capsys.readouterr().out
    for name, options in check.SCRIPTS.items():  # options that the scripts know
        assert all(f'"{word}"' in Path(script(name).__file__).read_text() for word in options.split() if "--" in word)


@pytest.fixture
def checked(tmp_path, monkeypatch):
    """What the check ends with where these are the ratios now."""
    check = script("check")

    def ended(ratios, *options, failed=()):
        monkeypatch.setattr(check, "measured", lambda *_: (dict(ratios), list(failed)))
        monkeypatch.setattr(sys, "argv", ["check.py", "--ratios", str(tmp_path / "ratios.json"), *options])
        return check.main()

    return ended


def test_the_check_fails_outside_of_its_band_and_stores_nothing_half(tmp_path, capsys, checked):
    now, kept = {f"ratio {i}": 1.0 for i in range(4)}, tmp_path / "ratios.json"
    with pytest.raises(SystemExit):
        checked(now)
    assert "--store it first" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        checked(now, "--store", failed=["experts"])
    assert "nothing is stored: experts failed" in capsys.readouterr().err
    assert not kept.exists()
    assert checked(now, "--store") == 0
    assert "stored 4 ratios" in capsys.readouterr().out
    assert {"machine", "versions", "date", "commit", "command"} <= json.loads(kept.read_text())["about"].keys()
    assert checked(now | {"ratio 1": 0.8}) == 0
    assert checked(now | {"ratio 1": 0.7}) == 1
    assert "WORSE: ratio 1: 1.00 before, 0.70 now, 30% worse" in capsys.readouterr().out
    assert checked(now | {"ratio 1": float("nan")}) == 1
    assert checked(now | {"ratio 1": 0.7}, "--band", "0.4") == 0
    for wrong in ("0", "1", "-0.1"):
        with pytest.raises(SystemExit):
            checked(now, "--band", wrong)
    del now["ratio 2"]  # its script has failed
    assert checked(now) == 1
    assert checked(now, "--store") == 0  # says what was there, and replaces it
    assert checked(now) == 0
    assert not list(tmp_path.glob("*.unfinished"))


def test_what_the_marks_do_not_guard_is_named(tmp_path, capsys, checked):
    now = {f"ratio {i}": 1.0 for i in range(3)}
    assert checked(now, "--store") == 0
    assert checked(now | {"ratio 1": 1.3, "ratio 2": 1.4, "ratio 9": 2.0}) == 0
    said = capsys.readouterr().out
    assert "NOT GUARDED: ratio 2: 1.00 before, 1.40 now; --store it" in said
    assert "NOT GUARDED: ratio 9: no mark, 2.00 now; --store it" in said
    assert "NOT GUARDED: ratio 1" not in said  # 25 % below 1.3 is still below the mark


def test_what_cannot_be_stored_is_said_and_costs_no_mark(tmp_path, capsys, checked, monkeypatch):
    kept, check = tmp_path / "ratios.json", script("check")
    assert checked({"ratio 0": 1.0}, "--store") == 0
    before = kept.read_text()

    def refused(ratios, *options):
        with pytest.raises(SystemExit) as ended:
            checked(ratios, *options)
        assert ended.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "nothing is stored: ratio 0 is nan, no ratio" in refused({"ratio 0": float("nan")}, "--store")
    assert "nothing is stored: ratio 0 is 0.0, no ratio" in refused({"ratio 0": 0.0}, "--store")
    assert kept.read_text() == before
    (tmp_path / "file").touch()
    for path, why in ((tmp_path / "file" / "r.json", "File exists"), (tmp_path, "Is a directory")):
        monkeypatch.setattr(check, "measured", lambda *_: pytest.fail("measured for nothing"))
        monkeypatch.setattr(sys, "argv", ["check.py", "--store", "--ratios", str(path)])
        with pytest.raises(SystemExit):
            check.main()
        assert why in capsys.readouterr().err.splitlines()[-1]

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "measured", interrupted)
    monkeypatch.setattr(sys, "argv", ["check.py", "--ratios", str(kept)])
    assert check.main() == 130


def test_a_stored_file_that_was_tampered_with_or_is_of_elsewhere_is_told(tmp_path, capsys, checked, monkeypatch):
    check, now, kept = script("check"), {"ratio 0": 1.0}, tmp_path / "ratios.json"
    for text, why in (
        ('{"ratios": {"rat', "holds no ratios"), ("[]", "holds no ratios"), ('{"about": {}}', "holds no ratios"),
        ('{"about": {}, "ratios": {"ratio 0": "fast"}}', "holds no ratios"),
        ('{"about": {}, "ratios": {"ratio 0": NaN}}', "'ratio 0' is nan, no ratio"),
        ('{"about": {}, "ratios": {"ratio 0": -1}}', "'ratio 0' is -1.0, no ratio"),
    ):  # fmt: skip
        kept.write_text(text)
        with pytest.raises(SystemExit) as ended:
            checked(now)
        assert ended.value.code == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert why in said
        assert "make it anew with --store" in said
    assert checked(now, "--store") == 0
    elsewhere = json.loads(kept.read_text())
    elsewhere["about"] |= {"machine": "another", "cores": 512}
    elsewhere["ratios"][check.BF16] = 2.0
    kept.write_text(json.dumps(elsewhere))
    capsys.readouterr()
    monkeypatch.setattr(check.peers, "faster", lambda: ())
    assert checked(now) == 0  # a processor that is slow in bf16 is not measured in it
    said = capsys.readouterr().out
    assert "stored elsewhere" in said
    assert "cores 512, here" in said
    assert f"not fast in bf16: {check.BF16}" in said
    assert "ours_bf16" not in check.fit()["peers"]
    monkeypatch.setattr(check.peers, "faster", lambda: ("ours_bf16",))
    assert check.fit()["peers"].endswith("pytorch ours_bf16")
    assert checked(now) == 1


def test_a_script_that_fails_loses_its_own_ratios_alone(tmp_path, capsys, monkeypatch):
    check = script("check")
    (tmp_path / "peers.py").write_text("raise SystemExit(1)")
    monkeypatch.setattr(check, "HERE", tmp_path)
    sized = {"experts": 4, "width": 8, "rows": 1, "input": 1, "device": "cpu", "threads": None}
    times = {form: {"wall": ms} for form, ms in (("batched", 6.0), ("loop", 4.0))}
    (tmp_path / "experts.jsonl").write_text(json.dumps({"what": sized, "repeat": 0, "auto": "loop", "ms": times}))
    now, failed = check.measured(tmp_path, {"peers": "--case middle"}, 1)
    assert (list(now.values()), failed) == ([1.5], ["peers"])
    assert "FAILED" in capsys.readouterr().out


def waited(what, folder):
    return {"what": what, "repeat": 0, **script("input").work(what, folder), "about": script("measure").about()}


# ---------------------------------------------------------------------- cold start


def test_cold_start_judges_by_segment_and_shows_what_it_has(tmp_path, monkeypatch, capsys):
    cold_start = script("cold_start")
    world = TextWorld(num_users=60, num_items=80, ratings=30)
    parts = cold_split(world.log())
    test = parts["test"]
    told = cold_start.by_segment(
        test, {task: test[f"p_{cold_start.LABELS[task]}"].to_numpy() for task in cold_start.TASKS}
    )
    popular = cold_start.by_segment(
        test, {task: cold_start.popularity(parts["train"], test, cold_start.LABELS[task]) for task in cold_start.TASKS}
    )
    assert sum(n for name, n in told["rows"].items() if name != "all") <= told["rows"]["all"] == len(test)
    assert told["liked"]["all"] > popular["liked"]["all"]
    assert popular["liked"]["never seen"] == 0.5  # nothing is known of them
    of_all = {"data": "synthetic", "encoder": "tfidf", "small": False, "sequences": "off"}
    results = [{**of_all, "variant": v, "seed": s, **f} for v, f in
               (("popularity", popular), ("true probability", told), ("id", popular)) for s in (0, 1)]  # fmt: skip
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, results)))
    wanted = ("--show", tmp_path / "r.jsonl", "--out", tmp_path / "c.jsonl")
    called_as("cold_start", monkeypatch, *wanted, "--markdown")
    said = capsys.readouterr().out
    assert f"| popularity | {popular['liked']['head']:.3f} ± 0.000 |" in said
    found = json.loads((tmp_path / "c.json").read_text())
    assert [table["title"].split()[0] for table in found["tables"]] == ["AUC", "GAUC"]
    of_popularity = next(r for r in found["results"] if r["what"]["variant"] == "popularity")
    assert of_popularity["repeats"] == 2
    assert of_popularity["figures"]["liked.head"]["median"] == popular["liked"]["head"]
    assert (tmp_path / "c.png").stat().st_size > 10_000


@pytest.mark.parametrize("data", ["movielens", "synthetic"])
def test_every_variant_of_cold_start_is_a_run(data):
    cold_start = script("cold_start")
    for variant, features in cold_start.VARIANTS.items():
        for sequences in (False, True) if any(f["name"] == "item_id" for f in features) else (False,):
            run = parse_run(yaml.safe_dump(cold_start.configuration(variant, sequences, data, 0, 100, small=False)))
            assert {f.name for f in run.data_schema.features} > {f["name"] for f in features}
            assert bool(run.histories) == sequences


# ---------------------------------------------------------------------- claims, and what is knowable


def claimed(seed, data="kuairand", lift=0.0, without=()):
    """A line of the results of `article_claims.py`, made up: every system a hundredth better than the one before."""
    claims = script("article_claims_tables")
    figures = {
        system: dict.fromkeys(claims.COLUMNS, 0.5 + 0.01 * (i + seed) + lift) | {"majority": 0.55}
        for i, system in enumerate(claims.SYSTEMS) if system not in without
    }  # fmt: skip
    return {"data": data, "trials": 8, "worth": None, "k": 5, "small": False, "seed": seed, "seconds": 3,
            "systems": figures}  # fmt: skip


def called_as(name, monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
    return script(name).main()


def test_claims_that_are_all_measured_are_shown_drawn_and_documented(tmp_path, monkeypatch, capsys):
    claims, out = script("article_claims"), tmp_path / "claims.jsonl"
    lines = [claimed(0), claimed(1) | {"about": script("measure").about("implicit")}, claimed(0, "movielens", 0.2)]
    lines.append(claimed(2, without=["one task"]))  # broken off: not of the table
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(claims, "configured", lambda *_, **__: pytest.fail("nothing is missing of these seeds"))
    called_as("article_claims", monkeypatch, "--seeds", 0, 1, "--out", out)
    found = json.loads((tmp_path / "claims.json").read_text())
    assert found["picture"] == "claims.png"
    assert not found["complete"]  # one of seed 2 is missing
    assert found["about"]["date"] == lines[1]["about"]["date"]
    [of_filter] = [r for r in found["results"] if r["what"]["system"] == "collaborative filtering"
                   and r["what"]["data"] == "kuairand"]  # fmt: skip
    assert of_filter["repeats"] == 3
    assert of_filter["figures"]["auc"] == {"median": pytest.approx(0.52), "least": pytest.approx(0.51),
                                           "most": pytest.approx(0.53)}  # fmt: skip
    kuairand, movielens = found["tables"]
    assert "2 seeds" in kuairand["title"]
    assert "1 seed;" in movielens["title"]
    rows = {row[0]: row[1:] for row in kuairand["rows"]}
    auc = list(script("article_claims_tables").COLUMNS).index("auc")
    assert rows["collaborative filtering"][auc] == "0.515 ± 0.007"
    # In AUC over 0.5: 4 and 5 hundredths, over 1 and 2.
    assert rows["one task: gain over collaborative filtering"][auc] == "+225.0% ± 106.1%"
    capsys.readouterr()
    called_as("article_claims", monkeypatch, "--show", out, "--markdown", "--picture", tmp_path / "again.png")
    said = capsys.readouterr().out
    assert "| collaborative filtering | 0.515 ± 0.007 |" in said
    assert min((tmp_path / name).stat().st_size for name in ("claims.png", "again.png")) > 10_000


def test_runs_of_a_world_are_shown_and_drawn_with_their_seeds(tmp_path, monkeypatch, capsys):
    knowable, out = script("knowable"), tmp_path / "k.jsonl"
    settings = {"world": "shop", "rows": 1000, "held_out": 10, "users": 5, "items": 6, "dial": [], "dim": 0, "set": [],
                "device": "cpu"}  # fmt: skip
    lines = [{"settings": settings | {"seed": seed, **more}, "seconds": 6.0, "share": share}
             for seed, more, share in ((0, {}, {"click": 0.5, "score": 0.25}), (1, {}, {"click": 0.75}),
                                       (0, {"rows": 9000, "set": ["training.epochs=3"]}, {"click": -0.1}))]  # fmt: skip
    out.write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    monkeypatch.setattr(knowable, "measured", lambda options: lines[2])
    called_as("knowable", monkeypatch, "--out", out)
    found = json.loads((tmp_path / "k.json").read_text())
    assert [r["repeats"] for r in found["results"]] == [2, 1]
    assert found["results"][0]["figures"]["share.click"] == {"median": 0.625, "least": 0.5, "most": 0.75}
    [table] = found["tables"]
    assert table["rows"] == [
        ["1", "50.0 %", "25.0 %", "0.1"], ["2", "75.0 %", "–", "0.1"], ["3", "-10.0 %", "–", "0.1"]
    ]  # fmt: skip
    assert "3: shop, 9,000 rows, 5 × 6 training.epochs=3, seed 0" in table["note"]
    capsys.readouterr()
    called_as("knowable", monkeypatch, "--show", out, "--picture", tmp_path / "again.png")
    assert "75.0 %" in capsys.readouterr().out
    assert min((tmp_path / name).stat().st_size for name in ("k.png", "again.png")) > 10_000


@pytest.mark.full
def test_a_world_is_learnt_from_the_command_line(tmp_path, monkeypatch):
    called_as("knowable", monkeypatch, "--rows", 2000, "--held-out", 500, "--users", 50, "--items", 50, "--device",
              "cpu", "--out", tmp_path / "k.jsonl")  # fmt: skip
    found = json.loads((tmp_path / "k.json").read_text())
    assert found["about"]["versions"]["torch"]
    assert found["results"][0]["figures"]["share.click"]["median"] < 1
