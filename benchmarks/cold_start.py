"""How well new items and new users are ranked: by ids, hashed ids, text, semantic ids, or both; histories off and on.

    python benchmarks/cold_start.py --data movielens --folder ml-1m --out results/cold_start.jsonl   # what is missing
    python benchmarks/cold_start.py --data synthetic --out results/cold_start.jsonl
    python benchmarks/cold_start.py --show results/cold_start.jsonl --picture results/cold_start.png

The log is split by each user's own order; a tenth of the items is never trained on, and of a twentieth of the users no
row is (`mtcl_torchrec.data.cold_split`).  A seed draws these, and starts the training.  Every variant has the same
users, tasks, trunk and schedule; what it knows of an item differs.  Shown is the AUC of the test rows about

- head: known users, the items that hold four fifths of the training rows; tail: the other items of training;
- never seen: known users, items without a training row;
- new users: users without a training row, items with some;

beside that of popularity (the smoothed share of the label among an item's training rows), of what is known afterwards
(the user's share in training times the item's share among the test rows themselves: what there is to win by knowing how
good an item is), and, where the world is made up, of the true probabilities.  GAUC is the AUC within a user's rows: a
model that knows nothing of an item has 0.5 there, while its AUC still profits from knowing who likes much.

Tasks: liked (rating of 4 or 5), loved (5), disliked (1 or 2) by towers on a shared trunk, and `taste`, liked once more
by a dot product of user and item (collaborative filtering); the fused score is the mean of what liked and taste say.
While training, a user is unknown in a tenth of the rows and an item in three tenths (`training.id_dropout`).

With histories (--sequences on), a user's liked items of the training part are a sequence that the candidate looks at
(DIN); they share the candidate's table, so variants without an id have none.

Every finished training is a line of --out; a run that was interrupted goes on where it stopped.  Beside it, .json has
the figures and tables of the whole file, .png the picture.  MovieLens-1M is not
part of the package: https://grouplens.org/datasets/movielens/1m/, and nothing of it may be passed on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from document import Line, Table
from measure import about as who_measures
from measure import appended, figure, read, save, shown
from rich.console import Console

ID: dict[str, Any] = {"name": "item_id", "group": "item", "embedding_dim": 16}
HASHED: dict[str, Any] = {**ID, "encoding": "hash"}  # into a quarter as many rows as there are items
TEXT: dict[str, Any] = {
    "name": "text", "group": "item", "kind": "vector", "column": "item_id", "vectors": "vectors.parquet",
    "embedding_dim": 16,
}  # fmt: skip
CODE: dict[str, Any] = {
    "name": "code", "group": "item", "kind": "semantic_id", "column": "item_id", "codes": "codes.parquet",
    "embedding_dim": 16,
}  # fmt: skip
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "id": (ID,),
    "hashed id": (HASHED,),
    "text": (TEXT,),
    "semantic id": (CODE,),
    "id + semantic id": (ID, CODE),
    "id + text": (ID, TEXT),
}
POPULARITY, AFTERWARDS, ORACLE = "popularity", "known afterwards", "true probability"
SEGMENTS = ("head", "tail", "never seen", "new users", "all")
TASKS = ("liked", "loved", "disliked", "taste", "score")
METRICS = ("auc", "gauc")
LABELS = {**{task: task for task in TASKS}, "taste": "liked", "score": "liked"}
SIZES = {"movielens": [64, 64, 64], "synthetic": [16, 16, 16]}  # of the codebook


def main() -> None:
    """Train what is missing, or show what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["movielens", "synthetic"], default="synthetic")
    parser.add_argument("--folder", type=Path, help="of MovieLens-1M")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--sequences", nargs="+", choices=["off", "on"], default=["off", "on"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--encoder", default="tfidf", help="of the text: tfidf, wordllama, minilm, or a folder")
    parser.add_argument("--out", type=Path, help="JSON lines, one for each training; what is there is not done again")
    parser.add_argument("--show", type=Path, help="print the tables of such a file")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["liked"], help="of the tables")
    parser.add_argument("--metric", choices=METRICS, nargs="+", default=list(METRICS), help="of the tables")
    parser.add_argument("--markdown", action="store_true", help="with --show: as Markdown")
    parser.add_argument(
        "--picture", type=Path, help="draw the first of --metric and --tasks there (PNG; default: beside --out)"
    )
    parser.add_argument("--small", action="store_true", help="a tenth of the users and one epoch, to try the script")
    arguments = parser.parse_args()
    if arguments.data == "movielens" and arguments.folder is None and not arguments.show:
        parser.error("--data movielens needs --folder, which holds MovieLens-1M")
    results = [] if arguments.show else train_missing(arguments)
    if file := arguments.show or arguments.out:
        results = read(file)
    metric, task = arguments.metric[0], arguments.tasks[0]
    shown(
        as_lines(results),
        lambda lines: [table for task in arguments.tasks for m in arguments.metric for table in tables(lines, task, m)],
        lambda lines, path: draw(lines, task, metric, path),
        picture=arguments.picture or (arguments.out.with_suffix(".png") if arguments.out else None),
        document=arguments.out.with_suffix(".json") if arguments.out else None,
        markdown=arguments.markdown,
    )


