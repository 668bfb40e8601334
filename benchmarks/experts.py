"""Experts computed together against experts computed one after the other: forward and backward, eager and compiled.

    python benchmarks/experts.py --out results/experts.jsonl --picture results/experts.png
    python benchmarks/experts.py --rows 4096 --sizes 4x256 64x32 --eager --out try.jsonl

Each size E × H is E experts of two layers, H and H/2, that read one input.  Both forms have the same parameters and
take turns in one process; `auto` is the form that the module takes by itself.  `cpu` is processor time of all threads.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import CONSOLE, Line, alternate, carry_out, figure, in_process, median, options, said, save, sweep

from mtcl_torchrec.evaluation.plain_table import plain_table
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


def show(lines: list[Line]) -> None:
    """A row for each size."""
    for of in by_rows(lines).values():
        first = next(iter(of.values()))[0]["what"]
        title = f"{first['rows']:,} rows of width {first['input']}, forward and backward, {first['device']}, ms"
        table = plain_table(title, ["E × H", "batched", "loop", "batched / loop", "by cpu", "auto", "compiled: batched",
                                    "loop"])  # fmt: skip
        for size, repeated in of.items():
            ms = {form: median_ms(repeated, form, "wall") for form in repeated[0]["ms"]}
            cpu = {form: median_ms(repeated, form, "cpu") for form in repeated[0]["ms"]}
            table.add_row(
                size, f"{ms['batched']:.1f}", f"{ms['loop']:.1f}", f"{ms['batched'] / ms['loop']:.2f}",
                f"{cpu['batched'] / max(cpu['loop'], 1e-9):.2f}", repeated[0]["auto"],
                *(f"{ms[form]:.1f}" if form in ms else "" for form in ("batched compiled", "loop compiled")),
            )  # fmt: skip
        CONSOLE.print(table, "")
    CONSOLE.print(said(lines))


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
        forms = [("eager", "batched", "loop"), ("compiled", "batched compiled", "loop compiled")]
        for number, (name, one, other) in enumerate(forms):
            found = {size: repeated for size, repeated in of.items() if one in repeated[0]["ms"]}
            values = [
                median_ms(repeated, one, "wall") / median_ms(repeated, other, "wall") for repeated in found.values()
            ]
            places = [list(of).index(size) + 0.4 * number - 0.2 for size in found]
            axis.bar(places, values, width=0.38, label=name)
        axis.axhline(1, color="black", linewidth=0.8)
        marks = [f"{size}\n{repeated[0]['auto']}" for size, repeated in of.items()]
        axis.set_xticks(range(len(of)), marks, fontsize=7)
        axis.set_title(f"{key[0]:,} rows, {key[2]}", fontsize=9)
        axis.set_ylabel("time of batched / time of loop", fontsize=8)
        axis.legend(fontsize=7, frameon=False)
    save(drawn, path)


def main() -> None:
    """Measure what is missing, print the table, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), metavar="ExH")
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 4096], help="of a batch (%(default)s)")
    parser.add_argument("--input", type=int, default=80, help="width of the input (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="of each form (%(default)s)")
    parser.add_argument("--eager", action="store_true", help="nothing compiled")
    parser.add_argument("--device", default="cpu")
    options(parser, repeats=3, timeout_s=600)
    given = parser.parse_args()
    carry_out(parser, given, work=work, measured=lambda: _measured(given), show=show, draw=draw)


def _measured(given: argparse.Namespace) -> list[Line]:
    sizes = [tuple(map(int, size.split("x"))) for size in given.sizes]
    todo = [
        {"experts": e, "width": h, "rows": rows, "input": given.input, "rounds": given.rounds, "device": given.device,
         "compile": not given.eager, "threads": given.threads}
        for rows in given.rows for e, h in sizes
    ]  # fmt: skip
    script = Path(__file__).resolve()
    return sweep(
        given.out, todo, given.repeats,
        lambda what: in_process(script, what, timeout_s=given.timeout, threads=given.threads),
    )  # fmt: skip


if __name__ == "__main__":
    main()
