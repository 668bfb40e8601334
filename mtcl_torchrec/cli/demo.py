"""`mtcl demo`: a whole run on data that ships with the package, or with texts on MovieLens from a person's folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from mtcl_torchrec.cli.app import DeviceOption, app, screen
from mtcl_torchrec.cli.recommend import print_recommendations
from mtcl_torchrec.cli.report import report_of_demo
from mtcl_torchrec.cli.stopping import if_stopped
from mtcl_torchrec.cli.train import show
from mtcl_torchrec.config import RunConfig, load_run, parse_run
from mtcl_torchrec.config.commands import MOVIELENS, Device
from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.training.directory import MARKER, Existing, claim_run_directory, fresh_run_directory

if TYPE_CHECKING:
    from mtcl_torchrec.training.run_data import RunData
    from mtcl_torchrec.training.sharding import Ranks

DATA = "data"


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run directory; a fresh one under runs/ by default.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a run that stands in --out.")] = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="Fewer or more epochs than the demo's own.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Another random seed.")] = None,
    text: Annotated[bool, typer.Option("--text", help="Items with texts: the films of MovieLens-1M.")] = False,
    folder: Annotated[
        Path | None, typer.Option(help=f"With --text: where MovieLens-1M is; {MOVIELENS} has it.")
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="With --text: tfidf, wordllama, minilm, or the folder of a language model.  [default: tfidf]"
        ),
    ] = None,
    twins: Annotated[
        bool | None,
        typer.Option(
            "--twins/--no-twins",
            help="Train the network on single tasks too, so that the report says whether tasks help each other.  "
            "[default: twins, but not with --text]",
        ),
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Train on real short-video impressions (KuaiRand) that ship with the package, and rank videos for one user.

    Prints one table of all tasks on the test split, the fused score beside a popularity baseline on the same
    impressions, and the top 10 videos of one user; then trains up to three tasks alone, to tell whether tasks help each
    other, and writes a report.  Takes about four minutes on two cores.

    **With texts:** mtcl demo --text --folder ml-1m

    trains on MovieLens-1M, of which the package ships nothing: it reads the folder that you give.  Films are known by
    id, by a vector of their title and genres, and by semantic id; users by what they liked before.  Behaviour, content
    and collaborative filtering are the tasks.  Prints besides how well films that nobody has rated and users without
    history are ranked, and ranks films for one of each.  Takes about five
    minutes on two cores.
    """
    if not text and (folder is not None or encoder is not None):
        raise ConfigError(f"{'--encoder' if folder is None else '--folder'} belongs to --text")
    if text and folder is None:
        raise ConfigError(
            f"--text needs --folder: MovieLens-1M, unpacked; {MOVIELENS} has it, the package ships none of it"
        )
    from mtcl_torchrec.cli.films import show_films, write_films
    from mtcl_torchrec.data import kuairand
    from mtcl_torchrec.training.run import train_run
    from mtcl_torchrec.training.sharding import ranks

    console = screen()
    existing: Existing = "overwrite" if overwrite else "refuse"
    with ranks(device) as where:
        if twins and where.world_size > 1:
            raise ConfigError("--twins are trained in one process: start the demo without torchrun")
        place = out or fresh_run_directory("kuairand" if folder is None else "movielens", where)
        claim_run_directory(place, where, existing=existing)
        if_stopped(f"{place} is not finished, the same command begins anew")
        run: RunConfig
        if folder is None:
            _written(kuairand.write, place, where)
            run = parse_run(kuairand.example_run(), name="the demo's run", folder=place)
        else:
            _written(lambda target: write_films(folder, target, encoder or "tfidf", seed or 0, device), place, where)
            run = load_run(place / DATA / "run.yaml")
        if epochs is not None:
            run.training.epochs = epochs
        if seed is not None:
            run.training.seed = seed
        wanted = where.world_size == 1 and (folder is None if twins is None else twins)
        data = _read_once(run, where, console) if wanted else None  # the twins are trained on the same rows
        result = train_run(run, place, existing=existing, device=device, console=console, data=data)
    if not where.first:
        return
    show(result, console)
    if folder is None:
        _show_videos(place, console)
    else:
        show_films(place, place / DATA, console)
    if data is not None:
        seconds = sum(s for s in result.history.seconds if s is not None)
        _measure_sharing(run, place, data, seconds, console, device)
    else:
        console.print(
            f"\nWhether the tasks help each other was not measured (--twins): `mtcl baselines {place} --only "
            "single_task --trials 1` trains the network on each of them alone, to compare with",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    report_of_demo(place, console)


def _measure_sharing(
    run: RunConfig, place: Path, data: RunData, seconds: float, console: Console, device: Device
) -> None:
    """Train the twins and say what they tell; without them, the report that follows says so."""
    from mtcl_torchrec.cli.twins import train_twins

    try:
        answer = train_twins(run, place, data, seconds, console, device)
        said = "\n".join([f"\n{answer.question}  {answer.short}.", *(f"  {line}" for line in answer.sentences)])
    except KeyboardInterrupt:
        said = f"\nThe twins were broken off; `mtcl baselines {place} --only single_task --trials 1` trains them."
    except FloatingPointError as error:
        said = f"\nNo twins: {error}"
    console.print(said, highlight=False, markup=False, soft_wrap=True)


def _read_once(run: RunConfig, where: Ranks, console: Console) -> RunData:
    from mtcl_torchrec.training.run_data import load_data

    return load_data(run, where, say=lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True))


def _written(write: Callable[[Path], None], place: Path, where: Ranks) -> None:
    """Let the first rank write the data; a run directory that holds nothing else does not outlive a failure."""
    if where.first:
        try:
            write(place / DATA)
        except BaseException:
            shutil.rmtree(place / DATA, ignore_errors=True)
            if [path.name for path in place.iterdir()] == [MARKER]:
                shutil.rmtree(place)
            raise
    where.barrier()


def _show_videos(place: Path, console: Console) -> None:
    from mtcl_torchrec.serving.recommender import Recommender

    recommender = Recommender.load(place)
    seen = recommender.catalogue.seen
    user = int(seen.loc[seen["user_id"] != 0, "user_id"].value_counts().index[0])
    print_recommendations(recommender, user, {}, 10, False, console)
    console.print(
        f"\nThe run is in {place}.  Next:\n"
        f"  mtcl recommend {place} --user 42 --context hour=20 --top 10\n"
        f"  mtcl evaluate {place} --data {place}/data/test.parquet\n"
        f"  tensorboard --logdir {place}/tensorboard",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
