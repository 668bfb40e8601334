"""`mtcl compare`: which of several runs is better, and whether that is more than chance."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtcl_torchrec.cli.app import app, check_target, holds_json_with, say_unfinished, screen
from mtcl_torchrec.cli.arguments import YAML, check_run, task_numbers
from mtcl_torchrec.config import EvaluationConfig, load_run
from mtcl_torchrec.config.commands import DRAWS
from mtcl_torchrec.schema import ConfigError, DataError
from mtcl_torchrec.training.directory import METRICS, replace_file
from mtcl_torchrec.training.unfinished import is_begun, unfinished_line

if TYPE_CHECKING:
    from mtcl_torchrec.evaluation.compare import Difference
    from mtcl_torchrec.evaluation.predictions_table import PredictionsTable


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run directories, or files of `mtcl evaluate --save`; the first is A for all others."),
    ],
    split: Annotated[str, typer.Option(help="Of the run directories: test or val.")] = "test",
    k: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Lengths of what is shown; may be repeated.  Default: what A says, or 5 and 10."),
    ] = None,
    value: Annotated[
        list[str] | None,
        typer.Option(help="task=number: what its event is worth; may be repeated.  Default: what A says."),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Compare every metric; the more there are, the less a single one says.")
    ] = False,
    draws: Annotated[int, typer.Option(min=20, help="How many times users are drawn.")] = DRAWS,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same users.")] = 0,
    write: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file, too.")] = None,
    page: Annotated[
        Path | None, typer.Option("--html", help="Write run directories side by side as one HTML file, with pictures.")
    ] = None,
) -> None:
    """Compare runs on the same rows: the difference in each metric, its 95 % interval and its p-value.

    Users are drawn with replacement, the same ones for both runs, so that what is hard for both cancels out.  Runs that
    were not judged on the same rows are refused: judge them on the same file with `mtcl evaluate --data FILE --save`.
    """
    if len(runs) < 2:
        raise ConfigError("compare needs two runs at least")
    places = [run.resolve() for run in runs]
    if again := next((run for n, run in enumerate(runs) if places[n] in places[:n]), None):
        raise ConfigError(f"{again} is given twice")
    check_target(write, "--json", holds_json_with("a", "against"))
    if page is not None and (file := next((run for run in runs if not run.is_dir()), None)):
        raise ConfigError(f"--html shows run directories, and {file} is none")
    from mtcl_torchrec.evaluation.compare import compare_tables, corrected, is_headline
    from mtcl_torchrec.evaluation.details import print_differences
    from mtcl_torchrec.report import compare_html, from_differences
    from mtcl_torchrec.training.history import finite

    console = screen()
    there = [run for run in runs if _is_there(run, split)]
    if page is None or not there:
        there = list(runs)  # what is missing is an error
    for run in runs:
        if run not in there:
            say_unfinished(run, "it is shown beside the others, and is not in the comparison")
    for run in there:
        for doubt in _doubts(run):
            console.print(f"WARNING: {run}: {doubt}", highlight=False, markup=False, soft_wrap=True)
    first = _read(there[0], split)
    values = task_numbers(value, "--value") if value else None
    lengths = list(dict.fromkeys(k or _lengths(there[0])))
    found: dict[str, list[Difference]] = {}
    for run in there[1:]:
        names = (str(there[0]), str(run))
        found[str(run)] = compare_tables(
            first, _read(run, split), k=lengths, values=values, draws=draws, seed=seed,
            names=names, only=(lambda of, metric: True) if every else is_headline,
        )  # fmt: skip
    together = iter(corrected([difference for of in found.values() for difference in of]))  # one family
    found = {run: [next(together) for _ in of] for run, of in found.items()}
    for run_b, of in found.items():
        print_differences(of, (str(there[0]), run_b), console)
        console.print()
    if len(found) > 1:
        said = f"p (Holm) allows for all comparisons of these {len(there)} runs together."
        console.print(said, highlight=False, soft_wrap=True)
    if any(d.metric.startswith("value@") for of in found.values() for d in of):
        whose = "as --value says" if values else f"as {there[0]} (A) says; --value TASK=NUMBER for others"
        shown = ", ".join(f"{task} {number:g}" for task, number in (values or first.values).items())
        console.print(
            f"value@k: what happened to the rows that are shown, worth {shown}, for all runs: {whose}.\n",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    for run in there:
        if speed := _speed(run):
            console.print(f"{run}: {speed}", highlight=False, markup=False, soft_wrap=True)
    if write is not None:
        content = {run: [asdict(difference) for difference in of] for run, of in found.items()}
        replace_file(write, json.dumps(finite({"a": str(there[0]), "split": split, "against": content}), indent=1))
    if page is not None:
        compared = from_differences(list(found.values())) if len(there) == len(runs) else None
        said = f"The runs side by side: {compare_html(runs, compared, page)}"
        console.print(said, highlight=False, markup=False, soft_wrap=True)


def _doubts(run: Path) -> list[str]:
    """What training has found that puts a run's figures in doubt."""
    return list(_of_metrics(run, "doubts") or [])


def _speed(run: Path) -> str:
    """How fast a run was trained, with what speed depends on; empty where its metrics do not tell."""
    cost = _of_metrics(run, "cost") or {}
    if cost.get("samples_per_second") is None or "threads" not in cost:
        return ""
    ranks, threads = cost["ranks"], cost["threads"]
    compiled = "" if cost["compile"] == "none" else f", compiled in a first step of {cost['first_step_s']:.1f} s"
    return (
        f"trained {cost['samples_per_second']:,.0f} samples/s on {cost['device']} with {ranks} rank{'s' * (ranks > 1)} "
        f"of {threads} thread{'s' * (threads > 1)}, {cost['precision']}, batches of {cost['batch_size']:,}{compiled}"
    )


def _of_metrics(run: Path, key: str) -> Any:
    """What a run's metrics hold under a key; None where there are none."""
    path = run / METRICS
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8")).get(key)
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path}: damaged ({error})") from None


def _lengths(run: Path) -> list[int]:
    """What a run is judged by: `evaluation.k` of its YAML."""
    written = run / "run.yaml"
    return load_run(written).evaluation.k if written.is_file() else EvaluationConfig().k


def _is_there(run: Path, split: str) -> bool:
    from mtcl_torchrec.training.judging import predictions_path

    return not run.is_dir() or predictions_path(run, split).is_file() or not unfinished_line(run)


def _read(run: Path, split: str) -> PredictionsTable:
    from mtcl_torchrec.evaluation.predictions_file import read_predictions
    from mtcl_torchrec.training.judging import predictions_path

    path = predictions_path(run, split) if run.is_dir() else run
    if (run.is_dir() and not is_begun(run) and not path.parent.is_dir()) or run.suffix.lower() in YAML:
        check_run(run, "compare")
    if run.is_dir() and not path.is_file():
        if line := unfinished_line(run):
            raise DataError(f"no predictions for {split} of {run} to compare yet: {line}")
        raise DataError(
            f"{run}: no predictions for {split} ({path.relative_to(run)} is missing); `mtcl evaluate {run} --data ROWS "
            "--save FILE` writes them for a file of rows"
        )
    return read_predictions(path)
