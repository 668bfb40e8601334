"""`mtcl recommend`: a ranked list for one user."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from mtcl_torchrec.cli.app import ContentsOption, ItemsOption, app, newer_files, note_if_unfinished, screen
from mtcl_torchrec.cli.arguments import check_model
from mtcl_torchrec.config import DataConfig
from mtcl_torchrec.schema import ConfigError

if TYPE_CHECKING:
    import pandas as pd

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
        typer.Option(help="column=value, such as hour=20,day=3; may be repeated.  The rest takes its usual value."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many items.")] = 10,
    seen: Annotated[bool, typer.Option(help="Offer items that the user has already met, too.")] = False,
    candidates: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID,ID",
            help="Rank these items only, or those in a Parquet or CSV file with the item column; may be repeated.",
        ),
    ] = None,
    why: Annotated[bool, typer.Option(help="Show what each task adds to the score, not its prediction.")] = False,
    titles: Annotated[
        Path | None, typer.Option(help="A file of items with their column title (or name): show it beside the ids.")
    ] = None,
    contents: ContentsOption = None,
    items: ItemsOption = None,
) -> None:
    """Rank the run's items for one user: the fused score, and each task's prediction or part behind it.

    Several runs of the same data rank by the mean of their scores; `score_std` says how far these are apart.

    **Some items only:** --candidates 318,527 --seen ranks these two, also where the user has met them.

    **New items:** --items new.csv --contents text=new_vectors.parquet ranks items that training never saw.
    """
    given = _context(context or [])
    check_model(run_dir, "recommend")
    from mtcl_torchrec.cli.titles import read_titles
    from mtcl_torchrec.serving.recommender import Recommender

    recommender = Recommender.load(run_dir, **newer_files(contents, items))
    names = None if titles is None else read_titles(titles, str(recommender.schema.item))
    if recommender.run is not None:
        note_if_unfinished(recommender.run, *run_dir)
    for line in recommender.new_items(dict(pair.split("=", 1) for pair in contents or ())):
        typer.echo(f"mtcl: {line}", err=True)
    console, wanted = screen(), _candidates(candidates, str(recommender.schema.item))
    print_recommendations(recommender, user, given, top, seen, console, why=why, candidates=wanted, titles=names)
    if recommender.run is not None and _has_test(recommender.run.config.data):
        whole = f"{len(recommender.catalogue.items):,} items and {len(recommender.catalogue.users):,} users"
        said = f"The catalogue has {whole} of train and val; what only the test rows say is not in it."
        console.print(said, highlight=False, soft_wrap=True)


def _context(texts: Sequence[str]) -> dict[str, str]:
    """Column -> value.  A comma parts two of them where a further column=value follows, and else belongs to the value.

    Raises:
        ConfigError: one is no column=value.

    Example:
        >>> _context(["hour=20,weather=rain", "place=Paris, Texas"])
        {'hour': '20', 'weather': 'rain', 'place': 'Paris, Texas'}
    """
    given = {}
    for pair in (part for text in texts for part in re.split(r",(?=[^,=]+=)", text)):
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--context takes column=value, such as hour=20, not {pair!r}")
        given[name.strip()] = value.strip()
    return given


def _has_test(data: DataConfig) -> bool:
    """Whether there are rows that neither training nor the catalogue has seen."""
    return data.test is not None or (data.log is not None and data.test_fraction > 0)


def _candidates(given: list[str] | None, item: str) -> list[Any] | None:
    """Keys of items, as they were named or as files hold them."""
    from mtcl_torchrec.data.source import read_rows

    if not given:
        return None
    keys: list[Any] = []
    for part in given:
        if Path(part).suffix.lower() in (".csv", ".parquet"):
            keys += read_rows([part], [item]).frame[item].dropna().tolist()
        else:
            keys += [key for key in (word.strip() for word in part.split(",")) if key]
    if not keys:
        raise ConfigError("--candidates names no item")
    return keys


def print_recommendations(
    recommender: Recommender,
    user: str | int,
    context: dict[str, Any],
    top: int,
    seen: bool,
    console: Console,
    *,
    why: bool = False,
    candidates: Sequence[Any] | None = None,
    titles: dict[str, str] | None = None,
) -> None:
    """Print the list.

    Args:
        recommender, user, context, top, seen, candidates: as of `Recommender.recommend`.
        why: show what each task adds to the score.
        titles: item, as text -> its title, to be shown beside it.

    Raises:
        ConfigError: `why`, and the fused score is no sum.
        DataError: as `Recommender.recommend`.
    """
    from mtcl_torchrec.cli.titles import titles_of
    from mtcl_torchrec.evaluation.plain_table import plain_table
    from mtcl_torchrec.serving.network import PART, SPREAD

    ranked = recommender.recommend(user, context, candidates=candidates, k=max(top, 2) if why else top, seen=seen)
    parts = [str(name) for name in ranked if str(name).startswith(PART)]
    if why and not parts:
        raise ConfigError("--why: this fused score is no sum of parts, it cannot tell what each task adds to it")
    beside = _beside(ranked, parts) if why else None
    ranked = ranked.head(top)
    tasks = [task.name for task in recommender.tasks]
    spread = [SPREAD] if SPREAD in ranked else []
    ranked = ranked[[recommender.schema.item, "score", *spread, *(parts if why else tasks)]]
    known = recommender.catalogue.known_user(str(user)) is not None
    usual = {**recommender.catalogue.context, **context}
    about = ", ".join(f"{k}={v}" for k, v in usual.items())
    console.print()
    if not known:
        console.print(f"User {user} is not in the log: ranked without history.", highlight=False)
    for column in recommender.unknown_context(context):
        console.print(f"{column}={context[column]} is not in the log: taken as unknown.", highlight=False, markup=False)
    to = "the score" if beside is not None else "the sum that orders the items, not to the score itself,"
    what = f"what each task adds to {to} of the top" if why else "top"
    title = f"{what.capitalize()} {len(ranked)} for user {user}" + (f" ({about})" if about else "")
    names = (str(c).removeprefix(PART).replace("_", "\n") for c in ranked.columns)
    beside_ids = None if titles is None else titles_of(ranked[str(recommender.schema.item)].tolist(), titles)
    table = plain_table(title, ["#", *names, *(() if beside_ids is None else ("title",))])
    if beside_ids is not None:
        table.columns[-1].justify = "left"
    for place, row in enumerate(ranked.itertuples(index=False)):
        cells = [f"{v:.3f}" if isinstance(v, float) else str(v) for v in row]
        table.add_row(str(place + 1), *cells, *(() if beside_ids is None else (beside_ids[place],)))
    console.print(table)
    if beside is not None and abs(beside) > 5e-4:
        console.print(f"To these come {beside:.3f}, which every item has.", highlight=False)


def _beside(ranked: pd.DataFrame, parts: list[str]) -> float | None:
    """The constant that the score has beside its parts; None where it is not their sum, but a map of it."""
    apart = ranked["score"] - ranked[parts].sum(axis=1)
    return float(apart.mean()) if apart.max() - apart.min() < 1e-5 and -1e-5 < apart.mean() < 1 else None
