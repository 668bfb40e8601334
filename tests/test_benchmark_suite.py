"""The frame of the benchmarks: one form of results, generated tables, a suite that loses nothing, bytes that add up."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ranks import run_ranks
from test_benchmarks import TINY, script

from mtcl_torchrec.models import MTCLTrain
from mtcl_torchrec.training.build import build_model
from mtcl_torchrec.training.loop import parallelise
from mtcl_torchrec.training.sharding import ranks


def line(what, repeat=0, **of):
    return {"what": what, "repeat": repeat, **of, "about": script("measure").about()}


# ---------------------------------------------------------------------- one form


def test_a_document_has_the_spread_of_every_number(tmp_path):
    document = script("document")
    lines = [line({"n": 1}, i, speed=v, of={"deep": 2 * v}, kind="x", each=[1, 2]) for i, v in enumerate((5.0, 1, 3))]
    table = document.Table("a | b", ["", "speed"], [["ours", "1.00"]], "so it is")
    document.written(tmp_path / "x.json", lines, [table], complete=False)
    found = json.loads((tmp_path / "x.json").read_text())
    [result] = found["results"]
    assert result == {
        "what": {"n": 1}, "repeats": 3,
        "figures": {"speed": {"median": 3, "least": 1, "most": 5}, "of.deep": {"median": 6, "least": 2, "most": 10}},
    }  # fmt: skip
    assert {"machine", "flags", "versions", "date", "command", "commit", "cores"} <= found["about"].keys()
    assert not found["complete"]
    assert document.tables_of(found) == [table]
    assert table.markdown().splitlines()[:5] == ["**a \\| b**", "", "|  | speed |", "|---|---:|", "| ours | 1.00 |"]


def test_ratios_are_of_the_same_repeat():
    document = script("document")
    ours, others = ([line({}, i, s=s) for i, s in of] for of in ([(0, 4.0), (1, 9.0), (2, 1.0)], [(1, 3.0), (0, 1.0)]))
    assert document.ratios(ours, others, "s") == [4, 3]
    assert document.ranged([4, 3]) == "3.50 (3.00–4.00)"
    assert document.ranged([]) == ""


def test_another_commit_is_measured_again_and_paths_are_not_told(tmp_path, monkeypatch):
    measure, asked = script("measure"), []
    out, todo = tmp_path / "r.jsonl", [{"n": 1}, {"n": 2}]

    def one(what):
        asked.append(what["n"])
        return {"ms": len(asked)}

    monkeypatch.setattr(sys, "argv", ["/here/x.py", "--rows", "5", "--out", str(out), "--again"])
    measure.sweep(out, todo, 1, one)
    assert measure.read(out)[0]["about"]["command"] == "python benchmarks/x.py --rows 5"
    for module in (measure, script("who")):
        monkeypatch.setattr(module, "commit", lambda: "another")
    assert [found["ms"] for found in measure.sweep(out, todo, 1, one)] == [3, 4]
    assert len(measure.read(out)) == 4
    assert [found["ms"] for found in measure.latest(measure.read(out))] == [3, 4]
    for module in (measure, script("who")):
        monkeypatch.setattr(module, "datetime", type("Later", (), {"now": staticmethod(lambda: LATER)}))
    assert [found["ms"] for found in measure.sweep(out, todo, 1, one, again=True)] == [5, 6]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--data kuairand movielens --seeds 1 --out r.jsonl", "--data kuairand movielens --seeds 1"),
        ("--data /somewhere/files --rows 5 --again", "--rows 5"),
        ("--rows 5 --data {here} --picture p.png --eager", "--rows 5 --eager"),
        ("--folder ml-1m --data movielens", "--data movielens"),
    ],
)
def test_a_command_tells_what_was_measured_and_not_where_it_lies(given, told, tmp_path):
    assert " ".join(script("who")._told(given.format(here=tmp_path).split())) == told


class _Later:
    def astimezone(self):
        return self

    def isoformat(self, **_):
        return "2999-01-01T00:00:00+00:00"


LATER = _Later()


def test_a_benchmark_says_so_where_something_failed(tmp_path, capsys):
    import argparse

    measure, document = script("measure"), script("document")
    parser = argparse.ArgumentParser()
    measure.options(parser, repeats=2, timeout_s=9)

    def carried_out(fails):
        return measure.benchmark(
            parser, parser.parse_args(["--out", str(tmp_path / "b.jsonl")]), work=lambda what: None,
            todo=lambda: [{"n": 1}, {"n": 2}], one=lambda what: None if what["n"] == fails else {"ms": 1.0},
            tables=lambda lines: [document.Table("t", ["a"], [[str(len(lines))]])],
            draw=lambda lines, path: path.write_bytes(b"drawn"),
        )  # fmt: skip

    assert carried_out(fails=2) == 1
    assert not json.loads((tmp_path / "b.json").read_text())["complete"]
    assert "FAILED: {'n': 2}" in capsys.readouterr().out
    assert carried_out(fails=None) == 0
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["complete"]
    assert found["picture"] == "b.png"
    assert found["tables"][0]["rows"] == [["4"]]


def asked(measure, out, *options, one=lambda what: {"ms": 1.0}, todo=({"n": 1}, {"n": 2}, {"n": 3})):
    """The status of a benchmark of three settings that is given these options, measured by `one`."""
    import argparse

    parser = argparse.ArgumentParser()
    measure.options(parser, repeats=1, timeout_s=9)
    return measure.benchmark(
        parser, parser.parse_args(["--out", str(out), *map(str, options)]), work=lambda what: None,
        todo=lambda: list(todo), one=one, draw=lambda lines, path: path.write_bytes(b"drawn"),
        tables=lambda lines: [script("document").Table("t", ["a"], [[str(len(lines))]])],
    )  # fmt: skip


def test_a_line_that_was_cut_off_costs_no_other(tmp_path):
    measure, out = script("measure"), tmp_path / "b.jsonl"
    assert asked(measure, out, todo=[{"n": 1}]) == 0
    whole = out.read_text()
    out.write_text(whole + '[1]\n{"what": {"n": 3}}\n' + whole[:40])  # of a process that was killed
    assert asked(measure, out) == 0
    assert [of["what"]["n"] for of in measure.read(out) if "about" in of] == [1, 2, 3]
    assert json.loads((tmp_path / "b.json").read_text())["tables"][0]["rows"] == [["3"]]


def test_ctrl_c_keeps_shows_and_draws_what_was_measured(tmp_path, capsys):
    measure, out = script("measure"), tmp_path / "b.jsonl"

    def interrupted(what):
        if what["n"] == 3:
            raise KeyboardInterrupt
        return {"ms": 1.0}

    assert asked(measure, out, one=interrupted) == 130
    assert f"broken off: 2 of 3 measurements are in {out}; the same command goes on there" in capsys.readouterr().out
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["complete"] is False
    assert found["tables"][0]["rows"] == [["2"]]
    assert (tmp_path / "b.png").exists()
    again = []
    assert asked(measure, out, one=lambda what: again.append(what["n"]) or {"ms": 1.0}) == 0
    assert again == [3]


def test_what_was_measured_is_not_replaced_by_nothing(tmp_path, capsys):
    measure, out = script("measure"), tmp_path / "b.jsonl"
    asked(measure, out)
    before = (tmp_path / "b.json").read_text()
    for options, why in (
        (["--show", tmp_path / "typo.jsonl"], "there is no such file"),
        (["--repeats", 0], "'0' is no whole number of at least 1"),
        (["--repeats", "two"], "'two' is no whole number of at least 1"),
        (["--timeout", -1], "'-1' is no number of seconds above 0"),
        (["--threads", 0], "at least 1"),
    ):
        with pytest.raises(SystemExit) as ended:
            asked(measure, out, *options)
        assert ended.value.code == 2
        assert why in capsys.readouterr().err
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert asked(measure, out, "--show", empty) == 0
    assert "nothing was measured" in capsys.readouterr().out
    assert asked(measure, out, todo=[{"n": 7}], one=lambda what: None) == 1
    assert (tmp_path / "b.json").read_text() == before
    # Whether something is missing of what is only looked at is not known, and all commands are told.
    with out.open("a") as file:
        command = json.loads(before)["about"]["command"]
        other = json.loads(before)["about"] | {"command": f"{command.split(' --')[0]} --other"}
        file.write(json.dumps({"what": {"n": 9}, "repeat": 0, "ms": 1.0, "about": other}))
    assert asked(measure, out, "--show", out) == 0
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["complete"] is None
    assert found["commands"] == [command, other["command"]]
    section = script("tables").section(tmp_path / "b.json")
    assert f"`, `{other['command']}`: " in section
    assert "Incomplete" not in section


def test_measurements_of_two_scripts_or_of_two_runs_at_once_do_not_share_a_file(tmp_path, capsys, monkeypatch):
    measure, out = script("measure"), tmp_path / "b.jsonl"

    def refused(*options, path=out):
        with pytest.raises(SystemExit) as ended:
            asked(measure, path, *options, one=lambda what: pytest.fail("measured for nothing"))
        assert ended.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    def at_once(what):
        assert f"{out}: another process measures into this file" in refused()
        return {"ms": 1.0}

    assert asked(measure, out, one=at_once) == 0
    document = (tmp_path / "b.json").read_text()
    assert f"--out {tmp_path / 'b.json'} is the name of the document beside" in refused(path=tmp_path / "b.json")
    assert "would replace the measurements" in refused("--picture", out)
    assert "--out /dev/zero is no file" in refused(path="/dev/zero")
    assert f"--out {tmp_path} is no file" in refused(path=tmp_path)
    (tmp_path / "notes").write_text("speed: good")
    assert "holds no measurements (JSON lines)" in refused("--show", tmp_path / "notes")
    assert "is the name of the document" in refused("--show", tmp_path / "b.json")
    mine = Path(json.loads(document)["about"]["command"].split()[1]).name
    monkeypatch.setattr(sys, "argv", ["/here/sequences.py"])
    for options in ((), ("--show", out)):
        assert f"{out} holds what {mine} has measured, and this is sequences.py" in refused(*options)
    assert len(measure.read(out)) == 3
    assert (tmp_path / "b.json").read_text() == document


def test_where_nothing_can_be_written_is_said_before_it_is_measured(tmp_path, capsys):
    measure = script("measure")
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        asked(measure, tmp_path / "file" / "b.jsonl", one=lambda what: pytest.fail("measured for nothing"))
    assert f"{tmp_path / 'file'}: File exists" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"/dev/full: No space left on device; lost, to be measured again: \{'n': 1\}"):
        measure.appended(Path("/dev/full"), {"what": {"n": 1}})


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("peers", "--rows -5", "--rows: '-5' is no whole number of at least 1"),
        ("peers", "--case vast", "invalid choice: 'vast'"),
        ("scaling", "--ranks 0", "--ranks: '0' is no whole number"),
        ("scaling", "--ranks 1 3 --kind strong", "strong scaling shares it out, and 3 does not divide it"),
        ("scaling", "--ranks 1 64 --kind weak --device cuda", "--device cuda: 64 ranks need as many GPUs"),
        ("experts", "--sizes 2-8", "--sizes: '2-8' is no whole number"),
        ("memory", "--rows 0", "--rows: '0' is no whole number"),
        ("input", "--rows 0", "--rows: '0' is no whole number"),
        ("input", "--batch-size -1", "--batch-size: '-1' is no whole number"),
        ("input", "--files 5by0", "'5by0' is not IDSxNUMBERS"),
        ("input", "--files 0x0", "'0x0' is not IDSxNUMBERS with a column at least"),
        ("input", "--rows 4096 --training", "training needs two steps of 4,096 rows at least"),
        ("training", "--warmup-steps -1", "--warmup-steps: '-1' is no whole number"),
        ("training", "--apart-steps 0", "--apart-steps: '0' is no whole number of at least 1"),
        ("training", "--expert-layers 8,x", "--expert-layers: 'x' is no whole number"),
        ("training", "--rows -7", "--rows: '-7' is no whole number"),
        ("load", "--clients 1,0", "--clients: '0' is no whole number"),
        ("training", "--vocabulary 100,many", "--vocabulary/--rows-per-table: 'many' is no whole number"),
        ("sequences", "--cap 0", "--cap: '0' is no whole number"),
        ("serving", "--tables int7", "invalid choice: 'int7'"),
        ("surgery_cost", "--tasks 1", "surgery needs two at least"),
        ("surgery_cost", "--cases upgrad", "'upgrad' is no kind/cut"),
        ("scaling_paper", "--world-size 0", "--world-size: '0' is no whole number"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_measured(
    name, options, why, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options.split(), "--out", str(tmp_path / "x.jsonl")])
    with pytest.raises(SystemExit) as ended:
        script(name).main()
    assert ended.value.code == 2
    assert why in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_peers_that_are_not_installed_are_named_with_their_extra(tmp_path, monkeypatch, capsys):
    import importlib.util

    peers, find_spec = script("peers"), importlib.util.find_spec
    gone = ("torch_rechub", "requests")
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None if name in gone else find_spec(name))
    monkeypatch.setattr(
        sys, "argv", ["peers.py", "--case", "small", "--data", str(tmp_path), "--out", str(tmp_path / "x")]
    )
    with pytest.raises(SystemExit) as ended:
        peers.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "rechub and deepctr need torch_rechub and requests: pip install 'mtcl_torchrec[bench]'" in said
    assert "leave them out: --contenders ours torchrec pytorch" in said
    assert not list(tmp_path.iterdir())  # no file of rows was written
    assert peers.missing(["ours", "torchrec"]) == ""


def test_peers_measure_ours_in_the_forms_that_the_machine_is_fit_for(monkeypatch):
    peers = script("peers")
    eager, compiled = ("torchrec_bf16", "ours_bf16"), ("torchrec_bf16", "ours_bf16", "ours_bf16_compiled")
    for bf16, compiler, forms in (
        (False, "/usr/bin/g++", ()), (True, None, eager), (True, "/usr/bin/g++", compiled),
    ):  # fmt: skip
        monkeypatch.setattr(peers, "has_fast_bf16", lambda device, bf16=bf16: bf16)
        monkeypatch.setattr(peers.shutil, "which", lambda name, compiler=compiler: compiler)
        assert peers.faster() == forms


def test_a_full_disk_keeps_what_was_measured_and_written_before(tmp_path, monkeypatch):
    measure, document, out = script("measure"), script("document"), tmp_path / "b.jsonl"
    asked(measure, out)
    before, write = (tmp_path / "b.json").read_text(), Path.write_text

    def full(path, text, **options):
        write(path, text[:20], **options)
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(document.Path, "write_text", full)
    with pytest.raises(SystemExit, match=r"b.unfinished: No space left on device; .* --show .*b.jsonl makes the rest"):
        asked(measure, out, "--again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.json", "b.jsonl", "b.png"]
    assert (tmp_path / "b.json").read_text() == before


def test_a_run_whose_training_was_broken_off_is_trained_anew(tmp_path, monkeypatch):
    serving = script("serving")
    (tmp_path / "demo-9" / "run" / "checkpoints").mkdir(parents=True)

    def trains(run, folder, **_):
        assert not folder.exists()
        folder.mkdir()

    monkeypatch.setattr(serving, "train_run", trains)
    assert serving.trained(tmp_path, 9) == tmp_path / "demo-9" / "run"
    monkeypatch.setattr(serving, "train_run", lambda *_, **__: pytest.fail("it is trained already"))
    assert serving.trained(tmp_path, 9).is_dir()


def test_a_full_disk_leaves_no_half_of_an_input_file(tmp_path, monkeypatch):
    reading = script("input")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reading.pq.ParquetWriter, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        reading.write(tmp_path / "rows.parquet", 10, 1, 1)
    assert not list(tmp_path.iterdir())


def test_code_that_has_changed_is_another_commit_also_in_a_new_file(tmp_path, monkeypatch):
    who, code = script("who"), tmp_path / "benchmarks"
    code.mkdir()
    (code / "old.py").write_text("old")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "feat: a"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(who, "__file__", str(code / "who.py"))
    commit, found = who.commit.__wrapped__, []
    found.append(commit())
    for name, text in (("new.py", "1"), ("new.py", "2"), ("old.py", "3"), ("README.md", "4")):
        (code / name).write_text(text)
        found.append(commit())
    assert "dirty" not in found[0]
    assert len(set(found[:4])) == 4  # text of a new file, and of an old one
    assert found[4] == found[3]  # no code


def test_a_full_disk_leaves_no_half_of_a_file(tmp_path, monkeypatch):
    cases = script("peer_cases")

    def full(*_):
        yield next(tables)
        raise OSError(28, "No space left on device")

    case = cases.CASES["small"].sized(2000, 50)
    tables = cases._tables(case, 2000, 1)
    monkeypatch.setattr(cases, "_tables", full)
    with pytest.raises(OSError, match="No space left"):
        cases.files_of(case, tmp_path)
    assert not list(tmp_path.iterdir())


def test_ranks_take_gpus_where_there_is_one_for_each(monkeypatch):
    scaling = script("scaling")
    for gpus, asked, most, taken in ((0, "auto", 4, "cpu"), (1, "auto", 4, "cpu"), (4, "auto", 4, "cuda"),
                                     (8, "cuda", 4, "cuda"), (8, "cpu", 4, "cpu")):  # fmt: skip
        monkeypatch.setattr(scaling.torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert scaling.device_for(asked, most) == taken


def test_a_suite_that_is_broken_off_says_what_is_left(tmp_path, monkeypatch, capsys):
    suite = script("suite")

    def interrupted(entry, *_, **__):
        if entry.script == "memory":
            raise KeyboardInterrupt
        return True

    monkeypatch.setattr(suite, "carried_out", interrupted)
    monkeypatch.setattr(sys, "argv", ["suite.py", "--results", str(tmp_path), "--only", "peers", "memory", "sequences"])
    assert suite.main() == 130
    assert "1 of 3 done in 0 min; not done: memory, sequences; run it again to go on" in capsys.readouterr().out
    (tmp_path / "peers.json").write_text('{"benchmark": "pe')  # of a process that was killed
    assert not suite.measured(suite.SUITE[0], "quick", tmp_path)
    for shown in (
        lambda: script("tables").section(tmp_path / "peers.json"),
        lambda: script("headline").speed(tmp_path),
    ):
        with pytest.raises(SystemExit, match=r"peers.json is no JSON .*--show peers.jsonl"):
            shown()


def test_a_suite_refuses_folders_before_it_measures(tmp_path, monkeypatch, capsys):
    suite = script("suite")
    monkeypatch.setattr(suite, "carried_out", lambda *_, **__: pytest.fail("measured for nothing"))
    monkeypatch.chdir(suite.HERE.parent)
    (tmp_path / "file").touch()
    for options, why in (
        ("--tiny --results benchmarks/results", "--tiny needs --results FOLDER"),
        (f"--results {tmp_path}/file", "File exists"),
        (f"--results {tmp_path}/file/x", "Not a dir"),
    ):
        monkeypatch.setattr(sys, "argv", ["suite.py", *options.split()])
        with pytest.raises(SystemExit) as ended:
            suite.main()
        assert ended.value.code == 2
        assert why in capsys.readouterr().err.splitlines()[-1]
    for other in ("[]", "{}", '{"about": null}'):
        (tmp_path / "memory.json").write_text(other)
        [entry] = [entry for entry in suite.SUITE if entry.script == "memory"]
        assert not suite.measured(entry, "quick", tmp_path)


def test_what_was_started_ends_with_who_started_it(tmp_path):
    log = tmp_path / "log"
    handler = signal.getsignal(signal.SIGTERM)

    def tell():
        while not (log.exists() and log.read_text().endswith("\n")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    teller = threading.Thread(target=tell)
    teller.start()
    child = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(100)"]
    with pytest.raises(SystemExit):
        script("measure").run(child, log, 60, dict(os.environ))
    teller.join()
    assert signal.getsignal(signal.SIGTERM) is handler
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


# ---------------------------------------------------------------------- generated tables


@pytest.fixture
def documents(tmp_path):
    """A README with two marks, and results for one of them."""
    document = script("document")
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text(
        "".join(f"# {n}\n\n<!-- {n}: begin -->\nold\n<!-- {n}: end -->\n\nby hand\n" for n in ("one", "two"))
    )
    table = document.Table("speeds", ["", "×"], [["ours", "2.00"]])
    document.written(tmp_path / "results" / "one.json", [line({"n": 1}, speed=1.0)], [table], complete=True)
    return tmp_path


def tables_main(monkeypatch, folder, *options):
    given = ["tables.py", "--readme", str(folder / "README.md"), "--results", str(folder / "results"), *options]
    monkeypatch.setattr(sys, "argv", given)
    return script("tables").main()


def test_tables_are_filled_between_their_marks_alone(documents, monkeypatch, capsys):
    readme = documents / "README.md"
    assert tables_main(monkeypatch, documents, "--check") == 1
    assert "stale: one, two" in capsys.readouterr().out
    before = readme.read_text()
    assert tables_main(monkeypatch, documents, "--only", "one") == 0
    text = readme.read_text()
    assert "| ours | 2.00 |" in text
    assert "torch 2" in text
    assert text.partition("# two")[2] == before.partition("# two")[2]
    assert tables_main(monkeypatch, documents) == 0
    assert script("tables").NOT_YET in readme.read_text()
    assert readme.read_text().count("by hand") == 2
    assert tables_main(monkeypatch, documents, "--check") == 0
    with pytest.raises(SystemExit, match="no table 'three'"):
        tables_main(monkeypatch, documents, "--only", "three")


def test_the_readme_says_what_the_results_do(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    assert script("tables").main() == 0, capsys.readouterr().out


def test_what_the_front_page_says_of_speed_is_computed_from_results(tmp_path):
    document, headline = script("document"), script("headline")
    assert headline.speed(tmp_path) == "Not measured yet."

    def kept(name, lines):
        document.written(tmp_path / f"{name}.json", lines, [], complete=True)

    def ran(who, repeat, read, alone, case="middle", rows=1000, **of):
        what = {"case": case, "rows": rows, "table_rows": 5, "contender": who, "threads": None}
        return line(what | of.pop("what", {}), repeat, from_file_per_s=read, samples_per_s=alone, log_loss=0.5, **of)

    of_middle = [
        ran(who, i, speed * (i + 1), 2 * speed * (i + 1))
        for who, speed in (("torchrec", 2e4), ("ours", 3e4), ("ours_bf16", 6e4), ("rechub", 1e4), ("deepctr", 1.5e4))
        for i in (0, 1, 2)
    ]
    smaller = [ran("ours", 0, 7.0, 7.0, rows=10), ran("ours", 0, 9.0, 9.0, case="small")]
    grown = [
        ran("ours", 0, 1.0, 1.0, case="growing", step_ms=ms, what={"table_rows": n}) for n, ms in ((10, 4.0), (99, 5.0))
    ]
    large = [
        ran(who, 0, speed, speed, case="large") for who, speed in (("ours", 8.0), ("torchrec", 4.0), ("rechub", 0.5))
    ]
    kept("peers", smaller + of_middle + large + grown)
    kept("scaling", [line({"kind": k, "ranks": n}, samples_per_s=s) for k, n, s in
                     (("weak", 1, 10.0), ("weak", 2, 17.0), ("strong", 2, 99.0))])  # fmt: skip
    kept("memory", [line({"case": "stream", "rows": n}, peak_rss_bytes=n * 1e5) for n in (1_000, 100_000)])
    said = headline.speed(tmp_path)
    assert "One pass over 1,000 rows" in said
    assert "medians of 3" in said
    assert "| this package, fp32 | 60,000 | 1.50 | 120,000 | 0.5000 |" in said
    assert said.index("this package, bf16") < said.index("this package, fp32")
    assert "is 3.0 and 2.0 times as fast as torch-rechub and deepctr-torch in fp32, 6.0 and 4.0 times in bf16." in said
    assert "it is, in fp32, 2.0 times as fast as TorchRec by hand, 16.0 times as fast as torch-rechub." in said
    assert "With tables of 99 rows a step takes 1.25 times as long as with 10." in said
    assert "which take twice the rows a step, are 1.7 times as fast as one rank of one thread." in said
    assert "100,000 generated rows stream through 10.00 GB of memory, 1,000 through 0.10." in said


def test_the_readme_has_a_mark_for_every_script_of_the_suite():
    tables, suite = script("tables"), script("suite")
    marks = [match["name"] for match in tables._MARKED.finditer((tables.HERE / "README.md").read_text())]
    assert marks == [*(entry.script for entry in suite.SUITE), "gpu"]


# ---------------------------------------------------------------------- the suite

GOOD = """
import json, sys
from pathlib import Path
given = sys.argv
out = Path(given[given.index("--out") + 1])
with out.open("a") as file:
    file.write("ran\\n")
