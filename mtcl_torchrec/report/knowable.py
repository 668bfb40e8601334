"""How much of what can be known a run on a synthetic world knows, in words, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtcl_torchrec.evaluation.knowable import KS, of_rule
from mtcl_torchrec.report.contents import RunContents
from mtcl_torchrec.report.fusion_pictures import bars, share
from mtcl_torchrec.report.studio import Picture, Studio
from mtcl_torchrec.report.tables import Table, number
from mtcl_torchrec.report.words import first_rows, listed

SCORE = "score"
RULE = (
    "In a synthetic world the true probabilities are known, and nobody can predict better than they do: a task knows "
    "the share that its AUC − 0.5 is of the truth's own; of a multiclass task it is the share of the information (what "
    "log-loss falls below the base rates'), of a regression that of R²; of the fused score, what the events of a "
    "request's first rows are worth on average beyond a random order, over what they are in the best order there is."
)
_MEASURES = {"auc": ("expected AUC", 4), "r2": ("R²", 4), "nats": ("information, nats", 4)}


def knowable_shares(run: RunContents) -> dict[str, float]:
    """Task -> share of what is knowable of it; nothing where no world is behind the run."""
    found: Mapping[str, Mapping[str, Any]] = run.evaluation.get("knowable") or {}
    return {name: float(of["share"]) for name, of in found.items() if name != SCORE and of.get("share") is not None}


def _of_score(run: RunContents) -> tuple[str, float] | None:
    """What the fused score's order is judged by, and its share: of the first few rows of requests that have more, or
    else of all rows."""
    score = (run.evaluation.get("knowable") or {}).get(SCORE) or {}
    for k in (5, 10, 1):
        if score.get(f"share@{k}") is not None:
            return first_rows(k).removeprefix("the "), float(score[f"share@{k}"])
    return None if score.get("share") is None else ("order of all rows", float(score["share"]))


def known_of_all(run: RunContents) -> dict[str, float]:
    """Task, and what of the fused score's order is judged -> share of what is knowable."""
    found = _of_score(run)
    return knowable_shares(run) | ({} if found is None else {f"fused score, {found[0]}": found[1]})


def knowable_sentence(run: RunContents) -> str:
    """Said in the verdict; empty where no world is behind the run."""
    tasks = [f"{share(value)} of {task}" for task, value in knowable_shares(run).items()]
    if not tasks:
        return ""
    line = f"Of what is knowable in this world it knows {listed(tasks)}"
    if (found := _of_score(run)) is not None:
        line += f"; of what its ranking can gain, the fused score gains {share(found[1])} ({found[0]})"
    return f"{line}."


def knowable_picture(run: RunContents, studio: Studio) -> list[Picture]:
    """A bar for each task and for the fused score; none where no world is behind the run."""
    shares = known_of_all(run)
    if not shares:
        return []
    return [bars(studio, "knowable", "Known, of what is knowable", shares, "share of the truth's own", percent=True)]


def knowable_table(run: RunContents) -> Table | None:
    """The run beside the oracle, which predicts the true probabilities; None where no world is behind the run."""
    found: Mapping[str, Mapping[str, Any]] = run.evaluation.get("knowable") or {}
    rows = []
    for name, of in found.items():
        measure = next((m for m in _MEASURES if f"oracle_{m}" in of), None)
        if name == SCORE or measure is None:
            continue
        label, digits = _MEASURES[measure]
        numbers = (number(of.get(measure), digits), number(of.get(f"oracle_{measure}"), digits))
        rows.append([name, _percent(of.get("share")), label, *numbers, number(of.get("regret"))])
    score = found.get(SCORE) or {}
    if score.get("share") is not None:
        rows.append(["fused score, all rows", _percent(score["share"]), "gain of ranking", "–", "–", "–"])
    for k in KS:
        if score.get(f"share@{k}") is not None:
            half = score.get(f"share@{k} half")
            sure = "" if half is None else f" ± {100 * half:.1f}"
            both = [number(score.get(f"{who}@{k}")) for who in ("value", "oracle")]
            known = _percent(score[f"share@{k}"]) + sure
            rows.append(
                [
                    f"fused score, {first_rows(k).removeprefix('the ')}",
                    known,
                    f"value@{k}",
                    *both,
                    number(score.get(f"regret@{k}")),
                ]
            )
    if not rows:
        return None
    note = (
        "Expected over the labels that these rows might have had, so an AUC here differs a little from that of the "
        "labels they got. Regret is what is left: mean KL divergence in nats, of a regression the mean squared error, "
        "of the ranking the value missed."
    )
    rule = next((score[key] for k in KS if score.get(key := f"rule_share@{k}") is not None), None)
    if rule is not None:
        note += f" The truth ranks by what a row's events are worth; {of_rule(rule)}."
    return Table("Beside the truth", ["of", "known", "measure", "this run", "the truth", "regret"], rows, note)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{number(100 * value, 1)} %"
