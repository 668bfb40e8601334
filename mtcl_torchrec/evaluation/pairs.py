"""Pairs of rows counted without looking at each pair."""

from __future__ import annotations

import numpy as np


def pairs_in_order(labels: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each row, the other rows with another label: how many are predicted in the right order (equal predictions
    count half), and how many there are.  The sums' ratio is XAUC.  O(n log n).

    Args:
        labels, predicted: (N,) numbers.

    Returns:
        (N,) float64 and (N,) float64.

    Example:
        >>> pairs_in_order(np.array([1.0, 2.0, 3.0]), np.array([0.1, 0.3, 0.2]))
        (array([2., 1., 1.]), array([2., 2., 2.]))
    """
    if len(labels) == 0:
        return np.zeros(0), np.zeros(0)
    order = np.argsort(labels, kind="stable")
    y, p = labels[order], np.unique(predicted[order], return_inverse=True)[1]
    first, past = (
        np.searchsorted(y, y, "left"),
        np.searchsorted(y, y, "right"),
    )  # rows of smaller, and of no larger label
    count = np.bincount(p)
    none_larger = np.cumsum(count)[p]
    both_smaller = smaller_in_prefix(p, first, p)
    both_larger = len(y) - past - none_larger + smaller_in_prefix(p, past, p + 1)
    # Rows equal in both stand beside each other when sorted by both.
    _, number, equal = np.unique(first * (p.max() + 1) + p, return_inverse=True, return_counts=True)
    predicted_alike = count[p] - equal[number]
    right, pairs = np.empty(len(y)), np.empty(len(y))
    right[order] = both_smaller + both_larger + predicted_alike / 2
    pairs[order] = len(y) - (past - first)
    return right, pairs


def smaller_in_prefix(values: np.ndarray, ends: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """How many of ``values[: ends[i]]`` are below ``bounds[i]``, of each i: with a wavelet matrix (Claude,
    Navarro & Ordóñez, Information Systems 2015), a bit at a time.

    Args:
        values: (N,) integers, at least 0.
        ends, bounds: (Q,) integers.

    Returns:
        (Q,) int64.

    Example:
        >>> smaller_in_prefix(np.array([3, 0, 2, 1]), np.array([0, 3, 4]), np.array([9, 3, 1]))
        array([0, 2, 1])
    """
    bits = max(int(values.max(initial=0)), int(bounds.max(initial=0))).bit_length()
    low, high = np.zeros(len(ends), np.int64), ends.astype(np.int64)
    found = np.zeros(len(ends), np.int64)
    for bit in range(bits - 1, -1, -1):
        zero = (values >> bit) & 1 == 0
        zeros = np.r_[0, np.cumsum(zero)]
        zeros_low, zeros_high = zeros[low], zeros[high]
        above = (bounds >> bit) & 1 == 1
        found += np.where(above, zeros_high - zeros_low, 0)
        low = np.where(above, zeros[-1] + low - zeros_low, zeros_low)
        high = np.where(above, zeros[-1] + high - zeros_high, zeros_high)
        values = np.concatenate([values[zero], values[~zero]])
    return found
