"""Whether a difference is more than chance: Student's t of its standard error, and Holm's correction of a family."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.stats import t as student

LEVEL = 0.05  # of a test; an interval holds 1 - LEVEL


def t_quantile(freedom: float) -> float:
    """What a standard error is multiplied by, of half a 95 % interval; NaN where nothing tells how sure it is.

    Args:
        freedom: degrees of freedom of the standard error; infinite: the normal distribution.

    Example:
        >>> round(t_quantile(19), 2), round(t_quantile(float("inf")), 2), t_quantile(0)
        (2.09, 1.96, nan)
    """
    return float(student.ppf(1 - LEVEL / 2, freedom)) if freedom > 0 else math.nan


def two_sided(difference: float, error: float, freedom: float) -> float:
    """p-value of a difference with a standard error, by Student's t.

    Args:
        freedom: degrees of freedom of the standard error.

    Example:
        >>> round(two_sided(1.96, 1.0, 10**6), 3), two_sided(0.0, 0.0, 100)
        (0.05, 1.0)
    """
    if not freedom > 0 or math.isnan(difference) or math.isnan(error):
        return math.nan
    if error == 0:
        return 1.0 if difference == 0 else 0.0
    return float(2 * student.sf(abs(difference) / error, freedom))


def holm(p: Sequence[float]) -> list[float]:
    """p-values of m tests, such that the chance of a single wrong rejection among all stays at the level (Holm, *A
    simple sequentially rejective multiple test procedure*, Scand. J. Stat. 1979): the i-th smallest, from 0, times
    (m - i), and none below one that was smaller.  NaN was not tested, and does not count.

    Example:
        >>> holm([0.01, 0.04, 0.03, float("nan")])
        [0.03, 0.06, 0.06, nan]
    """
    known = [i for i, value in enumerate(p) if not math.isnan(value)]
    adjusted, largest = [math.nan] * len(p), 0.0
    for rank, i in enumerate(sorted(known, key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(known) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted
