"""Student's t and Holm's correction, against their definitions and simulated families."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mtcl_torchrec.evaluation.significance import holm, t_quantile, two_sided


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_its_definition(p):
    """Step down: reject while p_(i) <= level / (m - i), and nothing after the first that is not."""
    adjusted = holm(p)
    for level in (0.01, 0.05, 0.3):
        rejected, order = set(), sorted(range(len(p)), key=lambda i: p[i])
        for rank, i in enumerate(order):
            if p[i] * (len(p) - rank) > level:
                break
            rejected.add(i)
        assert {i for i, value in enumerate(adjusted) if value <= level} == rejected


def test_a_p_value_is_below_the_level_exactly_where_the_interval_leaves_out_0():
    for freedom in (1.5, 3, 19, 1000, math.inf):
        half = t_quantile(freedom)
        assert two_sided(half * 0.1, 0.1, freedom) == pytest.approx(0.05)
        assert half == pytest.approx(stats.t(freedom).ppf(0.975))
    assert math.isnan(t_quantile(0))
    assert math.isnan(two_sided(1.0, 1.0, 0))
    assert two_sided(0.1, 0.0, 5) == 0.0


def sure(family):
    """Of differences, each with its standard error and the degrees of freedom of that: which are beyond chance."""
    return [p < 0.05 for p in holm([two_sided(*gap) for gap in family])]


def test_a_family_without_differences_has_a_winner_in_5_of_100():
    """20 means of 25 normal numbers each: alone, some mean of a family is beyond its interval in 64 of 100."""
    drawn = np.random.default_rng(0).normal(size=(2000, 20, 25))
    means, errors = drawn.mean(2), drawn.std(2, ddof=1) / 5
    families = [list(zip(m, e, np.full(20, 24.0), strict=True)) for m, e in zip(means, errors, strict=True)]
    assert np.mean([any(sure(family)) for family in families]) == pytest.approx(0.05, abs=0.015)
    assert np.mean([any(sure([gap])[0] for gap in family) for family in families]) > 0.55


def test_what_was_not_tested_makes_the_others_no_less_sure():
    gap, unknown = (-0.021, 0.01, 50.0), (0.5, math.nan, 50.0)
    assert sure([gap, *[unknown] * 50]) == [True] + [False] * 50
    assert sure([(math.nan, 0.1, 50.0), (0.1, 0.0, 0.0), gap]) == [False, False, True]
    assert sure([]) == []
    assert sure([(0.0, 0.0, 50.0), (0.2, 0.0, 50.0)]) == [False, True]
