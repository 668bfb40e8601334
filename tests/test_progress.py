"""What a person sees while training."""

import io

from rich.console import Console

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


def test_other_ranks_say_nothing():
    assert shown(terminal=False, active=False) == ""
