"""What more ranks bring: weak scaling (as many rows a rank), strong scaling (as many rows in all), and what they send.

    python benchmarks/scaling.py --out results/scaling.jsonl
    python benchmarks/scaling.py --ranks 1 2 --steps 5 --vocabulary 1000 --batch-size 64 --out try.jsonl

Ranks are processes of this machine on the setting of `training.py`: with a GPU each, talking by NCCL, where the machine
has one for every rank (--device auto), else of one thread each, talking by gloo.  All sizes take turns.  "times as
fast" is samples/s over those of the fewest ranks, repeat by repeat; "efficiency" divides that by how many times as many
ranks there are.  More ranks than cores cannot be faster: they show what communication costs.

Bytes between ranks in a step are counted while one runs, and beside it stands what they must be by the sharding plan
(`volume.py`); nothing of them depends on the machine.  `scaling_paper.py` has clusters that are not there.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import training
from document import Table, median, ranged, ratios
from measure import Line, benchmark, counted, figure, options, save
from volume import PARTS

KINDS = ("weak", "strong")


def todo(given: argparse.Namespace) -> list[Line]:
    """All sizes of both kinds; the same size of both is measured once a kind."""
    found = []
    for kind in given.kind:
        for n in given.ranks:
            rows = given.batch_size if kind == "weak" else given.batch_size // n
            setting = training.Setting(
                vocabulary=given.vocabulary, batch_size=rows, steps=given.steps, warmup_steps=given.warmup_steps,
                apart_steps=given.apart_steps, sharding=given.sharding, table_optimizer=given.table_optimizer,
                device=given.device,
            )  # fmt: skip
            found.append({"kind": kind, "ranks": n, "setting": asdict(setting)})
    return found


def device_for(asked: str, most: int) -> str:
    """``cuda`` where it is asked for, or where there is a GPU for each of the most ranks; else ``cpu``.

    Raises:
        ValueError: it is asked for, and there are fewer GPUs.
    """
    gpus = torch.cuda.device_count()
    if asked == "cuda" and gpus < most:
        raise ValueError(f"--device cuda: {most} ranks need as many GPUs, and this machine has {gpus}")
    return "cuda" if asked == "cuda" or (asked == "auto" and gpus >= most) else "cpu"


def by_kind(lines: list[Line]) -> dict[tuple[str, str, str], dict[int, list[Line]]]:
    """(kind, sharding, device) -> ranks -> repeats."""
    groups: dict[tuple[str, str, str], dict[int, list[Line]]] = {}
    for line in sorted(lines, key=lambda of: of["what"]["ranks"]):
        what = line["what"]
        key = (what["kind"], what["setting"]["sharding"], what["setting"]["device"])
        groups.setdefault(key, {}).setdefault(what["ranks"], []).append(line)
    return groups


def _processors(line: Line) -> tuple[int, str]:
    """How many there are, and of what kind."""
    if line["what"]["setting"]["device"] == "cuda":
        return line["about"]["gpus"], "GPUs"
    return line["about"]["cores"], "cores"


def tables(lines: list[Line]) -> list[Table]:
    """A table for each kind, and one of what was sent."""
    found = []
    for (kind, sharding, device), of in by_kind(lines).items():
        fewest, setting = min(of), of[min(of)][0]["what"]["setting"]
        cells = []
        for n, repeated in of.items():
            faster = ratios(repeated, of[fewest], "samples_per_s")
            sent = median([{"mb": sum(line["sent_bytes"].values()) / 1e6} for line in repeated], "mb")
            cells.append([
                f"{n} × {repeated[0]['what']['setting']['batch_size']:,} rows", ranged(faster),
                ranged([100 * r * fewest / n for r in faster], ".0f"), f"{median(repeated, 'samples_per_s'):,.0f}",
                f"{median([r['step_ms'] for r in repeated], 'median'):,.1f}", f"{sent:,.2f}",
                f"{median(repeated, 'peak_rss_bytes') / 1e9:.2f}",
            ])  # fmt: skip
        heads = ["ranks", "times as fast", "efficiency %", "samples/s", "ms a step", "MB sent a step", "peak GB a rank"]
        title = f"{kind} scaling: tables of {setting['vocabulary']:,} rows, dim {setting['dim']}, sharding {sharding}"
        note = "On {} {}, by {}.".format(*_processors(of[fewest][0]), "NCCL" if device == "cuda" else "gloo")
        found.append(Table(title, heads, cells, note))
        found.append(_sent(kind, of))
    return found


def _sent(kind: str, of: dict[int, list[Line]]) -> Table:
    heads = ["part", *(f"{n} ranks" for n in of if n > 1)]
    several = {n: repeated[0] for n, repeated in of.items() if n > 1}
    cells = []
    for part in PARTS:
        of_part = [part]
        for line in several.values():
            computed = (line["computed_bytes"] or {}).get(part)
            beside = "" if computed is None else f" ({computed / 1e6:,.3f})"
            of_part.append(f"{line['sent_bytes'].get(part, 0.0) / 1e6:,.3f}{beside}")
        cells.append(of_part)
    return Table(f"{kind} scaling: MB between ranks in a step, counted (by formula)", heads, cells)


def draw(lines: list[Line], path: Path) -> None:
    """How many times as fast, by ranks, beside as many times as there are ranks."""
    groups = by_kind(lines)
    drawn, axes = figure(wide=3.8 * len(groups), high=3.2, columns=len(groups))
    for axis, ((kind, *_), of) in zip(axes, groups.items(), strict=True):
        numbers = list(of)
        axis.plot(numbers, [n / numbers[0] for n in numbers], ":", color="grey", label="as many times as ranks")
        axis.plot(numbers, [median([{"r": r} for r in ratios(of[n], of[numbers[0]], "samples_per_s")], "r")
                            for n in numbers], marker="o", label="measured")  # fmt: skip
        number, name = _processors(of[numbers[0]][0])
        axis.axvline(number, color="black", linewidth=0.6, linestyle="--", label=f"as many as {name}")
        axis.set_title(f"{kind} scaling, {number} {name}", fontsize=9)
        axis.set_xticks(numbers)
        axis.set_ylim(0, None)
        axis.set_xlabel("ranks", fontsize=8)
        axis.legend(fontsize=7, frameon=False)
    axes[0].set_ylabel("samples/s over those of the fewest ranks", fontsize=8)
    save(drawn, path)


def main() -> int:
    """Measure what is missing, print the tables, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--ranks", type=counted, nargs="+", default=[1, 2, 4], help="(%(default)s)")
    parser.add_argument("--vocabulary", type=counted, default=1_000_000, help="users, and as many items (%(default)s)")
    parser.add_argument("--batch-size", type=counted, default=4096, help="rows of a rank; strong: of all (%(default)s)")
    parser.add_argument("--steps", type=counted, default=30, help="that are measured (%(default)s)")
    parser.add_argument("--warmup-steps", type=counted, default=5)
    parser.add_argument("--apart-steps", type=counted, default=2)
    parser.add_argument("--sharding", choices=["auto", "table_wise", "row_wise", "column_wise", "data_parallel"],
                        default="auto")  # fmt: skip
    parser.add_argument("--table-optimizer", choices=["rowwise_adagrad", "adagrad", "sgd"], default="rowwise_adagrad")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    options(parser, repeats=3, timeout_s=600)
    given = parser.parse_args()
    odd = [n for n in given.ranks if given.batch_size % n]
    if "strong" in given.kind and odd:
        parser.error(f"--batch-size {given.batch_size}: strong scaling shares it out, and {odd[0]} does not divide it")
    try:
        given.device = device_for(given.device, max(given.ranks))
    except ValueError as error:
        parser.error(str(error))
    return benchmark(
        parser, given, work=training.work, todo=lambda: todo(given), tables=tables, draw=draw,
        one=lambda what: training.started(what, timeout_s=given.timeout, threads=given.threads),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