about = {"commit": COMMIT, "command": " ".join(["python benchmarks/good.py", *given[1:given.index("--out")]])}
out.with_suffix(".json").write_text(json.dumps({"complete": True, "about": about}))
"""


def test_a_failing_or_endless_script_loses_nothing_of_the_rest(tmp_path, monkeypatch, capsys):
    suite = script("suite")
    (tmp_path / "bad.py").write_text("print('on the way'); raise SystemExit('broken')")
    (tmp_path / "endless.py").write_text("import time; time.sleep(600)")
    (tmp_path / "good.py").write_text(f"COMMIT = {suite.commit()!r}\n{GOOD}")
    monkeypatch.setattr(suite, "HERE", tmp_path)
    monkeypatch.setattr(
        suite, "SUITE", tuple(suite.Entry(n, "--rows 1", "--rows 9", "", 1, 1) for n in ("bad", "endless", "good"))
    )
    run = suite.run
    monkeypatch.setattr(suite, "run", lambda command, log, limit, environment: run(command, log, 3, environment))

    def main(*options):
        monkeypatch.setattr(sys, "argv", ["suite.py", "--results", str(tmp_path / "r"), *options])
        return suite.main(), capsys.readouterr().out

    status, said = main()
    assert status == 1
    assert "1 of 3 done" in said
    assert "failed: bad, endless" in said
    assert "broken" in said
    assert "about 3 min left" in said
    assert (tmp_path / "r" / "bad.log").exists()
    ran = tmp_path / "r" / "good.jsonl"
    assert main("--only", "good")[0] == 0  # measured already
    assert ran.read_text().count("ran") == 1
    assert main("--only", "good", "--full")[0] == 0  # another size
    assert main("--only", "good", "--full", "--again")[0] == 0
    assert ran.read_text().count("ran") == 3
    monkeypatch.setattr(suite, "commit", lambda: "another")
    assert main("--only", "good", "--full")[0] == 0
    assert ran.read_text().count("ran") == 4
    status, said = main("--list")
    assert status == 0
    assert "about 3 min on two idle cores" in said


@pytest.mark.parametrize("size", ["quick", "full", "tiny"])
def test_every_script_knows_the_options_that_the_suite_gives_it(size, tmp_path, monkeypatch, capsys):
    suite = script("suite")
    for entry in suite.SUITE:
        (tmp_path / "nothing.jsonl").touch()
        options = [*getattr(entry, size).split(), "--show", str(tmp_path / "nothing.jsonl"), "--data", str(tmp_path)]
        if entry.script not in ("peers", "input", "serving", "load"):
            options = options[:-2]
        monkeypatch.setattr(sys, "argv", [f"{entry.script}.py", *options])
        assert script(entry.script).main() == 0
        assert "nothing was measured" in capsys.readouterr().out
        monkeypatch.setattr(sys, "argv", [f"{entry.script}.py", "--help"])
        with pytest.raises(SystemExit) as ended:
            script(entry.script).main()
        assert ended.value.code == 0
        assert f"python benchmarks/{entry.script}.py" in capsys.readouterr().out


def test_the_quick_set_is_to_take_less_than_a_quarter_of_an_hour():
    suite = script("suite")
    assert sum(suite.minutes(entry, "quick") for entry in suite.SUITE) < 15


@pytest.mark.full
def test_the_whole_suite_runs_in_tiny_sizes(tmp_path, monkeypatch):
    suite = script("suite")
    monkeypatch.setattr(
        sys, "argv", ["suite.py", "--tiny", "--results", str(tmp_path / "r"), "--data", str(tmp_path / "data")]
    )
    assert suite.main() == 0
    for entry in suite.SUITE:
        found = json.loads((tmp_path / "r" / f"{entry.script}.json").read_text())
        assert found["complete"]
        assert found["tables"]
        assert found["about"]["command"] == f"python benchmarks/{entry.script}.py {entry.tiny}".strip()
        assert (tmp_path / "r" / found["picture"]).stat().st_size > 5000
        assert suite.measured(entry, "tiny", tmp_path / "r")
        assert not suite.measured(entry, "full", tmp_path / "r")


# ---------------------------------------------------------------------- bytes between ranks


def counted(kind):
    """This rank's bytes in a step, and those of all ranks by formula."""
    training, volume = script("training"), script("volume")
    setting = training.Setting(**TINY | {"sharding": kind, "table_optimizer": "adagrad"})
    with ranks("cpu") as where:
        run = training.configured(setting, where.world_size, Path())
        rows, preprocessor = training.training_rows(setting, run, Path(), where)
        module = MTCLTrain(build_model(run.model, preprocessor.encoder, run.fusion, seed=0))
        model, optimizer = parallelise(module, where, run.optimizers, sharding=run.sharding)
        model.train()
        batches = training.Batches(rows, where, setting.batch_size)
        for _ in range(2):  # DDP agrees on its buckets after the first
            loss, _ = model(next(batches))
            loss.backward()
            optimizer.step()
        with volume.Traffic() as traffic:
            model(next(batches))[0].backward()
        batches.close()
        dense = sum(p.numel() for p in module.model.tower.parameters())
        tables = volume.placed(model)
        cut = {"ranks": where.world_size, "batch_size": setting.batch_size}
        return dict(traffic.bytes), volume.by_formula(tables, dense, **cut), {table.kind for table in tables}


