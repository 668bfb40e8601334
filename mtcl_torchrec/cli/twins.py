"""What `mtcl demo` trains beside the run, so that its report can say whether tasks help each other."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.status import Status

from mtcl_torchrec.baselines import Budget, run_baselines
from mtcl_torchrec.baselines.progress import Doing
from mtcl_torchrec.config import RunConfig
from mtcl_torchrec.config.commands import Device
from mtcl_torchrec.report import Answer, do_tasks_help_in
from mtcl_torchrec.training.run_data import RunData

TWINS, CHEAP = "single_task", ("popularity", "logistic_regression")
MOST = 3  # tasks that have a twin
SECONDS = 100.0  # that all twins may take, but for the first, which is always trained
OF_RUN, BESIDES = 0.55, 5.0  # what a twin takes: of the seconds that the run trained for, and besides (measured)


def twin_tasks(run: RunConfig) -> list[str]:
    """The tasks that get a twin: events that the run watches, those first that count most in its fused score.

    Example:
        >>> from mtcl_torchrec.config import parse_run
        >>> from mtcl_torchrec.data import kuairand
        >>> twin_tasks(parse_run(kuairand.example_run()))
        ['like', 'click', 'long_view']
    """
    weights = (run.fusion.weights if run.fusion else None) or {}
    binary = [task.name for task in run.data_schema.tasks if task.kind == "binary" and task.weight > 0]
    watched = [name for name in binary if name in run.training.watch] or binary
    return sorted(watched, key=lambda name: -abs(weights.get(name, 0.0)))[:MOST]


def how_many(seconds: float) -> int:
    """How many twins are trained where the run took some seconds to train.

    Example:
        >>> how_many(40.0), how_many(80.0), how_many(1000.0)
        (3, 2, 1)
    """
    return max(1, min(MOST, int(SECONDS // (OF_RUN * seconds + BESIDES))))


def train_twins(
    run: RunConfig, folder: Path, data: RunData, seconds: float, console: Console, device: Device
) -> Answer:
    """Train the run's network on some of its tasks alone, and two cheap baselines; all of them untuned.

    Writes ``baselines.json`` and ``baselines/`` into the run directory.

    Args:
        run: as it was trained.
        folder: its directory.
        data: what it was trained on.
        seconds: that its training took.
        device: of the networks.

    Returns:
        Whether tasks help each other.
    """
    every = twin_tasks(run)
    tasks = every[: how_many(seconds)]
    left = f"; {', '.join(every[len(tasks) :])} would take too long" if len(tasks) < len(every) else ""
    takes = len(tasks) * (OF_RUN * seconds + BESIDES)
    console.print(
        f"\nDo the tasks help each other?  Training the same network with the same settings on {', '.join(tasks)} "
        f"alone, as twins to compare with, some {takes:.0f} s{left}; before that, popularity and logistic regression, "
        "untuned.  "
        "(--no-twins leaves this out.)",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    with Status("popularity and logistic regression", console=console) as status:

        def tell(doing: Doing) -> None:
            if doing.baseline == TWINS:  # the others take seconds, and are told of in the report
                twin = f"twin {doing.done + 1} of {doing.total}: {doing.title} alone"
                console.print(f"  {twin}", highlight=False, markup=False, soft_wrap=True)
                status.update(f"training {twin}")

        run_baselines(
            run, folder, only=[*CHEAP, TWINS], tasks=tasks, budget=Budget(trials=1), seed=run.training.seed,
            device=device, say=lambda line: None, progress=tell, data=data,
        )  # fmt: skip
    return do_tasks_help_in(folder)
