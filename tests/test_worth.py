"""What fusing is worth: `mtcl fuse`, `mtcl evaluate` and the report say the same of the same run and rows."""

import re
import sys

import numpy as np
import pytest
import shop
from rich.console import Console

from mtcl_torchrec.cli import main
from mtcl_torchrec.config import load_run, parse_run
from mtcl_torchrec.evaluation.predictions_file import read_predictions
from mtcl_torchrec.evaluation.worth import verdict_of
from mtcl_torchrec.report.contents import read_contents
from mtcl_torchrec.report.sections import _worth
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.held_out import columns_needed, held_out_of, rows_of_split
from mtcl_torchrec.training.run import train_run

K = 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worth")
    shop.log(3000).to_parquet(folder / "log.parquet", index=False)
    text = shop.RUN.replace("epochs: 4, batch_size: 32", "epochs: 1, batch_size: 256")
    run = parse_run(f"{text}evaluation: {{k: [{K}, 5]}}\n", folder=folder)
    train_run(run, folder / "run", device="cpu", console=Console(quiet=True))
    return folder / "run"


def held_out(folder):
    """The test rows as `mtcl fuse --test --session-minutes 0` takes them, and as a file for `mtcl evaluate`."""
    run = FinishedRun.load(folder)
    raw = rows_of_split(load_run(folder / "run.yaml"), columns_needed(run), "test")
    raw.frame.to_parquet(folder / "rows.parquet", index=False)
    return held_out_of(run, raw, session_minutes=0)


def said_by(lines):
    """(verdict, numbers) of the line that answers."""
    (line,) = (line for line in lines.splitlines() if line.startswith("Does fusing pay?"))
    return line.split(": ")[0], line.split(" on ", 1)[1].split(", ", 1)[1], re.findall(r"[-+]?\d+\.\d+", line)


@pytest.fixture
def mtcl(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mtcl", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out = capsys.readouterr()
        assert not stopped.value.code, out.err
        return out.out

    return run


@pytest.mark.parametrize("weights", ["click=1,buy=3,taste=0.5,stars=0.5", "click=1,buy=-2,taste=0,stars=9"])
def test_fuse_evaluate_and_report_state_the_same_gap(trained, mtcl, weights):
    of_fuse = said_by(
        mtcl("fuse", trained, "--set", weights, "--test", "--target", f"value@{K}", "--session-minutes", 0)
    )
    rows = held_out(trained)
    of_evaluate = said_by(mtcl("evaluate", trained, "--data", trained / "rows.parquet", "--k", K))
    assert of_evaluate == of_fuse
    line, explained = _worth(read_contents(trained))
    leads = re.findall(r"[-+]\d+\.\d+ % ± \d+\.\d+ %", of_fuse[1])
    assert len(leads) == 2  # on the best head, on popularity
    for lead in leads:
        assert lead.replace("-", "−") in line
    assert f"the first {K} rows" in line
    assert f"value@{K}" in explained
    # against plain loops over requests
    table = read_predictions(trained / "predictions/test.parquet")
    assert table.fused == ("click", "buy", "taste", "stars")
    found, reward = verdict_of(table, [K]), rows.reward(table.values)

    def worth(ranked_by):
        one = [np.flatnonzero(rows.request == r) for r in np.unique(rows.request)]
        return np.array([reward[of[np.argsort(-ranked_by[of], kind="stable")][:K]].sum() for of in one])

    own = worth(table.score)
    heads = {task: worth(rows.parts[task]) for task in table.fused}  # no event of this run costs anything
    best = max(heads, key=lambda task: heads[task].mean())
    assert found.rivals[0].name == f"head {best}"
    assert found.rivals[0].ahead == pytest.approx((own - heads[best]).mean(), abs=1e-3)
    assert found.worth == pytest.approx(own.mean(), abs=1e-3)
    assert f"{found.rivals[0].worth:.4f}" in of_fuse[2]
