"""Tables of baselines and twins: how well each predicts beside the run, and how they were tuned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtcl_torchrec.baselines.entries import TUNED, said_of_score
from mtcl_torchrec.evaluation.confidence import PLUS_MINUS
from mtcl_torchrec.evaluation.naming import MAIN, label_of
from mtcl_torchrec.report.comparisons import THIS_RUN, Comparison, is_single_task, of_tasks, untuned
from mtcl_torchrec.report.contents import RunContents
from mtcl_torchrec.report.tables import Table, number, with_error

Qualities = Mapping[str, Mapping[str, tuple[float, float]]]  # see `mtcl_torchrec.report.comparisons.qualities`


def twins_table(found: Qualities, compared: Sequence[Comparison]) -> Table | None:
    """Each task as the run predicts it, and as a twin does that was trained on it alone; None without twins."""
    rows: list[list[str]] = []
    tones: dict[tuple[int, int], str] = {}
    for c in of_tasks(compared):
        if not is_single_task(c.against):
            continue
        of = found.get(c.of) or {}
        both = [with_error(*of[name], metric=c.metric) if name in of else "–" for name in (THIS_RUN, c.against)]
        if c.sign:
            tones[len(rows), 5] = "good" if c.sign > 0 else "bad"
        rows.append([c.of, label_of(c.metric), *both, c.said().removesuffix(f" {label_of(c.metric)}"), c.word])
    if not rows:
        return None
    note = (
        f"{PLUS_MINUS}; the difference is paired, so its interval is the narrower one, and tested together with all "
        "baselines. Run and twins are of one training each: what another seed would change is not in it."
    )
    return Table(
        "Together and alone", ["task", "measure", "together", "alone", "difference", "together is"], rows, note, tones
    )


def baseline_tables(run: RunContents, found: Qualities, compared: Sequence[Comparison]) -> list[Table]:
    """How well this run and each baseline predict each task; and what each baseline cost."""
    tables = [_quality_table(run, found, compared)] if found else []
    if run.baselines:
        tables.append(_tuning_table(run))
    return tables


def _quality_table(run: RunContents, found: Qualities, compared: Sequence[Comparison]) -> Table:
    signs = {(c.of, c.against): c.sign for c in of_tasks(compared)}
    rows: list[list[str]] = []
    tones: dict[tuple[int, int], str] = {}
    for name in [THIS_RUN, *run.baselines]:
        if not any(name in of for of in found.values()):
            continue
        for c, task in enumerate(found, 1):
            if sign := signs.get((task, name), 0):
                tones[len(rows), c] = "bad" if sign < 0 else "good"
        metrics = {task: MAIN[run.kinds[task]] for task in found}
        cells = [with_error(*of[name], metric=metrics[task]) if name in of else "–" for task, of in found.items()]
        rows.append([name, *cells])
    unsure = {c.of: c.unsure for c in of_tasks(compared) if c.unsure}
    headings = [f"{task}, {label_of(MAIN[run.kinds[task]])}" for task in found]
    note = (
        f"{PLUS_MINUS}; of {label_of('ne')}, less is better. Marked where the difference to this run is more than "
        "chance (the same rows compared, all tested together, Holm): ▲ this run is better, ▼ this run is worse."
    )
    note += "".join(f" {task} cannot be judged: {why}." for task, why in unsure.items())
    return Table(f"Each task on the {run.split} split", ["predicted by", *headings], rows, note, tones)


def _tuning_table(run: RunContents) -> Table:
    rows, once = [], untuned(run)
    for name, entry in run.baselines.items():
        of = entry if isinstance(entry, dict) else {}
        said = _settings(of.get("settings") or {})
        trials = of.get("trials")
        trials = len(trials) if isinstance(trials, list) else trials
        how = str(of.get(TUNED) or (f"not tuned: {once[name]}" if name in once else "–"))
        rows.append([name, how, "–" if trials is None else str(trials), number(of.get("seconds"), 1), said or "–"])
    columns = ["baseline", "how", "trials", "seconds", "settings"]
    if all(row[1] == "–" for row in rows):
        columns, rows = columns[:1] + columns[2:], [row[:1] + row[2:] for row in rows]
    known = {name: of for name, of in run.baselines.items() if isinstance(of, dict)}
    note = " ".join(f"{said[0].upper()}{said[1:]}." for said in said_of_score(known))
    return Table("How the baselines were tuned", columns, rows, note)


def _settings(settings: Any) -> str:
    """Settings in a line, those of each task after its name."""
    if not isinstance(settings, dict):
        return str(settings)
    parts = [f"{k}: {_settings(v)}" if isinstance(v, dict) else f"{k} {_short(v)}" for k, v in settings.items()]
    return ("; " if any(isinstance(v, dict) for v in settings.values()) else ", ").join(parts)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
