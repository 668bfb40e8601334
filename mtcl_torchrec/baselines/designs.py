"""Encoded rows as the matrices that linear models and trees take."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.sparse import csr_matrix, hstack
from sklearn.decomposition import PCA

from mtcl_torchrec.baselines.rows import BaselineData, BaselineRows
from mtcl_torchrec.schema import Feature, Task

HASHED = 2**20  # columns of a larger table, at most: several of its rows share one
CONTENT_COLUMNS = 16  # principal components of a vector feature
FOLDS = 5

# (values, (M,) row of each, rows of the table)
Listed = tuple[np.ndarray, np.ndarray, int]


def seen_by(data: BaselineData, task: Task) -> tuple[list[Feature], np.ndarray]:
    """The sparse features that a task may see, and which dense columns (D,) bool; see `Task.inputs`."""
    groups = set(task.inputs)
    sparse = [f for f in data.encoder.schema.sparse_features if set(f.group) <= groups]
    dense = np.array([set(of) <= groups for of in data.encoder.dense_groups], bool)
    return sparse, dense


def dense_columns(data: BaselineData, task: Task, rows: BaselineRows) -> np.ndarray:
    """(N, d) float32: the dense features that a task may see, and the principal components of its vector features."""
    sparse, dense = seen_by(data, task)
    parts = [rows.dense[:, dense]]
    parts += [_components(data, f)[rows.ids[f.name]] for f in sparse if f.kind == "vector"]
    return np.concatenate(parts, axis=1).astype(np.float32, copy=False)


def _components(data: BaselineData, feature: Feature) -> np.ndarray:
    """(V + 1, d) float32 principal components of a feature's vectors, of unit variance; row 0, no vector, is 0."""
    key = ("components", feature.name)
    if key not in data.designs:
        vectors = data.encoder.vectors(feature.name).astype(np.float32)
        size = min(CONTENT_COLUMNS, vectors.shape[1], max(len(vectors) - 1, 1))
        components = np.zeros((len(vectors), size), np.float32)
        if len(vectors) > size:
            components[1:] = PCA(size, whiten=True, random_state=0).fit_transform(vectors[1:])
        data.designs[key] = components
    return data.designs[key]


def listed(data: BaselineData, feature: Feature, rows: BaselineRows) -> Listed:
    """A sparse feature's values as rows of its table, whether a row has one or several."""
    size = data.encoder.num_rows(feature)
    if feature.name in rows.ids:
        return rows.ids[feature.name], np.arange(len(rows)), size
    values, lengths = rows.bags[feature.name]
    return values, np.repeat(np.arange(len(rows)), lengths), size


def one_hot(data: BaselineData, task: Task) -> dict[str, csr_matrix]:
    """``"train"`` and each held-out split as a sparse matrix (N, columns) float32.

    A column for each row of a table (a hashed one where the table has more than 2²⁰), in which a bag or history of n
    values has 1/n for each; then the dense columns.
    """
    key = ("one_hot", task.inputs)
    if key not in data.designs:
        for other in [k for k in data.designs if k[0] == "one_hot"]:
            del data.designs[other]  # they are large, and tasks that see the same follow each other, mostly
        splits = {"train": data.train, **data.held_out}
        data.designs[key] = {split: _one_hot(data, task, rows) for split, rows in splits.items()}
    return data.designs[key]


def _one_hot(data: BaselineData, task: Task, rows: BaselineRows) -> csr_matrix:
    parts = []
    for feature in seen_by(data, task)[0]:
        if feature.kind == "vector":
            continue
        values, at, size = listed(data, feature, rows)
        lengths = np.bincount(at, minlength=len(rows))
        shares = (1 / np.maximum(lengths, 1)).astype(np.float32)[at]
        columns = values if size <= HASHED else values % HASHED
        starts = np.r_[0, np.cumsum(lengths)]
        parts.append(csr_matrix((shares, columns, starts), shape=(len(rows), min(size, HASHED))))
    dense = dense_columns(data, task, rows)
    return hstack([*parts, csr_matrix(dense)], format="csr", dtype=np.float32)


def target_means(
    data: BaselineData, task: Task, at: np.ndarray, labels: np.ndarray, smoothing: float, seed: int
) -> tuple[np.ndarray, Callable[[BaselineRows], np.ndarray]]:
    """Each value of each sparse feature as the mean label of the rows that have it, smoothed (Micci-Barreca, 2001).

    No row sees its own label: a training row's means are those of the four folds that it is not in.  Later rows get the
    means of all training rows.  A bag has the mean over its values, NaN where it is empty.  (scikit-learn's
    `TargetEncoder` does this for one value a row.)

    Args:
        at: (n,) positions of the task's training rows.
        labels: (n,) theirs; of a multiclass task, whether they are of one class.
        smoothing: pseudo-count of the overall mean.
        seed: of the folds.

    Returns:
        (n, features) float32 of the training rows, and a function that gives those of later ones.
    """
    features = [f for f in seen_by(data, task)[0] if f.kind != "vector"]
    train = data.train.at(at)
    labels = labels.astype(np.float64)
    fold = np.random.default_rng(seed).permutation(len(at)) % FOLDS

    def means(values: np.ndarray, owners: np.ndarray, size: int, rows: np.ndarray | None) -> np.ndarray:
        """(size,) from the rows (n,) bool, None being all."""
        kept = slice(None) if rows is None else rows[owners]
        prior = labels.mean() if rows is None else labels[rows].mean() if rows.any() else 0.0
        sums = np.bincount(values[kept], labels[owners[kept]], minlength=size)
        counts = np.bincount(values[kept], minlength=size)
        return (sums + smoothing * prior) / (counts + smoothing)

    encoded, whole = np.empty((len(at), len(features)), np.float32), list[np.ndarray]()
    for i, feature in enumerate(features):
        values, owners, size = listed(data, feature, train)
        of_value = np.empty(len(values))
        for k in range(FOLDS):
            inside = fold[owners] == k
            of_value[inside] = means(values, owners, size, fold != k)[values[inside]]
        encoded[:, i] = _mean_by_row(of_value, owners, len(at))
        whole.append(means(values, owners, size, None).astype(np.float32))

    def later(rows: BaselineRows) -> np.ndarray:
        columns = []
        for feature, of in zip(features, whole, strict=True):
            values, owners, _ = listed(data, feature, rows)
            columns.append(_mean_by_row(of[values], owners, len(rows)))
        return np.stack(columns, 1).astype(np.float32) if columns else np.empty((len(rows), 0), np.float32)

    return encoded, later


def _mean_by_row(of_value: np.ndarray, owners: np.ndarray, rows: int) -> np.ndarray:
    """(rows,) means of the values of each row, NaN where it has none."""
    if len(owners) == rows and np.array_equal(owners, np.arange(rows)):
        return of_value
    counts = np.bincount(owners, minlength=rows)
    with np.errstate(invalid="ignore"):
        return np.bincount(owners, of_value, minlength=rows) / np.where(counts > 0, counts, np.nan)
