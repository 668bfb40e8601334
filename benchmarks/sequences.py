"""What each encoder of histories costs a step, jagged as it trains, beside the same padded to the cap.

    python benchmarks/sequences.py --out results/sequences.jsonl
    python benchmarks/sequences.py --rows 1024 --mean 20 --cap 50 --dim 32 --encoders din gru --out try.jsonl

Forward and backward of the encoder alone, the two ways in turn, medians of --rounds, each encoder in a process of its
own.  Lengths are geometric, cut at the cap.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from document import Table, ranged
from measure import Line, benchmark, counted, figure, options, save
from torch import nn

from mtcl_torchrec.modules.sequences import DIN, GRU, LSTM, History, JaggedHistory, Mean, PaddedHistory, Transformer

ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "mean": Mean,
    "din": DIN,
    "gru": GRU,
    "lstm": LSTM,
    "transformer": lambda: Transformer(times=False),
    "transformer, times": Transformer,
}


SIZES = {"rows": 1024, "mean": 20, "cap": 50, "dim": 32}


def work(what: Line) -> Line:
    """Both ways of one encoder, in this process."""
    torch.manual_seed(0)
    drawn = torch.distributions.Geometric(1 / (what["mean"] + 1)).sample((what["rows"],)).long()
    lengths = drawn.clamp(max=what["cap"]).to(what["device"])
    ages = torch.randint(1, 34, (int(lengths.sum()),), device=what["device"])
    encoder = ENCODERS[what["encoder"]]().to(what["device"])
    jagged, padded = measure(encoder, lengths, ages if "times" in what["encoder"] else None, what)
    return {"jagged_ms": 1000 * jagged, "padded_ms": 1000 * padded, "times_as_fast": padded / jagged,
            "positions": int(lengths.sum()) / what["rows"]}  # fmt: skip


def measure(encoder: nn.Module, lengths: torch.Tensor, ages: torch.Tensor | None, what: Line) -> tuple[float, float]:
    """Median seconds of forward and backward, jagged and padded."""
    encoder.build(what["dim"], what["cap"], ages=ages is not None)  # type: ignore[operator]
    encoder.to(lengths.device)
    values = torch.randn(int(lengths.sum()), what["dim"], device=lengths.device, requires_grad=True)
    candidate = torch.randn(len(lengths), what["dim"], device=lengths.device, requires_grad=True)

    def history(padded: bool) -> History:
        jagged = JaggedHistory(values, lengths, what["cap"], ages)
        if not padded:
            return jagged
        whole = JaggedHistory(values, lengths, what["cap"], asks=False)  # pads to the cap
        of = None if ages is None else whole.padded(ages.unsqueeze(1).float()).squeeze(2).long()
        return PaddedHistory(whole.padded(), lengths, of)

    seconds: dict[bool, list[float]] = {False: [], True: []}
    for repeat in range(what["rounds"] + 2):
        for padded, taken in seconds.items():
            start = time.perf_counter()
            given = (history(padded), candidate) if encoder.reads_candidate else (history(padded),)
            encoder(*given).square().sum().backward()
            if lengths.is_cuda:
                torch.cuda.synchronize()
            if repeat > 1:
                taken.append(time.perf_counter() - start)
    return statistics.median(seconds[False]), statistics.median(seconds[True])


def by_encoder(lines: list[Line]) -> dict[str, list[Line]]:
    """Encoder -> repeats."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(line["what"]["encoder"], []).append(line)
    return groups


def tables(lines: list[Line]) -> list[Table]:
    """A row for each encoder."""
    what, cells = lines[0]["what"], []
    for name, of in by_encoder(lines).items():
        values = [[line[figure] for line in of] for figure in ("times_as_fast", "jagged_ms", "padded_ms")]
        cells.append([name, *map(ranged, values)])
    title = (
        f"histories: {what['rows']:,} rows of {lines[0]['positions']:.1f} positions on average, cap {what['cap']}, "
        f"width {what['dim']}, {what['device']}"
    )
    return [Table(title, ["", "jagged is … times as fast", "jagged ms", "padded ms"], cells)]


def draw(lines: list[Line], path: Path) -> None:
    """How many times as fast, by encoder."""
    drawn, (axis,) = figure(wide=5.6)
    groups = by_encoder(lines)
    values = [statistics.median(line["times_as_fast"] for line in of) for of in groups.values()]
    axis.bar_label(axis.bar(list(groups), values), fmt="%.1f", fontsize=8)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.tick_params(axis="x", labelsize=8, rotation=20)
    axis.set_ylabel("time padded / time jagged", fontsize=8)
    save(drawn, path)


def main() -> int:
    """Measure what is missing, print the table, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=counted, default=default, help="(%(default)s)")
    parser.add_argument("--rounds", type=counted, default=11, help="of both ways (%(default)s)")
    parser.add_argument("--encoders", nargs="+", choices=list(ENCODERS), default=list(ENCODERS), metavar="ENCODER")
    parser.add_argument("--device", default="cpu")
    options(parser, repeats=3, timeout_s=300)
    given = parser.parse_args()
    same = {name: getattr(given, name) for name in (*SIZES, "rounds", "device", "threads")}
    todo = [{"encoder": name} | same for name in given.encoders]
    return benchmark(parser, given, work=work, todo=lambda: todo, tables=tables, draw=draw)


if __name__ == "__main__":
    sys.exit(main())