# ---------------------------------------------------------------------- data


def prepare(folder: Path, data: str, source: Path | None, encoder: str, seed: int, *, small: bool) -> None:
    """Write train, val, test, items, vectors and codes of one seed's split."""
    from mtcl_torchrec.data import movielens
    from mtcl_torchrec.data.cold_split import cold_split
    from mtcl_torchrec.data.synthetic_text import TextWorld

    if data == "movielens":
        assert source is not None
        log, items = movielens.load(source), movielens.items(source)
    else:
        world = TextWorld(seed=seed, num_users=1000, num_items=1200, ratings=160, topics=8, latent_dim=2, signal=2.0)
        log, items = world.log(), world.items()
    if small:
        log = log[log.user_id % 10 == 0]
    for name, rows in cold_split(log, seed=seed).items():
        rows.drop(columns=["title", "genres"]).to_parquet(folder / f"{name}.parquet", index=False)
    items.to_parquet(folder / "items.parquet", index=False)
    command = [sys.executable, "-m", "mtcl_torchrec", "embed", str(folder / "items.parquet"), "--text", "title,genres",
               "--encoder", encoder, "--out", str(folder / "vectors.parquet"), "--no-cache",
               "--semantic-ids", str(folder / "codes.parquet"), "--codes", ",".join(map(str, SIZES[data]))]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def configuration(variant: str, sequences: bool, data: str, seed: int, buckets: int, *, small: bool) -> dict[str, Any]:
    """The run of a variant, as what its YAML says."""
    user: list[dict[str, Any]] = [{"name": "user_id", "group": "user", "embedding_dim": 16}]
    if data == "movielens":
        user += [{"name": name, "group": "user", "embedding_dim": 4} for name in ("gender", "age", "occupation")]
    of_item = [
        {**feature, "vocabulary_size": buckets} if feature is HASHED else feature for feature in VARIANTS[variant]
    ]
    made_up = data == "synthetic"
    run: dict[str, Any] = {
        "name": variant.replace("+", "and"),
        "data": {"train": "train.parquet", "val": "val.parquet"},
        "schema": {
            "user": "user_id",
            "item": "item_id",
            "time": "position",
            "features": [*user, *of_item],
            "tasks": [
                {"name": "liked", "kind": "binary"},
                {"name": "loved", "kind": "binary", "weight": 0.5},
                {"name": "disliked", "kind": "binary", "weight": 0.5},
                {"name": "taste", "kind": "binary", "label": "liked", "head": {"kind": "dot", "dim": 16, "l2": 1e-4}},
            ],
        },
        "model": {
            "trunk": {"kind": "mmoe", "num_experts": 4, "expert_layers": [64, 32],
                      "dropout": 0.1 if made_up else 0.3},
            "tower_layers": [16],
        },
        "optimizers": {
            # Products of vectors that start small take long to say anything: large steps.
            "tables": {"kind": "rowwise_adagrad", "lr": 0.3 if made_up else 0.1, "init_scale": 0.1},
            "dense": {"lr": 0.01 if made_up else 0.004, "weight_decay": 0.01 if made_up else 0.3},
        },
        "training": {"epochs": 1 if small else 16 if made_up else 4, "patience": 2, "seed": seed,
                     # so that it learns to do without an id, as it must for a new one
                     "id_dropout": {"user_id": 0.1, **({"item_id": 0.3} if _has_id(variant) else {})},
                     "batch_size": 1024 if made_up else 2048, "eval_batch_size": 8192,
                     "watch": ["liked"]},
        "fusion": {"weights": {"liked": 1.0, "taste": 1.0}},
    }  # fmt: skip
    if sequences:
        run["schema"]["features"].append(
            {"name": "liked_before", "group": "user", "kind": "history", "of": "item_id", "max_length": 50}
        )
        run["histories"] = [{"feature": "liked_before", "where": ["liked"]}]
        run["model"]["sequences"] = {"liked_before": "din"}
    return run


# ---------------------------------------------------------------------- training and judging


