"""Features from a raw log: how often, and how often with which outcome, a user, an item or a pair was seen before.

For a training row, only training rows with a *strictly earlier* time count, so no row sees its own label, a later
one, or one of the same moment.  For every later row (validation, test, serving) the statistics stand frozen at the
end of the training split.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from mtcl_torchrec.data.key_index import KeyIndex
from mtcl_torchrec.data.source import time_values
from mtcl_torchrec.schema import DataError, Feature, Group

Progress = Callable[[str], None]


def quiet(_: str) -> None:
    """Progress that nobody sees."""


def earlier_sums(group: np.ndarray, time: np.ndarray, values: np.ndarray, last: int | None = None) -> np.ndarray:
    """For each row, the sum of `values` over rows of the same group with a strictly earlier time.

    Args:
        group: (N,) integers.
        time: (N,) numbers.
        values: (N, V) float64.
        last: take only the latest so many of those rows; of one moment, the later one in the table is the later.

    Returns:
        (N, V) float64.

    Example:
        >>> earlier_sums(np.array([0, 0, 1, 0]), np.array([1, 2, 2, 2]), np.array([[1.0], [1], [1], [1]])).ravel()
        array([0., 1., 0., 1.])
    """
    order = np.lexsort((time, group))
    g, t, v = group[order], time[order], values[order]
    position = np.arange(len(g))
    new_group = np.ones(len(g), bool)
    new_group[1:] = g[1:] != g[:-1]
    new_moment = new_group.copy()
    new_moment[1:] |= t[1:] != t[:-1]
    moment_start = np.maximum.accumulate(np.where(new_moment, position, 0))
    # Summed within each group, and shifted instead of "sum minus own value": a sum then depends on
    # the earlier rows of its group to the last bit and on nothing else.
    before = np.zeros_like(v)
    before[1:] = pd.DataFrame(v).groupby(g).cumsum().to_numpy()[:-1]
    before[new_group] = 0
    sums = before[moment_start]
    if last is not None:
        group_start = np.maximum.accumulate(np.where(new_group, position, 0))
        sums = sums - before[np.maximum(moment_start - last, group_start)]
    result = np.empty_like(before)
    result[order] = sums
    return result


def latest_sums(group: np.ndarray, time: np.ndarray, values: np.ndarray, size: int, last: int | None) -> np.ndarray:
    """The sum of `values` over the rows, or the `last` so many rows, of each group: (size, V).

    Args:
        group: (N,) integers below `size`; negative ones belong to no group.
    """
    chosen = group >= 0
    if last is not None:
        order = np.lexsort((time, group))
        rank = pd.Series(group[order]).groupby(group[order]).cumcount(ascending=False).to_numpy()
        chosen[order] &= rank < last
    return np.stack([np.bincount(group[chosen], weights=c[chosen], minlength=size) for c in values.T], 1)


def _rate_before(group: np.ndarray, time: np.ndarray, values: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Mean (N, O) of each outcome over strictly earlier rows of the group; NaN where there is none."""
    sums = earlier_sums(group, time, np.c_[present, values])
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[:, present.shape[1] :] / sums[:, : present.shape[1]]


def _within_unit_interval(values: np.ndarray) -> np.ndarray:
    return np.asarray(((values >= 0) & (values <= 1)).all(axis=0))


@dataclass
class _Totals:
    index: KeyIndex
    counts: np.ndarray  # (K,)
    present: np.ndarray  # (K, O) rows in which the outcome is known
    sums: np.ndarray  # (K, O)


