"""What stands out in a finished training, in words: a function from numbers to sentences.

The bounds below are where a person would want to look, not tests of significance.  What is about validation metrics
allows for the chance that small numbers of rows leave.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from mtcl_torchrec.evaluation.confidence import too_few_to_judge
from mtcl_torchrec.evaluation.naming import label_of, main_metric, sign_of_better
from mtcl_torchrec.evaluation.rivals import WORDS
from mtcl_torchrec.training.balance import Balance, GateUse, GradientAgreement, LossWeights
from mtcl_torchrec.training.rising import LEARNT as _LEARNT
from mtcl_torchrec.training.rising import chance_of_auc, in_words, still_rising

MOST_LINES = 8

OPPOSED = -0.05  # mean cosine of two gradients; near 0, half of all steps conflict by chance alone
OFTEN, OFTEN_OF = 0.75, 20  # share of conflicting steps that chance does not explain, of so many steps or more
NOTABLE = -0.02  # mean cosine above which that share is of no consequence
PAIRS = 3  # of tasks that pull apart, named one by one
SETTLED = 50  # readings before which gates that do not choose may only not have learnt to yet
HELD = 0.05  # share of steps in which weights were clamped or the Gramian had no solution
UNUSED = 0.1  # of an equal share: what no gate gives more than is idle
LEANS = 0.9  # weight of a task's own experts, or of one expert
UNEVEN = 2.0  # ratio of two tasks' weights
EVEN = 0.97  # entropy of gates, on average, that do not choose
LEARNT = _LEARNT["auc"]  # from which on a task has learnt something
FAR = 1.25  # predicted events for each that came, or the other way round, that chance does not explain
STEADY, STEADY_FOR = {"auc": 0.004, "r2": 0.004, "ne": 0.003}, 2  # a loss that grew in so many epochs, one by one
MENDS = "`calibration:` mends levels"
DROPPED = {"auc": 0.01, "r2": 0.02, "ne": 0.02}  # from a task's best epoch to the kept one

Metrics = Mapping[str, "float | None"]


class _Finding(NamedTuple):
    weight: float  # of the finding among others
    sentence: str


def diagnose(
    balance: Balance,
    epochs: Sequence[Mapping[str, Metrics]] = (),
    best_epoch: int = 0,
    *,
    calibrated: Collection[str] = (),
    popular: Mapping[str, Mapping[str, Any]] | None = None,
    doubts: Sequence[str] = (),
) -> list[str]:
    """What is worth saying about a training, the most important first: at most `MOST_LINES` lines.

    Args:
        balance: the numbers after the last reading.
        epochs: validation metrics by task, of each epoch.
        best_epoch: the kept one, from 1; 0 where there is none.
        calibrated: tasks whose predictions are calibrated after training, so that their level says nothing.
        doubts: what stands before all else, as it puts all else in doubt.
        popular: of the validation split, what `mtcl_torchrec.evaluation.rivals.against_popularity` found.

    Example:
        >>> gates = [GateUse(1, "click", [0.5, 0.5, 0.0], 0.6), GateUse(1, "like", [0.7, 0.29, 0.01], 0.6)]
        >>> diagnose(Balance(gates=gates))
        ['expert 2 is unused: no gate gives it more than 0.01']
    """
    found = [_Finding(9, doubt) for doubt in doubts]
    if balance.loss_weights is not None:
        found += _about_loss_weights(balance.loss_weights)
    for cut in balance.gradients:
        found += _about_gradients(cut, f" at the {cut.cut}" if len(balance.gradients) > 1 else "")
    for level in sorted({use.level for use in balance.gates}):
        uses = [use for use in balance.gates if use.level == level]
        several = len({use.level for use in balance.gates}) > 1
        found += _about_experts(uses, f" of level {level}" if several else "", balance.readings >= SETTLED)
    if 0 < best_epoch <= len(epochs):
        defined = [{task: _defined(of) for task, of in epoch.items()} for epoch in epochs]
        vague = {task: why for task, of in defined[best_epoch - 1].items() if (why := too_few_to_judge(of))}
        found += _about_vague(vague)
        judged = [{task: of for task, of in epoch.items() if task not in vague} for epoch in defined]
        found += _about_metrics(judged, best_epoch)
        found += _about_levels({t: m for t, m in judged[best_epoch - 1].items() if t not in calibrated})
        found += _about_popularity(popular or {})
        if rising := still_rising(defined, best_epoch):
            found.append(_Finding(1.6, f"{in_words(rising)}: more epochs may pay"))
    found.sort(key=lambda finding: -finding.weight)
    lines = [finding.sentence for finding in found]
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], f"and {len(lines) - MOST_LINES + 1} lesser things (metrics.json, balance)"]
    return lines or [_nothing(balance, bool(epochs))]


def _nothing(balance: Balance, judged: bool) -> str:
    """All is well, wherever there was something to look at."""
    looked = [
        "the tasks' validation metrics" if judged else "",
        "the use of experts" if balance.gates else "",
        "the weights of the losses" if balance.loss_weights else "",
        "the tasks' gradients" if balance.gradients else "",
    ]
    places = [place for place in looked if place]
    return f"nothing stands out in {_listed(places)}" if places else "nothing to look at"


def _about_loss_weights(of: LossWeights) -> Iterator[_Finding]:
    held = {task: share for task, share in of.clamped.items() if share is not None and share >= HELD}
    if held:
        yield _Finding(2 + max(held.values()), f"the weights of {of.method} were held in their range: {_shares(held)}")
    yield from _uneven(of.method, of.mean, "")


def _about_gradients(seen: GradientAgreement, where: str) -> Iterator[_Finding]:
    if seen.degenerate is not None and seen.degenerate >= HELD:
        yield _Finding(
            3 + seen.degenerate,
            f"in {seen.degenerate:.0%} of steps the gradients{where} were none, not finite or without a solution, and "
            "just added up",
        )
    if seen.clamped is not None and seen.clamped >= HELD:
        yield _Finding(2 + seen.clamped, f"the gradients' weights{where} were clamped in {seen.clamped:.0%} of steps")
    pairs: list[tuple[float, str, float, float]] = []
    for i, one in enumerate(seen.tasks):
        for j, other in enumerate(seen.tasks[:i]):
            cosine, share = seen.cosine[i][j], seen.conflicting[i][j]
            if cosine is None or share is None:
                continue
            often = share >= OFTEN and seen.steps >= OFTEN_OF and cosine <= NOTABLE
            if often or (cosine <= OPPOSED and share > HELD):
                pairs.append((1 + share - cosine, f"{other} and {one}", share, cosine))
    pairs.sort(reverse=True)
    for weight, pair, share, cosine in pairs[:PAIRS]:
        sentence = f"{pair} pull apart{where} in {share:.0%} of steps (mean cosine of late {_signed(cosine)})"
        yield _Finding(weight, sentence)
    if rest := pairs[PAIRS:]:
        yield _Finding(rest[0][0], f"other tasks that pull apart{where}: {', '.join(pair for _, pair, _, _ in rest)}")
    yield from _uneven("gradient surgery", seen.weights, where)


def _uneven(method: str, weights: Mapping[str, float | None], where: str) -> Iterator[_Finding]:
    """The task of the largest weight beside that of the smallest."""
    known = {task: w for task, w in weights.items() if w is not None and w > 0}
    if len(known) < 2:
        return
    most, least = max(known, key=known.__getitem__), min(known, key=known.__getitem__)
    ratio = known[most] / known[least]
    if ratio >= UNEVEN:
        times = f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"
        yield _Finding(0.4 + math.log10(ratio) / 2, f"{method} gives {most} {times} times the weight of {least}{where}")


def _about_experts(uses: Sequence[GateUse], where: str, settled: bool) -> Iterator[_Finding]:
    idle = sorted(_idle(uses))
    if idle:
        most = max(use.weights[e] or 0.0 for use in uses for e in idle)
        experts = _listed([str(e) for e in idle])
        subject = f"expert {experts}{where} is" if len(idle) == 1 else f"experts {experts}{where} are"
        it = "it" if len(idle) == 1 else "any of them"
        yield _Finding(1.2 + len(idle) / 100, f"{subject} unused: no gate gives {it} more than {most:.2f}")
    for use in uses:
        seen = {e: w for e, w in enumerate(use.weights) if w is not None}
        if len(seen) < 2:
            continue
        own = [e for e in seen if sum(other.weights[e] is not None for other in uses if other.gate != "shared") == 1]
        on_own = sum(seen[e] for e in own) if len(own) < len(seen) and use.gate != "shared" else 0.0
        favourite = max(seen, key=seen.__getitem__)
        if on_own >= LEANS:
            experts = "expert" if len(own) == 1 else "experts"
            yield _Finding(0.8, f"task {use.gate} leans on its own {experts}{where} ({on_own:.2f}): it shares little")
        elif seen[favourite] >= LEANS and favourite not in own:
            yield _Finding(0.7, f"task {use.gate} uses expert {favourite}{where} alone ({seen[favourite]:.2f})")
    if sum(use.entropy for use in uses) / len(uses) >= EVEN:
        so_far = "one larger expert may do as well" if settled else "so few steps may not teach them to choose"
        yield _Finding(0.2, f"the gates{where} mix all experts evenly: {so_far}")


def _idle(uses: Sequence[GateUse]) -> Iterator[int]:
    """Experts that no gate takes, and that no gate adds beside."""
    native = {expert for use in uses for expert in use.native}
    for expert in sorted(set(range(len(uses[0].weights))) - native):
        shares = [(use.weights[expert], sum(w is not None for w in use.weights)) for use in uses]
        known = [(weight, seen) for weight, seen in shares if weight is not None]
        if known and all(weight < UNUSED / seen for weight, seen in known):
            yield expert


def _defined(metrics: Metrics) -> Metrics:
    """With None for what is NaN: of one class only, say."""
    return {name: value if value is None or math.isfinite(value) else None for name, value in metrics.items()}


def _about_metrics(epochs: Sequence[Mapping[str, Metrics]], best_epoch: int) -> Iterator[_Finding]:
    weak: dict[str, list[tuple[str, float]]] = {"auc": [], "r2": [], "ne": []}
    for task, kept in epochs[best_epoch - 1].items():
        name = main_metric(kept) or "ne"
        value = kept.get(name)
        if value is None:
            continue
        learnt = {"auc": value >= LEARNT, "r2": value > 0, "ne": value < 1}[name]
        if learnt:
            values = [of.get(task, {}).get(name) for of in epochs]
            yield from _fallen(task, name, values, best_epoch, chance_of_auc(kept))
        else:
            weak[name].append((task, value))
    for name, tasks in weak.items():
        if tasks:
            yield _Finding(2.5 + len(tasks) / 100, _no_better(name, tasks))


def _about_vague(tasks: Mapping[str, str]) -> Iterator[_Finding]:
    """All tasks that the validation rows cannot judge, by the bounds of every other judgement."""
    if tasks:
        yield _Finding(0.9, f"validation cannot judge {_listed([f'{task} ({why})' for task, why in tasks.items()])}")


def _about_levels(kept: Mapping[str, Metrics]) -> Iterator[_Finding]:
    """Tasks whose probabilities are worse than a constant, or add up to another number of events than came."""
    worse = {t: ne for t, m in kept.items() if (m.get("auc") or 0) >= LEARNT and (ne := m.get("ne")) and ne >= 1}
    if worse:
        than = "its base rate" if len(worse) == 1 else "their base rates"
        said = f"predicted worse than by {than}, however ranked (validation NE {_span([*worse.values()], 2)})"
        yield _Finding(1.4, f"{_are([*worse])} {said}; {MENDS}")
    if far := _far_off(kept):
        came = "it" if len(far) == 1 else "they"
        said = f"predicted {_span([*far.values()], 2)} times as often as {came} came in validation"
        yield _Finding(1.4, f"{_are([*far])} {said}; {MENDS}")


def _far_off(kept: Mapping[str, Metrics]) -> dict[str, float]:
    """Task -> predicted events for each that came, where that is far from 1 by more than chance (Poisson)."""
    found = {}
    for task, metrics in kept.items():
        ratio, events = metrics.get("calibration"), (metrics.get("count") or 0.0) * (metrics.get("base_rate") or 0.0)
        if metrics.get("auc") is None or not ratio or not events:
            continue
        if abs(math.log(ratio)) > max(math.log(FAR), 3 / math.sqrt(events)):
            found[task] = ratio
    return found


def _about_popularity(popular: Mapping[str, Mapping[str, Any]]) -> Iterator[_Finding]:
    """Events that the fused score surely finds less well than the popularity of items does."""
    below = {task: of for task, of in popular.items() if of["fused_is"] == WORDS[-1]}
    if below:
        by = ", ".join(f"{abs(of['difference']):.3f} {label_of(of['metric'])}" for of in below.values())
        yield _Finding(2.2, f"{_listed(below)}: popularity ranks better than the fused score (by {by} on validation)")


def _span(values: Sequence[float], digits: int) -> str:
    """The smallest and the largest, one where they read alike."""
    shown = [f"{value:.{digits}f}".replace("-", "−") for value in (min(values), max(values))]
    return " to ".join(dict.fromkeys(shown))


def _no_better(name: str, tasks: Sequence[tuple[str, float]]) -> str:
    """One sentence about all tasks that learnt nothing by a metric, however many they are."""
    whose, s = ("its", "") if len(tasks) == 1 else ("their", "s")
    than = {"auc": "by chance", "r2": f"by {whose} mean{s}", "ne": f"by {whose} base rates"}
    found = f"{label_of(name)} {_span([value for _, value in tasks], 3 if name == 'auc' else 2)}"
    return f"{_are([task for task, _ in tasks])} predicted no better than {than[name]} (validation {found})"


def _fallen(task: str, name: str, values: Sequence[float | None], best_epoch: int, chance: float) -> Iterator[_Finding]:
    """Whether the kept epoch is much worse than this task's own best one."""
    sign = sign_of_better(name)
    of_epoch = {epoch: sign * v for epoch, v in enumerate(values, 1) if v is not None}
    top = max(of_epoch, key=of_epoch.__getitem__)
    drop = of_epoch[top] - of_epoch[best_epoch]
    label = label_of(name)
    then, now = values[top - 1], values[best_epoch - 1]
    if drop <= max(DROPPED[name], 2 * chance if name == "auc" else 0.0):
        if best_epoch - top >= STEADY_FOR and drop > max(STEADY[name], chance if name == "auc" else 0.0):
            since = [of_epoch[epoch] for epoch in range(top, best_epoch + 1) if epoch in of_epoch]
            if all(later < earlier for earlier, later in pairwise(since)):
                said = f"{task} has become worse in every epoch since epoch {top}"
                yield _Finding(1.3, f"{said} (validation {label} {then:.3f}, now {now:.3f})")
        return
    overfits = "it overfits since; training.task_patience stops such a task"
    why = overfits if top < best_epoch else "it still learns when the rest is done"
    yield _Finding(
        1.5 + min(drop, 0.4),
        f"{task} was better in epoch {top} ({label} {then:.3f}) than in the kept epoch {best_epoch} ({now:.3f}): {why}",
    )


def _shares(of: Mapping[str, float]) -> str:
    """Shares of steps, the largest first."""
    largest = sorted(of, key=lambda task: -of[task])
    return _listed([f"{task} in {of[task]:.0%} of its steps" for task in largest])


def _are(tasks: Sequence[str]) -> str:
    """Subject and verb."""
    return f"{_listed(tasks)} {'is' if len(tasks) == 1 else 'are'}"


def _listed(parts: Iterable[str]) -> str:
    *front, last = parts
    return f"{', '.join(front)} and {last}" if front else last


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")
