"""How much of what is knowable in a synthetic world a run learns from so many rows, and what would be possible at most.

    python benchmarks/knowable.py --rows 1000000      # as `mtcl init --world shop` has it
    python benchmarks/knowable.py --rows 10000000 --set training.epochs=3 --set optimizers.tables.lr=0.05 --out k.jsonl
    python benchmarks/knowable.py --show k.jsonl --picture k.png

Every run is a line of --out, and beside it .json has the figures and the table of all of them, .png the picture: its
settings, seconds, and the figures of `mtcl_torchrec.evaluation.knowable` on the test
split.  `benchmarks/knowable_limits.py` says what an observer could know who knows the world's rules.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import yaml
from document import Line, Table
from measure import about, figure, read, save, shown
from rich.console import Console

from mtcl_torchrec.config import parse_run
from mtcl_torchrec.data.worlds import READY_WORLDS, world_run
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
        heads = [task["head"] for task in raw["schema"]["tasks"] if "head" in task]
        factors = {name for head in heads for name in head["factors"]}  # of one width, which is the heads'
        for wide, key in ((heads, "dim"), (raw["schema"]["features"], "embedding_dim")):
            for part in wide:
                if key == "dim" or part["name"] in factors:
                    part[key] = options.dim
    return changed(raw, options.set)


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Train once; what came of it as one line."""
    run = parse_run(yaml.safe_dump(configured(options)))
    who, started = about(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = train_run(run, Path(folder) / "run", device=options.device, console=Console(stderr=True))
    known = result.evaluations["test"].knowable
    assert known is not None
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "show", "picture")}
    return {
        "settings": settings,
        "seconds": round(time.perf_counter() - started, 1),
        "epochs": len(result.history.epochs),
        "best_epoch": result.history.best_epoch,
        "share": {task: round(values["share"], 4) for task, values in known.items() if "share" in values},
        "knowable": known,
        "about": who,
    }


# ---------------------------------------------------------------------- shown


def of_runs(results: list[dict[str, Any]]) -> list[Line]:
    """The runs as the other benchmarks have their lines: what was run, and the seed."""
    return [
        {"what": {k: v for k, v in result["settings"].items() if k != "seed"}, "repeat": result["settings"]["seed"],
         "about": None, **{k: v for k, v in result.items() if k != "settings"}}
        for result in results
    ]  # fmt: skip


def named(what: Line) -> str:
    """What a run is."""
    settings = [*what["dial"], *([f"dim={what['dim']}"] if what["dim"] else []), *what["set"]]
    return " ".join([f"{what['world']}, {what['rows']:,} rows, {what['users']:,} × {what['items']:,}", *settings])


def tasks_of(lines: list[Line]) -> list[str]:
    """All that have a share, in their order."""
    return list(dict.fromkeys(task for line in lines for task in line["share"]))


def tables(lines: list[Line]) -> list[Table]:
    """Shares of every run, a line each, and below them what the runs are."""
    rows = [
        [str(number), *(f"{100 * line['share'][task]:.1f} %" if task in line["share"] else "–"
                        for task in tasks_of(lines)), f"{line['seconds'] / 60:.1f}"]
        for number, line in enumerate(lines, start=1)
    ]  # fmt: skip
    runs = "\n".join(f"{n}: {named(line['what'])}, seed {line['repeat']}" for n, line in enumerate(lines, start=1))
    return [Table("Share of what is knowable, test split", ["run", *tasks_of(lines), "minutes"], rows, runs)]


def draw(lines: list[Line], path: Path) -> None:
    """Each run's share by task, as much as the mean over its seeds, with each seed's."""
    runs: dict[str, list[Line]] = {}
    for line in lines:
        runs.setdefault(named(line["what"]), []).append(line)
    tasks = tasks_of(lines)
    drawn, [axis] = figure(wide=max(6.0, 1.2 * len(tasks)), high=3.2 + 0.2 * len(runs))
    for number, (name, of) in enumerate(runs.items()):
        place = 0.6 * ((number + 0.5) / len(runs) - 0.5)
        shares = {task: [100 * line["share"][task] for line in of if task in line["share"]] for task in tasks}
        shares = {task: values for task, values in shares.items() if values}
        at = [tasks.index(task) + place for task in shares]
        [dots] = axis.plot(at, [statistics.mean(of) for of in shares.values()], "o", label=textwrap.fill(name, 110))
        for x, values in zip(at, shares.values(), strict=True):
            axis.plot([x] * len(values), values, "_-", color=dots.get_color(), linewidth=1)
    axis.set_xticks(range(len(tasks)), tasks, fontsize=8)
    axis.axhline(100, color="black", linewidth=0.8)
    axis.set_ylim(min(0.0, axis.get_ylim()[0]), 103)  # below 0 is worse than the base rate
    axis.set_ylabel("share of what is knowable, %", fontsize=8)
    drawn.legend(fontsize=6, frameon=False, loc="outside lower left")
    save(drawn, path)


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing, or show what there is."""
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
    parser.add_argument("--dim", type=int, default=0, help="of the vectors of users and items")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of the YAML: training.epochs=3"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--out", type=Path, help="JSON lines to add to; beside it, .json and .png are of all of them")
    parser.add_argument("--show", type=Path, help="train nothing, print the table of such a file")
    parser.add_argument("--picture", type=Path, help="draw it there (PNG; default: beside --out)")
    options = parser.parse_args(arguments)
    out, results = options.out, []
    if not options.show:
        results = [measured(options)]
        if out:
            with out.open("a") as file:
                file.write(json.dumps(results[0]) + "\n")
        else:
            print(json.dumps(results[0]))
    if kept := options.show or out:
        results = read(kept)
    shown(
        of_runs(results), tables, draw,
        picture=options.picture or (out.with_suffix(".png") if out else None),
        document=out.with_suffix(".json") if out else None,
    )  # fmt: skip


if __name__ == "__main__":
    main()
