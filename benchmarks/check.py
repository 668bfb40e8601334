"""Whether this package is as fast as it was: ratios measured now against stored ones, never times.

    python benchmarks/check.py --store                      # after a change that is meant, on an idle machine
    python benchmarks/check.py                              # 1 where a ratio has become worse by more than the band

The ratios, larger is better: of training, ours over a hand-written TorchRec loop and over plain PyTorch, both of the
middle case's model (`peers.py`); of experts, the other form over the one that the module picks (`experts.py`); of
reading, our batches over pyarrow alone (`input.py`).  All take turns, in three repeats.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import experts
import input as reading
import peers
from measure import CONSOLE, about, median, read

from mtcl_torchrec.evaluation.plain_table import plain_table

HERE = Path(__file__).parent
STORED = HERE / "results" / "ratios.json"
SCRIPTS = {
    "peers": "--case middle --rows 150000 --contenders ours torchrec pytorch",
    "experts": "--sizes 4x256 64x32 --rows 1024 --eager",
    "input": "--rows 500000 --files 5x0 --ways pyarrow batches",
}


def measured(folder: Path, scripts: dict[str, str], repeats: int) -> dict[str, float]:
    """The ratios as they are now.

    Args:
        scripts: name of a script -> its options.

    Raises:
        subprocess.CalledProcessError: a script failed.
    """
    for name, options in scripts.items():
        command = [sys.executable, str(HERE / f"{name}.py"), *options.split(), f"--repeats={repeats}"]
        subprocess.run([*command, f"--out={folder / name}.jsonl"], check=True)
    return {
        **_of_peers(folder / "peers.jsonl"),
        **_of_experts(folder / "experts.jsonl"),
        **_of_input(folder / "input.jsonl"),
    }


def _of_peers(path: Path) -> dict[str, float]:
    found = {}
    for of in peers.by_size(read(path)).values():
        for who in (who for who in of if who != "ours"):
            found[f"training, ours over {who}"] = peers.slower(of["ours"], of[who])
    return found


def _of_experts(path: Path) -> dict[str, float]:
    found = {}
    for of in experts.by_rows(read(path)).values():
        for size, repeated in of.items():
            ms = {form: experts.median_ms(repeated, form, "wall") for form in ("batched", "loop")}
            found[f"experts {size}, the other form over ours"] = sum(ms.values()) / ms[repeated[0]["auto"]] - 1
    return found


def _of_input(path: Path) -> dict[str, float]:
    found = {}
    for key, of in reading.by_file(read(path)).items():
        ratio = median(of["batches"], "rows_per_s") / median(of["pyarrow"], "rows_per_s")
        found[f"reading {key[1]} ids and {key[2]} numbers, batches over pyarrow"] = ratio
    return found


def compare(now: dict[str, float], before: dict[str, float], band: float) -> list[str]:
    """Print both; what has become worse by more than the band, or is not there any more."""
    table = plain_table(f"larger is better; worse by more than {band:.0%} fails", ["", "before", "now"])
    for name in before | now:
        table.add_row(name, *(f"{of[name]:.2f}" if name in of else "" for of in (before, now)))
    CONSOLE.print(table, "")
    return [name for name, ratio in before.items() if not now.get(name, 0.0) >= ratio * (1 - band)]


def main() -> int:
    """Measure, compare or store; 1 where something has become worse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", action="store_true", help="keep what is measured as what later runs must reach")
    parser.add_argument("--ratios", type=Path, default=STORED, help="the file (%(default)s)")
    parser.add_argument(
        "--band", type=float, default=0.25, help="how much worse is still taken for noise (%(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    if not (given.store or given.ratios.exists()):
        parser.error(f"{given.ratios} is not there: --store it first")
    with tempfile.TemporaryDirectory() as folder:
        now = measured(Path(folder), SCRIPTS, given.repeats)
    if given.store:
        given.ratios.parent.mkdir(exist_ok=True)
        given.ratios.write_text(json.dumps({"about": about(), "ratios": now}, indent=1) + "\n")
    worse = compare(now, json.loads(given.ratios.read_text())["ratios"], given.band)
    for name in worse:
        CONSOLE.print(f"WORSE: {name}")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
