"""Whether this package is as fast as it was: ratios measured now against stored ones, never times.

    python benchmarks/check.py --store                      # after a change that is meant, on an idle machine
    python benchmarks/check.py                              # 1 where a ratio has become worse by more than the band

`make bench-check` runs it, ``make bench-check BENCH=--store`` stores. The ratios, larger is better: of training, ours
over a hand-written TorchRec loop and over plain PyTorch, both of the middle case's model, and ours in bf16 over the
TorchRec loop where the processor is fast in it (`peers.py`); of experts, the other form over the one that the module
picks (`experts.py`); of reading, our batches over pyarrow alone (`input.py`); of memory, the peak of few rows over that
of many (`memory.py`); of ranks, two over one (`scaling.py`); of serving, the int8 export over the model as it is
(`serving.py`). All take turns, in three repeats. A script that fails loses its own ratios alone, and these count as
worse. What has become better by more than the band, or has no mark, is named: its mark holds nothing until it is
stored. Ratios are of a processor, too: on another one than they were stored on, store them first.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import experts
import input as reading
import memory
import peers
import scaling
import serving
from document import CONSOLE, Line, Table, median, ratios
from measure import about, counted, read

HERE = Path(__file__).parent
STORED = HERE / "results" / "ratios.json"
BF16 = "training, ours_bf16 over torchrec"
SCRIPTS = {
    "peers": "--case middle --rows 150000 --contenders ours torchrec pytorch",  # and ours_bf16, see `fit`
    "experts": "--sizes 4x256 64x32 --rows 1024 --eager",
    "input": "--rows 500000 --files 5x0 --ways pyarrow batches",
    "memory": "--rows 500000 2000000",
    "scaling": "--ranks 1 2 --kind weak --vocabulary 100000 --steps 10 --device cpu",
    "serving": "--train-rows 3000 --tables int8 --compiled no --times 60",
}


def fit() -> dict[str, str]:
    """The scripts with the options that this machine is fit for."""
    bf16 = " ours_bf16" if "ours_bf16" in peers.faster() else ""
    return SCRIPTS | {"peers": SCRIPTS["peers"] + bf16}


def measured(folder: Path, scripts: dict[str, str], repeats: int) -> tuple[dict[str, float], list[str]]:
    """The ratios as they are now, and the scripts that have failed, of which there may be none.

    Args:
        scripts: name of a script -> its options.
    """
    failed = []
    for name, options in scripts.items():
        command = [sys.executable, str(HERE / f"{name}.py"), *options.split(), f"--repeats={repeats}"]
        if subprocess.run([*command, f"--out={folder / name}.jsonl"], check=False).returncode:
            CONSOLE.print(f"FAILED: {' '.join(command)}", markup=False)
            failed.append(name)
    found: dict[str, float] = {}
    for name, ratios_of in OF.items():
        found |= ratios_of(read(folder / f"{name}.jsonl"))
    return found, failed


def better(now: dict[str, float], before: dict[str, float], band: float) -> list[str]:
    """What the stored marks no longer hold: ratios that are better by more than the band, or that have no mark."""
    return [
        f"{name}: {f'{before[name]:.2f} before' if name in before else 'no mark'}, {ratio:.2f} now"
        for name, ratio in now.items() if name not in before or ratio * (1 - band) > before[name]
    ]  # fmt: skip


def _of_peers(lines: list[Line]) -> dict[str, float]:
    found = {}
    for of in peers.by_size(lines).values():
        pairs = [("ours", who) for who in of if not who.startswith("ours")] + [("ours_bf16", "torchrec")]
        for ours, who in pairs:
            if faster := ratios(of.get(ours, []), of.get(who, []), "from_file_per_s"):
                found[f"training, {ours} over {who}"] = statistics.median(faster)
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


def _of_scaling(lines: list[Line]) -> dict[str, float]:
    found = {}
    for (kind, *_), of in scaling.by_kind(lines).items():
        for ranks in sorted(of)[1:]:
            if faster := ratios(of[ranks], of[min(of)], "samples_per_s"):
                found[f"{kind} scaling, {ranks} ranks over {min(of)}"] = statistics.median(faster)
    return found


def _of_serving(lines: list[Line]) -> dict[str, float]:
    of = serving.by_way(lines)
    return {
        f"serving, {way} over {serving.EAGER}": statistics.median(faster)
        for way in of
        if way != serving.EAGER and (faster := ratios(of[way], of.get(serving.EAGER, []), "candidates_per_s"))
    }


OF = {
    "peers": _of_peers, "experts": _of_experts, "input": _of_input, "memory": _of_memory, "scaling": _of_scaling,
    "serving": _of_serving,
}  # fmt: skip


def compare(now: dict[str, float], before: dict[str, float], band: float) -> list[str]:
    """Print both; a line for each that has become worse by more than the band, or is not there any more."""
    cells = []
    for name in before | now:
        both = f"{now[name] / before[name]:.2f}" if name in now and name in before else ""
        cells.append([name, *(f"{of[name]:.2f}" if name in of else "" for of in (before, now)), both])
    Table(f"larger is better; worse by more than {band:.0%} fails", ["", "before", "now", "now/before"], cells).print()
    worse = []
    for name, ratio in before.items():
        if name not in now:
            worse.append(f"{name}: {ratio:.2f} before, not measured now")
        elif not now[name] >= ratio * (1 - band):
            worse.append(f"{name}: {ratio:.2f} before, {now[name]:.2f} now, {1 - now[name] / ratio:.0%} worse")
    return worse


def stored(path: Path) -> tuple[dict[str, float], dict[str, object]]:
    """The ratios of a file, and who measured them.

    Raises:
        ValueError: it is not such a file.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        before = {str(name): float(ratio) for name, ratio in document["ratios"].items()}
        about = dict(document["about"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} holds no ratios ({type(error).__name__}: {error}); make it anew with --store"
        ) from None
    wrong = [name for name, ratio in before.items() if not _sound(ratio)]
    if wrong:
        raise ValueError(f"{path}: {wrong[0]!r} is {before[wrong[0]]}, no ratio; make it anew with --store")
    return before, about


