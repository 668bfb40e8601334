"""Random numbers that are a function of (stream, counter): no state, any order, any process, any machine.

A generator with a state must be run from its start to reach row 10⁹; here the numbers of row 10⁹ are a hash of it.
Everything works element by element on contiguous arrays, so that a number never depends on which others were asked
for with it (a matrix product or a reduction would round differently for other lengths).
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import numpy as np

# Constants of the splitmix64 finaliser (variant 13 of D. Stafford's mixers).
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_HALF_WIDTH = math.sqrt(3.0)  # of the uniform distribution with variance 1


class Stream(NamedTuple):
    """One sequence of random numbers: counter n becomes mix(n · multiplier + offset)."""

    multiplier: np.uint64
    offset: np.uint64


def stream(seed: int, *name: str | int) -> Stream:
    """The stream of a name; streams of other names or seeds have nothing to do with it.

    Example:
        >>> stream(0, "user") == stream(0, "user"), stream(0, "user") == stream(1, "user")
        (True, False)
    """
    key = hashlib.blake2b(repr((seed, *name)).encode(), digest_size=16).digest()
    return Stream(np.uint64(int.from_bytes(key[:8], "little") | 1), np.uint64(int.from_bytes(key[8:], "little")))


def bits(source: Stream, counter: np.ndarray) -> np.ndarray:
    """64 random bits for each counter.

    Args:
        source: the stream.
        counter: (N,) integers of at least 0.

    Returns:
        (N,) uint64.

    Example:
        >>> a = bits(stream(0, "user"), np.array([5, 6, 7]))
        >>> b = bits(stream(0, "user"), np.array([7]))
        >>> bool(a[2] == b[0])
        True
    """
    x = counter.astype(np.uint64)
    x *= source.multiplier
    x += source.offset
    x ^= x >> np.uint64(30)
    x *= _MIX_1
    x ^= x >> np.uint64(27)
    x *= _MIX_2
    x ^= x >> np.uint64(31)
    return x


def uniform(source: Stream, counter: np.ndarray) -> np.ndarray:
    """(N,) float64, uniform in [0, 1) with all 53 bits."""
    return (bits(source, counter) >> np.uint64(11)) * 2.0**-53


def below(source: Stream, counter: np.ndarray, n: int) -> np.ndarray:
    """(N,) int64, uniform in 0 … n - 1; n is far below 2³²."""
    return (((bits(source, counter) >> np.uint64(32)) * np.uint64(n)) >> np.uint64(32)).astype(np.int64)


def sixteenths(source: Stream, counter: np.ndarray) -> list[np.ndarray]:
    """Four numbers from one hash: (N,) float32 each, uniform in (0, 1) in steps of 2⁻¹⁶."""
    x = bits(source, counter)
    parts = [((x >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.float32) for shift in (0, 16, 32, 48)]
    for part in parts:
        part += np.float32(0.5)
        part *= np.float32(2.0**-16)
    return parts


def latents(seed: int, name: str, ids: np.ndarray, dim: int) -> list[np.ndarray]:
    """A vector for each id: `dim` arrays (N,) of float32, uniform with mean 0 and variance 1.

    Example:
        >>> [x.shape for x in latents(0, "user", np.array([1, 10**10]), 3)]
        [(2,), (2,), (2,)]
    """
    vectors: list[np.ndarray] = []
    for block in range(-(-dim // 4)):
        vectors += sixteenths(stream(seed, name, block), ids)
    for x in vectors[:dim]:
        x -= np.float32(0.5)
        x *= np.float32(2 * _HALF_WIDTH)
    return vectors[:dim]


def zipf_ranks(u: np.ndarray, n: int, exponent: float) -> np.ndarray:
    """Ranks 1 … n with P(k) ∝ ∫ x⁻ˢ dx over k ± ½, by inversion: no table, whatever n is.

    That is k⁻ˢ itself but for the first few ranks (for s = 1, rank 1 gets 10 % more than k⁻ˢ would give it).

    Args:
        u: (N,) float64 in [0, 1).
        n: how many ranks.
        exponent: s ≥ 0; 0 is uniform.

    Returns:
        (N,) int64.

    Example:
        >>> zipf_ranks(np.array([0.0, 0.5, 0.999999]), 10**10, 1.0).tolist()
        [1, 70711, 9999762...]
    """
    low, width = 0.5, math.log((n + 0.5) / 0.5)
    power = 1.0 - exponent
    # x = low · (1 + u ((high / low)ᵖ - 1))^(1/p), written so that it stays exact where p goes to 0
    log_x = u * width if abs(power) < 1e-12 else np.log1p(u * math.expm1(power * width)) / power
    x = np.exp(log_x)
    x *= low
    x += 0.5
    return np.clip(x.astype(np.int64), 1, n)


def scatter(ranks: np.ndarray, n: int, offset: int) -> np.ndarray:
    """A one-to-one map of 0 … n - 1 onto itself that puts neighbours far apart.

    Popular ids then lie all over a table, as they do in real ones; in order of popularity, the first shard of a
    row-wise table would get nearly all of the work.

    Example:
        >>> sorted(scatter(np.arange(6), 6, 2).tolist())
        [0, 1, 2, 3, 4, 5]
    """
    step = min(int(n * 0.6180339887498949), 2**62 // n)
    while math.gcd(step, n) != 1:
        step += 1
    return (ranks * step + offset) % n
