"""`mtcl recommend`: a ranked list for one user."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mtcl_torchrec.cli.app import app, note_if_unfinished, screen
from mtcl_torchrec.evaluation.report import plain_table
from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.serving.network import PART, SPREAD
from mtcl_torchrec.serving.recommender import Recommender


@app.command()
def recommend(
    run_dir: Annotated[
        list[Path],
        typer.Argument(help="What `mtcl train`, `demo` or `export` wrote; several runs are one deep ensemble."),
    ],
    user: Annotated[str, typer.Option(help="The user's id, as in the log.  An unknown one has no history.")],
    context: Annotated[
        list[str] | None,
        typer.Option(help="column=value, such as hour=20; may be repeated.  The rest takes its usual value."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many items.")] = 10,
    seen: Annotated[bool, typer.Option(help="Offer items that the user has already met, too.")] = False,
    why: Annotated[bool, typer.Option(help="Show what each task adds to the score, not its prediction.")] = False,
) -> None:
    """Rank the run's items for one user: the fused score, and each task's prediction or part behind it.

    Several runs of the same data rank by the mean of their scores; `score_std` says how far these are apart.
    """
    given: dict[str, Any] = {}
    for pair in context or []:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"--context takes column=value, such as hour=20, not {pair!r}")
        given[name.strip()] = value.strip()
    recommender = Recommender.load(run_dir)
    if recommender.run is not None:
        note_if_unfinished(recommender.run, *run_dir)
    print_recommendations(recommender, user, given, top, seen, screen(), why=why)


def print_recommendations(
    recommender: Recommender,
    user: str | int,
    context: dict[str, Any],
    top: int,
    seen: bool,
    console: Console,
    *,
    why: bool = False,
) -> None:
    ranked = recommender.recommend(user, context, k=top, seen=seen)
    parts = [name for name in ranked if str(name).startswith(PART)]
    if why and not parts:
        raise ConfigError("--why: this fused score is no sum of parts, it cannot tell what each task adds to it")
    tasks = [task.name for task in recommender.tasks]
    spread = [SPREAD] if SPREAD in ranked else []
    ranked = ranked[[recommender.schema.item, "score", *spread, *(parts if why else tasks)]]
    known = recommender.catalogue.known_user(str(user)) is not None
    usual = {**recommender.catalogue.context, **context}
    about = ", ".join(f"{k}={v}" for k, v in usual.items())
    console.print()
    if not known:
        console.print(f"User {user} is not in the log: ranked without history.", highlight=False)
    what = "what each task adds to the score of the top" if why else "top"
    title = f"{what.capitalize()} {len(ranked)} for user {user}" + (f" ({about})" if about else "")
    names = (str(c).removeprefix(PART).replace("_", "\n") for c in ranked.columns)
    table = plain_table(title, ["#", *names])
    for place, row in enumerate(ranked.itertuples(index=False), start=1):
        table.add_row(str(place), *(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row))
    console.print(table)
