"""How a codebook is used: a level of which few codes carry most items says little, and should be seen to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from mtcl_torchrec.text.codebook import Codebook

FEWEST = 100  # items: of fewer, some share of them in one code tells nothing
EXPLAINED = (
    "codes: that a level has; used: that some item has; perplexity: so many codes, used equally, would say as much; "
    "largest: share of the items in the fullest code; unexplained: share of the vectors' variance that is left over"
)


@dataclass(frozen=True)
class LevelUse:
    """Of one level.

    Args:
        size: K, its codes.
        used: codes that some item has.
        entropy: of the codes, in bits; at most log2 K.
        perplexity: 2 ** entropy: as many codes, used equally, would say as much.
        largest: share of items with the most frequent code.
        error: share of the vectors' variance that this level and those before it leave over.
    """

    size: int
    used: int
    entropy: float
    perplexity: float
    largest: float
    error: float


@dataclass(frozen=True)
class CodebookUse:
    """Of a codebook, on the items given.

    Args:
        items: N.
        levels: in their order.
        distinct: full codes that some item has.
        alone: share of items whose full code no other has.
        fullest: items of the most frequent full code.
        warnings: what looks like collapse, a line each.
    """

    items: int
    levels: tuple[LevelUse, ...]
    distinct: int
    alone: float
    fullest: int
    warnings: tuple[str, ...] = field(default=())

    @property
    def items_per_code(self) -> float:
        """Mean number of items of a full code that is used."""
        return self.items / self.distinct

    def lines(self) -> list[str]:
        """For people: a table, what full codes there are, and warnings."""
        head = f"{'level':>5} {'codes':>6} {'used':>6} {'perplexity':>10} {'largest':>8} {'unexplained':>11}"
        rows = [
            f"{i:>5} {u.size:>6} {u.used:>6} {u.perplexity:>10.1f} {u.largest:>8.1%} {u.error:>11.1%}"
            for i, u in enumerate(self.levels, 1)
        ]
        full = (
            f"{self.items:,} items have {self.distinct:,} full codes: {self.items_per_code:.2f} items per code, "
            f"{self.alone:.0%} of the items have one alone, the fullest code has {self.fullest:,}"
        )
        return [head, *rows, EXPLAINED, full, *(f"warning: {warning}" for warning in self.warnings)]


def codebook_use(book: Codebook, vectors: np.ndarray, codes: np.ndarray, *, fitted_here: bool = True) -> CodebookUse:
    """Measure how the codes of some vectors use a codebook.

    Of at least 100 items that the codebook was fitted on, what looks like collapse is warned of.

    Args:
        book: the codebook.
        vectors: (N, d), N at least 1.
        codes: (N, L) of them.
        fitted_here: whether the codebook was fitted on these very vectors; other items need not use it evenly.

    Example:
        >>> vectors = np.float32([[0, 0], [0, 1], [9, 0], [9, 1]])
        >>> book = Codebook((np.float32([[0, 0.5], [9, 0.5]]), np.float32([[0, -0.5], [0, 0.5]])))
        >>> use = codebook_use(book, vectors, book.encode(vectors))
        >>> [round(level.error, 3) for level in use.levels], use.levels[0].perplexity, use.distinct, use.warnings
        ([0.012, 0.0], 2.0, 4, ())
    """
    centre = vectors.mean(axis=0, dtype=np.float64)
    spread = _squares(vectors, centre[None])
    levels = []
    for level, size in enumerate(book.sizes):
        share = np.bincount(codes[:, level], minlength=size) / len(codes)
        present = share[share > 0]
        entropy = float(-(present * np.log2(present)).sum()) + 0.0
        error = _squares(vectors, book, codes[:, : level + 1]) / spread if spread > 0 else 0.0
        levels.append(LevelUse(size, len(present), entropy, 2**entropy, float(share.max()), error))
    counts = np.unique(codes, axis=0, return_counts=True)[1]
    use = CodebookUse(
        len(codes), tuple(levels), len(counts), float((counts == 1).sum() / len(codes)), int(counts.max())
    )
    return replace(use, warnings=tuple(_signs(use))) if fitted_here and use.items >= FEWEST else use


def _squares(vectors: np.ndarray, around: np.ndarray | Codebook, codes: np.ndarray | None = None) -> float:
    """Sum of squared distances, some rows at a time."""
    total = 0.0
    for start in range(0, len(vectors), 16_384):
        part = vectors[start : start + 16_384].astype(np.float64)
        if isinstance(around, Codebook):
            assert codes is not None
            part -= around.decode(codes[start : start + len(part)])
        else:
            part -= around
        total += float(np.square(part).sum())
    return total


def _signs(use: CodebookUse) -> list[str]:
    """What looks like collapse; levels of few codes may look like anything."""
    found, before = [], 1.0
    for number, level in enumerate(use.levels, 1):
        reachable = min(level.size, use.items)
        if level.used < reachable / 2:
            found.append(f"level {number} uses {level.used} of its {level.size} codes")
        elif level.perplexity < reachable / 4:
            found.append(
                f"level {number} says no more than {level.perplexity:.1f} of its {level.size} codes would, used equally"
            )
        if level.size >= 8 and level.largest > 0.25:
            found.append(f"{level.largest:.0%} of the items have the same code at level {number}")
        if level.error > 0.99 * before or before < 1e-9:
            found.append(f"level {number} explains nothing of what the levels before it leave over")
        before = level.error
    if use.fullest > 0.05 * use.items:
        found.append(f"{use.fullest:,} of {use.items:,} items have the very same code: their texts may be the same")
    return found
