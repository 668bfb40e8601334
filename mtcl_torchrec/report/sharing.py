"""Whether tasks help each other, in plain words: by single-task twins; gradients and gates are hints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtcl_torchrec.evaluation.rivals import Gap, sign_of
from mtcl_torchrec.report.facts import is_single_task
from mtcl_torchrec.report.verdict import Answer, Tone
from mtcl_torchrec.report.words import listed, signed, signed_with_error

SMALL = 0.002  # of an AUC: what is sure and smaller is too little to go by
OPPOSED, ALIKE = -0.05, 0.05  # mean cosine of two gradients


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
