"""What an offline plan says, as data and as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from rich.console import Console

from mtcl_torchrec.evaluation.plain_table import plain_table

MANY = 30  # more tables than this are shown in groups
NAME_WIDTH = 26
PHASES = {  # of TorchRec's estimates, in the order of a step
    "prefetch_compute": "fill caches from host memory",
    "fwd_compute": "look up",
    "fwd_comms": "pooled embeddings to the ranks of their rows",
    "bwd_comms": "gradients back",
    "bwd_compute": "update",
}


@dataclass(frozen=True)
class TablePlan:
    """One table's place.

    Args:
        name: as in the schema.
        rows, dim: its size.
        gb: weights and optimizer state, all shards together, 10⁹ bytes; each copy of a data-parallel table counts.
        kind, kernel: sharding type and compute kernel.
        ranks: that hold a part of it.
        largest_gb: what its largest shard takes of a rank, buffers of input and output included.
    """

    name: str
    rows: int
    dim: int
    gb: float
    kind: str
    kernel: str
    ranks: tuple[int, ...]
    largest_gb: float


@dataclass(frozen=True)
class RankMemory:
    """How a rank's memory is shared out, in 10⁹ bytes.

    Args:
        total: what a rank has.
        reserve: left free.
        dense: parameters that are no tables, their gradients and optimizer state.
        activations: of a batch, between forward and backward.
    """

    total: float
    reserve: float
    dense: float
    activations: float

    @property
    def for_tables(self) -> float:
        """What is left for tables and their buffers."""
        return self.total - self.reserve - self.dense - self.activations


@dataclass(frozen=True)
class Phase:
    """A phase of a step: milliseconds of the mean and of the slowest rank."""

    mean: float
    slowest: float


@dataclass(frozen=True)
class PlanReport:
    """An estimate of a run on a cluster.

    Args:
        name, device, world_size, ranks_per_host, batch_size: what was planned.
        memory: of a rank.
        planning_s: how long the planner took.
        shortfall: why it does not fit, or None.
        hint: what to change then.
        tables: where each table goes; without a place where it does not fit.
        used_gb: for each rank, what its tables and their buffers take of the device (of the host, on a CPU).
        host_gb: for each rank, what they take of host memory; zeros on a CPU.
        phases: of a step; the embedding part alone.
        plan: as `plan_as_json` gives it.
    """

    name: str
    device: str
    world_size: int
    ranks_per_host: int
    batch_size: int
    memory: RankMemory
    planning_s: float
    shortfall: str | None
    hint: str
    tables: list[TablePlan]
    used_gb: list[float] = field(default_factory=list)
    host_gb: list[float] = field(default_factory=list)
    phases: dict[str, Phase] = field(default_factory=dict)
    plan: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether there is a plan."""
        return self.shortfall is None

    @property
    def step_ms(self) -> float:
        """The embedding part of a step: every phase ends in an exchange that waits for the slowest rank."""
        return sum(phase.slowest for phase in self.phases.values())

    @property
    def time_imbalance(self) -> float:
        """The slowest rank's time over the mean, phase by phase; 1 is even."""
        mean = sum(phase.mean for phase in self.phases.values())
        return self.step_ms / mean if mean else 1.0

    @property
    def memory_imbalance(self) -> float:
        """The fullest rank's tables over the mean; 1 is even."""
        mean = sum(self.used_gb) / max(len(self.used_gb), 1)
        return max(self.used_gb) / mean if mean else 1.0

    @property
    def rows_per_s(self) -> float:
        """Rows a second on all ranks, were there nothing but embeddings."""
        return self.batch_size * self.world_size / self.step_ms * 1000 if self.step_ms else float("inf")

    def as_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        derived = {
            name: getattr(self, name)
            for name in ("fits", "step_ms", "time_imbalance", "memory_imbalance", "rows_per_s")
        }
        return {**asdict(self), **derived} if self.fits else {**asdict(self), "fits": False}


