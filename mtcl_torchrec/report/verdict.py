"""A verdict in plain words, from numbers by rules; `RULES` says them to the reader."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from mtcl_torchrec.evaluation.confidence import FEWEST, SURE, plus_minus
from mtcl_torchrec.evaluation.naming import MAIN, bounds_of, label_of
from mtcl_torchrec.evaluation.resampled import RANKING
from mtcl_torchrec.evaluation.rivals import POPULARITY, sign_of
from mtcl_torchrec.report.comparisons import Comparison, is_single_task, of_tasks
from mtcl_torchrec.report.facts import Event, TaskFact
from mtcl_torchrec.report.words import listed, shortened

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
    "A difference to popularity or an event's own head counts where it is beyond its 95% interval (over users, the "
    "same rows compared), or, where no interval is known, more than 0.005; all else is too close to call.",
    "Baselines and twins are compared by AUC of events, NE of classes and R² of numbers, and by value@k. All of these "
    "are tested together, as `mtcl baselines` does (paired over users, 5% after Holm's correction): of many equal "
    "baselines, one is beyond its own 95% interval by chance more often than not, and does not count for that.",
    f"Fewer than {FEWEST} events, or rows without, or a single user, make nothing sure: such a task is named, and "
    "nothing else is said of it.",
    "The model is good where at least half of its tasks are better than guessing and baselines are clearly better on "
    "less than half of the tasks that both predict.",
    "Whether tasks help each other is told by twins, the same network trained on each task alone, and by nothing else: "
    "a difference that is sure but below 0.002 (of AUC, NE or R²) counts as hardly any. Run and twins are trained "
    "once, and what another seed would change is not in the intervals. Gradients that agree or pull apart (mean cosine "
    "beyond ±0.05) are a hint, not a proof.",
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


def in_doubt(answer: Answer, doubts: Sequence[str]) -> Answer:
    """An answer after what puts it in doubt; the answer itself where nothing does.

    Example:
        >>> in_doubt(Answer("Is it good?", "Yes", "good", ["Better than guessing."]), ["It saw the label."]).sentences
        ['It saw the label.', 'Better than guessing.']
    """
    if not doubts:
        return answer
    return replace(answer, short="In doubt: too good to be true", tone="bad", sentences=[*doubts, *answer.sentences])


def learnt(fact: TaskFact) -> bool | None:
    """Whether a task is predicted better than guessing, by more than its interval; None where that cannot be told."""
    if fact.unsure:
        return None
    if fact.kind == "regression":
        return _beyond(fact, "r2", 0.0)
    if fact.kind == "multiclass":
        return _beyond(fact, "ne", 1.0, above=False)
    orders, informs = _beyond(fact, "auc", 0.5), _beyond(fact, "ne", 1.0, above=False)
    return None if orders is None or informs is None else orders and informs


def orders(fact: TaskFact) -> bool | None:
    """Whether a task's predictions put rows into a better order than chance, whatever their probabilities are worth;
    None where that cannot be told."""
    return learnt(fact) if fact.kind != "binary" or fact.unsure else _beyond(fact, "auc", 0.5)


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
    compared: Sequence[Comparison],
    events: Sequence[Event],
    *,
    untuned: Collection[str] = (),
    knowable: str = "",
) -> Answer:
    """Is the model good: against guessing, popularity and baselines.

    Args:
        compared: with baselines, see `mtcl_torchrec.report.comparisons.comparisons`.
        events: of the fused ranking, for popularity.
        untuned: baselines that were tried at one setting only.
        knowable: a sentence about what can be known at all, of a run on a synthetic world.
    """
    question = "Is the model good?"
    known = {f.task: better for f in facts if (better := learnt(f)) is not None}
    unknown = [fact for fact in facts if fact.task not in known]
    if not known:
        why = [f"No task can be judged: {'; '.join(shortened([*map(_why_not, unknown)]))}."] if unknown else []
        return Answer(question, "Not known", "unknown", why or ["No task has labels by which it could be judged."])
    good = [task for task, better in known.items() if better]
    sentences = [f"{_of(good, known)} predicted better than guessing."]
    if weak := [_weak(f) for f in facts if known.get(f.task) is False]:
        sentences[0] = f"{sentences[0][:-1]}; not clearly so {listed(weak)}."
    if unknown:
        sentences.append(f"Cannot be judged, and left out below: {'; '.join(shortened([*map(_why_not, unknown)]))}.")
    sentences += [knowable] if knowable else []
    judged = [fact for fact in facts if fact.task in known]
    sentences += _separation(judged) + against_popularity([e for e in events if e.task in known])
    worse, total, lines = _against_baselines(compared, untuned, list(known))
    sentences += lines
    sentences += _calibration(judged)
    half = len(known) / 2
    if len(good) < half or (total and worse >= total / 2):
        why_bad = "a baseline is better" if total and worse >= total / 2 else _count(good, known)
        return Answer(question, f"No: {why_bad}", "bad", sentences)
    if len(good) < len(known) or worse:
        why_mixed = _count(good, known) if not worse else f"a baseline wins {worse} of {total} tasks"
        return Answer(question, f"In part: {why_mixed}", "mixed", sentences)
    if not total:
        return Answer(question, "Better than guessing", "good", sentences)
    return Answer(question, "Yes: no baseline is better", "good", sentences)


def _count(good: Sequence[str], known: Collection[str]) -> str:
    return f"{len(good)} of {len(known)} tasks learnt"


def _why_not(fact: TaskFact) -> str:
    """A task that cannot be judged, and why, in a few words."""
    lacking = "no labels" if not fact.metrics.get("count") else "only one kind of label"
    return f"{fact.task}, {fact.unsure or lacking}"


def _weak(fact: TaskFact) -> str:
    """A task that is not clearly better than guessing, and the measure that says so."""
    key = MAIN[fact.kind]
    if fact.kind == "binary" and _beyond(fact, "auc", 0.5):
        key = "ne"
    error = fact.error(key)
    half = math.nan if math.isnan(error) else SURE * error
    return f"{fact.task} ({label_of(key)} {plus_minus(fact.number(key), half, bounds=bounds_of(key))})"


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
    gaps = {e.task: g for e in events for g in e.gaps if g.against == POPULARITY and not g.unsure}
    if not gaps:
        return []
    signs = {task: sign_of(gap) for task, gap in gaps.items()}
    better = [t for t, s in signs.items() if s > 0]
    line = f"Ranked by the fused score, {len(better)} of {len(signs)} events come out better than by popularity"
    line += f" ({', '.join(shortened(better))})" if better else ""
    if worse := [t for t, s in signs.items() if s < 0]:
        line += f", {listed(worse)} worse"
    if close := [t for t, s in signs.items() if s == 0]:
        line += f"; {listed(close)} too close to call"
    return [line + "."]


def _against_baselines(
    every: Sequence[Comparison], untuned: Collection[str], known: Sequence[str]
) -> tuple[int, int, list[str]]:
    """Tasks on which some baseline is clearly better, tasks compared, and sentences."""
    compared = [c for c in every if not is_single_task(c.against)]
    with_twins = len(compared) < len(every)
    sure = [c for c in of_tasks(compared) if not c.unsure and c.of in known]
    if not sure and compared:
        return 0, 0, ["It was compared with baselines on no task that can be judged."]
    if not sure:
        return 0, 0, ["It was compared with no tuned baselines: `mtcl baselines RUN_DIR` trains them."]
    tasks = list(dict.fromkeys(c.of for c in sure))
    won = [task for task in tasks if all(c.sign > 0 for c in sure if c.of == task)]
    names = list(dict.fromkeys(c.against for c in sure))
    rivals = listed(names) if len(names) < 3 else f"{len(names)} baselines"
    rivals += " (the twins not counted)" if with_twins else ""
    best = f" ({', '.join(shortened(won))})" if won else ""
    lines = [f"Against {rivals}, it is clearly the best on {len(won)} of {len(tasks)} tasks{best}."]
    lines += _few_rivals(sure, won, len(names))
    ahead = {task: _ahead([c for c in sure if c.of == task]) for task in tasks}
    lost = [task for task in tasks if ahead[task]]
    lines += [f"On {task}, {ahead[task]}." for task in lost]
    if close := [task for task in tasks if task not in won and task not in lost]:
        lines.append(f"On {listed(close)}, no difference that counts between it and the best baseline.")
    if left := [task for task in known if task not in tasks and "|" not in task]:
        lines.append(f"Not compared with baselines: {listed(left)}.")
    lines += [f"By {metric} of what is shown, {said}." for metric, said in _of_ranking(compared)]
    if alone := [name for name in names if name in untuned]:
        of = "They" if len(alone) == len(names) > 1 else listed(alone)
        lines.append(
            f"{of} {'was' if len(alone) == 1 else 'were'} tried at one setting only, and not tuned: `mtcl baselines "
            "RUN_DIR` tunes baselines, and networks with `--network-trials`."
        )
    return len(lost), len(tasks), lines


def _few_rivals(compared: Sequence[Comparison], won: Sequence[str], count: int) -> list[str]:
    """What the run was best on, but not of as many baselines as there are: who predicts that."""
    tasks_of: dict[tuple[str, ...], list[str]] = {}
    for task in won:
        tasks_of.setdefault(tuple(c.against for c in compared if c.of == task), []).append(task)
    return [
        f"Of these baselines, only {listed(rivals)} predict{'s' * (len(rivals) == 1)} {listed(tasks)}."
        for rivals, tasks in tasks_of.items()
        if len(rivals) < count
    ]


def _ahead(compared: Sequence[Comparison]) -> str:
    """Who is better than the run, the best first; empty where nobody is."""
    better = sorted((c for c in compared if c.sign < 0), key=lambda c: c.gain)
    if not better:
        return ""
    return f"{listed([f'{c.against} (by {c.by()})' for c in better])} {'is' if len(better) == 1 else 'are'} better"


def _of_ranking(compared: Sequence[Comparison]) -> list[tuple[str, str]]:
    """Measure of the ranking -> which baselines are better in it; of those where some are."""
    sure = [c for c in compared if c.of == RANKING and not c.unsure]
    said = {metric: _ahead([c for c in sure if c.metric == metric]) for metric in dict.fromkeys(c.metric for c in sure)}
    return [(label_of(metric), ahead) for metric, ahead in said.items() if ahead]


def _calibration(facts: Sequence[TaskFact]) -> list[str]:
    """What is predicted too often or too seldom by more than a tenth, and by more than its interval."""
    known = {f.task: f for f in facts if f.kind == "binary" and not math.isnan(f.number("calibration"))}
    if not known:
        return []
    off = {task: f.number("calibration") for task, f in known.items() if _is_off(f)}
    vague = [t for t, f in known.items() if t not in off and not _is_right(f.number("calibration"))]
    right = [t for t in known if t not in off and t not in vague]
    parts = []
    if off:
        parts.append(
            f"Probabilities are off: {listed([f'{t} is predicted {_too(ratio)}' for t, ratio in off.items()])}"
        )
    if right:
        parts.append(f"Predicted and observed events of {listed(right)} agree within 10%")
    if vague:
        parts.append(f"of {listed(vague)}, whether they agree is more than so few events can tell")
    line = "; ".join([parts[0], *(part[0].lower() + part[1:] for part in parts[1:])])
    return [f"{line[0].upper()}{line[1:]}."]


def _is_right(ratio: float) -> bool:
    return RATIO[0] <= ratio <= RATIO[1]


def _is_off(fact: TaskFact) -> bool:
    ratio, error = fact.number("calibration"), fact.error("calibration")
    if math.isnan(error):  # of so many events, as of a Poisson number
        events = (fact.metrics.get("count") or 0.0) * (fact.metrics.get("base_rate") or 0.0)
        error = ratio / math.sqrt(events) if events else 0.0
    return not fact.unsure and not _is_right(ratio) and abs(ratio - 1) > SURE * error


def _too(ratio: float) -> str:
    if ratio > 2:
        return f"{ratio:.1f} times as often as it happens"
    return f"{abs(ratio - 1):.0%} too {'often' if ratio > 1 else 'seldom'}"
