"""A verdict in plain words, from numbers by rules; `RULES` says them to the reader."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mtcl_torchrec.report.facts import Event, Gap, TaskFact, is_single_task
from mtcl_torchrec.report.words import listed, signed, signed_with_error

SURE = 2.0  # standard errors that a difference takes to count
MARGIN = 0.005  # of an AUC, where no standard error is known
SMALL = 0.002  # of an AUC: what is sure and smaller is too little to go by
# Of an AUC.
BANDS = ((0.8, "well"), (0.7, "fairly well"), (0.6, "poorly"), (0.0, "hardly better than by chance"))
RATIO = (0.9, 1.1)  # of predicted to observed events: outside of it, probabilities are off
AHEAD = 1.5  # times the share of the next task: from there on, a task of half the ranking decides it mostly
OPPOSED, ALIKE = -0.05, 0.05  # mean cosine of two gradients

Tone = Literal["good", "mixed", "bad", "unknown"]

RULES = (
    "A task is predicted better than guessing where its log-loss is below that of always predicting the base rate "
    "(NE < 1) and, of a binary task, its AUC lies above 0.5 by two standard errors; of a regression, where R² > 0.",
    "An AUC of at least 0.8 tells events from the rest well, 0.7 fairly well, 0.6 poorly, less hardly better than by "
    "chance.",
    "A difference counts where it is more than two standard errors (over users, the same rows compared), or, where no "
    "standard error is known, more than 0.005; all else is too close to call.",
    "The model is good where at least half of its tasks are better than guessing and no baseline is clearly better on "
    "half of the tasks that both predict or more.",
    "Whether tasks help each other is told by twins, the same network trained on each task alone, and by nothing else: "
    "a difference that is sure but below 0.002 AUC counts as hardly any. Run and twins are trained once, and what "
    "another seed would change is not in the intervals. Gradients that agree or pull apart (mean cosine beyond ±0.05) "
    "are a hint, not a proof.",
    "The fused ranking is held against popularity, and against each event's own head, by GAUC where users are known "
    "(AUC where not); of an event that lowers the score, a low value is what is wanted.",
    "Probabilities are off where predicted over observed events lies outside 0.9 to 1.1.",
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


def sign_of(gap: Gap) -> int:
    """1 where the difference counts as better, -1 as worse, 0 where it is too close to call.

    Example:
        >>> sign_of(Gap("click", "popularity", 0.03, 0.01)), sign_of(Gap("click", "popularity", 0.03, 0.02))
        (1, 0)
    """
    if math.isnan(gap.difference):
        return 0
    bound = MARGIN if math.isnan(gap.error) else SURE * gap.error
    return 0 if abs(gap.difference) <= bound else (1 if gap.difference > 0 else -1)


def learnt(fact: TaskFact) -> bool | None:
    """Whether a task is predicted better than guessing; None where that cannot be told."""
    ne = fact.number("ne")
    if fact.kind == "regression":
        r2 = fact.number("r2")
        return None if math.isnan(r2) else r2 > 0
    if math.isnan(ne):
        return None
    if fact.kind == "multiclass":
        return ne < 1
    auc = fact.number("auc")
    if math.isnan(auc):
        return None
    return ne < 1 and auc > 0.5 + SURE * (0.0 if math.isnan(fact.error) else fact.error)


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
    sentences += _separation(facts) + _against_popularity(events)
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


def _against_popularity(events: Sequence[Event]) -> list[str]:
    signs = {e.task: sign_of(g) for e in events for g in e.gaps if g.against == "popularity"}
    if not signs:
        return []
    better = [t for t, s in signs.items() if s > 0]
    line = f"Ranked by the fused score, {len(better)} of {len(signs)} events come out better than by popularity"
    if worse := [t for t, s in signs.items() if s < 0]:
        line += f", {listed(worse)} worse"
    if close := [t for t, s in signs.items() if s == 0]:
        line += f"; {listed(close)} too close to call"
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
    ratios = {f.task: f.number("calibration") for f in facts if f.kind == "binary"}
    off = {t: r for t, r in ratios.items() if not math.isnan(r) and not RATIO[0] <= r <= RATIO[1]}
    if not off:
        known = [r for r in ratios.values() if not math.isnan(r)]
        return ["Predicted and observed events agree within 10%."] if known else []
    said = [f"{t} is predicted {f'{r:.1f} times as often as it happens' if r > 2 else _too(r)}" for t, r in off.items()]
    return [f"Probabilities are off: {listed(said)}."]


def _too(ratio: float) -> str:
    return f"{abs(ratio - 1):.0%} too {'often' if ratio > 1 else 'seldom'}"


def do_tasks_help(
    gaps: Sequence[Gap], gradients: Sequence[Mapping[str, Any]], gates: Sequence[Mapping[str, Any]],
    tasks: Sequence[str],
) -> Answer:  # fmt: skip
    """Do tasks help each other: against single-task twins; gradients and gates beside it.

    Args:
        gaps: against all baselines.
        gradients, gates: as in metrics.json, ``balance``.
        tasks: of the run.
    """
    question = "Do the tasks help each other?"
    if len(tasks) < 2:
        return Answer(question, "There is one task", "unknown", ["With one task there is nothing to share."])
    hints = _agreement(gradients) + _sharing(gates)
    twins = [gap for gap in gaps if is_single_task(gap.against)]
    command = "`mtcl baselines RUN_DIR --only single_task --trials 1` trains them."
    if not twins:
        first = f"Only twins, the same network trained on each task alone, tell whether sharing pays: {command}"
        return Answer(question, "Not measured", "unknown", [first, *hints])
    groups: dict[int, list[Gap]] = {sign: [gap for gap in twins if sign_of(gap) == sign] for sign in (1, -1, 0)}
    helped, hurt, close = groups[1], groups[-1], groups[0]
    sentences = [
        f"Of {len(twins)} task{'s' * (len(twins) > 1)} that twins were trained on alone, {len(helped)} "
        f"{'is' if len(helped) == 1 else 'are'} predicted better together, {len(hurt)} worse, {len(close)} too close "
        "to call."
    ]
    for of, word in ((helped, "Better"), (hurt, "Worse"), (close, "Too close to call")):
        if of:
            said = [f"{gap.task} ({signed_with_error(gap.difference, gap.error)} AUC)" for gap in of]
            sentences.append(f"{word}: {listed(said)}.")
    if left := [task for task in tasks if task not in {gap.task for gap in twins}]:
        sentences.append(f"Not compared: {listed(left)}.")
    short, tone = _of_sharing(helped, hurt, len(twins))
    return Answer(question, short, tone, sentences + hints)


def _of_sharing(helped: Sequence[Gap], hurt: Sequence[Gap], count: int) -> tuple[str, Tone]:
    if not helped and not hurt:
        return "No difference that counts", "mixed"
    if max(abs(gap.difference) for gap in (*helped, *hurt)) < SMALL:
        return f"Hardly: all differences are below {SMALL} AUC", "mixed"
    if not hurt:
        return f"Yes, {len(helped)} of {count}", "good"
    if not helped:
        return f"No, sharing hurts {len(hurt)} of {count}", "bad"
    return f"{len(helped)} gain, {len(hurt)} lose", "mixed"


def _agreement(gradients: Sequence[Mapping[str, Any]]) -> list[str]:
    pairs = [
        (float(value), str(seen["tasks"][j]), str(seen["tasks"][i]))
        for seen in gradients[:1]
        for i, row in enumerate(seen["cosine"])
        for j, value in enumerate(row[:i])
        if value is not None
    ]
    if not pairs:
        return []
    (low, a, b), (high, x, y) = min(pairs), max(pairs)
    if low <= OPPOSED:
        opposed = sum(value <= OPPOSED for value, _, _ in pairs)
        return [
            f"Gradients pull apart for {opposed} of {len(pairs)} pairs of tasks, most {a} and {b} ({signed(low, 2)})."
        ]
    if high >= ALIKE:
        return [f"No two tasks' gradients pull apart; {x} and {y} agree most ({signed(high, 2)})."]
    return ["The tasks' gradients hardly meet: no pair agrees or pulls apart."]


def _sharing(gates: Sequence[Mapping[str, Any]]) -> list[str]:
    """How much of their experts two gates have in common on average: Σ min of their weights."""
    first = [use for use in gates if use["level"] == gates[0]["level"]] if gates else []
    weights = [[w or 0.0 for w in use["weights"]] for use in first]
    pairs = [(one, other) for i, one in enumerate(weights) for other in weights[:i]]
    overlaps = [sum(min(a, b) for a, b in zip(one, other, strict=True)) for one, other in pairs]
    if not overlaps:
        return []
    mean = sum(overlaps) / len(overlaps)
    return [
        f"Any two gates give {mean:.0%} of their weight to the same experts, on average: 100% would be one mixture for "
        "all tasks, 0% experts of their own."
    ]


def what_does_fusion(
    shares: Mapping[str, float],
    events: Sequence[Event],
    has_fusion: bool,
    tried: Sequence[Gap] = (),
    target: str = "",
) -> Answer:
    """What the fused score does: who decides, what is won against popularity, what each event's own head would do.

    Args:
        shares: task -> share of the ranking; empty where it is not known.
        events: see `mtcl_torchrec.report.facts.events`.
        has_fusion: whether the run declares or fitted one.
        tried: of one fitted after training, see `mtcl_torchrec.report.facts.tried_gaps`.
        target: what it was fitted for.
    """
    question = "What does the fusion do?"
    if not has_fusion:
        return Answer(
            question, "There is none", "unknown", ["The run has no fused score: `fusion` in its YAML declares one."]
        )
    sentences = []
    tasks = sorted((t for t in shares if t != "the rest"), key=lambda t: -abs(shares[t]))
    short = "Ranks by all heads together"
    if tasks:
        lead = [f"{t} ({shares[t]:.0%})".replace("-", "−") for t in tasks[:3] if abs(shares[t]) >= 0.05]
        first, second = [*(abs(shares[t]) for t in tasks[:2]), 0.0][:2]
        alone = first >= 0.5 and first >= AHEAD * second
        short = f"Ranks mostly by {tasks[0]}" if alone else f"Led by {listed(tasks[:2])}"
        sentences.append(f"The order within a request is decided by {listed(lead or tasks[:1])}.")
    sentences += _against_popularity(events)
    lost = [(g.difference, e) for e in events for g in e.gaps if g.against == "own head"]
    if lost:
        worst, event = min(lost, key=lambda of: of[0])
        ahead = [e.task for d, e in lost for g in e.gaps if g.against == "own head" and sign_of(g) > 0]
        if worst < 0:
            sentences.append(
                f"One order for all events costs each of them at most {-worst:.3f} {event.metric} against its own head "
                f"(most for {event.task})."
            )
        if ahead:
            sentences.append(f"For {listed(list(dict.fromkeys(ahead)))} it is better than the event's own head.")
    words = {1: "clearly better than", 0: "not clearly better than", -1: "clearly worse than"}
    for gap in tried:
        other = f"the head of {gap.task} alone" if gap.task else gap.against
        found = f"{words[sign_of(gap)]} {other} on rows left out ({signed(gap.difference)})"
        sentences.append(f"Fitted for {target}, it is {found}.")
    signs = [sign_of(g) for e in events for g in e.gaps if g.against == "popularity"]
    signs += [sign_of(gap) for gap in tried]
    if not signs:
        return Answer(question, short, "unknown" if not tasks else "mixed", sentences or ["It was not evaluated."])
    won, fell = sum(s > 0 for s in signs), sum(s < 0 for s in signs)
    tone: Tone = "good" if won > len(signs) / 2 and not fell else "bad" if won < fell else "mixed"
    return Answer(question, short, tone, sentences)
