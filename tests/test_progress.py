"""What a person sees while training."""

import io

from rich.console import Console

from mtcl_torchrec.cli import stages
from mtcl_torchrec.training import progress
from mtcl_torchrec.training.progress import TrainingProgress

LOSSES = {"total": 1.5, "click": 0.61, "like": 0.08}


def shown(terminal, width=80, active=True):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width)
    with TrainingProgress(active=active, total_steps=40, console=console) as reports:
        for step in range(1, 21):
            reports.step(epoch=1, step=step, rows=100, losses=LOSSES if step % 10 == 0 else None)
        reports.epoch(step=20, scalars={}, line="epoch 1/2 done")
    return out.getvalue()


def test_a_terminal_of_80_columns_shows_bar_speed_losses_and_time_left():
    text = shown(terminal=True)
    for part in ("20/40", "samples/s", "click 0.6100", "like 0.0800", ":", "epoch 1/2 done"):
        assert part in text


def test_elsewhere_there_are_plain_lines(monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    text = shown(terminal=False)
    assert "\x1b" not in text
    assert "epoch 1 step 20/40" in text
    assert "click 0.6100" in text
    assert "min left" in text
    assert "epoch 1/2 done" in text


def test_stages_are_a_bar_on_a_terminal_and_begin_anew(monkeypatch):
    out, now = io.StringIO(), [0.0]
    monkeypatch.setattr(stages, "Console", lambda **_: Console(file=out, force_terminal=True, width=80))
    monkeypatch.setattr(stages.time, "monotonic", lambda: now[0])
    with stages.Stages() as shown:
        for doing, total, seconds in (("predicting rows", 1000, 5.0), ("making draws of users", 400, 100.0)):
            began = now[0]
            for done in range(0, total + 1, total // 4):
                now[0] = began + seconds * done / total
                shown(doing, done, total)
                shown._bar.refresh()
    text = out.getvalue()
    for part in ("predicting rows", "500/1000", "200 rows/s", "making draws of users", "100/400", "4 draws/s"):
        assert part in text
    assert "80 rows/s" not in text  # the second stage's draws are not counted from the first's beginning
    assert text.endswith("\x1b[?25h") or "\x1b[2K" in text.split("draws/s")[-1]  # nothing of it stays


def test_stages_say_a_line_every_so_often_elsewhere(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(stages.time, "monotonic", lambda: now[0])
    with stages.Stages() as shown:
        for done in range(0, 101):
            now[0] = 0.5 * done
            shown("predicting rows", 1000 * done, 100_000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5  # of 50 seconds
    assert lines[0] == "mtcl: predicting rows: 20,000 of 100,000, 2,000 rows/s, 40 s left"


def test_other_ranks_say_nothing():
    assert shown(terminal=False, active=False) == ""
