"""Predictions nobody planned for: no rows, one user, one class, ties, huge k, names in brackets."""

import io
import warnings

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from mtcl_torchrec.evaluation.compare import compare_tables
from mtcl_torchrec.evaluation.details import print_details, print_differences, print_segments
from mtcl_torchrec.evaluation.judged import evaluate_table
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable
from mtcl_torchrec.evaluation.ranking import Ranking
from mtcl_torchrec.evaluation.report import evaluate_predictions, print_evaluation
from mtcl_torchrec.evaluation.segments import hours_of_day, segment_values
from mtcl_torchrec.schema import DataError, Task

NAN = float("nan")
CLICK = Task.binary("click")


def frame(rows=20, **columns):
    draw = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "user": draw.integers(0, 4, rows), "item": draw.integers(0, 5, rows),
            "label.click": draw.integers(0, 2, rows).astype(float), "p.click": draw.random(rows),
            "score": draw.random(rows), "popularity": draw.integers(0, 9, rows).astype(float),
            "popular": draw.random(rows), "popular.click": draw.random(rows), **columns,
        }
    )  # fmt: skip


def judged(of, *tasks, segments=(), k=(1, 5), event="click"):
    """All that is told of a table, as text; a warning is an error."""
    table = PredictionsTable(of, tasks or (CLICK,), thresholds={event: 0.5}, values={event: 1.0})
    console = Console(file=io.StringIO(), width=200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = evaluate_table(table, k=k, segments=segments, bootstrap=20)
        differences = compare_tables(table, table, k=k, draws=20, only=lambda of, metric: True)
    print_evaluation(found, "test", console)
    print_details(found, console, k)
    print_segments(found, console)
    print_differences(differences, ("a", "b"), console)
    return found, console.file.getvalue()


@pytest.mark.parametrize(
    "odd",
    [
        {"user": [None] * 20}, {"user": [None, "a"] * 10}, {"user": [7] * 20}, {"item": [None] * 20},
        {"label.click": np.ones(20)}, {"label.click": np.zeros(20)}, {"label.click": np.full(20, NAN)},
        {"p.click": np.full(20, 0.5)}, {"p.click": np.repeat([0.0, 1.0], 10)}, {"score": np.full(20, np.inf)},
    ],
)  # fmt: skip
def test_odd_columns_are_judged_without_a_warning(odd):
    found, _ = judged(frame(**odd))
    assert found.rows == 20
    assert 0 <= found.tasks["click"].get("brier", 0) <= 1


@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_one_row_are_judged(rows):
    found, told = judged(frame().iloc[:rows])
    assert found.rows == rows
    assert found.tasks["click"]["count"] == rows
    assert "click" in told


@pytest.mark.parametrize("k", [10**9, 10**30])
def test_a_list_of_any_length_needs_no_memory(k):
    found, _ = judged(frame(), k=(k,))
    shown = found.ranking["fused"]
    assert shown[f"choice@{k}"] == 0
    assert shown[f"recall@{k} click"] == 1
    assert Ranking(np.zeros(3, int), np.ones(3)).ndcg_at_k(np.array([1.0, 0, 0]), k) == pytest.approx(
        (1 + 1 / np.log2(3) + 0.5) / 3
    )


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"p.click": np.r_[0.1, NAN]}, "p.click, row 1: a prediction is finite"),
        ({"p.click": np.r_[0.1, 1.5]}, "p.click, row 1: a probability is from 0 to 1"),
        ({"score": np.r_[NAN, 1]}, "score, row 0: NaN ranks nowhere"),
        (
            {"label.click": np.r_[1, np.inf]},
            "label.click, row 1: a label of binary task 'click' is a whole number from",
        ),
        ({"label.click": np.r_[2.0, 1]}, "label.click, row 0: a label of binary task 'click' is a whole number from"),
    ],
)
def test_what_is_no_prediction_or_label_is_refused(odd, said):
    with pytest.raises(DataError, match=said):
        PredictionsTable(frame(2, **odd), (CLICK,))


def test_class_probabilities_that_are_none_are_refused():
    of, task = frame(2, **{"label.t": [0.0, 3.0]}), Task.multiclass("t", 3)
    third = np.full((2, 3), 1 / 3, np.float32)
    with pytest.raises(DataError, match=r"label.t, row 1: .* 't' is a whole number from 0 to 2"):
        PredictionsTable(of, (task,), classes={"p.t": third})
    of["label.t"] = [0.0, 2.0]
    with pytest.raises(DataError, match=r"p.t, row 1: the probabilities"):
        PredictionsTable(of, (task,), classes={"p.t": third * [[1], [0]]})
    with pytest.raises(DataError, match=r"'click' is binary, and its predictions have the shape \(2, 3\)"):
        PredictionsTable(of, (CLICK,), classes={"p.click": third})


def test_names_and_values_in_brackets_are_no_styles():
    name = "[red]a.b[/red]|<script>"
    of = frame(user=["[/b]", "[bold]ß"] * 10).rename(columns=lambda c: c.replace("click", name))
    found, told = judged(of, Task.binary(name), segments=["user"], event=name)
    assert name in told
    assert "[/b]" in told
    assert "[bold]ß" in told
    assert set(found.segments["user"]) == {"[/b]", "[bold]ß"}


@pytest.mark.parametrize(
    ("values", "sizes"),
    [
        (1.6e9 + np.arange(200), [40] * 5),  # six digits would call all of them alike
        (2**60 + 1000 * np.arange(200), [40] * 5),
        (np.r_[np.arange(100.0), [np.inf] * 50, [-np.inf] * 50], None),
        (["(other)", "(missing)", None, "a"] * 50, [50, 50, 100]),
        (["(other)"] * 20 + [f"v{i}" for i in range(180)], None),
    ],
)
def test_every_segment_has_a_name_of_its_own(values, sizes):
    found = segment_values(PredictionsTable(frame(200, **{"segment.s": values}), (CLICK,)), "s")
    assert found.cat.categories.is_unique
    assert not found.isna().any()
    if sizes is not None:
        assert sorted(found.value_counts(sort=False)) == sorted(sizes)


def test_hours_of_what_is_missing_or_no_time():
    assert hours_of_day(pd.Series([NAN, NAN])).isna().all()
    assert len(hours_of_day(pd.Series([], dtype=float))) == 0
    assert hours_of_day(pd.Series(["2020-01-01T05:00:00", None])).tolist()[0] == 5
    with pytest.raises(DataError, match="holds what is no time"):
        hours_of_day(pd.Series(["soon"]))


def test_headings_are_as_wide_as_the_screen_and_one_event_has_one_row():
    tasks = (Task.binary("click"), Task.binary("match", label="click"), Task.binary("like"))
    y = np.tile([[0.0, 0.0, 1.0], [1.0, 1.0, 0.0]], (4, 1))
    p = {task.name: np.linspace(0.1, 0.9, 8) for task in tasks} | {"score": np.linspace(0, 1, 8)}
    found = evaluate_predictions(tasks, p, y, None, {t.name: np.arange(8.0) for t in tasks}, [t.name for t in tasks])
    out = io.StringIO()
    print_evaluation(found, "test split", Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    at = lines.index("The same rows ranked by the fused score and by each event's popularity")
    assert [line.split("  ")[0] for line in lines[at + 2 :]] == ["click, match", "like"]
    assert {"auc match", "auc click"} <= set(found.ranking["fused"])  # the numbers stay as they are
