"""Experts computed together against experts computed one after the other: forward and backward, eager and compiled.

    python benchmarks/experts.py --out results/experts.jsonl
    python benchmarks/experts.py --rows 4096 --sizes 4x256 64x32 --eager --out try.jsonl

Each size E × H is E experts of two layers, H and H/2, that read one input.  Both forms have the same parameters and
take turns in one process; `auto` is the form that the module takes by itself.  `cpu` is processor time of all threads.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from document import Table, median, ranged
from measure import Line, alternate, benchmark, counted, figure, options, save

from mtcl_torchrec.modules.experts import BatchedExperts

SIZES = ("4x512", "4x256", "8x256", "8x128", "16x128", "16x64", "32x64", "32x32", "64x32")


def work(what: Line) -> Line:
    """Time both forms of one size in this process."""
    torch.manual_seed(0)
    experts, width = what["experts"], what["width"]
    x = torch.randn(what["rows"], what["input"], device=what["device"], requires_grad=True)
    direction = torch.randn(experts, what["rows"], max(width // 2, 1), device=what["device"])
    forms = {
        form: BatchedExperts(what["input"], [width, max(width // 2, 1)], experts, form=form).to(what["device"])
        for form in ("batched", "loop")
    }
    calls = {form: _step(module, x, direction) for form, module in forms.items()}
    if what["compile"]:
        calls |= {f"{form} compiled": _step(torch.compile(module), x, direction) for form, module in forms.items()}
    auto = BatchedExperts(what["input"], [width, max(width // 2, 1)], experts).to(what["device"])
    return {"ms": alternate(calls, what["rounds"]), "auto": "loop" if auto._one_by_one(x) else "batched"}


def _step(module: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, direction: torch.Tensor) -> Any:
    def step() -> None:
        x.grad = None
        module(x).backward(direction)

    return step


# ---------------------------------------------------------------------- shown


def tables(lines: list[Line]) -> list[Table]:
    """A table for each number of rows, in it a row for each size."""
    heads = ["E × H", "time of batched over loop", "cpu", "auto takes", "batched ms", "loop ms",
             "compiled: batched over loop", "batched ms", "loop ms"]  # fmt: skip
    found = []
    for (rows, width, device, threads), of in by_rows(lines).items():
        cells = [
            [size, ratio(repeated, "", "wall"), ratio(repeated, "", "cpu"), repeated[0]["auto"],
             *times(repeated, ""), ratio(repeated, " compiled", "wall"), *times(repeated, " compiled")]
            for size, repeated in of.items()
        ]  # fmt: skip
        compiled = any(row[-1] for row in cells)
        title = f"experts: {rows:,} rows of width {width}, forward and backward, {device}"
        title += f", threads: {threads or 'default'}"
        found.append(Table(title, heads if compiled else heads[:-3], [c if compiled else c[:-3] for c in cells]))
    return found


def ratio(repeated: list[Line], kind: str, clock: str) -> str:
    """Batched over loop, repeat by repeat; kind is empty or `` compiled``.  Empty where it was not measured."""
    of = [line["ms"] for line in repeated if f"loop{kind}" in line["ms"]]
    return ranged([ms[f"batched{kind}"][clock] / max(ms[f"loop{kind}"][clock], 1e-9) for ms in of])


def times(repeated: list[Line], kind: str) -> list[str]:
    """Milliseconds of both forms."""
    forms = (f"batched{kind}", f"loop{kind}")
    return [f"{median_ms(repeated, form, 'wall'):.1f}" if form in repeated[0]["ms"] else "" for form in forms]


def by_rows(lines: list[Line]) -> dict[tuple[Any, ...], dict[str, list[Line]]]:
    """Rows, input, device, threads -> size -> repeats."""
    groups: dict[tuple[Any, ...], dict[str, list[Line]]] = {}
    for line in lines:
        what = line["what"]
        key = tuple(what[name] for name in ("rows", "input", "device", "threads"))
        groups.setdefault(key, {}).setdefault(f"{what['experts']} × {what['width']}", []).append(line)
    return groups


def median_ms(repeated: list[Line], form: str, clock: str) -> float:
    """Of the repeats; clock is wall or cpu."""
    return median([{"ms": line["ms"][form][clock]} for line in repeated], "ms")


def draw(lines: list[Line], path: Path) -> None:
    """How many times as fast the loop is, by size; what the module takes by itself is marked."""
    groups = by_rows(lines)
    drawn, axes = figure(wide=5.2 * len(groups), high=3.2, columns=len(groups))
    for axis, (key, of) in zip(axes, groups.items(), strict=True):
        kinds = [kind for kind in ("", " compiled") if any(f"loop{kind}" in r[0]["ms"] for r in of.values())]
        for number, kind in enumerate(kinds):
            found = {size: repeated for size, repeated in of.items() if f"loop{kind}" in repeated[0]["ms"]}
            values = [
                median_ms(repeated, f"batched{kind}", "wall") / median_ms(repeated, f"loop{kind}", "wall")
                for repeated in found.values()
            ]
            places = [list(of).index(size) + 0.4 * (number - (len(kinds) - 1) / 2) for size in found]
            axis.bar(places, values, width=0.38, label=kind.strip() or "eager")
        axis.axhline(1, color="black", linewidth=0.8)
        marks = [f"{size}\n{repeated[0]['auto']}" for size, repeated in of.items()]
        axis.set_xticks(range(len(of)), marks, fontsize=7)
        axis.set_title(f"{key[0]:,} rows, {key[2]}", fontsize=9)
        axis.set_ylabel("time of batched / time of loop", fontsize=8)
        axis.legend(fontsize=7, frameon=False)
    save(drawn, path)


def main() -> int:
    """Measure what is missing, print the table, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=_size, default=[_size(size) for size in SIZES], metavar="ExH",
                        help=f"experts x width of their first layer ({' '.join(SIZES)})")  # fmt: skip
    parser.add_argument("--rows", type=counted, nargs="+", default=[512, 4096], help="of a batch (%(default)s)")
    parser.add_argument("--input", type=counted, default=80, help="width of the input (%(default)s)")
    parser.add_argument("--rounds", type=counted, default=15, help="of each form (%(default)s)")
    parser.add_argument("--eager", action="store_true", help="nothing compiled")
    parser.add_argument("--device", default="cpu")
    options(parser, repeats=3, timeout_s=600)
    given = parser.parse_args()
    return benchmark(parser, given, work=work, todo=lambda: _todo(given), tables=tables, draw=draw)


def _todo(given: argparse.Namespace) -> list[Line]:
    same = {"input": given.input, "rounds": given.rounds, "device": given.device, "compile": not given.eager,
            "threads": given.threads}  # fmt: skip
    return [{"experts": e, "width": h, "rows": rows} | same for rows in given.rows for e, h in given.sizes]


def _size(text: str) -> tuple[int, int]:
    experts, _, width = text.partition("x")
    return counted(experts), counted(width)


if __name__ == "__main__":
    sys.exit(main())
