"""Whether this package is as fast as it was: ratios measured now against stored ones, never times.

    python benchmarks/check.py --store                      # after a change that is meant, on an idle machine
    python benchmarks/check.py                              # 1 where a ratio has become worse by more than the band

`make bench-check` runs it, ``make bench-check BENCH=--store`` stores.  The ratios, larger is better: of training, ours
over a hand-written TorchRec loop and over plain PyTorch, both of the middle case's model (`peers.py`); of experts, the
other form over the one that the module picks (`experts.py`); of reading, our batches over pyarrow alone (`input.py`);
of memory, the peak of few rows over that of many (`memory.py`).  All take turns, in three repeats.  A script that fails
loses its own ratios alone, and these count as worse.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import experts
import input as reading
import memory
import peers
from document import CONSOLE, Line, Table, median, ratios
from measure import about, read

HERE = Path(__file__).parent
STORED = HERE / "results" / "ratios.json"
SCRIPTS = {
    "peers": "--case middle --rows 150000 --contenders ours torchrec pytorch",
    "experts": "--sizes 4x256 64x32 --rows 1024 --eager",
    "input": "--rows 500000 --files 5x0 --ways pyarrow batches",
    "memory": "--rows 500000 2000000",
}


def measured(folder: Path, scripts: dict[str, str], repeats: int) -> dict[str, float]:
    """The ratios as they are now; none of a script that has failed.

    Args:
        scripts: name of a script -> its options.
    """
    for name, options in scripts.items():
        command = [sys.executable, str(HERE / f"{name}.py"), *options.split(), f"--repeats={repeats}"]
        if subprocess.run([*command, f"--out={folder / name}.jsonl"], check=False).returncode:
            CONSOLE.print(f"FAILED: {' '.join(command)}", markup=False)
    found: dict[str, float] = {}
    for name, ratios_of in OF.items():
        found |= ratios_of(read(folder / f"{name}.jsonl"))
    return found


def _of_peers(lines: list[Line]) -> dict[str, float]:
    found = {}
    for of in peers.by_size(lines).values():
        for who in (who for who in of if who != "ours"):
            if faster := ratios(of.get("ours", []), of[who], "from_file_per_s"):
                found[f"training, ours over {who}"] = statistics.median(faster)
    return found


def _of_experts(lines: list[Line]) -> dict[str, float]:
    found = {}
    for of in experts.by_rows(lines).values():
        for size, repeated in of.items():
            ms = {form: experts.median_ms(repeated, form, "wall") for form in ("batched", "loop")}
            found[f"experts {size}, the other form over ours"] = sum(ms.values()) / ms[repeated[0]["auto"]] - 1
    return found


def _of_input(lines: list[Line]) -> dict[str, float]:
    found = {}
    for key, of in reading.by_file(lines).items():
        if {"batches", "pyarrow"} <= of.keys():
            ratio = median(of["batches"], "rows_per_s") / median(of["pyarrow"], "rows_per_s")
            found[f"reading {key[1]} ids and {key[2]} numbers, batches over pyarrow"] = ratio
    return found


def _of_memory(lines: list[Line]) -> dict[str, float]:
    found = {}
    for case, of in memory.by_case(lines).items():
        few, many = min(of), max(of)
        if few < many:
            ratio = median(of[few], "peak_rss_bytes") / median(of[many], "peak_rss_bytes")
            found[f"memory, {case}: {few:,} rows over {many:,}"] = ratio
    return found


RATIOS = 6  # of all scripts
OF = {"peers": _of_peers, "experts": _of_experts, "input": _of_input, "memory": _of_memory}


def compare(now: dict[str, float], before: dict[str, float], band: float) -> list[str]:
    """Print both; what has become worse by more than the band, or is not there any more."""
    cells = [[name, *(f"{of[name]:.2f}" if name in of else "" for of in (before, now))] for name in before | now]
    Table(f"larger is better; worse by more than {band:.0%} fails", ["", "before", "now"], cells).print()
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
        if len(now) < RATIOS:
            parser.error(f"nothing is stored: {len(now)} of {RATIOS} ratios were measured")
        given.ratios.parent.mkdir(exist_ok=True)
        given.ratios.write_text(json.dumps({"about": about(), "ratios": now}, indent=1) + "\n")
    worse = compare(now, json.loads(given.ratios.read_text())["ratios"], given.band)
    for name in worse:
        CONSOLE.print(f"WORSE: {name}")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
