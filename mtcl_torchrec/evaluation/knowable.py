"""How much of what can be known is known: predictions beside the true probabilities of a synthetic world.

Where the probability of every label is known, the best that anybody could predict is known, too: the **oracle**
predicts the truth.  The figures are expectations over the labels that these rows might have had, not over those they
happened to get, so that no luck is in them.

- **binary**: the share of (AUC - ½).  The AUC of scores s under true probabilities p is
  Σᵢⱼ pᵢ (1 - pⱼ) [sᵢ > sⱼ] / Σᵢⱼ pᵢ (1 - pⱼ) over i ≠ j, ties counting half: expected pairs in the right order over
  expected pairs.
- **multiclass**: the share of the information, what log-loss falls below that of always predicting the base rates.
- **regression**: the share of R², 1 - E (m - ŷ)² / var m, for the expected value m.

The **regret** is what remains: mean KL(p ‖ p̂) in nats, of a regression E (m - ŷ)².
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from rich.console import Console

from mtcl_torchrec.evaluation.confidence import PLUS_MINUS
from mtcl_torchrec.evaluation.metrics import Metrics, auc
from mtcl_torchrec.evaluation.plain_table import plain_table
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable
from mtcl_torchrec.evaluation.ranking import Ranking, mean_and_error
from mtcl_torchrec.evaluation.significance import t_quantile
from mtcl_torchrec.schema import Task

KS = (1, 5, 10)


def expected_auc(true: np.ndarray, scores: np.ndarray) -> float:
    """AUC of scores where each label is 1 with its true probability: expected pairs in the right order over expected
    pairs.

    Args:
        true: (N,) probabilities.
        scores: (N,) the higher the better; ties count half.

    Returns:
        NaN where no pair is possible.

    Example:
        >>> expected_auc(np.array([0.0, 1.0, 1.0]), np.array([0.1, 0.4, 0.05]))  # certain labels: the AUC
        0.5
        >>> expected_auc(np.array([0.5, 0.5]), np.array([0.1, 0.4]))
        0.5
    """
    order = np.argsort(scores)
    p, s = true[order], scores[order]
    new = np.r_[True, s[1:] != s[:-1]][: len(s)]
    tied = np.cumsum(new) - 1
    positive, negative = np.bincount(tied, p), np.bincount(tied, 1 - p)
    below = np.cumsum(negative) - negative
    alone = float((p * (1 - p)).sum())  # a row is no pair with itself
    right = float((positive * (below + negative / 2)).sum()) - alone / 2
    pairs = float(p.sum() * (1 - p).sum()) - alone
    return right / pairs if pairs > 1e-12 else float("nan")


def knowable(task: Task, labels: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> Metrics:
    """What a task's predictions are worth beside the oracle's, over the rows whose label is there.

    Args:
        labels: (N,) NaN where missing or masked out.
        predicted: (N,) probability or value, or (N, C) class probabilities.
        true: the same of the oracle.

    Returns:
        ``share`` of what is knowable, see the module: 1 is all, 0 nothing, and below that, worse than the base rate;
        NaN where there is nothing to know.  ``regret``.  ``count``.  Of binary and multiclass tasks ``nats`` and
        ``oracle_nats``, the information; of binary ones ``auc`` and ``oracle_auc`` (expected ones), and
        ``auc_of_labels`` and ``oracle_auc_of_labels`` (of the labels that were drawn); of regression ``r2`` and
        ``oracle_r2`` (the oracle's of the labels).

    Example:
        >>> true = np.array([0.1, 0.6, 0.9])
        >>> knowable(Task.binary("click"), np.array([0.0, 1.0, 1.0]), true, true)["share"]
        1.0
    """
    present = ~np.isnan(labels)
    y, p, m = labels[present], predicted[present].astype(np.float64), true[present].astype(np.float64)
    found: Metrics = {"count": float(len(y))}
    if len(y) == 0:
        return found
    if task.kind == "regression":
        regret, spread, variance = float(((p - m) ** 2).mean()), float(m.var()), float(y.var())
        oracle = 1 - float(((y - m) ** 2).mean()) / variance if variance > 0 else float("nan")
        share = _share(spread - regret, spread)
        return found | {"share": share, "regret": regret, "r2": share * oracle, "oracle_r2": oracle}
    classes, of_classes = (m, p) if task.kind == "multiclass" else (_both(m), _both(p))
    if task.kind == "multiclass":
        of_classes = of_classes / of_classes.sum(1, keepdims=True)
    known, regret = information(classes), divergence(classes, of_classes)
    found |= {"regret": regret, "nats": known - regret, "oracle_nats": known}
    if task.kind == "multiclass":
        return found | {"share": _share(known - regret, known)}
    mine, best = expected_auc(m, p), expected_auc(m, m)
    return found | {
        "share": _share(mine - 0.5, best - 0.5),
        "auc": mine,
        "oracle_auc": best,
        "auc_of_labels": auc(y, p),
        "oracle_auc_of_labels": auc(y, m),
    }


def _share(found: float, there: float) -> float:
    return found / there if there > 1e-12 else float("nan")


def _both(p: np.ndarray) -> np.ndarray:
    return np.stack([1 - p, p], 1)


def divergence(true: np.ndarray, predicted: np.ndarray) -> float:
    """Mean KL(true ‖ predicted) in nats; (N, C) each, whose lines add up to 1.

    Example:
        >>> divergence(np.array([[0.5, 0.5]]), np.array([[0.25, 0.75]])).__round__(4)
        0.1438
    """
    p = np.clip(predicted, 1e-15, 1)
    return float((true * (_log(true) - np.log(p))).sum(1).mean())


def information(true: np.ndarray) -> float:
    """What knowing each row's probabilities (N, C) tells beyond their mean, in nats: mean KL to it.

    Example:
        >>> information(np.array([[0.0, 1.0], [1.0, 0.0]])).__round__(4)
        0.6931
    """
    return divergence(true, true.mean(0, keepdims=True))


def _log(p: np.ndarray) -> np.ndarray:
    return np.log(np.where(p > 0, p, 1))


def knowable_score(
    request: np.ndarray,
    score: np.ndarray,
    true: np.ndarray,
    users: np.ndarray | None = None,
    *,
    worth: np.ndarray | None = None,
) -> Metrics:
    """What ranking by a fused score brings beside what the truth could.

    Over all rows, the score is held against the same score of the true probabilities.  Of the first k rows of a
    request it is value@k that counts, what their events are worth: the oracle ranks by what a row is worth on average.
    That is another order than that of the true fused score, where a weight is not that of an event: as of an event
    that may only follow another, whose head says how probable it is once the first has happened.

    Args:
        request: (N,) whose rows are ranked against each other, NaN where not known.
        score: (N,) of the model.
        true: (N,) the score of the oracle's probabilities.
        users: (N,) rows of one may depend on each other: for the standard error.  None: requests do not.
        worth: (N,) expected value of what happens to each row; None where it is not known.

    Returns:
        ``share``: of the gain of ranking all rows: the mean, over all lengths k of a list, of what its first k rows
            bring above average of the true score, over the same of the oracle.  For k of 1, 5 and 10, over the requests
            of more than k rows: ``requests@k``, and where there are any and `worth` is known, the expected ``value@k``,
            ``oracle@k`` (the most that can be), ``rule@k`` (ranked by the true score), ``random@k`` (in random order),
            ``regret@k`` (the oracle's less the score's), and ``share@k``, of what the oracle's order brings beyond a
            random one; both with half of its 95 % interval, as ``share@k half``; and ``rule_share@k``, the share that
            the true score has.

    Example:
        >>> request, true = np.zeros(4), np.array([0.1, 0.2, 0.4, 0.9])
        >>> found = knowable_score(request, np.array([0.1, 0.2, 0.9, 0.4]), true, worth=true)
        >>> round(found["regret@1"], 4), round(found["share@1"], 4), found["requests@5"]
        (0.5, 0.0, 0.0)
    """
    known = ~np.isnan(request)
    everything = np.zeros(len(true), np.int64)
    found: Metrics = {"share": _share(_gain(everything, score, true), _gain(everything, true, true))}
    numbers = np.unique(request[known], return_inverse=True)[1]
    rows = np.bincount(numbers)
    clusters = None
    if users is not None:
        of_request = np.full(len(rows), np.nan)
        of_request[numbers] = users[known]
        clusters = np.where(np.isnan(of_request), -1 - np.arange(len(rows)), of_request)
    of_row = None if worth is None else worth[known].astype(np.float64)
    orders = {} if of_row is None else {"value": score[known], "oracle": of_row, "rule": true[known]}
    rankings = {name: Ranking(numbers, by) for name, by in orders.items()}
    rankings["random"] = Ranking(numbers, np.zeros(len(numbers)))
    for k in KS:
        choice = rows > k
        found[f"requests@{k}"] = float(choice.sum())
        if of_row is None or not choice.any():
            continue
        of = {name: ranking.value_at_k(of_row, k)[choice] for name, ranking in rankings.items()}
        cluster = None if clusters is None else clusters[choice]
        found |= {f"{name}@{k}": float(values.mean()) for name, values in of.items()}
        regret, error = mean_and_error(of["oracle"] - of["value"], cluster)
        gained, there = of["value"] - of["random"], of["oracle"] - of["random"]
        share = _share(float(gained.mean()), float(there.mean()))
        sure = t_quantile(len(there if cluster is None else np.unique(cluster)) - 1)
        spread = mean_and_error(gained - share * there, cluster)[1]  # of a ratio of means, by the delta method
        found |= {
            f"regret@{k}": regret, f"regret@{k} half": sure * error,
            f"share@{k}": share, f"share@{k} half": sure * spread / float(there.mean()) if share == share else math.nan,
            f"rule_share@{k}": _share(float((of["rule"] - of["random"]).mean()), float(there.mean())),
        }  # fmt: skip
    return found


def _gain(request: np.ndarray, score: np.ndarray, true: np.ndarray) -> float:
    """Mean over all k of Σ over the first k rows of (true - mean): proportional to the covariance of true and rank."""
    order = Ranking(request, score)
    t = true.astype(np.float64)
    of_tied = np.bincount(order.tied, (t - t.mean())[order.order])
    behind = len(t) - (order.first + (order.size - 1) / 2)  # in how many lists a row is, on average over ties
    return float((of_tied * behind).sum() / max(len(t), 1))


def of_tasks(table: PredictionsTable, true: Mapping[str, np.ndarray]) -> dict[str, Metrics]:
    """`knowable` of each task, and of the conditional prediction of a chain, that the oracle knows the truth of.

    Args:
        true: by task and by conditional name, for the rows of the table.
    """
    return {
        name: knowable(table.task(name), table.labels(name), table.predicted(name), true[name])
        for name in table.predicted_names
        if name in true
    }


_MEASURES = {"auc": "expected AUC", "r2": "R²", "nats": "nats"}


def print_knowable(found: Mapping[str, Metrics] | None, console: Console | None = None) -> None:
    """Print the shares as a table: the tasks, then the fused score.

    Args:
        found: `of_tasks`, and under ``"score"``, `knowable_score`.  None, where no world is behind the run, prints
            nothing; without anything in it, it says so.
    """
    if found is None:
        return
    console = console or Console()
    if not found:
        text = "these rows are not of the run's world, or its tasks are others: what is knowable is not known"
        console.print(f"\n{text}", highlight=False, soft_wrap=True)
        return
    table = plain_table("Of what is knowable in this world", ["", "share", "measure", "model", "oracle", "regret"])
    for name, known in found.items():
        if name == "score" or "share" not in known:
            continue
        measure = next(m for m in _MEASURES if m in known)
        numbers = (known[measure], known[f"oracle_{measure}"], known["regret"])
        table.add_row(name, _percent(known["share"]), _MEASURES[measure], *(f"{x:.4f}" for x in numbers))
    score = found.get("score", {})
    if score:
        table.add_row("score, all rows", _percent(score["share"]), "gain", "", "", "")
    for k in KS:
        if f"share@{k}" in score:
            numbers = (score[f"value@{k}"], score[f"oracle@{k}"], score[f"regret@{k}"])
            share = f"{_percent(score[f'share@{k}'])} ± {100 * score[f'share@{k} half']:.1f}"
            table.add_row(f"score, first {k}", share, f"value@{k}", *(f"{x:.4f}" for x in numbers))
    console.print("", table)
    shown = [k for k in KS if f"share@{k}" in score]
    lines = []
    if shown:
        rule = score[f"rule_share@{shown[0]}"]
        lines = ["value@k: expected, of what happens" + f"; {of_rule(rule)}" * (rule == rule), PLUS_MINUS]
    if any("auc" in known for known in found.values()):
        lines.insert(0, "expected AUC: over all labels that these rows might have had, by their true probabilities; "
                     "the AUC above is of the labels that they got")  # fmt: skip
    if lines:
        console.print(f"{'; '.join(lines)}.", highlight=False, soft_wrap=True)


def of_rule(share: float) -> str:
    """How far the rule of the fused score itself goes, in words.

    Args:
        share: ``rule_share@k`` of `knowable_score`.

    Example:
        >>> of_rule(0.83)
        'the same fused score of the true probabilities gets 83.0 %; the rest is for another rule to gain'
        >>> of_rule(1.0)
        'the same fused score of the true probabilities gets 100.0 %'
    """
    lacking = "; the rest is for another rule to gain" * (share < 0.995)
    return f"the same fused score of the true probabilities gets {_percent(share)}{lacking}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
