"""Pictures are drawn whatever tasks are called."""

import warnings
from types import SimpleNamespace

import pandas as pd
import pytest
import shop

from mtcl_torchrec.config import parse_run
from mtcl_torchrec.config.tuning import ParameterConfig
from mtcl_torchrec.fusing.pareto import draw_front
from mtcl_torchrec.report.studio import Studio
from mtcl_torchrec.training.tuning.objective import Objective
from mtcl_torchrec.training.tuning.picture import draw_parallel
from mtcl_torchrec.training.tuning.space import Space
from mtcl_torchrec.training.tuning.study import Finished

NAMES = ["$a^^$", "点击", r"\frac{1}", "<b>&"]  # no formula, letters that matplotlib's font lacks, HTML


@pytest.fixture(autouse=True)
def _no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("name", NAMES)
def test_a_report_draws_names_as_they_are(name, tmp_path):
    drawn = Studio(tmp_path).draw(
        "p", name, "", lambda axes, c: (axes.plot([0, 1], label=name), axes.legend(), axes.set_xlabel(name))
    )
    text = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert drawn.svg.count(f">{text}<") == 2
    assert (tmp_path / "p.png").stat().st_size > 1000


@pytest.mark.parametrize("name", NAMES)
def test_the_front_of_a_fusion_draws_names_as_they_are(name, tmp_path):
    front = pd.DataFrame({"name": ["", f"head {name}", "x"], f"loss {name}": [0.0, 0.1, 0.2], "target": [1.0, 2, 3]})
    fitted = SimpleNamespace(
        front=front, chosen=SimpleNamespace(name="x"), target=SimpleNamespace(name=f"auc:{name} {name}")
    )
    draw_front(fitted, tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 1000


@pytest.mark.parametrize("name", NAMES)
def test_the_trials_of_a_search_draw_names_as_they_are(name, tmp_path):
    run = parse_run(shop.RUN)
    tasks = tuple(t.model_copy(update={"name": name, "label": "click"}) for t in run.data_schema.tasks[:1])
    run = run.model_copy(update={"data_schema": run.data_schema.model_copy(update={"tasks": tasks}), "fusion": None})
    path = f"schema.tasks.{name}.weight"
    space = Space.of(run, {path: ParameterConfig(uniform=(0.5, 2.0))})
    trials = [
        Finished(
            number=n, values={path: 0.5 + n}, state="complete", value=0.7 + n / 10, metrics={}, error="", seconds=1
        )
        for n in (0, 1)
    ]
    draw_parallel(tmp_path / "trials.png", space, Objective(f"auc:{name}", tasks, "auc"), trials, trials[1])
    assert (tmp_path / "trials.png").stat().st_size > 1000