def print_plan(report: PlanReport, console: Console | None = None) -> None:
    """Print where each table goes, the memory of ranks and the time of a step, or what is missing.

    Fits 100 columns.
    """
    console = console or Console()
    hosts = report.world_size // report.ranks_per_host
    where = f"{hosts} hosts of {report.ranks_per_host}" if hosts > 1 else "one host"
    console.print(
        f"Plan of {report.name} for {report.world_size} × {report.device} ({where}), "
        f"{report.batch_size:,} rows a step and rank; planned in {report.planning_s:.1f} s",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    _print_tables(report, console)
    if report.fits:
        _print_memory(report, console)
        _print_step(report, console)
    else:
        console.print(f"\n{report.shortfall}\n{report.hint}", highlight=False, soft_wrap=True)


def _print_tables(report: PlanReport, console: Console) -> None:
    console.print()
    rows, gb = sum(t.rows for t in report.tables), sum(t.gb for t in report.tables)
    title = f"{len(report.tables)} tables, {rows:,} rows, {gb:,.1f} GB of weights and optimizer state"
    columns = ["table", "rows", "dim", "GB"]
    console.print(title, style="bold", highlight=False)
    table = plain_table("", [*columns, "kind", "kernel", "ranks", "GB on one"] if report.fits else columns)
    for name, of in _grouped(report.tables):
        first = of[0]
        cells = [_short(name), f"{sum(t.rows for t in of):,}", str(first.dim), f"{sum(t.gb for t in of):,.1f}"]
        if report.fits:
            largest = f"{max(t.largest_gb for t in of):.2f}"
            ranks = short_ranks(sorted({rank for t in of for rank in t.ranks}))
            cells += [first.kind, first.kernel.removeprefix("fused_") or first.kernel, ranks, largest]
        table.add_row(*cells)
    console.print(table)


def _print_memory(report: PlanReport, console: Console) -> None:
    memory, used = report.memory, report.used_gb
    fullest, mean = max(range(len(used)), key=used.__getitem__), sum(used) / len(used)
    console.print()
    table = plain_table(
        "Memory of a rank, GB (estimated)",
        ["", "has", "reserve", "dense", "activations", "left for tables", "tables", "free"],
    )
    fixed = [memory.total, memory.reserve, memory.dense, memory.activations, memory.for_tables]
    emptiest = min(range(len(used)), key=used.__getitem__)
    for name, gb in (
        (f"tightest, rank {fullest}", used[fullest]),
        ("mean", mean),
        (f"emptiest, rank {emptiest}", used[emptiest]),
    ):
        table.add_row(name, *(f"{value:,.1f}" for value in (*fixed, gb, memory.for_tables - gb)))
    console.print(table)
    if any(report.host_gb):
        console.print(f"Host memory: {max(report.host_gb):,.1f} GB for the fullest rank", highlight=False)


def _print_step(report: PlanReport, console: Console) -> None:
    console.print()
    table = plain_table("Step, embedding part alone, ms (estimated from bandwidths)", ["phase", "slowest rank", "mean"])
    for phase, ms in report.phases.items():
        table.add_row(PHASES[phase], f"{ms.slowest:.2f}", f"{ms.mean:.2f}")
    table.add_row("all", f"{report.step_ms:.2f}", f"{report.step_ms / report.time_imbalance:.2f}")
    console.print(table)
    console.print(
        f"Imbalance (most over mean): time {report.time_imbalance:.2f}, memory {report.memory_imbalance:.2f}; "
        f"at most {report.rows_per_s:,.0f} rows a second",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _grouped(tables: Sequence[TablePlan]) -> list[tuple[str, list[TablePlan]]]:
    """Name and tables of each row to show: each table, or those of one treatment together where there are many."""
    if len(tables) <= MANY:
        return [(table.name, [table]) for table in tables]
    groups: dict[tuple, list[TablePlan]] = {}
    for table in tables:
        groups.setdefault((table.kind, table.kernel, table.dim, len(table.ranks)), []).append(table)
    return [(of[0].name if len(of) == 1 else f"{len(of)} like {of[0].name}", of) for of in groups.values()]


def _short(name: str) -> str:
    return name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 1]}…"


def short_ranks(ranks: Sequence[int]) -> str:
    """Ranks in ascending order as a few characters.

    Example:
        >>> short_ranks([0, 1, 2, 3]), short_ranks([3, 17]), short_ranks(range(0, 64, 2))
        ('0-3', '3, 17', '32 of 0-62')
    """
    runs: list[list[int]] = []
    for before, rank in pairwise([-2, *ranks]):
        if rank == before + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    if len(runs) > 3:
        return f"{len(ranks)} of {ranks[0]}-{ranks[-1]}"
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
