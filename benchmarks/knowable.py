"""How much of what is knowable in a synthetic world a run learns from so many rows, and what would be possible at most.

    python benchmarks/knowable.py --rows 1000000      # as `mtcl init --world shop` has it
    python benchmarks/knowable.py --rows 10000000 --set training.epochs=3 --set optimizers.tables.lr=0.05 --out k.jsonl
    python benchmarks/knowable.py --show k.jsonl

Every run is a line of --out: its settings, seconds, and the figures of `mtcl_torchrec.evaluation.knowable` on the test
split.  `benchmarks/knowable_limits.py` says what an observer could know who knows the world's rules.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from mtcl_torchrec.config import parse_run
from mtcl_torchrec.data.worlds import READY_WORLDS, world_run
from mtcl_torchrec.evaluation.plain_table import plain_table
from mtcl_torchrec.training.run import train_run


def changed(raw: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """The YAML with some keys set, given as ``training.epochs=3``; values are YAML.

    Example:
        >>> changed({"training": {"epochs": 1}}, ["training.epochs=3", "model.tower_layers=[8]"])
        {'training': {'epochs': 3}, 'model': {'tower_layers': [8]}}
    """
    for setting in settings:
        path, _, value = setting.partition("=")
        *folders, key = path.split(".")
        part = raw
        for folder in folders:
            part = part.setdefault(folder, {})
        part[key] = yaml.safe_load(value)
    return raw


def configured(options: argparse.Namespace) -> dict[str, Any]:
    """The world's own YAML, with what the options say."""
    dials = dict(yaml.safe_load(f"[{d.replace('=', ', ')}]") for d in options.dial)
    text = world_run(
        options.world, rows=options.rows, val_rows=options.held_out, test_rows=options.held_out,
        num_users=options.users, num_items=options.items, seed=options.seed, **dials,
    )  # fmt: skip
    raw = yaml.safe_load(text)
    if options.dim:
        for feature in raw["schema"]["features"]:
            if feature["name"] in (raw["schema"]["user"], raw["schema"]["item"]):
                feature["embedding_dim"] = options.dim
    return changed(raw, options.set)


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Train once; what came of it as one line."""
    run = parse_run(yaml.safe_dump(configured(options)))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = train_run(run, Path(folder) / "run", device=options.device, console=Console(stderr=True))
    known = result.evaluations["test"].knowable
    assert known is not None
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "show")}
    return {
        "settings": settings,
        "seconds": round(time.perf_counter() - started, 1),
        "epochs": len(result.history.epochs),
        "best_epoch": result.history.best_epoch,
        "share": {task: round(values["share"], 4) for task, values in known.items() if "share" in values},
        "knowable": known,
    }


def show(lines: list[dict[str, Any]], console: Console) -> None:
    """Shares of every run, a line each, and below them what the runs are."""
    tasks = list(dict.fromkeys(task for line in lines for task in line["share"]))
    table = plain_table("Share of what is knowable, test split", ["run", *tasks, "minutes"])
    for number, line in enumerate(lines, start=1):
        cells = (f"{100 * line['share'][task]:.1f} %" if task in line["share"] else "–" for task in tasks)
        table.add_row(str(number), *cells, f"{line['seconds'] / 60:.1f}")
    console.print(table, "")
    for number, line in enumerate(lines, start=1):
        of = line["settings"]
        settings = [*of["dial"], *([f"dim={of['dim']}"] if of["dim"] else []), *of["set"]]
        name = f"{of['world']}, {of['rows']:,} rows, {of['users']:,} × {of['items']:,}"
        console.print(f"{number}: {name} {' '.join(settings)}", highlight=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=READY_WORLDS, default="shop")
    parser.add_argument("--rows", type=int, default=1_000_000, help="to train on")
    parser.add_argument("--held-out", type=int, default=50_000, help="rows of val, and of test")
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="of the world")
    parser.add_argument(
        "--dial", action="append", default=[], metavar="DIAL=VALUE", help="of the world, such as text=0.5"
    )
    parser.add_argument("--dim", type=int, default=0, help="of the embeddings of users and items")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of the YAML: training.epochs=3"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--out", type=Path, help="a file of lines to add to")
    parser.add_argument("--show", type=Path, help="a file of lines: print the table, train nothing")
    options = parser.parse_args(arguments)
    console = Console(width=100)
    if options.show is not None:
        show([json.loads(line) for line in options.show.read_text().splitlines()], console)
        return
    line = measured(options)
    if options.out is not None:
        with options.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
    else:
        print(json.dumps(line))
    show([line], console)


if __name__ == "__main__":
    main()
