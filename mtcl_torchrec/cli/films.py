"""What `mtcl demo --text` does beside training: write films with what their texts say, and show how they are ranked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console

from mtcl_torchrec.cli.app import screen
from mtcl_torchrec.cli.embed import embed
from mtcl_torchrec.cli.titles import short
from mtcl_torchrec.config.commands import Device
from mtcl_torchrec.data import movielens
from mtcl_torchrec.data.vectors import read_vectors
from mtcl_torchrec.evaluation.cold import EXPLAINED, print_segments, segment_masks, smoothed_popularity
from mtcl_torchrec.evaluation.plain_table import plain_table
from mtcl_torchrec.evaluation.predict import predict
from mtcl_torchrec.serving.recommender import Recommender
from mtcl_torchrec.training.finished import FinishedRun

LEVELS, CODES = 3, 64  # of the semantic ids
TOP = 10
LATER, ALIKE = "rated later", "its text is like"
NUMBERS = ("score", "liked", "taste", "next_genre")


def write_films(source: Path, target: Path, encoder: str, seed: int, device: Device) -> None:
    """Write the splits, the films' vectors and semantic ids, and the run.yaml that trains on them.

    Args:
        source: MovieLens-1M.
        target: the folder to write to; what stands there under these names is replaced.
        encoder: of the films' titles and genres; see ``mtcl embed``.
        seed: of the split and the semantic ids.

    Raises:
        DataError: `source` is not what it should be.
        ConfigError: there is no such encoder.
    """
    console = screen()
    console.print(f"reading MovieLens-1M from {source}", highlight=False, markup=False, soft_wrap=True)
    movielens.write(source, target, seed=seed)
    films = len(pd.read_parquet(target / "items.parquet", columns=["item_id"]))
    embed(
        [str(target / "items.parquet")], text="title,genres", out=target / "vectors.parquet", encoder=encoder,
        device=device, no_cache=True, semantic_ids=target / "codes.parquet", levels=LEVELS,
        codes=str(max(1, min(CODES, films // 8))), seed=seed, overwrite=True,
    )  # fmt: skip
    (target / "run.yaml").write_text(movielens.example_run(), encoding="utf-8")


def show_films(run_dir: Path, data: Path, console: Console) -> None:
    """Print the AUC by how much was known of a film and of a user; and lists for a known user and for a new one.

    Args:
        run_dir: of the finished run.
        data: what `write_films` wrote.
    """
    run = FinishedRun.load(run_dir)
    train = pd.read_parquet(data / "train.parquet", columns=["user_id", "item_id", "position", "liked"])
    test = pd.read_parquet(data / "test.parquet")
    predicted = predict(run.model, run.encode(test))
    popular = test["item_id"].map(smoothed_popularity(train["item_id"], train["liked"])).fillna(train["liked"].mean())
    rankings = {
        "popularity": popular.to_numpy(),
        "liked (towers)": predicted["liked"],
        "taste (dot product)": predicted["taste"],
        "fused score": predicted["score"],
    }
    console.print()
    title = "AUC of liked, by what training knew of film and user"
    print_segments(title, test["liked"].to_numpy(), rankings, segment_masks(test), console)
    console.print(EXPLAINED, highlight=False, markup=False, soft_wrap=True)
    films = pd.read_parquet(data / "items.parquet")
    _show_lists(run, films, train, test, data / "vectors.parquet", console)
    console.print(
        f"\nThe run is in {run_dir}; the data, which are MovieLens's and not to be passed on, in {data}.  Next:\n"
        f"  mtcl recommend {run_dir} --user 42 --why --titles {data}/items.parquet\n"
        f"  mtcl train {data}/run.yaml, which you may edit\n"
        f"  tensorboard --logdir {run_dir}/tensorboard",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def _show_lists(
    run: FinishedRun, films: pd.DataFrame, train: pd.DataFrame, test: pd.DataFrame, vectors: Path, console: Console
) -> None:
    recommender = Recommender(run)
    known = _someone(train, test)
    own = train[(train["user_id"] == known) & (train["liked"] == 1)].sort_values("position")
    titles = films.set_index("item_id")["title"]
    lately = [f"    {short(titles[film])}" for film in own["item_id"].tail(3)[::-1]]
    said = [f"User {known} has liked {len(own)} films in training, last", *lately]
    console.print("", *said, sep="\n", highlight=False, markup=False)
    ranked = _with_stars(recommender.recommend(known, k=TOP), films, test, known)
    _print_films(f"Top {len(ranked)} for user {known}", ranked, console, LATER)

    someone = recommender.catalogue.users
    unmet = films[~films["item_id"].isin(train["item_id"])].reset_index(drop=True)
    if len(unmet):
        asked = unmet.merge(someone[someone["user_id"] == known], how="cross")
        scored = unmet.join(recommender.score(asked)[["score", "liked", "taste", "next_genre"]])
        scored = scored.nlargest(TOP // 2, "score")
        scored[ALIKE] = _alike(scored, films[films["item_id"].isin(train["item_id"])], vectors)
        title = f"Top {len(scored)} of the {len(unmet):,} films that training never saw"
        _print_films(title, scored, console, ALIKE, ("score", "liked"))

    strangers = test.loc[test["new_user"], "user_id"]
    new = int(max(someone["user_id"].max(), test["user_id"].max()) + 1 if strangers.empty else strangers.mode()[0])
    ranked = _with_stars(recommender.recommend(new, k=TOP), films, test, new)
    _print_films(f"Top {len(ranked)} for user {new}, of whom training knew nothing", ranked, console, LATER)


def _with_stars(ranked: pd.DataFrame, films: pd.DataFrame, test: pd.DataFrame, user: int) -> pd.DataFrame:
    """The list with what is known of the films, and how the user has rated them in the test split."""
    stars = test[test["user_id"] == user].set_index("item_id")["rating"].astype(str)
    return ranked.merge(films, on="item_id").assign(**{LATER: ranked["item_id"].map(stars).fillna("").to_numpy()})


def _someone(train: pd.DataFrame, test: pd.DataFrame) -> int:
    """A user with as many liked films as most have, who has test rows."""
    liked = train[train["user_id"].isin(test["user_id"])].groupby("user_id")["liked"].sum()
    return int(liked.index.to_numpy()[(liked - liked.median()).abs().to_numpy().argmin()])


def _alike(films: pd.DataFrame, known: pd.DataFrame, vectors: Path) -> list[str]:
    """The title of the known film whose text is most like each film's, by the cosine of their vectors."""
    read = read_vectors(vectors, "item_id")
    row = pd.Series(np.arange(len(read)), index=read.keys)
    known = known[known["item_id"].isin(row.index)]
    of_known = np.asarray(read.vectors)[row[known["item_id"]]]
    found = []
    for film in films["item_id"]:
        if film not in row.index or known.empty:
            found.append("")
            continue
        found.append(short(known["title"].iloc[int(np.argmax(of_known @ read.vectors[row[film]]))]))
    return found


def _print_films(
    title: str, ranked: pd.DataFrame, console: Console, beside: str, numbers: Sequence[str] = NUMBERS
) -> None:
    """A table of films with the predictions behind their score.

    Args:
        ranked: with title, genre, score and the tasks' predictions.
        beside: a further column of text.
        numbers: columns of `ranked` that are shown.
    """
    table = plain_table(title, ["film", "genre", *(name.replace("_", "\n") for name in numbers), beside])
    for column in (table.columns[1], table.columns[-1]):
        column.justify = "left"
    for column in table.columns[2:-1]:
        column.min_width = 5  # of a narrow screen, titles give way
    for place, film in enumerate(ranked.to_dict("records"), start=1):
        figures = (f"{film[name]:.3f}" for name in numbers)
        genre = film["genre"] if isinstance(film["genre"], str) else ""
        table.add_row(f"{place:2d}  {short(film['title'])}", genre, *figures, film[beside])
    console.print()
    console.print(table)
