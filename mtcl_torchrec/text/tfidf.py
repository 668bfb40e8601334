"""TF-IDF of hashed words with a truncated SVD (latent semantic analysis): needs no model and no vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args
from zipfile import BadZipFile

import numpy as np

from mtcl_torchrec.schema import DataError

Analyzer = Literal["word", "char"]
BUCKETS = 2**18


@dataclass(frozen=True)
class HashedTfidf:
    """An encoder fitted on texts; later ones get vectors in the same space.

    Counts of hashed words and pairs of words, 1 + log(count), times log((1 + n) / (1 + texts with it)) + 1, brought to
    length 1, projected on the right singular vectors of the texts it was fitted on (Deerwester et al., 1990).

    Args:
        analyzer: ``"word"`` (words and pairs of neighbours) or ``"char"`` (2 to 4 characters inside of words: for
            languages without spaces, for product codes, for spelling mistakes).
        buckets: (F,) int64, the hash buckets that count.
        idf: (F,) float32.
        components: (d, F) float32.

    Example:
        >>> encoder = HashedTfidf.fit(["red wool scarf", "blue wool scarf", "steel frying pan", "iron pan"], width=3)
        >>> vectors = encoder(["green wool scarf", "wool", "frying pan"])
        >>> vectors.shape, bool(vectors[0] @ vectors[1] > 5 * abs(vectors[0] @ vectors[2]))
        ((3, 3), True)
    """

    analyzer: Analyzer
    buckets: np.ndarray
    idf: np.ndarray
    components: np.ndarray

    @classmethod
    def fit(
        cls,
        texts: Iterable[str],
        width: int = 128,
        *,
        analyzer: Analyzer = "word",
        max_buckets: int = 65_536,
        seed: int = 0,
    ) -> HashedTfidf:
        """Learn which words are rare and which go together.  Deterministic.

        Args:
            width: d.  Fewer texts span fewer directions; the rest of each vector is then zero.
            max_buckets: the ones that most texts have are kept.

        Raises:
            DataError: there is no word in any text.
        """
        from sklearn.decomposition import TruncatedSVD

        if width < 1:
            raise DataError(f"vectors have at least 1 number, not {width}")
        texts = list(texts)
        if not texts:
            raise DataError("there is no text to learn from: all are empty")
        counts = _counts(texts, analyzer)
        if not counts.nnz:
            raise DataError(f"no text among {len(texts)} has a {analyzer} of two letters that could be learnt from")
        frequency = np.bincount(counts.indices, minlength=BUCKETS)
        often = np.argsort(-frequency, kind="stable")[: min(max_buckets, np.count_nonzero(frequency))]
        buckets = np.sort(often).astype(np.int64)
        idf = (np.log((1 + len(texts)) / (1 + frequency[buckets])) + 1).astype(np.float32)
        weighted = _weighted(counts, buckets, idf)
        rank = min(width, *weighted.shape)
        components = np.zeros((width, len(buckets)), np.float32)
        with np.errstate(invalid="ignore"):  # scikit-learn divides by the variance, which one text has not
            svd = TruncatedSVD(rank, random_state=seed).fit(weighted)
        real = svd.singular_values_ > 1e-4 * svd.singular_values_[0]  # the others are directions of rounding errors
        components[:rank][real] = svd.components_[real]
        return cls(analyzer, buckets, idf, components)

    def __call__(self, texts: list[str]) -> np.ndarray:
        """(n, d) float32; zeros for a text without a word that was there in fitting."""
        if not texts:
            return np.zeros((0, len(self.components)), np.float32)
        weighted = _weighted(_counts(texts, self.analyzer), self.buckets, self.idf)
        return np.asarray(weighted @ self.components.T, dtype=np.float32)

    @property
    def identity(self) -> str:
        """Differs wherever the vectors would."""
        digest = sha256()
        for part in (self.buckets, self.idf, self.components):
            digest.update(np.ascontiguousarray(part).tobytes())
        return f"tfidf {self.analyzer} {self.components.shape} {digest.hexdigest()}"

    def save(self, path: Path) -> None:
        """Write what was fitted, as .npz."""
        unfinished = path.with_name(path.name + ".unfinished")
        with unfinished.open("wb") as file:
            np.savez_compressed(
                file, tfidf=self.analyzer, buckets=self.buckets, idf=self.idf, components=self.components
            )
        unfinished.replace(path)

    @classmethod
    def load(cls, path: Path) -> HashedTfidf:
        """Read what `save` wrote.

        Raises:
            DataError: it is no such file.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                analyzer, buckets = str(stored["tfidf"]), stored["buckets"]
                idf, components = stored["idf"], stored["components"]
        except (OSError, KeyError, ValueError, EOFError, BadZipFile) as error:
            raise DataError(f"{path}: no fitted tfidf ({error})") from None
        fits = (
            analyzer in get_args(Analyzer)
            and buckets.dtype == np.int64
            and idf.dtype == components.dtype == np.float32
            and idf.shape == buckets.shape == components.shape[1:]
            and bool(np.all((buckets >= 0) & (buckets < BUCKETS)))
            and bool(np.isfinite(idf).all() and np.isfinite(components).all())
        )
        if not fits:
            raise DataError(f"{path}: no fitted tfidf (its parts do not belong together)")
        return cls("char" if analyzer == "char" else "word", buckets, idf, components)


def _counts(texts: list[str], analyzer: Analyzer) -> Any:
    """(n, BUCKETS) sparse."""
    from sklearn.feature_extraction.text import HashingVectorizer

    kind: dict[str, Any] = (
        {"analyzer": "word", "ngram_range": (1, 2), "strip_accents": "unicode"}
        if analyzer == "word"
        else {"analyzer": "char_wb", "ngram_range": (2, 4)}
    )
    vectorizer = HashingVectorizer(n_features=BUCKETS, alternate_sign=False, norm=None, dtype=np.float32, **kind)
    return vectorizer.transform(texts).tocsr()


def _weighted(counts: Any, buckets: np.ndarray, idf: np.ndarray) -> Any:
    """(n, F) sparse, rows at length 1."""
    from sklearn.preprocessing import normalize

    kept = counts[:, buckets].tocsr()
    kept.data = (1 + np.log(kept.data)) * idf[kept.indices]
    return normalize(kept)