class CausalStatistics:
    """Counts and smoothed outcome rates for each key, causal on the training split and frozen after it.

    For a key k and an outcome o, over the rows before time t:
    ``rate = (sum_k,o + smoothing · prior_o) / (n_k,o + smoothing)`` where ``prior_o`` is the rate of o over *all*
    rows before t.  Produces, for each key, one count and one rate per outcome, as columns such as
    ``count(user_id,tag)`` and ``rate(is_click|user_id,tag)``.  A rate with no earlier row at all is missing (NaN).

    With `given`, the rates are of what an outcome differs from what those columns' own rates had predicted for its row:
    how much more often than usual for *these videos* does *this user* click?  The prediction of a 0/1 outcome from the
    rates r₁ … r_K of the given columns and the prior p is ``σ(Σ logit r - (K-1) logit p)``, of any other outcome
    ``Σ r - (K-1) p``; it is as causal as everything else here.

    Args:
        keys: each one a list of columns.
        outcomes: numeric columns; a missing value (NaN) counts neither as a hit nor as a miss.  They must
            be known at the row's own time: what only later rows tell (did the user come back?) would leak from them.
        time: the time column.
        smoothing: pseudo-count of the prior.
        smoothing_of: outcome -> pseudo-count of its own.
        given: columns whose rates predict the outcomes; none takes the outcomes as they are.
        given_smoothing: pseudo-count of the prior in those rates.
        counts: whether the counts are produced.  Those of keys with few values only tell the time.
        last: look at the latest so many rows of a key only, or at all (None).
        label: goes into the columns' names, to tell two of these with other smoothing apart.

    Raises:
        DataError: an outcome is not numeric.

    Example:
        >>> log = pd.DataFrame({"user": ["a", "a", "b", "a"], "t": [1, 2, 3, 4], "click": [1, 0, 0, 1]})
        >>> statistics = CausalStatistics([["user"]], ["click"], time="t", smoothing=1.0)
        >>> statistics.fit_transform(log)["count(user)"].tolist()
        [0.0, 1.0, 0.0, 2.0]
        >>> statistics.transform(pd.DataFrame({"user": ["a", "z"]})).round(3).values.tolist()
        [[3.0, 0.625], [0.0, 0.5]]
    """

    def __init__(
        self,
        keys: Sequence[Sequence[str]],
        outcomes: Sequence[str],
        *,
        time: str,
        smoothing: float = 20.0,
        smoothing_of: Mapping[str, float] | None = None,
        given: Sequence[str] = (),
        given_smoothing: float = 20.0,
        counts: bool = True,
        last: int | None = None,
        label: str = "",
    ) -> None:
        self.keys = [list(key) for key in keys]
        self.outcomes = list(outcomes)
        self.time = time
        self.smoothing, self.smoothing_of = smoothing, dict(smoothing_of or {})
        self.given, self.given_smoothing = list(given), given_smoothing
        self.counts, self.last, self.label = counts, last, label
        self._totals: list[_Totals] = []
        self._prior = np.full(len(self.outcomes), np.nan)
        self._is_rate = np.zeros(len(self.outcomes), bool)

    def columns(self) -> list[str]:
        """Names of the columns produced, in order."""
        return [name for key in self.keys for name in self._names(key)]

    def _names(self, key: Sequence[str]) -> list[str]:
        how = [f"last {self.last}"] * (self.last is not None) + [self.label] * bool(self.label)
        count = ";".join([",".join(key), *how])
        of = ";".join([",".join(key), *[f"given {','.join(self.given)}"] * bool(self.given), *how])
        rates = [f"rate({outcome}|{of})" for outcome in self.outcomes]
        return [f"count({count})", *rates] if self.counts else rates

    def features(self, groups: dict[str, Group]) -> tuple[Feature, ...]:
        """The produced columns as dense features; a pair belongs to the groups of both its columns."""
        features = []
        transforms = [("logit" if is_rate else "log") for is_rate in self._is_rate]
        for key in self.keys:
            group = tuple(dict.fromkeys(groups[c] for c in key))
            for name, transform in zip(self._names(key), ["log"] * self.counts + transforms, strict=True):
                # A count of 0 says that there was nothing before; a mark would say it again.
                feature = {"name": name, "group": group, "kind": "dense", "transform": transform, "mark_missing": False}
                features.append(Feature.model_validate(feature))
        return tuple(features)

    def fit_transform(self, frame: pd.DataFrame, progress: Progress = quiet) -> pd.DataFrame:
        """Learn the totals of the training split and return its causal columns.

        Args:
            frame: the training rows, in any order, with the key, outcome and time columns.
            progress: called with the name of each key when it is done.

        Returns:
            (N, len(columns())) float64, with the frame's index.
        """
        values, present = self._outcome_values(frame)
        time = time_values(frame, self.time)
        prior = _rate_before(np.zeros(len(frame), np.int64), time, values, present)
        if self.given:
            values, present = self._beyond_given(frame, time, values, present, prior)
            prior = _rate_before(np.zeros(len(frame), np.int64), time, values, present)
        self._is_rate = _within_unit_interval(values)
        with np.errstate(invalid="ignore", divide="ignore"):
            self._prior = values.sum(0) / present.sum(0)
        self._totals, columns = [], []
        numbers = np.c_[np.ones((len(frame), 1)), present, values]
        width = len(self.outcomes)
        for key in self.keys:
            index = KeyIndex.fit(key, frame)
            group = index.lookup(frame)
            sums = earlier_sums(group, time, numbers, self.last)
            sums[group < 0] = 0
            columns.append(self._columns_of(sums, prior))
            total = latest_sums(group, time, numbers, len(index.combined), self.last)
            self._totals.append(_Totals(index, total[:, 0], total[:, 1 : 1 + width], total[:, 1 + width :]))
            progress(" × ".join(key))
        return self._as_frame(columns, frame)

    def _beyond_given(
        self, frame: pd.DataFrame, time: np.ndarray, values: np.ndarray, present: np.ndarray, prior: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Outcomes minus what the given columns' rates predict; missing where nothing came before."""
        is_rate = _within_unit_interval(values)

        def link(rate: np.ndarray) -> np.ndarray:
            inside = np.clip(rate, 1e-4, 1 - 1e-4)
            return np.where(is_rate, np.log(inside / (1 - inside)), rate)

        predicted = (1 - len(self.given)) * link(prior)
        for column in self.given:
            group = KeyIndex.fit([column], frame).lookup(frame)
            sums = earlier_sums(group, time, np.c_[present, values])
            sums[group < 0] = 0
            there, total = sums[:, : present.shape[1]], sums[:, present.shape[1] :]
            predicted = predicted + link((total + self.given_smoothing * prior) / (there + self.given_smoothing))
        predicted = np.where(is_rate, 1 / (1 + np.exp(-predicted)), predicted)
        known = (present > 0) & ~np.isnan(predicted)
        return np.where(known, values - np.nan_to_num(predicted), 0.0), known.astype(np.float64)

    def transform(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The frozen columns for rows that come after the training split; needs the key columns only.

        Raises:
            RuntimeError: nothing was learnt yet.
        """
        if len(self._totals) != len(self.keys):
            raise RuntimeError("fit_transform the training split first")
        columns = []
        for totals in self._totals:
            at = totals.index.lookup(frame)
            stacked = np.c_[totals.counts, totals.present, totals.sums]
            sums = stacked[at] if len(stacked) else np.zeros((len(frame), stacked.shape[1]))
            sums = np.where((at >= 0)[:, None], sums, 0.0)
            columns.append(self._columns_of(sums, np.broadcast_to(self._prior, (len(frame), len(self.outcomes)))))
        return self._as_frame(columns, frame)

    def frozen(self) -> list[tuple[KeyIndex, pd.DataFrame]]:
        """For each key its index, and the columns that rows with it get after the training split.

        The frame has a row for each key, in numbering order, and a last one for keys that training has never seen.
        """
        frozen = []
        for key, totals in zip(self.keys, self._totals, strict=True):
            sums = np.c_[totals.counts, totals.present, totals.sums]
            sums = np.concatenate([sums, np.zeros((1, sums.shape[1]))])
            values = self._columns_of(sums, np.broadcast_to(self._prior, (len(sums), len(self.outcomes))))
            frozen.append((totals.index, pd.DataFrame(values, columns=pd.Index(self._names(key)))))
        return frozen

    def _columns_of(self, sums: np.ndarray, prior: np.ndarray) -> np.ndarray:
        width = len(self.outcomes)
        count, present, total = sums[:, :1], sums[:, 1 : 1 + width], sums[:, 1 + width :]
        smoothing = np.array([self.smoothing_of.get(outcome, self.smoothing) for outcome in self.outcomes])
        rates = (total + smoothing * prior) / (present + smoothing)
        return np.c_[count, rates] if self.counts else rates

    def _as_frame(self, columns: list[np.ndarray], frame: pd.DataFrame) -> pd.DataFrame:
        data = np.concatenate(columns, axis=1) if columns else np.empty((len(frame), 0))
        return pd.DataFrame(data, columns=self.columns(), index=frame.index)

    def _outcome_values(self, frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """Outcomes (N, O) with 0 where missing, and 1.0 where present."""
        values = np.zeros((len(frame), len(self.outcomes)))
        for i, outcome in enumerate(self.outcomes):
            column = frame[outcome]
            if column.isna().all():
                values[:, i] = np.nan
                continue
            kind = pd.api.types.infer_dtype(column, skipna=True)
            if not (pd.api.types.is_numeric_dtype(column) or kind in ("boolean", "decimal")):
                raise DataError(f"statistics.outcomes: column {outcome!r} is not numeric")
            values[:, i] = column.to_numpy(dtype=np.float64, na_value=np.nan)
            if np.isinf(values[:, i]).any():
                raise DataError(f"statistics.outcomes: column {outcome!r} holds an infinite value")
        present = ~np.isnan(values)
        return np.where(present, values, 0.0), present.astype(np.float64)

    def save(self, folder: Path) -> None:
        """Write the totals as Parquet files and what describes them as JSON."""
        folder.mkdir(parents=True, exist_ok=True)
        about = {
            "keys": self.keys, "outcomes": self.outcomes, "time": self.time, "smoothing": self.smoothing,
            "smoothing_of": self.smoothing_of, "counts": self.counts, "last": self.last, "label": self.label,
            "given": self.given, "given_smoothing": self.given_smoothing,
            "prior": [None if np.isnan(p) else float(p) for p in self._prior],
            "is_rate": self._is_rate.tolist(),
        }  # fmt: skip
        (folder / "statistics.json").write_text(json.dumps(about, indent=1))
        for i, totals in enumerate(self._totals):
            frame = totals.index.frame()
            numbers = np.c_[totals.counts, totals.present, totals.sums]
            names = ["count", *(f"present:{o}" for o in self.outcomes)]
            names += [f"sum:{o}" for o in self.outcomes]
            # A key's column may be called "count" too.
            frame.columns = pd.Index([f"key:{column}" for column in frame.columns])
            table = pd.concat([frame, pd.DataFrame(numbers, columns=names)], axis=1)
            table.to_parquet(folder / f"totals_{i}.parquet")

    @classmethod
    def load(cls, folder: Path) -> CausalStatistics:
        """Read what `save` wrote."""
        about = json.loads((folder / "statistics.json").read_text())
        prior, is_rate = about.pop("prior"), about.pop("is_rate")
        self = cls(**about)
        self._prior = np.array([np.nan if p is None else p for p in prior])
        self._is_rate = np.array(is_rate, bool)
        width = len(self.outcomes)
        for i, key in enumerate(self.keys):
            frame = pd.read_parquet(folder / f"totals_{i}.parquet")
            frame.columns = pd.Index([*key, *frame.columns[len(key) :]])
            of_key = frame.iloc[:, : len(key)]
            index = KeyIndex.fit(key, of_key)
            numbers = np.empty((len(frame), 1 + 2 * width))
            numbers[index.lookup(of_key)] = frame.iloc[:, len(key) :].to_numpy(dtype=np.float64)
            self._totals.append(_Totals(index, numbers[:, 0], numbers[:, 1 : 1 + width], numbers[:, 1 + width :]))
        return self
