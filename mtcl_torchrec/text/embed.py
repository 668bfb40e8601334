"""From items' texts to a vectors file."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from mtcl_torchrec.data.vectors import write_vectors
from mtcl_torchrec.schema import DataError
from mtcl_torchrec.text.cache import CachedEncoder
from mtcl_torchrec.text.encoders import Encoder, checked_vectors, unit_length
from mtcl_torchrec.text.items import ItemTexts

PART_ROWS = 1024


@dataclass
class Embedded:
    """What came of it.

    Args:
        items: rows of the vectors file.
        width: d.
        seconds: it took.
        empty: rows without any text, and
        unknown: rows of whose text the encoder knows nothing (a vector of zeros).  Both have no row in the file.
        cut: rows with more characters than were taken.
        cut_tokens: how many texts the encoder has read only the beginning of, beside these.
        found: how many texts came from a cache.
        first: what of these ("empty", "unknown", "cut") -> where the first is.
    """

    items: int = 0
    width: int = 0
    seconds: float = 0.0
    empty: int = 0
    unknown: int = 0
    cut: int = 0
    cut_tokens: int = 0
    found: int = 0
    first: dict[str, str] = field(default_factory=dict)

    def note(self, what: str, rows: np.ndarray, items: ItemTexts) -> None:
        """Count some rows under `what`."""
        if len(rows):
            setattr(self, what, getattr(self, what) + len(rows))
            self.first.setdefault(what, items.locate(int(rows[0])))


def embed_items(
    items: ItemTexts,
    encoder: Encoder,
    out: Path,
    *,
    normalise: bool = True,
    half: bool = False,
    part_rows: int = PART_ROWS,
    progress: Callable[[int], None] | None = None,
) -> Embedded:
    """Encode the text of each item and write a vectors file.

    An item without text, or of whose text the encoder knows nothing, gets no row: for a model it is an item without a
    vector, which is something else than a vector in the middle.  Memory: the keys and some parts; the rest is on disk.

    Args:
        items: see `ItemTexts.open`.
        encoder: any callable from texts to (n, d); `CachedEncoder` makes it resumable.
        out: the file; it appears when it is whole.
        normalise: bring each vector to length 1.
        half: write float16.
        part_rows: texts that are given to the encoder at once.
        progress: called with the rows that are done.

    Raises:
        DataError: a file or column is wrong, the encoder gave no finite vectors (n, d), or no item has a text.

    Example:
        >>> import tempfile, pandas as pd
        >>> from mtcl_torchrec.data.vectors import read_vectors
        >>> def letters(texts):
        ...     return np.array([[text.count(letter) for letter in "aeo"] for text in texts], float)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     frame = pd.DataFrame({"item_id": [5, 7, 9], "title": ["a boat", None, "tree"]})
        ...     frame.to_parquet(Path(folder) / "items.parquet")
        ...     items = ItemTexts.open([folder + "/items.parquet"], ["title"], "item_id")
        ...     done = embed_items(items, letters, Path(folder) / "vectors.parquet", normalise=False)
        ...     read = read_vectors(Path(folder) / "vectors.parquet")
        >>> read.keys.tolist(), read.vectors.tolist(), done.empty
        ([5, 9], [[2.0, 0.0, 1.0], [0.0, 2.0, 0.0]], 1)
    """
    done, kept, began = Embedded(), list[np.ndarray](), time.monotonic()
    kind = np.dtype(np.float16 if half else np.float32)
    found_before, cut_before = getattr(encoder, "found", 0), getattr(encoder, "cut", 0)
    with TemporaryFile(dir=out.resolve().parent) as spill:
        for part in items.parts(part_rows):
            there = np.array([bool(text) for text in part.texts], bool)
            rows = part.start + np.flatnonzero(there)
            texts = [text for text in part.texts if text]
            done.note("empty", part.start + np.flatnonzero(~there), items)
            done.note("cut", part.start + np.flatnonzero(part.cut), items)
            if texts:
                vectors = checked_vectors(encoder(texts), texts, done.width or None)
                done.width = vectors.shape[1]
                known = vectors.any(axis=1)
                done.note("unknown", rows[~known], items)
                vectors = vectors[known]
                with np.errstate(over="ignore"):
                    spill.write((unit_length(vectors) if normalise else vectors).astype(kind).tobytes())
                kept.append(rows[known])
                done.items += len(vectors)
            if progress is not None:
                progress(part.start + len(part.texts))
        if not done.items:
            raise DataError(
                f"none of the {len(items)} items has a text in {', '.join(items.columns)} that says anything"
            )
        spill.flush()
        everything = np.memmap(spill, kind, mode="r", shape=(done.items, done.width))
        about = {"encoder": getattr(encoder, "identity", None), "text": list(items.columns), "normalised": normalise}
        write_vectors(out, items.keys.iloc[np.concatenate(kept)], everything, key=items.key, about=about)
    done.found = getattr(encoder, "found", 0) - found_before if isinstance(encoder, CachedEncoder) else 0
    done.cut_tokens = int(getattr(encoder, "cut", 0)) - int(cut_before)
    done.seconds = time.monotonic() - began
    return done
