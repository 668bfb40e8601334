"""Semantic ids as rows of one table: each prefix of an item's code has a number, and an unseen one backs off.

An item's code (7, 3, 12) has the prefixes (7), (7, 3) and (7, 3, 12); its vector is the sum of theirs.  Items alike
share the front of their codes and so part of their vectors; the last prefix is the item's own, or that of a few.
Source: Singh et al., Better Generalization with Semantic IDs (RecSys 2024), prefixes as N-grams of a code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from mtcl_torchrec.schema import DataError


@dataclass(frozen=True)
class Prefixes:
    """The prefixes that a catalogue's codes have, numbered from 1; 0 is a prefix that is not known.

    The prefixes form a tree; one is found from the number of the prefix before it and its last code.  Numbers follow
    levels, then codes, and stay what they are when the tree grows.

    Args:
        sizes: how many codes each level has, (L,).
        keys: (P,) int64, number of the prefix before (0 for a first code) × widest size + last code, in the order of
            the numbers.  With `sizes` this is everything there is to keep.

    Example:
        >>> prefixes = Prefixes.of(np.array([[0, 2, 1], [0, 2, 0], [1, 0, 0]]), sizes=(2, 3, 2))
        >>> len(prefixes), prefixes.numbers(np.array([[0, 2, 0]])).tolist()
        (7, [[1, 3, 5]])

        A new item shares the first two codes with an old one, another only the first, a third none:

        >>> prefixes.numbers(np.array([[1, 0, 1], [1, 2, 0], [-1, -1, -1]])).tolist()
        [[2, 4, 0], [2, 0, 0], [0, 0, 0]]
        >>> prefixes.codes_of(5)
        (0, 2, 0)
    """

    sizes: tuple[int, ...]
    keys: np.ndarray

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise DataError(f"sizes of the levels are positive, not {self.sizes}")

    @classmethod
    def of(cls, codes: np.ndarray, sizes: Sequence[int]) -> Prefixes:
        """Of a catalogue's codes.

        Args:
            codes: (V, L) integers, each in [0, size of its level); -1 from where a code ends.
            sizes: (L,).
        """
        return cls(tuple(map(int, sizes)), np.zeros(0, np.int64)).grown(codes)

    def __len__(self) -> int:
        """P; a table of them has P + 1 rows."""
        return len(self.keys)

    @property
    def levels(self) -> int:
        """L."""
        return len(self.sizes)

    def numbers(self, codes: np.ndarray) -> np.ndarray:
        """(N, L) int64: the number of each prefix; 0 from the first one that is not known.

        Args:
            codes: (N, L) integers; any outside of [0, size of its level) is not known.

        Raises:
            DataError: codes have another number of levels.
        """
        codes = self._checked(codes)
        found = np.zeros(codes.shape, np.int64)
        before = np.zeros(len(codes), np.int64)
        for level in range(self.levels):
            here = self._index.get_indexer(pd.Index(self._keys(before, codes, level))).astype(np.int64) + 1
            found[:, level] = before = np.where((before > 0) | (level == 0), here, 0)
        return found

    def jagged(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The known prefixes of each row, one after the other, and how many each row has.

        Returns:
            numbers (sum of lengths,) int64 from 1 to P, and lengths (N,) int64 from 0 (nothing is known) to L.

        Example:
            >>> prefixes = Prefixes.of(np.array([[0, 1], [1, 0]]), sizes=(2, 2))
            >>> [part.tolist() for part in prefixes.jagged(np.array([[1, 0], [-1, -1], [0, 0]]))]
            [[2, 4, 1], [2, 0, 1]]
        """
        numbers = self.numbers(codes)
        known = numbers > 0
        return numbers[known], known.sum(axis=1)

    def grown(self, codes: np.ndarray) -> Prefixes:
        """With the prefixes of more items, numbered after the old ones.

        Args:
            codes: as of `of`.

        Raises:
            DataError: a code is not below the size of its level, or goes on after its end.
        """
        codes = self._checked(codes)
        for level, size in enumerate(self.sizes):
            wrong = (codes[:, level] >= size) | (codes[:, level] < -1)
            if level:
                wrong |= (codes[:, level] >= 0) & (codes[:, level - 1] < 0)
            if wrong.any():
                row = int(np.argmax(wrong))
                raise DataError(
                    f"code {tuple(codes[row].tolist())} of row {row}: level {level + 1} has {size} codes, from 0; "
                    f"-1 ends a code"
                )
        grown = self
        for level in range(self.levels):
            before = grown.numbers(codes)[:, level - 1] if level else np.zeros(len(codes), np.int64)
            there = codes[:, level] >= 0
            keys = np.unique(grown._keys(before, codes, level)[there])
            new = keys[grown._index.get_indexer(pd.Index(keys)) < 0]
            grown = Prefixes(self.sizes, np.concatenate([grown.keys, new]))
        return grown

    def codes_of(self, number: int) -> tuple[int, ...]:
        """The codes of a prefix; none for 0."""
        codes: list[int] = []
        while number:
            number, code = divmod(int(self.keys[number - 1]), max(self.sizes))
            codes.append(code)
        return tuple(reversed(codes))

    @cached_property
    def _index(self) -> pd.Index:
        return pd.Index(self.keys.astype(np.int64))

    def _checked(self, codes: np.ndarray) -> np.ndarray:
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.shape[1] != self.levels or codes.dtype.kind not in "iu":
            raise DataError(f"codes are integers (N, {self.levels}), not {codes.dtype} {codes.shape}")
        return codes.astype(np.int64)

    def _keys(self, before: np.ndarray, codes: np.ndarray, level: int) -> np.ndarray:
        """(N,) int64; -1, which no key is, where the code is none of its level."""
        code = codes[:, level]
        return np.where((code >= 0) & (code < self.sizes[level]), before * max(self.sizes) + code, -1)
