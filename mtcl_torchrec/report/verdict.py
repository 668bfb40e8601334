"""A verdict in plain words, from numbers by rules; `RULES` says them to the reader."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mtcl_torchrec.evaluation.confidence import FEWEST, SURE
from mtcl_torchrec.evaluation.rivals import POPULARITY, Gap, sign_of
from mtcl_torchrec.report.facts import Event, TaskFact, is_single_task
from mtcl_torchrec.report.words import listed

# Of an AUC.
BANDS = ((0.8, "well"), (0.7, "fairly well"), (0.6, "poorly"), (0.0, "hardly better than by chance"))
RATIO = (0.9, 1.1)  # of predicted to observed events: outside of it, probabilities are off

Tone = Literal["good", "mixed", "bad", "unknown"]

RULES = (
    "A task is predicted better than guessing where its log-loss is below that of always predicting the base rate "
    "(NE < 1) and, of a binary task, its AUC lies above 0.5; of a regression, where R² > 0; each by more than half of "
    "its 95% interval.",
    "An AUC of at least 0.8 tells events from the rest well, 0.7 fairly well, 0.6 poorly, less hardly better than by "
    "chance.",
    "A difference counts where it is beyond its 95% interval (over users, the same rows compared), or, where no "
    "interval is known, more than 0.005; all else is too close to call. "
    f"Fewer than {FEWEST} events, or rows without, or a single user, make no difference sure.",
    "The model is good where at least half of its tasks are better than guessing and no baseline is clearly better on "
    "half of the tasks that both predict or more.",
    "Whether tasks help each other is told by twins, the same network trained on each task alone, and by nothing else: "
    "a difference that is sure but below 0.002 AUC counts as hardly any. Run and twins are trained once, and what "
    "another seed would change is not in the intervals. Gradients that agree or pull apart (mean cosine beyond ±0.05) "
    "are a hint, not a proof.",
    "The fused ranking is held against popularity, and against each event's own head, by GAUC where users are known "
    "(AUC where not); of an event that lowers the score, a low value is what is wanted. Popularity is the share of an "
    "item's training rows in which that very event happened, smoothed; in value@k, those shares fused as the "
    "predictions are.",
    "Probabilities are off where predicted over observed events lies outside 0.9 to 1.1, by more than its interval.",
)


@dataclass(frozen=True)
class Answer:
    """To one question.

    Args:
        question: as a person asks it.
        short: a few words.
        tone: how it is coloured (and marked, for who does not see colours).
        sentences: why.
    """

    question: str
    short: str
    tone: Tone
    sentences: list[str] = field(default_factory=list)


def learnt(fact: TaskFact) -> bool | None:
    """Whether a task is predicted better than guessing, by more than its interval; None where that cannot be told."""
    if fact.unsure:
        return None
    if fact.kind == "regression":
        return _beyond(fact, "r2", 0.0)
    if fact.kind == "multiclass":
        return _beyond(fact, "ne", 1.0, above=False)
    better = _beyond(fact, "auc", 0.5)
    ne = fact.number("ne")
    return None if better is None or math.isnan(ne) else better and ne < 1


def _beyond(fact: TaskFact, key: str, nothing: float, *, above: bool = True) -> bool | None:
    """Whether a metric lies beyond what predicting nothing gets, by more than its interval."""
    value, error = fact.number(key), fact.error(key)
    if math.isnan(value):
        return None
    gain = value - nothing if above else nothing - value
    return gain > (0.0 if math.isnan(error) else SURE * error)


def band(auc: float) -> str:
    """An AUC in words.

    Example:
        >>> band(0.84), band(0.55)
        ('well', 'hardly better than by chance')
    """
    return next(word for least, word in BANDS if auc >= least)


def is_it_good(
    facts: Sequence[TaskFact],
    gaps: Sequence[Gap],
    events: Sequence[Event],
    *,
    untuned: bool = False,
    knowable: str = "",
) -> Answer:
    """Is the model good: against guessing, popularity and baselines.

    Args:
        gaps: against baselines, see `mtcl_torchrec.report.facts.baseline_gaps`.
        events: of the fused ranking, for popularity.
        untuned: whether the baselines were tried at their usual settings only.
        knowable: a sentence about what can be known at all, of a run on a synthetic world.
    """
    question = "Is the model good?"
    known = {f.task: better for f in facts if (better := learnt(f)) is not None}
    if not known:
        return Answer(question, "Not known", "unknown", ["No task has labels by which it could be judged."])
    good = [task for task, better in known.items() if better]
    sentences = [f"{_of(good, known)} predicted better than guessing."]
    if weak := [task for task, better in known.items() if not better]:
        sentences[0] = f"{sentences[0][:-1]}; not so {listed(weak)}."
    if unknown := [f.task for f in facts if f.task not in known]:
        sentences.append(f"{listed(unknown)} cannot be judged: there are too few labels, or only one kind of them.")
    sentences += [knowable] if knowable else []
    sentences += _separation(facts) + against_popularity(events)
    rivals = [gap for gap in gaps if not is_single_task(gap.against)]
    worse, total, line = _against_baselines(rivals, untuned)
    sentences.append(line)
    sentences += _calibration(facts)
    half = len(known) / 2
    if len(good) < half or (total and worse >= total / 2):
        why = "a baseline is better" if total and worse >= total / 2 else f"{len(good)} of {len(known)} tasks learnt"
        return Answer(question, f"No: {why}", "bad", sentences)
    if len(good) < len(known) or worse:
        why = f"{len(good)} of {len(known)} tasks learnt" if not worse else f"a baseline wins {worse} of {total} tasks"
        return Answer(question, f"In part: {why}", "mixed", sentences)
    if not total:
        return Answer(question, "Better than guessing", "good", sentences)
    return Answer(question, "Yes: no baseline is better", "good", sentences)


def _of(some: Sequence[str], of: Iterable[str]) -> str:
    some, every = list(some), list(of)
    if len(some) == len(every):
        return f"All {len(every)} tasks are" if len(every) > 1 else f"{every[0]} is"
    return f"{len(some)} of {len(every)} tasks {'is' if len(some) == 1 else 'are'}"


def _separation(facts: Sequence[TaskFact]) -> list[str]:
    aucs = {f.task: f.number("auc") for f in facts if f.kind == "binary" and not math.isnan(f.number("auc"))}
    if not aucs:
        return []
    best, worst = max(aucs, key=lambda t: aucs[t]), min(aucs, key=lambda t: aucs[t])
    line = f"Events of {best} are told from the rest {band(aucs[best])} (AUC {aucs[best]:.3f})"
    if worst != best:
        line += f", those of {worst} {band(aucs[worst])} ({aucs[worst]:.3f})"
    return [line + "."]


def against_popularity(events: Sequence[Event]) -> list[str]:
    """A sentence; none where popularity is not known."""
    gaps = {e.task: g for e in events for g in e.gaps if g.against == POPULARITY}
    if not gaps:
        return []
    signs = {task: sign_of(gap) for task, gap in gaps.items()}
    better = [t for t, s in signs.items() if s > 0]
    line = f"Ranked by the fused score, {len(better)} of {len(signs)} events come out better than by popularity"
    if worse := [t for t, s in signs.items() if s < 0]:
        line += f", {listed(worse)} worse"
    if close := [t for t, s in signs.items() if s == 0 and not gaps[t].unsure]:
        line += f"; {listed(close)} too close to call"
    if few := [f"{t}: {gaps[t].unsure}" for t in gaps if gaps[t].unsure]:
        line += f"; {listed(few)}"
    return [line + "."]


def _against_baselines(gaps: Sequence[Gap], untuned: bool) -> tuple[int, int, str]:
    """Tasks on which some baseline is clearly better, tasks compared, and a sentence."""
    if not gaps:
        return 0, 0, "It was compared with no tuned baselines: `mtcl baselines RUN_DIR` trains them."
    tasks = list(dict.fromkeys(gap.task for gap in gaps))
    signs = {task: [sign_of(gap) for gap in gaps if gap.task == task] for task in tasks}
    won = [task for task, of in signs.items() if all(s > 0 for s in of)]
    lost = [task for task, of in signs.items() if any(s < 0 for s in of)]
    names = list(dict.fromkeys(gap.against for gap in gaps))
    rivals = listed(names) if len(names) < 3 else f"{len(names)} baselines"
    rivals += " (not tuned; `mtcl baselines RUN_DIR` tunes them, and trains more)" if untuned else ""
    line = f"Against {rivals}, it is clearly the best on {len(won)} of {len(tasks)} tasks"
    for task in lost:
        best = min((gap for gap in gaps if gap.task == task), key=lambda gap: gap.difference)
        line += f"; on {task}, {best.against} is better by {-best.difference:.3f} AUC"
    return len(lost), len(tasks), line + "."


def _calibration(facts: Sequence[TaskFact]) -> list[str]:
    """What is predicted too often or too seldom by more than a tenth, and by more than its interval."""
    known = {f.task: f for f in facts if f.kind == "binary" and not math.isnan(f.number("calibration"))}
    off = {task: f.number("calibration") for task, f in known.items() if _is_off(f)}
    if off:
        said = [f"{t} is predicted {_too(ratio)}" for t, ratio in off.items()]
        return [f"Probabilities are off: {listed(said)}."]
    vague = [t for t, f in known.items() if not RATIO[0] <= f.number("calibration") <= RATIO[1]]
    if vague:
        return [
            f"Predicted and observed events agree within 10%, or, of {listed(vague)}, as far as its events can tell."
        ]
    return ["Predicted and observed events agree within 10%."] if known else []


def _is_off(fact: TaskFact) -> bool:
    ratio, error = fact.number("calibration"), fact.error("calibration")
    if math.isnan(error):  # of so many events, as of a Poisson number
        events = (fact.metrics.get("count") or 0.0) * (fact.metrics.get("base_rate") or 0.0)
        error = ratio / math.sqrt(events) if events else 0.0
    return not fact.unsure and not RATIO[0] <= ratio <= RATIO[1] and abs(ratio - 1) > SURE * error


def _too(ratio: float) -> str:
    if ratio > 2:
        return f"{ratio:.1f} times as often as it happens"
    return f"{abs(ratio - 1):.0%} too {'often' if ratio > 1 else 'seldom'}"
