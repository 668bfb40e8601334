"""Made-up titles: words that belong to topics, and words that mean nothing."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_SYLLABLES = ("ba", "do", "fi", "gu", "ka", "le", "mo", "nu", "pi", "ra", "se", "tu", "vo", "za", "chi", "stro")


@lru_cache(maxsize=8)
def vocabulary(topics: int, words: int) -> np.ndarray:
    """(topics + 1, words) different words: a line for each topic, and a last one of words that mean nothing.

    Example:
        >>> vocabulary(1, 2).tolist()
        [['babababa', 'babadogu'], ['babafimo', 'babagura']]
    """
    return _made_up_words((topics + 1) * words).reshape(topics + 1, words)


def word_numbers(chance: np.ndarray, words: int) -> np.ndarray:
    """Which of a topic's words, from uniform numbers: the first are the usual ones.

    Example:
        >>> word_numbers(np.array([0.0, 0.5, 0.99]), 30).tolist()
        [0, 7, 29]
    """
    return (words * chance**2).astype(np.int64)


def titles(known: np.ndarray, topic: np.ndarray, chance: np.ndarray) -> list[str]:
    """A title for each of N items of W words.

    Args:
        known: of `vocabulary`.
        topic: (N, W) integers, the line of each word.
        chance: (N, W) uniform numbers, see `word_numbers`.

    Example:
        >>> titles(vocabulary(1, 2), np.array([[0, 1]]), np.array([[0.0, 0.9]]))
        ['babababa babagura']
    """
    return [" ".join(words) for words in known[topic, word_numbers(chance, known.shape[1])]]


def _made_up_words(count: int) -> np.ndarray:
    """So many different words, without a meaning in any language.

    Example:
        >>> _made_up_words(3).tolist()
        ['babababa', 'babadogu', 'babafimo']
    """
    base = len(_SYLLABLES)
    words = []
    for number in range(count):
        first, second, third = number // base**2 % base, number // base % base, number % base
        check = (7 * first + 5 * second + 3 * third) % base
        tail = _SYLLABLES[number // base**3 % base] if number >= base**3 else ""
        words.append(tail + _SYLLABLES[first] + _SYLLABLES[second] + _SYLLABLES[third] + _SYLLABLES[check])
    return np.array(words)
