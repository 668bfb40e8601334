"""What a benchmark says where others disturb it, where it is asked to show what is not its own, and that pictures of a
step hold all of it."""

import argparse
import json
import subprocess
import sys
import time

import pytest
from test_benchmarks import script


def looked(seconds):
    """Cores of others, and seconds of our own, while this process computes for so long."""
    who, began = script("who"), time.perf_counter()
    before = who.computed()
    while time.perf_counter() - began < seconds:
        pass
    after = who.computed()
    return who.cores_of_others(before, after, time.perf_counter() - began), after[1] - before[1]


def test_what_others_compute_is_told_from_our_own():
    alone, own = looked(0.5)
    assert own > 0.1
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])  # not ours until it is over
    try:
        time.sleep(0.2)
        beside, _ = looked(1.0)
    finally:
        process.kill()
    before = script("who").computed()[1]
    process.wait()
    assert beside > 0.25  # of a core, on however busy a machine
    assert script("who").computed()[1] - before > 0.2  # what a child has computed is ours then
    assert alone >= 0


def benchmark(out, *options, tables=lambda lines: []):
    measure = script("measure")
    parser = argparse.ArgumentParser()
    measure.options(parser, repeats=1, timeout_s=9)
    return measure.benchmark(
        parser, parser.parse_args([*options, str(out)]), work=lambda what: None, todo=lambda: [{"n": 1}, {"n": 2}],
        one=lambda what: {"ms": 1.0}, tables=tables, draw=lambda lines, path: path.write_bytes(b"drawn"),
    )  # fmt: skip


@pytest.mark.parametrize(("busy", "warned"), [(0.05, False), (0.5, True)])
def test_a_disturbed_measurement_is_warned_of(tmp_path, monkeypatch, capsys, busy, warned):
    measure, out = script("measure"), tmp_path / "b.jsonl"
    cores = script("who").about()["cores"]
    monkeypatch.setattr(measure, "cores_of_others", lambda before, after, seconds: busy * cores)
    assert benchmark(out, "--out") == 0
    said = capsys.readouterr().out
    warning = f"WARNING: during 2 of 2 measurements others kept cores at work, up to {busy * cores:.1f} of {cores}"
    assert (warning in said) is warned
    measured = json.loads((tmp_path / "b.json").read_text())["measured"]
    assert f"others meanwhile, median {busy * cores:.1f} cores" in measured
    # Lines from before it was kept say nothing of it.
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    for line in lines:
        del line["about"]["cores_of_others"]
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert benchmark(out, "--show") == 0
    said = capsys.readouterr().out
    assert "load before" in said
    assert "others" not in said


def test_the_bar_of_a_step_is_as_high_as_the_step():
    training, parts = script("training_tables"), script("step_parts").PARTS
    _, (axis,) = script("pictures").figure()
    small = dict.fromkeys(parts, 0.5)  # of 100 ms: too little to be seen
    steps = {"one": small | {"trunk": 60.0, "step": 80.0}, "two": small | {"trunk": 40.0, "input": 30.0, "step": 100.0}}
    training.stacked(axis, steps)
    heights = {name: sum(bars[i].get_height() for bars in axis.containers) for i, name in enumerate(steps)}
    assert heights == pytest.approx({"one": 80.0, "two": 100.0})
    assert [bars.get_label() for bars in axis.containers] == ["input", "trunk", "all others"]
    tops = [bars[1].get_y() for bars in axis.containers]
    assert tops == sorted(tops)


def test_a_plan_that_fits_nowhere_is_a_picture_that_says_so(tmp_path, recwarn):
    paper = script("scaling_paper")
    from matplotlib import pyplot

    kept, close = [], pyplot.close
    what = {"plan": "one_terabyte.yaml", "device": "h200", "world_size": 8, "batch_size": None, "planning_s": 1}
    pyplot.close = kept.append
    try:
        paper.draw([{"what": what, "fits": False}], tmp_path / "p.png")
    finally:
        pyplot.close = close
    [drawn] = kept
    assert [text.get_text() for text in drawn.axes[0].texts] == ["ON PAPER: fits on none of 8 × h200"]
    close(drawn)
    assert (tmp_path / "p.png").stat().st_size > 1000
    assert not [of for of in recwarn if "legend" in str(of.message)]


def test_help_says_who_is_compared(monkeypatch, capsys):
    peers, contenders = script("peers"), script("contenders")
    monkeypatch.setattr(sys, "argv", ["peers.py", "--help"])
    with pytest.raises(SystemExit):
        peers.main()
    description = capsys.readouterr().out.partition("options:")[0]
    told = {line.partition("  ")[0] for line in map(str.strip, description.splitlines())}  # a name, then what it is
    assert {name for names in told for name in names.split(", ")} >= set(contenders.CONTENDERS)
