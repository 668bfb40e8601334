"""What `gpu.py` shows of what it has measured."""

from __future__ import annotations

from pathlib import Path

from document import Table, median
from measure import Line, figure, save
from step_parts import PARTS
from training_tables import stacked

# Not `aten::_local_scalar_dense`: DDP and FBGEMM read some twenty numbers a step that lie in the host's memory.
# One that lies in the device's shows as the first of these.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
FORMS = ("eager", "compiled", "graphs")  # of the dense part


def by_size(lines: list[Line]) -> dict[str, list[Line]]:
    """Case and batch size -> repeats."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(f"{line['what']['case']}, {line['what']['batch_size']:,}", []).append(line)
    return groups


def tables(lines: list[Line]) -> list[Table]:
    """One table, with a column for each case and batch size."""
    groups, known = by_size(lines), lines[0]["limits"]
    device = "CPU, tiny sizes: figures mean nothing" if lines[0]["what"]["dry_run"] else lines[0]["about"]["gpu"]
    title = (
        f"{device}; copy {known['copy_bytes_per_s'] / 1e9:,.0f} GB/s, bf16 {known['bf16_flop_per_s'] / 1e12:,.1f} "
        f"TFLOP/s, fp32 {known['fp32_flop_per_s'] / 1e12:,.1f}"
    )

    def row(name: str, form: str, *keys: str) -> list[str]:
        cells = [name]
        for of in groups.values():
            inner = of
            for key in keys[:-1]:
                inner = [line[key] for line in inner]
            there = all(keys[-1] in line for line in inner)
            cells.append(f"{median(inner, keys[-1]):{form}}" if there else "")
        return cells

    forms = [form for form in FORMS if any(form in line["step_ms"] for line in lines)]
    rows = [
        row("the roofline's time over the fastest form's", ".0%", "share_of_roofline"),
        row("samples/s, fastest form", ",.0f", "samples_per_s"),
        *(row(f"step, {form}, ms", ".2f", "step_ms", form) for form in forms),
        ["roofline, ms", *(f"{median([{'s': sum(line['roofline_ms'].values())} for line in of], 's'):.3f}"
                           for of in groups.values())],
        *(row(f"  {part}", ".3f", "roofline_ms", part) for part in lines[0]["roofline_ms"]),
        row("the eager step taken apart, ms", ".2f", "apart_ms", "step"),
        *(row(f"  {part}", ".2f", "apart_ms", part) for part in PARTS),
        *(row(f"{part}, of the copy rate", ".0%", "share_of_copy_rate", part)
          for part in lines[0]["share_of_copy_rate"]),
        row("dense part, of the matrix rate", ".0%", "share_of_matrix_rate"),
        *(row(f"{name}, a step", ".1f", "waits_per_step", name) for name in WAITS),
        ["peak, GB", *("" if of[0]["peak_cuda_bytes"] is None else f"{median(of, 'peak_cuda_bytes') / 1e9:.1f}"
                       for of in groups.values())],
    ]  # fmt: skip
    notes = [f"{size}: {form} failed: {why}." for size, of in groups.items() for form, why in of[0]["failed"].items()]
    places = {place: times for line in lines for place, times in line["waits_at"].items()}
    notes += [f"The host waits at {place}, {times:.1f} times a step." for place, times in places.items()]
    return [Table(title, ["", *groups], rows, " ".join(notes))]


def draw(lines: list[Line], path: Path) -> None:
    """The parts of the eager step, stacked, beside the fastest form and the roofline, of each case and batch size."""
    groups = by_size(lines)
    drawn, (axis,) = figure(wide=7.5, high=4.2)
    names = [name.replace(", ", "\n") for name in groups]
    apart = ([line["apart_ms"] for line in of] for of in groups.values())
    stacked(axis, {name: {part: median(of, part) for part in ("step", *PARTS)}
                   for name, of in zip(names, apart, strict=True)})  # fmt: skip
    fastest = [median([{"ms": min(line["step_ms"].values())} for line in of], "ms") for of in groups.values()]
    roofline = [median([{"ms": sum(line["roofline_ms"].values())} for line in of], "ms") for of in groups.values()]
    axis.plot(names, fastest, "k_", markersize=28, markeredgewidth=2, label="fastest form, overlapping")
    axis.plot(names, roofline, "_", color="red", markersize=28, markeredgewidth=2, label="roofline")
    axis.set(ylabel="ms; bars: the eager step, nothing overlapping", xlabel="case and batch size")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    save(drawn, path)