def _sound(ratio: float) -> bool:
    return math.isfinite(ratio) and ratio > 0


def _band(text: str) -> float:
    band = float(text)
    if not 0 < band < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return band


def main() -> int:
    """Measure, compare or store; 1 where something has become worse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", action="store_true", help="keep what is measured as what later runs must reach")
    parser.add_argument("--ratios", type=Path, default=STORED, help="the file (%(default)s)")
    parser.add_argument(
        "--band", type=_band, default=0.25, help="how much worse is still taken for noise (%(default)s)"
    )
    parser.add_argument("--repeats", type=counted, default=3)
    given = parser.parse_args()
    before: dict[str, float] = {}
    if given.store:
        try:  # before minutes are spent
            given.ratios.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=given.ratios.parent).close()
        except OSError as error:
            parser.error(f"--ratios {error.filename or given.ratios}: {error.strerror or error}")
    if given.ratios.exists():
        try:
            before, who = stored(given.ratios)
        except OSError as error:
            parser.error(f"--ratios {given.ratios}: {error.strerror or error}")
        except ValueError as error:
            if not given.store:
                parser.error(str(error))
        else:
            _say_where_they_are_from(who)
    elif not given.store:
        parser.error(f"{given.ratios} is not there: --store it first")
    if "ours_bf16" not in peers.faster() and BF16 in before:
        del before[BF16]
        CONSOLE.print(f"left out, as this processor is not fast in bf16: {BF16}")
    try:
        with tempfile.TemporaryDirectory() as folder:
            now, failed = measured(Path(folder), fit(), given.repeats)
    except KeyboardInterrupt:
        CONSOLE.print("broken off; nothing is compared or stored")
        return 130
    worse = compare(now, before, given.band)
    if given.store:
        if failed or not now:
            parser.error(f"nothing is stored: {', '.join(failed) or 'everything'} failed")
        if wrong := [name for name, ratio in now.items() if not _sound(ratio)]:
            parser.error(f"nothing is stored: {wrong[0]} is {now[wrong[0]]}, no ratio")
        unfinished = given.ratios.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({"about": about(), "ratios": now}, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(given.ratios)
        CONSOLE.print(f"stored {len(now)} ratios in {given.ratios}")
        return 0
    for line in worse:
        CONSOLE.print(f"WORSE: {line}", markup=False)
    for line in better(now, before, given.band):
        CONSOLE.print(f"NOT GUARDED: {line}; --store it, or it may fall by as much unnoticed", markup=False)
    if not worse:
        CONSOLE.print(f"nothing is worse by more than {given.band:.0%}")
    return int(bool(worse))


def _say_where_they_are_from(who: dict[str, object]) -> None:
    here = about()
    CONSOLE.print(f"stored at commit {who.get('commit')}, {str(who.get('date'))[:16]}")
    other = [f"{name} {who.get(name)}, here {here[name]}" for name in ("machine", "capability", "cores")
             if who.get(name) != here[name]]  # fmt: skip
    if other:
        CONSOLE.print(f"stored elsewhere, where ratios may be others ({'; '.join(other)}): --store them here first")


if __name__ == "__main__":
    sys.exit(main())