@pytest.mark.parametrize("kind", ["table_wise", "row_wise", pytest.param("data_parallel", marks=pytest.mark.full)])
def test_bytes_between_ranks_are_those_of_the_formula(kind):
    of_ranks = run_ranks(counted, 2, kind)
    sent = {part: sum(of.get(part, 0) for of, *_ in of_ranks) for part in script("volume").PARTS}
    computed = of_ranks[0][1]
    assert of_ranks[0][2] == {kind}
    for part in ("pooled embeddings", "gradients of embeddings", "dense gradients"):
        assert sent[part] == computed[part], part
    assert (computed["pooled embeddings"] == 0) == (kind == "data_parallel")
    # Which ids go to another rank is up to them where rows are cut; sizes of messages are sent, too.
    assert computed["ids"] <= sent["ids"] * 1.05 <= computed["ids"] * 1.05 + 1000
    assert sent["other"] < 1000


def test_an_unknown_cut_has_no_formula():
    volume = script("volume")
    with pytest.raises(NotImplementedError, match="grid_shard"):
        volume.by_formula([volume.Placed("grid_shard", 10, 4)], 0, ranks=2, batch_size=8)


# ---------------------------------------------------------------------- memory, and what others show


def test_memory_goes_through_all_rows(tmp_path):
    memory = script("memory")
    what = {"case": "stream", "vocabulary": 50, "window": 200, "workers": 1, "batch_size": 64, "threads": None}
    lines = [line(of := what | {"rows": rows}, **memory.work(of)) for rows in (400, 900)]
    assert all(len(of["rss_by_share"]) >= 7 and min(of["rss_by_share"]) > 1e7 for of in lines)
    [table] = memory.tables(lines)
    assert [row[0] for row in table.rows] == ["400 rows", "900 rows"]
    memory.draw(lines, tmp_path / "m.png")
    assert (tmp_path / "m.png").stat().st_size > 5000
    made_up = [line(what | {"rows": n}, peak_rss_bytes=n * 10.0 + 500) for n in (100, 300)]
    assert memory.growth(memory.by_case(made_up)["stream"], 300) == 10


