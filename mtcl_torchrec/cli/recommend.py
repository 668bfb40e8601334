"""`mtcl recommend`: a ranked list for one user."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mtcl_torchrec.cli.app import app, note_if_unfinished, screen
from mtcl_torchrec.evaluation.report import plain_table
from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.serving.recommender import Recommender


@app.command()
def recommend(
    run_dir: Annotated[Path, typer.Argument(help="What `mtcl train` or `mtcl demo` wrote.")],
    user: Annotated[str, typer.Option(help="The user's id, as in the log.  An unknown one has no history.")],
    context: Annotated[
        list[str] | None,
        typer.Option(help="column=value, such as hour=20; may be repeated.  The rest takes its usual value."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many items.")] = 10,
    seen: Annotated[bool, typer.Option(help="Offer items that the user has already met, too.")] = False,
) -> None:
    """Rank the run's items for one user: the fused score, and each task's prediction behind it."""
    given: dict[str, Any] = {}
    for pair in context or []:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"--context takes column=value, such as hour=20, not {pair!r}")
        given[name.strip()] = value.strip()
    recommender = Recommender.load(run_dir)
    note_if_unfinished(recommender.run, run_dir)
    print_recommendations(recommender, user, given, top, seen, screen())


def print_recommendations(
    recommender: Recommender, user: str | int, context: dict[str, Any], top: int, seen: bool, console: Console
) -> None:
    ranked = recommender.recommend(user, context, k=top, seen=seen)
    known = recommender.catalogue.known_user(str(user)) is not None
    usual = {**recommender.catalogue.context, **context}
    about = ", ".join(f"{k}={v}" for k, v in usual.items())
    console.print()
    if not known:
        console.print(f"User {user} is not in the log: ranked without history.", highlight=False)
    title = f"Top {len(ranked)} for user {user}" + (f" ({about})" if about else "")
    table = plain_table(title, ["#", *(str(c).replace("_", "\n") for c in ranked.columns)])
    for place, row in enumerate(ranked.itertuples(index=False), start=1):
        table.add_row(str(place), *(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row))
    console.print(table)
