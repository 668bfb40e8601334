"""By how much each baseline is better or worse than the run, and whether that counts: paired, on the same rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mtcl_torchrec.evaluation.bootstrap import clusters_of, draw, spread
from mtcl_torchrec.evaluation.compare import Difference, corrected, difference_of, distinct_metrics, with_amounts_of
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable
from mtcl_torchrec.evaluation.resampled import resampled_metrics
from mtcl_torchrec.evaluation.supports import supports_of

# (task or "ranking", metric) -> the baseline's less the run's.
Differences = dict[tuple[str, str], Difference]
_DRAWS, _FEWEST_DRAWS, _ROWS = 200, 50, 10**7  # of users; so many that draws times rows stay affordable


def differences(
    run: PredictionsTable,
    baselines: Mapping[str, PredictionsTable],
    *,
    only: Callable[[str, str], bool],
    k: Sequence[int] = (5, 10),
    values: Mapping[str, float] | None = None,
    seed: int = 0,
) -> dict[str, Differences]:
    """Baseline -> every metric that it and the run have; `Difference.a` is the run's, `Difference.b` the baseline's.

    All are measured in the same draws of users (see `mtcl_torchrec.evaluation.bootstrap`), 200 of them, or fewer, down
    to 50, of more than 50,000 rows.  They are judged as `mtcl_torchrec.evaluation.compare.compare_tables` judges two
    runs: what is equal by construction is left out, what rests on too few users is there without interval, and one
    correction for many comparisons (Holm) is of them all.

    Args:
        run: its predictions.
        baselines: theirs; one of other rows than the run's is left out.
        only: (task or ``"ranking"``, metric) -> whether it is compared.
        k, values: of the ranking.
        seed: of the draws.
    """
    clusters = clusters_of(run)
    count = int(np.clip(_ROWS // max(len(run), 1), _FEWEST_DRAWS, _DRAWS))
    distinct = distinct_metrics(run, k)
    support = supports_of(run, clusters, values=values, paired=True)

    def wanted(of: str, metric: str) -> bool:
        return only(of, metric) and distinct(of, metric)

    def measured(table: PredictionsTable) -> tuple[dict[tuple[str, str], int], np.ndarray, np.ndarray]:
        parts = resampled_metrics(table, clusters, k=k, values=values, only=wanted)
        if not parts:
            return {}, np.empty(0), np.empty((count, 0))
        place = {name: i for i, name in enumerate(name for part in parts for name in part.names)}
        values_of = np.concatenate([part.estimate(clusters[1]) for part in parts])
        return place, values_of, draw(parts, clusters[1], draws=count, seed=seed)

    places, own, own_draws = measured(run)
    every = list[tuple[str, Difference]]()
    there = {n: t for n, t in baselines.items() if len(t) == len(run) and t.fingerprint == run.fingerprint}
    for name, table in there.items():
        found, theirs, their_draws = measured(with_amounts_of(run, table))
        shared = [key for key in places if key in found]
        a, b = [places[key] for key in shared], [found[key] for key in shared]
        over_draws = spread(their_draws[:, b] - own_draws[:, a])
        for key, x, y, of_draws in zip(shared, own[a], theirs[b], over_draws, strict=True):
            every.append((name, difference_of(*key, float(x), float(y), float(of_draws), support(*key))))
    by_baseline: dict[str, Differences] = {name: {} for name in there}
    for (name, _), difference in zip(every, corrected([d for _, d in every]), strict=True):
        by_baseline[name][difference.of, difference.metric] = difference
    return by_baseline


def verdict(found: Mapping[str, Differences], shown: Mapping[tuple[str, str], str]) -> list[str]:
    """Who is ahead on what, in sentences.

    Args:
        found: of `differences`.
        shown: what is told of -> how it is called, such as ``("like", "auc")`` -> ``"like"``.

    Example:
        >>> key = ("like", "auc")
        >>> better = Difference(*key, a=0.8, b=0.82, difference=0.02, low=0.01, high=0.03, p=0.01, p_holm=0.01)
        >>> worse = Difference(*key, a=0.8, b=0.7, difference=-0.1, low=-0.11, high=-0.09, p=0.0, p_holm=0.0)
        >>> verdict({"trees": {key: better}, "als": {key: worse}}, {key: "like"})
        ['like: trees is ahead of this run (+0.0200 ± 0.0100)']
        >>> verdict({"als": {key: worse}}, {key: "like"})
        ['this run is ahead of als on like']
        >>> verdict({"als": {}, "popularity": {key: worse}}, {key: "like"})
        ['this run is ahead of popularity on like (nothing else here predicts it)']
    """
    first, lines = dict[tuple[str, ...], list[str]](), list[str]()
    for key, called in shown.items():
        of = {name: by[key] for name, by in found.items() if key in by and not np.isnan(by[key].difference)}
        if not of:
            continue
        if unsure := next((d.unsure for d in of.values() if d.unsure), ""):
            lines.append(f"{called}: cannot be judged, {unsure}")
            continue
        ahead = sorted((n for n, d in of.items() if d.better == "b"), key=lambda n: of[n].p)
        close = [n for n, d in of.items() if d.better is None]
        if ahead:
            by = [f"{of[n].difference:+.4f} ± {half_of(of[n]):.4f}" for n in ahead]
            word = "is" if len(ahead) == 1 else "are"
            lines.append(f"{called}: {', '.join(ahead)} {word} ahead of this run ({', '.join(by)})")
        elif close:
            behind = [name for name in of if name not in close]
            rest = f"; it is ahead of {', '.join(behind)}" if behind else ""
            lines.append(f"{called}: no difference that counts between this run and {', '.join(close)}{rest}")
        else:
            first.setdefault(tuple(of), []).append(called)
    return [_first(rivals, called, len(found)) for rivals, called in first.items()] + lines


def _first(rivals: Sequence[str], called: Sequence[str], count: int) -> str:
    """What a run is ahead of all on, of as many baselines as there are."""
    on = f"on {', '.join(called)}"
    if len(rivals) == count > 2:
        return f"this run is ahead of all {count} that are here {on}"
    alone = f" (nothing else here predicts {'it' if len(called) == 1 else 'them'})" if len(rivals) < count else ""
    return f"this run is ahead of {', '.join(rivals)} {on}{alone}"


def half_of(difference: Difference) -> float:
    """Half of its 95 % interval."""
    return (difference.high - difference.low) / 2
