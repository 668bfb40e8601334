"""ON PAPER: what the planner estimates of 8 to 1,024 GPUs that are not there.  Nothing here is measured.

    python benchmarks/scaling_paper.py --out results/scaling_paper.jsonl
    python benchmarks/scaling_paper.py --world-size 8 16 --device a100-80 --plan run.yaml --out try.jsonl

`mtcl plan` is asked for each number of ranks: it lets TorchRec's planner place the tables of a run on a cluster, and
estimates times from the bandwidths of datasheets.  These are of the embedding part of a step alone, one phase after the
other, without the network's latency, without the dense part, without overlap: they tell how communication grows and
whether the tables fit, not how fast training will be.  Every GPU has the same rows a step (weak scaling); "efficiency"
is the fewest ranks' estimated time over these ranks'.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from document import Table
from measure import Line, benchmark, counted, figure, options, save

from mtcl_torchrec.config import load_run
from mtcl_torchrec.training.planning.hardware import KNOWN
from mtcl_torchrec.training.planning.offline import plan_offline
from mtcl_torchrec.training.planning.report import PHASES

TERABYTE = Path(__file__).parent / "plans" / "one_terabyte.yaml"
PAPER = "Estimated on paper by TorchRec's planner from bandwidths, the embedding part of a step alone; not measured."


def work(what: Line) -> Line:
    """The plan for one cluster."""
    plan = TERABYTE if what["plan"] == TERABYTE.name else Path(what["plan"])
    report = plan_offline(
        load_run(plan), what["world_size"], what["device"], batch_size=what["batch_size"], timeout_s=what["planning_s"]
    )  # fmt: skip
    told = {"on_paper": True, "fits": report.fits, "shortfall": report.shortfall, "planning_took_s": report.planning_s}
    if not report.fits:
        return told
    return told | {
        "step_ms": report.step_ms, "rows_per_s": report.rows_per_s,
        "phase_ms": {name: phase.slowest for name, phase in report.phases.items()},
        "tables_gb": sum(table.gb for table in report.tables),
        "tightest_rank_gb": max(report.used_gb), "time_imbalance": report.time_imbalance,
    }  # fmt: skip


def by_plan(lines: list[Line]) -> dict[tuple[str, str], list[Line]]:
    """(plan, device) -> its numbers of ranks, the fewest first."""
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in sorted(lines, key=lambda of: of["what"]["world_size"]):
        groups.setdefault((line["what"]["plan"], line["what"]["device"]), []).append(line)
    return groups


def tables(lines: list[Line]) -> list[Table]:
    """A table for each plan and device."""
    found = []
    for (plan, device), of in by_plan(lines).items():
        first = next((line for line in of if line["fits"]), None)
        names = [name for name in PHASES if first and name in first["phase_ms"]]
        cells = []
        for line in of:
            n = line["what"]["world_size"]
            if not line["fits"] or first is None:
                cells.append([f"{n:,} × {device}", "does not fit", *[""] * (len(names) + 3)])
                continue
            cells.append([
                f"{n:,} × {device}", f"{100 * first['step_ms'] / line['step_ms']:.0f}", f"{line['step_ms']:.2f}",
                *(f"{line['phase_ms'][name]:.2f}" for name in names),
                f"{line['rows_per_s'] / 1e6:,.1f}", f"{line['tightest_rank_gb']:.1f}",
            ])  # fmt: skip
        heads = ["estimated", "efficiency %", "ms a step", *(f"{PHASES[name]}, ms" for name in names),
                 "at most, M rows/s", "tables on the tightest rank, GB"]  # fmt: skip
        found.append(Table(f"scaling on paper: {Path(plan).stem}, {device}", heads, cells, PAPER))
    return found


def draw(lines: list[Line], path: Path) -> None:
    """The estimated step by the number of ranks, cut into its phases."""
    groups = by_plan([line for line in lines if line["fits"]])
    drawn, axes = figure(wide=4.8 * max(len(groups), 1) + 2.2, high=3.4, columns=max(len(groups), 1))
    for axis, ((plan, device), of) in zip(axes, groups.items(), strict=False):
        labels, bottom = [f"{line['what']['world_size']:,}" for line in of], [0.0] * len(of)
        for name, said in PHASES.items():
            values = [line["phase_ms"].get(name, 0.0) for line in of]
            if any(values):
                axis.bar(labels, values, bottom=bottom, label=said)
                bottom = [b + v for b, v in zip(bottom, values, strict=True)]
        axis.set_title(f"ON PAPER: {Path(plan).stem}, {device}", fontsize=9)
        axis.set_xlabel("GPUs", fontsize=8)
        axis.tick_params(labelsize=8)
    if not groups:
        tried = ", ".join(f"{line['what']['world_size']:,} × {line['what']['device']}" for line in lines)
        axes[0].text(0.5, 0.5, f"ON PAPER: fits on none of {tried}", ha="center", transform=axes[0].transAxes)
        axes[0].set_axis_off()
    else:
        axes[-1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        axes[0].set_ylabel("embedding part of a step, estimated ms", fontsize=8)
    save(drawn, path)


def main() -> int:
    """Plan what is missing, print the table, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-size", type=counted, nargs="+", default=[8, 16, 32, 64, 128, 256, 512, 1024])
    parser.add_argument("--device", nargs="+", choices=list(KNOWN), default=["h200"], metavar="DEVICE",
                        help=f"of {', '.join(KNOWN)} (%(default)s)")  # fmt: skip
    parser.add_argument("--plan", type=Path, default=TERABYTE, help="a run, as for mtcl plan (%(default)s)")
    parser.add_argument("--batch-size", type=counted, help="rows a step and rank; the run's by default")
    parser.add_argument("--planning-s", type=float, default=60, help="for one plan; no better one is sought after it")
    options(parser, repeats=1, timeout_s=900)
    given = parser.parse_args()
    plan = given.plan.name if given.plan == TERABYTE else str(given.plan)
    todo = [
        {"plan": plan, "device": device, "world_size": n, "batch_size": given.batch_size,
         "planning_s": given.planning_s}
        for device in given.device for n in given.world_size
    ]  # fmt: skip
    return benchmark(parser, given, work=work, todo=lambda: todo, tables=tables, draw=draw)


if __name__ == "__main__":
    sys.exit(main())