def test_what_is_shown_has_ratios_first(tmp_path):
    scaling, serving, load, paper = map(script, ("scaling", "serving", "load", "scaling_paper"))
    setting = {"batch_size": 64, "vocabulary": 50, "dim": 16, "sharding": "auto", "device": "cpu"}
    lines = [
        line({"kind": "weak", "ranks": n, "setting": setting}, samples_per_s=speed, step_ms={"median": 1.0},
             sent_bytes={"ids": 2e6}, computed_bytes={"ids": 1e6}, peak_rss_bytes=1e9)
        for n, speed in ((1, 10.0), (2, 15.0))
    ]  # fmt: skip
    speeds, sent = scaling.tables(lines)
    assert speeds.rows[1][1:3] == ["1.50", "75"]
    assert sent.rows[0] == ["ids", "2.000 (1.000)"]
    assert speeds.note.endswith(" cores, by gloo.")
    scaling.draw(lines, tmp_path / "scaling.png")
    for of in lines:
        of["what"]["setting"] = setting | {"device": "cuda"}
        of["about"] |= {"gpus": 8}
    assert scaling.tables(lines)[0].note == "On 8 GPUs, by NCCL."

    asked = {"p50": 1.0, "p99": 2.0, "cpu": 1.0}
    lines = [
        line({"way": way}, candidates_per_s=speed, one_user=asked, catalogue=asked, together=asked, together_per_s=9.0,
             model_mb=3.0, load_s=1.0, candidates=5, items=9)
        for way, speed in (("eager", 100.0), ("int8 graph", 250.0))
    ]  # fmt: skip
    assert serving.tables(lines)[0].rows[1][:2] == ["int8 graph", "2.50"]
    serving.draw(lines, tmp_path / "serving.png")

    of = dict.fromkeys(("p50_ms", "p90_ms", "p99_ms", "max_ms", "requests_per_batch"), 1.0)
    lines = [line({"clients": n, "candidates": 5}, requests=8, failed=0, requests_per_s=float(n), **of) for n in (1, 4)]
    assert load.tables(lines)[0].rows[1][:2] == ["4", "4.00"]
    load.draw(lines, tmp_path / "load.png")
    assert load.answered({"requests": 3, "failed": 1}) is None

    sequences = script("sequences")
    what = {"encoder": "mean", "rows": 8, "mean": 3, "cap": 5, "dim": 4, "rounds": 2, "device": "cpu"}
    lines = [line(what, **sequences.work(what))]
    assert float(sequences.tables(lines)[0].rows[0][1]) > 0
    sequences.draw(lines, tmp_path / "sequences.png")

    surgery = script("surgery_cost")
    lines = [
        line(
            {"cases": ["none", "upgrad/trunk"], "ranks": 1, "batch_size": 8, "tasks": 3},
            i,
            cases={
                "none": {"ratio": 1.0, "median_ms": 2.0, "least_ms": 1.0},
                "upgrad/trunk": {"ratio": 1.5 + i, "median_ms": 3.0, "least_ms": 1.0},
            },
        )
        for i in (0, 1)
    ]
    assert surgery.tables(lines)[0].rows[1][:2] == ["upgrad/trunk", "2.00 (1.50–2.50)"]
    surgery.draw(lines, tmp_path / "surgery.png")

    what = {"plan": "one_terabyte.yaml", "device": "h200", "batch_size": None, "planning_s": 1}
    lines = [line(what | {"world_size": n}, fits=n > 8, step_ms=4.0 * n, phase_ms={"fwd_comms": 4.0}, rows_per_s=1e6,
                  tightest_rank_gb=1.0) for n in (8, 16, 32)]  # fmt: skip
    [table] = paper.tables(lines)
    assert [row[1] for row in table.rows] == ["does not fit", "100", "50"]
    assert "not measured" in table.note
    paper.draw(lines, tmp_path / "paper.png")
    assert (
        min(
            (tmp_path / f"{n}.png").stat().st_size
            for n in ("scaling", "serving", "load", "sequences", "surgery", "paper")
        )
        > 5000
    )
