"""What the project's README says of speed, made of the same results as the tables of benchmarks/README.md.

`tables.py` writes it between ``<!-- speed: begin -->`` and ``<!-- speed: end -->``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peer_cases import CASES

MIDDLE = CASES["middle"]
WHO = {
    "ours_bf16_compiled": "this package, bf16, `compile: dense`",
    "ours_bf16": "this package, bf16 (the default where it is fast)",
    "ours": "this package, fp32",
    "torchrec_bf16": "the same model by hand on TorchRec, bf16 autocast",
    "torchrec": "the same model by hand on TorchRec, fp32",
    "pytorch": "the same by hand on `nn.Embedding(sparse=True)`, fp32",
    "rechub": "torch-rechub, MMoE, fp32",
    "deepctr": "deepctr-torch, MMoE, fp32",
}


def speed(results: Path) -> str:
    """The table and the sentences; what was not measured is left out."""
    peers = _read(results / "peers.json")
    parts = [_beside_others(peers)] if peers else []
    sentences = [*(of(peers) for of in (_small, _large, _growing) if peers), _ranks(results), _memory(results)]
    return "\n\n".join([*parts, " ".join(filter(None, sentences))]).strip() or "Not measured yet."


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise SystemExit(f"{path} is no JSON ({error}); make it anew with --show {path.stem}.jsonl") from None


def _beside_others(peers: dict[str, Any]) -> str:
    of_case = [result for result in peers["results"] if result["what"]["case"] == "middle"]
    if not of_case:
        return ""
    rows = max(result["what"]["rows"] for result in of_case)
    found = {
        result["what"]["contender"]: {name: of["median"] for name, of in result["figures"].items()}
        | {"repeats": result["repeats"]}
        for result in of_case if result["what"]["rows"] == rows
    }  # fmt: skip
    about = peers["about"]
    lines = [
        f"One pass over {rows:,} rows of a Parquet file: {MIDDLE.features} tables of {MIDDLE.table_rows:,} rows, "
        f"dim {MIDDLE.dim}, MMoE of {MIDDLE.experts} experts {'-'.join(map(str, MIDDLE.expert_layers))}, "
        f"{MIDDLE.tasks} tasks, batches of {MIDDLE.batch_size:,}, Adagrad and Adam; {about['cores']} cores of an "
        f"{about['machine']}, {about['date'][:10]}, all in turn, medians of "
        f'{min(of["repeats"] for of in found.values())} (`benchmarks/peers.py --case middle`). "From file" counts '
        "everything that is read before training, too.",
        "",
        "| | samples/s from file | over TorchRec by hand | samples/s while training | log-loss |",
        "|---|---:|---:|---:|---:|",
    ]
    for who in (who for who in WHO if who in found):
        of = found[who]
        over = f"{of['from_file_per_s'] / found['torchrec']['from_file_per_s']:.2f}" if "torchrec" in found else ""
        lines.append(
            f"| {WHO[who]} | {_hundreds(of['from_file_per_s'])} | {over} | {_hundreds(of['samples_per_s'])} | "
            f"{of['log_loss']:.4f} |"
        )
    others = [(name, who) for who, name in (("rechub", "torch-rechub"), ("deepctr", "deepctr-torch")) if who in found]
    for who in ("ours", "ours_bf16", "ours_bf16_compiled"):
        if who in found and others:
            times = [f"{found[who]['from_file_per_s'] / found[other]['from_file_per_s']:.1f}" for _, other in others]
            how = WHO[who].partition(", ")[2].partition(" (")[0]
            if who == "ours":
                names = " and ".join(name for name, _ in others)
                lines += ["", f"From file that is {' and '.join(times)} times as fast as {names} in {how}"]
            else:
                lines[-1] += f", {' and '.join(times)} times in {how}"
    if others and "ours" in found:
        lines[-1] += "."
    return "\n".join(lines)


def _small(peers: dict[str, Any]) -> str:
    """The case in which little is computed, so that what is done beside computing shows."""
    found = {
        result["what"]["contender"]: {name: of["median"] for name, of in result["figures"].items()}
        for result in peers["results"]
        if result["what"]["case"] == "small"
    }
    if not {"ours", "torchrec"} <= found.keys():
        return ""
    case, ours, by_hand = CASES["small"], found["ours"], found["torchrec"]
    return (
        f"With {case.features} features and tables of {case.table_rows:,} rows, {_hundreds(ours['samples_per_s'])} "
        f"samples/s in fp32 while training and {_hundreds(ours['from_file_per_s'])} from file, by hand on TorchRec "
        f"{_hundreds(by_hand['samples_per_s'])} and {_hundreds(by_hand['from_file_per_s'])}."
    )


def _large(peers: dict[str, Any]) -> str:
    """The case in which whoever touches a whole table in each step shows."""
    found = {
        result["what"]["contender"]: result["figures"]["from_file_per_s"]["median"]
        for result in peers["results"]
        if result["what"]["case"] == "large"
    }
    others = [(name, who) for who, name in (("torchrec", "TorchRec by hand"), ("rechub", "torch-rechub"),
                                            ("deepctr", "deepctr-torch")) if who in found]  # fmt: skip
    if "ours" not in found or not others:
        return ""
    case = CASES["large"]
    times = ", ".join(f"{found['ours'] / found[who]:.1f} times as fast as {name}" for name, who in others)
    return f"With one table of {case.table_rows:,} rows of dim {case.dim} it is, in fp32, {times}."


def _growing(peers: dict[str, Any]) -> str:
    grown = {
        result["what"]["table_rows"]: result["figures"]["step_ms"]["median"]
        for result in peers["results"]
        if result["what"]["case"] == "growing" and result["what"]["contender"] == "ours"
    }
    if len(grown) < 2:
        return ""
    few, many = min(grown), max(grown)
    return f"With tables of {many:,} rows a step takes {grown[many] / grown[few]:.2f} times as long as with {few:,}."


def _ranks(results: Path) -> str:
    scaling = _read(results / "scaling.json")
    speeds = {
        result["what"]["ranks"]: result["figures"]["samples_per_s"]["median"]
        for result in (scaling["results"] if scaling else ())
        if result["what"]["kind"] == "weak"
    }
    if not {1, 2} <= speeds.keys():
        return ""
    return (
        f"Two ranks of a thread each, which take twice the rows a step, are {speeds[2] / speeds[1]:.1f} times as fast "
        "as one rank of one thread."
    )


def _memory(results: Path) -> str:
    document = _read(results / "memory.json")
    peaks = {
        result["what"]["rows"]: result["figures"]["peak_rss_bytes"]["median"] / 1e9
        for result in (document["results"] if document else ())
        if result["what"]["case"] == "stream"
    }
    if len(peaks) < 2:
        return ""
    few, many = min(peaks), max(peaks)
    return f"{many:,} generated rows stream through {peaks[many]:.2f} GB of memory, {few:,} through {peaks[few]:.2f}."


def _hundreds(per_s: float) -> str:
    return f"{round(per_s, -2):,.0f}"
