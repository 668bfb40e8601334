"""What more ranks bring: weak scaling (as many rows a rank), strong scaling (as many rows in all), and what they send.

    python benchmarks/scaling.py --out results/scaling.jsonl
    python benchmarks/scaling.py --ranks 1 2 --steps 5 --vocabulary 1000 --batch-size 64 --out try.jsonl

Ranks are processes of this machine that talk by gloo, one thread each, on the setting of `training.py`; all sizes take
turns.  "times as fast" is samples/s over those of the fewest ranks, repeat by repeat; "efficiency" divides that by how
many times as many ranks there are.  More ranks than cores cannot be faster: they show what communication costs.

Bytes between ranks in a step are counted while one runs, and beside it stands what they must be by the sharding plan
(`volume.py`); nothing of them depends on the machine.  `scaling_paper.py` has clusters that are not there.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import training
from document import Table, median, ranged, ratios
from measure import Line, benchmark, figure, options, save
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
                device="cpu",
            )  # fmt: skip
            found.append({"kind": kind, "ranks": n, "setting": asdict(setting)})
    return found


def by_kind(lines: list[Line]) -> dict[tuple[str, str], dict[int, list[Line]]]:
    """(kind, sharding) -> ranks -> repeats."""
    groups: dict[tuple[str, str], dict[int, list[Line]]] = {}
    for line in sorted(lines, key=lambda of: of["what"]["ranks"]):
        what = line["what"]
        groups.setdefault((what["kind"], what["setting"]["sharding"]), {}).setdefault(what["ranks"], []).append(line)
    return groups


def tables(lines: list[Line]) -> list[Table]:
    """A table for each kind, and one of what was sent."""
    found = []
    for (kind, sharding), of in by_kind(lines).items():
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
        found.append(Table(title, heads, cells, f"On {of[fewest][0]['about']['cores']} cores."))
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
    for axis, ((kind, _), of) in zip(axes, groups.items(), strict=True):
        numbers = list(of)
        axis.plot(numbers, [n / numbers[0] for n in numbers], ":", color="grey", label="as many times as ranks")
        axis.plot(numbers, [median([{"r": r} for r in ratios(of[n], of[numbers[0]], "samples_per_s")], "r")
                            for n in numbers], marker="o", label="measured")  # fmt: skip
        cores = of[numbers[0]][0]["about"]["cores"]
        axis.axvline(cores, color="black", linewidth=0.6)
        axis.set_title(f"{kind}; {cores} cores", fontsize=9)
        axis.set_xticks(numbers)
        axis.set_xlabel("ranks", fontsize=8)
        axis.legend(fontsize=7, frameon=False)
    axes[0].set_ylabel("samples/s, times those of the fewest", fontsize=8)
    save(drawn, path)


def main() -> int:
    """Measure what is missing, print the tables, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="(%(default)s)")
    parser.add_argument("--vocabulary", type=int, default=1_000_000, help="users, and as many items (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=4096, help="rows of a rank; strong: of all (%(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="that are measured (%(default)s)")
    parser.add_argument("--warmup-steps", type=int, default=5)
    parser.add_argument("--apart-steps", type=int, default=2)
    parser.add_argument("--sharding", choices=["auto", "table_wise", "row_wise", "column_wise", "data_parallel"],
                        default="auto")  # fmt: skip
    parser.add_argument("--table-optimizer", choices=["rowwise_adagrad", "adagrad", "sgd"], default="rowwise_adagrad")
    options(parser, repeats=3, timeout_s=600)
    given = parser.parse_args()
    return benchmark(
        parser, given, work=training.work, todo=lambda: todo(given), tables=tables, draw=draw,
        one=lambda what: training.started(what, timeout_s=given.timeout, threads=given.threads),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
