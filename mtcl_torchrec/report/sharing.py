"""Whether tasks help each other, in plain words: by single-task twins; gradients and gates are hints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtcl_torchrec.report.comparisons import Comparison, is_single_task, of_tasks
from mtcl_torchrec.report.verdict import Answer, Tone
from mtcl_torchrec.report.words import listed, signed

SMALL = 0.002  # of AUC, NE or R²: what is sure and smaller is too little to go by
OPPOSED, ALIKE = -0.05, 0.05  # mean cosine of two gradients


def do_tasks_help(
    compared: Sequence[Comparison], gradients: Sequence[Mapping[str, Any]], gates: Sequence[Mapping[str, Any]],
    tasks: Sequence[str], untuned: Mapping[str, str] | None = None,
) -> Answer:  # fmt: skip
    """Do tasks help each other: against single-task twins; gradients and gates beside it.

    Args:
        compared: with all baselines.
        gradients, gates: as in metrics.json, ``balance``.
        tasks: of the run.
        untuned: baselines, twins among them, that were trained at one setting only -> which one, in words.
    """
    untuned = untuned or {}
    question = "Do the tasks help each other?"
    if len(tasks) < 2:
        return Answer(question, "There is one task", "unknown", ["With one task there is nothing to share."])
    hints = _agreement(gradients) + _sharing(gates)
    every = [c for c in of_tasks(compared) if is_single_task(c.against)]
    command = "`mtcl baselines RUN_DIR --only single_task --trials 1` trains them."
    if not every:
        first = f"Only twins, the same network trained on each task alone, tell whether sharing pays: {command}"
        return Answer(question, "Not measured", "unknown", [first, *hints])
    twins = [c for c in every if not c.unsure]
    groups = {sign: [c for c in twins if c.sign == sign] for sign in (1, -1, 0)}
    helped, hurt, close = groups[1], groups[-1], groups[0]
    sentences = []
    if twins:
        sentences.append(
            f"Of {len(twins)} task{'s' * (len(twins) > 1)} that twins were trained on alone, {len(helped)} "
            f"{'is' if len(helped) == 1 else 'are'} predicted better together, {len(hurt)} worse, {len(close)} too "
            "close to call."
        )
    for of, word in ((helped, "Better"), (hurt, "Worse"), (close, "Too close to call")):
        if of:
            sentences.append(f"{word}: {listed([f'{c.of} ({c.said()})' for c in of])}.")
    if any(c.metric == "ne" for c in twins):
        sentences.append("Of NE, less is better.")
    if unsure := [f"{c.of}, {c.unsure}" for c in every if c.unsure]:
        sentences.append(f"Cannot be judged: {'; '.join(unsure)}.")
    if left := [task for task in tasks if task not in {c.of for c in every}]:
        sentences.append(f"Not compared: {listed(left)}.")
    if which := next((untuned[c.against] for c in every if c.against in untuned), ""):
        sentences.append(
            f"The twins have {which}, and were not tuned: `mtcl baselines RUN_DIR --only single_task --network-trials "
            "8` tunes them."
        )
    if not twins:
        return Answer(question, "Not known: too few events", "unknown", sentences + hints)
    short, tone = _of_sharing(helped, hurt, len(twins))
    return Answer(question, short, tone, sentences + hints)


def _of_sharing(helped: Sequence[Comparison], hurt: Sequence[Comparison], count: int) -> tuple[str, Tone]:
    if not helped and not hurt:
        return "No difference that counts", "mixed"
    if max(abs(c.difference) for c in (*helped, *hurt)) < SMALL:
        measures = {c.metric for c in (*helped, *hurt)}
        unit = " AUC" if measures == {"auc"} else ""
        return f"Hardly: all differences are below {SMALL}{unit}", "mixed"
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
