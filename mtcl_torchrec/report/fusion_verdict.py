"""What the fused score does, and what it is worth, in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mtcl_torchrec.evaluation.confidence import PLUS_MINUS
from mtcl_torchrec.evaluation.rivals import Gap, sign_of
from mtcl_torchrec.evaluation.worth import Verdict, lead_of
from mtcl_torchrec.report.facts import Event
from mtcl_torchrec.report.verdict import Answer, Tone, against_popularity
from mtcl_torchrec.report.words import first_rows, listed, rows_in_words, shortened, signed

AHEAD = 1.5  # times the share of the next task: from there on, a task of half the ranking decides it mostly
HEARD = 0.05  # share of the ranking from which on a task is said to decide it


def worth_in_a_line(found: Verdict | None) -> str:
    """What ranking by the fused score brings against simpler orders; empty where that is not known.

    Args:
        found: see `mtcl_torchrec.evaluation.worth.verdict_of`.

    Example:
        >>> from mtcl_torchrec.evaluation.worth import Rival
        >>> worth_in_a_line(Verdict("value@5", 2.06, (Rival("head click", 2.0, 0.06, 0.01),), "users"))[26:]
        'the first 5 rows of a request bring +3.0 % ± 0.5 % against the best single head (click).'
    """
    if found is None or not found.rivals:
        return ""
    said = []
    for rival in found.rivals:
        of = f"the best single head ({rival.head})" if rival.head else rival.name
        if rival.ahead == 0 and not rival.half > 0:
            said.append(f"the same as {of}")
            continue
        unsure = f", with {found.unsure} to be sure" if found.unsure else ", which is too close to call"
        said.append(f"{lead_of(rival)} against {of}{unsure * (rival.sign == 0)}".replace("-", "−", 1))
    k = int(found.measure.partition("@")[2])
    bring = f"{first_rows(k)} of a request bring{'s' * (k == 1)}"
    return f"What the fusion is worth: {bring} {', and '.join(said)}."


def worth_explained(
    k: int, values: Mapping[str, float], choice: float | None, numbers: Mapping[str, str] | None = None
) -> str:
    """What is counted in it.

    Args:
        k: rows of a request that are shown.
        values: task -> what its event is worth.
        choice: the share of requests that have more than k rows.
        numbers: task -> the feature of the item, such as its price, that its value is multiplied by.

    Example:
        >>> worth_explained(5, {"click": 1.0, "like": 8.0}, 0.25)[:72]
        'That is value@5: what happened to these rows, worth click 1, like 8; 25%'
    """
    by = {task: f" · {feature}" for task, feature in (numbers or {}).items()}
    counted = ", ".join(shortened([f"{task} {value:g}{by.get(task, '')}" for task, value in values.items()]))
    line = f"That is value@{k}: what happened to {'that row' if k == 1 else 'these rows'}, worth {counted}; "
    if choice is not None:
        line += (
            f"{choice:.0%} of the requests have more than {rows_in_words(k)}: in all others the order changes nothing; "
        )
    return f"{line}{PLUS_MINUS}."


def what_does_fusion(
    shares: Mapping[str, float],
    events: Sequence[Event],
    has_fusion: bool,
    tried: Sequence[Gap] = (),
    target: str = "",
    not_learnt: Sequence[str] = (),
) -> Answer:
    """What the fused score does: who decides, what is won against popularity, what each event's own head would do.

    Args:
        shares: task -> share of the ranking; empty where it is not known.
        events: see `mtcl_torchrec.report.facts.events`.
        has_fusion: whether the run declares or fitted one.
        tried: of one fitted after training, see `mtcl_torchrec.report.facts.tried_gaps`.
        target: what it was fitted for.
        not_learnt: tasks whose predictions order rows no better than chance, or of which that is not sure.
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
        said = [f"{t} ({shares[t]:.0%})".replace("-", "−") for t in tasks[:3] if abs(shares[t]) >= HEARD]
        overruled = [of for of in said if "(−" in of]
        lead = [of for of in said if of not in overruled]
        first, second = [*(abs(shares[t]) for t in tasks[:2]), 0.0][:2]
        alone = first >= 0.5 and first >= AHEAD * second
        leaders = [task for task in tasks if shares[task] > 0] or tasks
        short = f"Ranks mostly by {tasks[0]}" if alone else f"Led by {listed(leaders[:2])}"
        against = f", against {listed(overruled)}, whose part in the score is overruled" if overruled and lead else ""
        sentences.append(f"The order within a request is decided by {listed(lead or tasks[:1])}{against}.")
    blind = [task for task in tasks if task in not_learnt and abs(shares[task]) >= HEARD]
    if blind:
        sentences.append(
            f"Warning: the score ranks by {listed(blind)}, whose order is not clearly better than chance; such a "
            "weight may add noise."
        )
    sentences += against_popularity(events)
    lost = [(g.difference, e) for e in events for g in e.gaps if g.against == "own head" and not g.unsure]
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
    if unsure := [f"{e.task}, {why}" for e in events if (why := next((g.unsure for g in e.gaps if g.unsure), ""))]:
        sentences.append(f"Cannot be judged: {'; '.join(shortened(unsure))}.")
    signs = [sign_of(g) for e in events for g in e.gaps if g.against == "popularity" and not g.unsure]
    signs += [sign_of(gap) for gap in tried]
    if not signs:
        return Answer(question, short, "unknown" if not tasks else "mixed", sentences or ["It was not evaluated."])
    won, fell = sum(s > 0 for s in signs), sum(s < 0 for s in signs)
    tone: Tone = "good" if won > len(signs) / 2 and not fell and not blind else "bad" if won < fell else "mixed"
    return Answer(question, short, tone, sentences)
