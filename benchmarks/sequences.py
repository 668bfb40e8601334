"""What each encoder of histories costs a step, jagged as it trains, beside the same padded to the cap.

    python benchmarks/sequences.py --rows 1024 --mean 20 --cap 50 --dim 32

Forward and backward of the encoder alone, the two ways in turn, medians.  Lengths are geometric, cut at the cap.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
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


def main() -> None:
    """Measure and print one line an encoder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 1024), ("mean", 20), ("cap", 50), ("dim", 32), ("repeats", 11)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    drawn = torch.distributions.Geometric(1 / (args.mean + 1)).sample((args.rows,)).long()
    lengths = drawn.clamp(max=args.cap).to(args.device)
    ages = torch.randint(1, 34, (int(lengths.sum()),), device=args.device)
    print(f"{args.rows} rows of {int(lengths.sum()) / args.rows:.1f} positions on average, cap {args.cap}, "
          f"width {args.dim}, {args.device}")  # fmt: skip
    for name, make in ENCODERS.items():
        jagged, padded = measure(make().to(args.device), lengths, ages if "times" in name else None, args)
        print(f"{name:20} jagged {1e3 * jagged:8.2f} ms   padded {1e3 * padded:8.2f} ms   {padded / jagged:.2f}")


def measure(
    encoder: nn.Module, lengths: torch.Tensor, ages: torch.Tensor | None, args: argparse.Namespace
) -> tuple[float, float]:
    """Median seconds of forward and backward, jagged and padded."""
    encoder.build(args.dim, args.cap, ages=ages is not None)  # type: ignore[operator]
    encoder.to(lengths.device)
    values = torch.randn(int(lengths.sum()), args.dim, device=lengths.device, requires_grad=True)
    candidate = torch.randn(len(lengths), args.dim, device=lengths.device, requires_grad=True)

    def history(padded: bool) -> History:
        jagged = JaggedHistory(values, lengths, args.cap, ages)
        if not padded:
            return jagged
        whole = JaggedHistory(values, lengths, args.cap, asks=False)  # pads to the cap
        of = None if ages is None else whole.padded(ages.unsqueeze(1).float()).squeeze(2).long()
        return PaddedHistory(whole.padded(), lengths, of)

    seconds: dict[bool, list[float]] = {False: [], True: []}
    for repeat in range(args.repeats + 2):
        for padded, taken in seconds.items():
            start = time.perf_counter()
            given = (history(padded), candidate) if encoder.reads_candidate else (history(padded),)
            encoder(*given).square().sum().backward()
            if lengths.is_cuda:
                torch.cuda.synchronize()
            if repeat > 1:
                taken.append(time.perf_counter() - start)
    return statistics.median(seconds[False]), statistics.median(seconds[True])


if __name__ == "__main__":
    main()
