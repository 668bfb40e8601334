"""Which head decides the fused ranking, told from predictions and scores alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd


def shares_of_ranking(
    parts: Mapping[str, np.ndarray], score: np.ndarray, groups: np.ndarray | None = None
) -> dict[str, float]:
    """Each head's share of what makes the fused scores of a request differ (Pratt, 1987).

    The score, less its mean in the request, is regressed on the predictions, less theirs; the share of a head is
    βᵢ Cov(pᵢ, s) / Var(s).  Of a score that is Σ wᵢ pᵢ this is `mtcl_torchrec.fusing.weights.influence_of`; the shares
    add up to R², and what is left is of heads that are not among `parts`, or no sum.

    Args:
        parts: task -> (N,) predictions.
        score: (N,).
        groups: (N,) integers, equal for rows of one request; None: all rows are one.

    Returns:
        Task -> share; empty where the score does not differ.

    Example:
        >>> a, b = np.array([0.0, 1, 0, 1]), np.array([0.0, 0, 1, 1])
        >>> {t: round(s, 6) for t, s in shares_of_ranking({"a": a, "b": b}, a + 3 * b).items()}
        {'a': 0.1, 'b': 0.9}
    """
    known = np.isfinite(score) & np.all([np.isfinite(p) for p in parts.values()], axis=0)
    if not parts or not known.any():
        return {}
    columns = np.stack([np.asarray(p, np.float64)[known] for p in parts.values()], axis=1)
    x = np.column_stack([columns, np.asarray(score, np.float64)[known]])
    if groups is None:
        x = x - x.mean(axis=0)
    else:
        number = pd.factorize(groups[known])[0]
        rows = np.bincount(number)
        x = x - np.stack([np.bincount(number, column) / rows for column in x.T], axis=1)[number]
    parts_of, s = x[:, :-1], x[:, -1]
    variance = float(s @ s)
    if variance <= 1e-18 * len(s):
        return {}
    scale = np.maximum(np.sqrt((parts_of**2).mean(axis=0)), 1e-12)
    beta = np.linalg.lstsq(parts_of / scale, s, rcond=None)[0] / scale
    return dict(zip(parts, (beta * (parts_of.T @ s) / variance).tolist(), strict=True))
