"""`mtcl evaluate`: a finished run, judged by other rows than its own."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mtcl_torchrec.cli.app import app, check_target, holds_json_with, note_if_unfinished, screen
from mtcl_torchrec.cli.arguments import check_run
from mtcl_torchrec.config import EvaluationConfig, RunConfig, load_run
from mtcl_torchrec.config.evaluation import MIN_DRAWS
from mtcl_torchrec.schema import ConfigError, DataError, nearest
from mtcl_torchrec.training.directory import replace_file

if TYPE_CHECKING:
    from mtcl_torchrec.data.source import Rows


@app.command()
def evaluate(
    run_dir: Annotated[Path, typer.Argument(help="What `mtcl train` or `mtcl demo` wrote.")],
    data: Annotated[list[str], typer.Option(help="Parquet or CSV with inputs and labels; may be repeated.")],
    batch_size: Annotated[int, typer.Option(min=1)] = 8192,
    every: Annotated[
        bool,
        typer.Option("--all", help="Every metric: probabilities, decisions at a threshold, what is shown."),
    ] = False,
    segments: Annotated[
        list[str] | None,
        typer.Option(
            help="Judge the values of a column apart, or of item_seen, user_seen (whether it was trained on), "
            "hour_of_day; several with commas between."
        ),
    ] = None,
    k: Annotated[list[int] | None, typer.Option(min=1, help="Lengths of what is shown; may be repeated.")] = None,
    bootstrap: Annotated[int, typer.Option(min=0, help="95 % intervals from so many draws of users, such as 400.")] = 0,
    save: Annotated[
        Path | None, typer.Option("--save", help="Write the predictions to this Parquet file, for `mtcl compare`.")
    ] = None,
    write: Annotated[Path | None, typer.Option("--json", help="Write every metric to this file.")] = None,
) -> None:
    """Evaluate a finished run on other rows: each task, and the fused score beside popularity."""
    if 0 < bootstrap < MIN_DRAWS:
        raise ConfigError(f"--bootstrap: fewer than {MIN_DRAWS} draws say nothing of an interval; 0 is none")
    check_target(write, "--json", holds_json_with("tasks", "ranking", "rows"))
    check_run(run_dir)
    from mtcl_torchrec.cli.stages import Stages
    from mtcl_torchrec.data.source import column_names, find_files
    from mtcl_torchrec.evaluation.details import print_details, print_segments
    from mtcl_torchrec.evaluation.judged import evaluate_table
    from mtcl_torchrec.evaluation.knowable import print_knowable
    from mtcl_torchrec.evaluation.predictions_file import is_predictions, write_predictions
    from mtcl_torchrec.evaluation.report import print_evaluation
    from mtcl_torchrec.evaluation.worth import verdict_lines, verdict_of
    from mtcl_torchrec.training.finished import FinishedRun
    from mtcl_torchrec.training.judging import evaluation_as_json, fused_tasks, rows_predicted_by, thresholds_of
    from mtcl_torchrec.training.oracle import knowable_of, truth_columns
    from mtcl_torchrec.training.other_rows import other_rows

    check_target(save, "--save", is_predictions)
    run, console = FinishedRun.load(run_dir), screen()
    named = (name.strip() for names in segments or () for name in names.split(","))
    apart = [name for name in dict.fromkeys(named) if name]
    lengths = list(dict.fromkeys(k or run.config.evaluation.k))
    config = run.config.evaluation.model_copy(update={"segments": apart, "k": lengths})
    there = set.intersection(*(set(column_names(file)) for file in find_files(data)))
    _check_segments(config, there)
    wanted = [c for c in (run.preprocessor.declared.time, *truth_columns(run.config)) if c in there]
    with Stages() as stages:
        others = other_rows(run.preprocessor, data, there, [*config.columns(), *wanted])
        raw = others.rows
        note_if_unfinished(run, run_dir)
        for line in others.lines:
            typer.echo(f"mtcl: --data: {line}", err=True)
        _note_known(load_run(run_dir / "run.yaml"), raw)
        table = rows_predicted_by(
            run, raw, batch_size=batch_size, split=", ".join(data), segments=config.columns(), progress=stages
        )
        table = others.judged(replace(table, thresholds=thresholds_of(run_dir)))
        judged = [name for name in fused_tasks(run.model) if name in {task.name for task in table.tasks}]
        result = evaluate_table(
            table, fused_tasks=judged, k=config.k, segments=apart, bootstrap=bootstrap,
            seed=run.config.training.seed, progress=stages,
        )  # fmt: skip
        verdict = verdict_of(table, config.k)
    print_evaluation(result, ", ".join(data), console)
    if verdict is not None:
        for line in verdict_lines(verdict, "on these rows"):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if run.config.data.synthetic is not None and not others.lacking:
        result.knowable = knowable_of(run.config, run.model, raw, run.preprocessor.encode(raw), table)
        print_knowable(result.knowable, console)
    if every:
        console.print()
        print_details(result, console, config.k)
    if apart:
        console.print()
        print_segments(result, console)
    if save is not None:
        write_predictions(save, table)
    if write is not None:
        replace_file(write, json.dumps(evaluation_as_json(result), indent=1))


def _check_segments(config: EvaluationConfig, there: Collection[str]) -> None:
    from mtcl_torchrec.evaluation.segments import DERIVED, there_are

    for name in config.columns():
        if name not in there:
            columns = [*sorted(there), *DERIVED]
            raise DataError(f"--segments: no column {name!r}{nearest(name, columns)}; {there_are(columns)}")


def _note_known(config: RunConfig, rows: Rows) -> None:
    """Say so, where the run was trained on some of the rows that it is judged by."""
    from mtcl_torchrec.training.known_rows import said_of_known, trained_on

    seen = trained_on(config, rows)
    if seen is not None and seen.any():
        typer.echo(f"mtcl: --data: {said_of_known(seen)}", err=True)