def train_missing(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Train what --out lacks; all results."""
    from mtcl_torchrec.schema import ConfigError

    console = Console()
    results = read(arguments.out) if arguments.out and arguments.out.exists() else []
    about = {"data": arguments.data, "encoder": arguments.encoder, "small": arguments.small}
    results = [r for r in results if all(r[key] == value for key, value in about.items())]
    done = {(r["variant"], r["sequences"], r["seed"]) for r in results}
    with tempfile.TemporaryDirectory(prefix="cold-start-") as temporary:
        for seed in arguments.seeds:
            bounds = [POPULARITY, AFTERWARDS, *([ORACLE] if arguments.data == "synthetic" else [])]
            wanted = [(bound, "off") for bound in bounds]
            wanted += [(v, s) for v in arguments.variants for s in arguments.sequences if s == "off" or _has_id(v)]
            wanted = [(v, s) for v, s in wanted if (v, s, seed) not in done]
            if not wanted:
                continue
            folder = Path(temporary) / f"seed{seed}"
            folder.mkdir()
            prepare(folder, arguments.data, arguments.folder, arguments.encoder, seed, small=arguments.small)
            for variant, sequences in wanted:
                who, started = who_measures(), time.perf_counter()
                try:
                    figures = judge(folder, variant, sequences == "on", arguments.data, seed, small=arguments.small)
                except ConfigError as error:
                    raise SystemExit(f"{variant}, histories {sequences}: {error}") from None
                seconds = round(time.perf_counter() - started, 1)
                result = {
                    **about,
                    "variant": variant,
                    "sequences": sequences,
                    "seed": seed,
                    "seconds": seconds,
                    **figures,
                    "about": who,
                }
                results.append(result)
                if arguments.out:
                    appended(arguments.out, result)
                liked = "  ".join(f"{s} {result['liked'][s]:.3f}" for s in SEGMENTS)
                console.print(f"seed {seed}, {variant}, histories {sequences}, {seconds} s: {liked}", highlight=False)
    return results


def _has_id(variant: str) -> bool:
    return any(feature["name"] == "item_id" for feature in VARIANTS[variant])


def judge(folder: Path, variant: str, sequences: bool, data: str, seed: int, *, small: bool) -> dict[str, Any]:
    """AUC by task and segment of a variant, trained anew, or of what it is compared with."""
    test = pd.read_parquet(folder / "test.parquet")
    if variant == ORACLE:
        return by_segment(test, {task: test[f"p_{LABELS[task]}"].to_numpy() for task in TASKS})
    train = pd.read_parquet(folder / "train.parquet")
    if variant == POPULARITY:
        return by_segment(test, {task: popularity(train, test, LABELS[task]) for task in TASKS})
    if variant == AFTERWARDS:
        return by_segment(test, {task: known_afterwards(train, test, LABELS[task]) for task in TASKS})
    from mtcl_torchrec.config import parse_run
    from mtcl_torchrec.evaluation.predict import predict
    from mtcl_torchrec.training.finished import FinishedRun
    from mtcl_torchrec.training.run import train_run

    buckets = train.item_id.nunique() // 4
    told = configuration(variant, sequences, data, seed, buckets, small=small)
    run = parse_run(yaml.safe_dump(told, sort_keys=False), folder=folder)
    place = folder / f"{variant.replace(' ', '_')}_{sequences}"
    result = train_run(run, place, device="auto", console=Console(quiet=True))
    finished = FinishedRun.load(place)
    predictions = predict(finished.model, finished.encode(test))
    epochs = {"epochs": len(result.history.epochs), "best_epoch": result.history.best_epoch}
    return {**epochs, **by_segment(test, {task: predictions[task] for task in TASKS})}


def popularity(train: pd.DataFrame, test: pd.DataFrame, label: str, key: str = "item_id") -> np.ndarray:
    """(N,) for each test row, the smoothed share of a label among the training rows of its item, or user."""
    from mtcl_torchrec.evaluation.cold import smoothed_popularity

    share = smoothed_popularity(train[key], train[label])
    return test[key].map(share).fillna(train[label].mean()).to_numpy()


def known_afterwards(train: pd.DataFrame, test: pd.DataFrame, label: str) -> np.ndarray:
    """The odds of a user's share in training, times those of the item's share among the test rows, as log."""
    of_user, of_item = popularity(train, test, label, "user_id"), popularity(test, test, label)
    return np.log(of_user / (1 - of_user)) + np.log(of_item / (1 - of_item))


def by_segment(test: pd.DataFrame, predictions: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Task -> segment -> AUC, ``"gauc task"`` -> segment -> GAUC; and ``"rows"`` -> segment -> number of rows."""
    from mtcl_torchrec.evaluation.cold import segment_masks
    from mtcl_torchrec.evaluation.metrics import auc, gauc

    masks = {**segment_masks(test), "all": np.ones(len(test), bool)}
    figures: dict[str, dict[str, float]] = {"rows": {name: int(mask.sum()) for name, mask in masks.items()}}
    for task, predicted in predictions.items():
        labels, users = test[LABELS[task]].to_numpy(), test.user_id.to_numpy()
        figures[task] = {name: auc(labels[mask], predicted[mask]) for name, mask in masks.items()}
        figures[f"gauc {task}"] = {n: gauc(labels[mask], predicted[mask], users[mask]) for n, mask in masks.items()}
    return figures


# ---------------------------------------------------------------------- showing


def as_lines(results: Sequence[dict[str, Any]]) -> list[Line]:
    """The results as the other benchmarks have their lines."""
    settings = ("data", "encoder", "small", "variant", "sequences")
    return [
        {"what": {key: result[key] for key in settings}, "repeat": result["seed"],
         **{key: value for key, value in result.items() if key not in (*settings, "seed")}}
        for result in results
    ]  # fmt: skip


def grouped(lines: Sequence[Line]) -> dict[tuple[str, str], list[Line]]:
    """(variant, histories) -> lines of its seeds, in the order of the table."""
    order = [POPULARITY, *VARIANTS, AFTERWARDS, ORACLE]
    found: dict[tuple[str, str], list[Line]] = {}
    for line in sorted(lines, key=lambda of: (order.index(of["what"]["variant"]), of["what"]["sequences"])):
        found.setdefault((line["what"]["variant"], line["what"]["sequences"]), []).append(line)
    return found


def _sets(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """Lines by data and encoder."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        what = line["what"]
        name = f"{what['data']}, {what['encoder']}" + (", small" if what["small"] else "")
        found.setdefault(name, []).append(line)
    return found


def cell(lines: Sequence[Line], task: str, metric: str, segment: str) -> tuple[float, float]:
    """Mean and standard deviation over seeds; the latter 0 of one."""
    values = [line[task if metric == "auc" else f"gauc {task}"][segment] for line in lines]
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def tables(lines: Sequence[Line], task: str, metric: str = "auc") -> list[Table]:
    """The table of one task and metric, for each set of data."""
    found = []
    for name, of_set in _sets(lines).items():
        seeds = len({line["repeat"] for line in of_set})
        rows = []
        for (variant, sequences), of in grouped(of_set).items():
            cells = []
            for segment in SEGMENTS:
                mean, spread = cell(of, task, metric, segment)
                cells.append(f"{mean:.3f}" + (f" ± {spread:.3f}" if len(of) > 1 else ""))
            rows.append([variant + (", histories" if sequences == "on" else ""), *cells])
        title = f"{metric.upper()} of {task}, {name}, {seeds} seed{'s' if seeds > 1 else ''}"
        found.append(Table(title, ["what is known of an item", *SEGMENTS], rows))
    return found


def draw(lines: Sequence[Line], task: str, metric: str, path: Path) -> None:
    """The metric by segment, a panel for each set of data and segment."""
    sets, panels = _sets(lines), SEGMENTS[:-1]
    drawn, axes = figure(wide=12, high=0.8 + 3.4 * len(sets), columns=len(panels), rows=len(sets), grid="x")
    from matplotlib.lines import Line2D

    for row, (name, of_set) in zip(axes, sets.items(), strict=True):
        shown = {key: of for key, of in grouped(of_set).items() if key[0] not in (POPULARITY, AFTERWARDS)}
        popular = grouped(of_set).get((POPULARITY, "off"))
        labels = [variant + (", histories" if s == "on" else "") for variant, s in shown]
        for axis, segment in zip(row, panels, strict=True):
            for y, ((_, sequences), of) in enumerate(shown.items()):
                mean, spread = cell(of, task, metric, segment)
                colour, marker = ("#d55e00", "s") if sequences == "on" else ("#0072b2", "o")
                axis.errorbar(mean, -y, xerr=spread or None, fmt=marker, color=colour, capsize=2)
            if popular:
                axis.axvline(cell(popular, task, metric, segment)[0], color="grey", linestyle="--", linewidth=1)
            axis.set_yticks([-y for y in range(len(labels))], labels if axis is row[0] else [])
            axis.set_title(segment)
        row[0].set_ylabel(name)
        for axis in row:
            axis.set_xlabel(f"{metric.upper()} of {task}")
    handles = [
        Line2D([], [], marker="o", linestyle="", color="#0072b2", label="without histories"),
        Line2D([], [], marker="s", linestyle="", color="#d55e00", label="with histories"),
        Line2D([], [], linestyle="--", color="grey", label=POPULARITY),
    ]
    drawn.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    save(drawn, path)


if __name__ == "__main__":
    main()
