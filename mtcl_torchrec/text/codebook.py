"""Semantic ids: residual k-means codes of item vectors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from mtcl_torchrec.schema import ConfigError, DataError

ROWS_PER_CODE = 256  # what more rows than these teach a centroid is nothing (faiss takes as many)
_ROWS_AT_ONCE = 16_384


@dataclass(frozen=True)
class Codebook:
    """Centroids of L levels: the first of vectors, each later one of what the levels before it leave over.

    Args:
        centroids: L arrays (K_l, d) float32.
        encoder: identity of what made the vectors that it was fitted on, where that is known.

    Example:
        >>> book = Codebook((np.float32([[0, 0], [10, 10]]), np.float32([[0, 1], [1, 0]])))
        >>> codes = book.encode(np.float32([[0, 1.1], [11, 10]]))
        >>> codes.tolist(), book.decode(codes).tolist()
        ([[0, 0], [1, 1]], [[0.0, 1.0], [11.0, 10.0]])
    """

    centroids: tuple[np.ndarray, ...]
    encoder: str | None = None

    def __post_init__(self) -> None:
        shapes = [part.shape for part in self.centroids]
        fits = bool(shapes) and all(len(s) == 2 and s[0] > 0 and s[1] == shapes[0][-1] > 0 for s in shapes)
        if not fits or any(p.dtype != np.float32 or not np.isfinite(p).all() for p in self.centroids):
            raise DataError(f"a codebook has finite float32 centroids (K, d) of one width, not {shapes}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """K of each level."""
        return tuple(len(part) for part in self.centroids)

    @property
    def width(self) -> int:
        """d."""
        return self.centroids[0].shape[1]

    @property
    def identity(self) -> str:
        """Differs wherever the codes would."""
        return sha256(b"".join(part.tobytes() for part in self.centroids)).hexdigest()[:24]

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """The code of each vector: at each level the nearest centroid of what is left over.

        Args:
            vectors: (N, d) floats, finite.

        Returns:
            (N, L) int64.

        Raises:
            DataError: the vectors have another width.
        """
        self._check(vectors)
        codes = np.zeros((len(vectors), len(self.centroids)), np.int64)
        for start in range(0, len(vectors), _ROWS_AT_ONCE):
            left = vectors[start : start + _ROWS_AT_ONCE].astype(np.float64)
            for level, centroids in enumerate(self.centroids):
                nearest = _nearest(left, centroids)
                codes[start : start + len(left), level] = nearest
                left -= centroids[nearest]
        return codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """(N, d) float32: the sum of the centroids of the first levels, as many as `codes` (N, <= L) has."""
        parts = [self.centroids[level][codes[:, level]] for level in range(codes.shape[1])]
        return np.asarray(sum(parts, start=np.zeros((len(codes), self.width), np.float32)))

    def save(self, path: Path) -> None:
        """Write it as .npz; it appears under its name when it is whole."""
        unfinished = path.with_name(path.name + ".unfinished")
        with unfinished.open("wb") as file:
            parts = {f"level_{i}": part for i, part in enumerate(self.centroids)}
            np.savez(file, encoder=np.array(self.encoder or ""), **parts)  # type: ignore[arg-type]
        unfinished.replace(path)

    @classmethod
    def load(cls, path: Path) -> Codebook:
        """Read what `save` wrote.

        Raises:
            DataError: it is no codebook.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                levels = len([name for name in stored.files if name != "encoder"])
                encoder = str(stored["encoder"]) if "encoder" in stored.files else ""
                return cls(tuple(stored[f"level_{i}"] for i in range(levels)), encoder or None)
        except (OSError, KeyError, ValueError, EOFError, BadZipFile) as error:
            raise DataError(f"{path}: no codebook ({error})") from None

    def _check(self, vectors: np.ndarray) -> None:
        if vectors.ndim != 2 or vectors.shape[1] != self.width:
            raise DataError(f"the codebook is for vectors of width {self.width}, not {vectors.shape[-1]}")


def fit_codebook(vectors: np.ndarray, sizes: Sequence[int], *, seed: int = 0, starts: int | None = None) -> Codebook:
    """Residual k-means (scikit-learn's, with k-means++ starts), one level after the other.

    Source: residual vector quantisation (Juang and Gray, 1982), for semantic ids as in Rajput et al. (NeurIPS 2023)
    and Singh et al. (RecSys 2024), who learn it in an autoencoder; plain k-means has no codebook that collapses in
    training.

    Args:
        vectors: (N, d) floats, finite.
        sizes: K of each level, (L,).
        seed: of starts, and of the rows it is fitted on where there are more than 256 for each code.
        starts: the best of so many is taken; the default is 4 for up to 20,000 rows, and 1 for more.

    Raises:
        ConfigError: there is no level, or one has no code.
        DataError: fewer vectors than codes of a level.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    if not sizes or min(sizes) < 1:
        raise ConfigError(f"a codebook has at least one level, of at least one code, not {list(sizes)}")
    if len(vectors) < max(sizes):
        raise DataError(
            f"{len(vectors)} vectors are fewer than {max(sizes)} codes: take fewer (--codes), or, for new items, the "
            "codebook of the first ones (--codebook)"
        )
    rows = np.arange(len(vectors))
    if len(rows) > ROWS_PER_CODE * max(sizes):
        rows = np.sort(np.random.default_rng(seed).choice(len(rows), ROWS_PER_CODE * max(sizes), replace=False))
    left = vectors[rows].astype(np.float64)
    starts = starts or (4 if len(rows) <= 20_000 else 1)
    centroids = []
    for level, size in enumerate(sizes):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than codes: the report says so
            fitted = KMeans(size, n_init=starts, max_iter=50, random_state=seed + level).fit(left.astype(np.float32))
        centroids.append(fitted.cluster_centers_.astype(np.float32))
        left -= centroids[-1][_nearest(left, centroids[-1])]
    return Codebook(tuple(centroids))


def _nearest(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """(N,) number of the nearest centroid; the first of equally near ones."""
    from sklearn.metrics import pairwise_distances_argmin

    if not len(vectors):
        return np.zeros(0, np.int64)
    return pairwise_distances_argmin(vectors, centroids.astype(np.float64))
