"""Quality of the demo's model on KuaiRand-Pure: mean and spread over seeds, for one trunk or several.

python benchmarks/kuairand_quality.py                           # the README's figures: MMoE, seeds 0 1 2
python benchmarks/kuairand_quality.py --trunks mmoe ple shared_bottom single_task --out quality.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torchrec
from rich.console import Console

from mtcl_torchrec.config import RunConfig, TrunkConfig, parse_run
from mtcl_torchrec.data import kuairand
from mtcl_torchrec.evaluation.plain_table import plain_table
from mtcl_torchrec.training.run import train_run

EVENTS = ("click", "long_view", "like")


def configured(folder: Path, trunk: str, seed: int) -> RunConfig:
    """The demo's run with another trunk of similar size and another seed."""
    run = parse_run(kuairand.example_run(), folder=folder)
    run.training.seed = seed
    demo = run.model.trunk
    if trunk != demo.kind:
        run.model.trunk = TrunkConfig.model_validate(
            {"kind": trunk, "expert_layers": demo.expert_layers, "dropout": demo.dropout}
        )
    return run


def main() -> None:
    """Train, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    kinds = ["mmoe", "ple", "shared_bottom", "single_task"]
    parser.add_argument("--trunks", nargs="+", default=["mmoe"], choices=kinds)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    console, results = Console(), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        kuairand.write(folder / "data")
        for trunk in arguments.trunks:
            for seed in arguments.seeds:
                started = time.perf_counter()
                run = configured(folder, trunk, seed)
                done = train_run(run, folder / f"{trunk}-{seed}", device="cpu", console=Console(quiet=True))
                figures = {
                    split: {event: evaluation.tasks[event]["auc"] for event in EVENTS}
                    for split, evaluation in done.evaluations.items()
                }
                seconds = time.perf_counter() - started
                results.append({"trunk": trunk, "seed": seed, "seconds": round(seconds, 1), **figures})
                console.print(f"{trunk} seed {seed}: {seconds:.0f} s", figures["test"], highlight=False)
    table = plain_table("AUC, mean ± standard deviation over seeds", ["trunk", "split", *EVENTS])
    for trunk in arguments.trunks:
        for split in ("val", "test"):
            cells = []
            for event in EVENTS:
                values = [r[split][event] for r in results if r["trunk"] == trunk]
                spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.4f}{spread}")
            table.add_row(trunk, split, *cells)
    console.print(table)
    if arguments.out:
        about = {
            "machine": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "torchrec": torchrec.__version__,
        }
        arguments.out.write_text(json.dumps({"about": about, "runs": results}, indent=1))


if __name__ == "__main__":
    main()
