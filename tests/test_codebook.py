"""Residual k-means: codes that say what vectors do, what a report shows of a collapse, and files."""

import corpus
import numpy as np
import pytest

from mtcl_torchrec.schema import ConfigError, DataError
from mtcl_torchrec.text import Codebook, HashedTfidf, codebook_use, fit_codebook
from mtcl_torchrec.text.encoders import unit_length


def grid():
    """(64, 2): a coarse place of 4 x 4, and a fine one of 2 x 2 in each."""
    coarse = np.stack(np.meshgrid(range(4), range(4)), -1).reshape(16, 1, 2) * 100.0
    fine = np.array([[0, 0], [0, 4], [4, 0], [4, 4]]).reshape(1, 4, 2)
    return (coarse + fine).reshape(64, 2).astype(np.float32)


def test_levels_are_the_coarse_and_the_fine():
    vectors = grid()
    book = fit_codebook(vectors, [16, 4], starts=20)
    codes = book.encode(vectors)
    assert codes.shape == (64, 2)
    assert len({tuple(c) for c in codes.tolist()}) == 64
    assert all(len(set(codes[i : i + 4, 0])) == 1 for i in range(0, 64, 4))
    assert np.allclose(book.decode(codes), vectors, atol=1e-4)
    assert np.allclose(book.decode(codes[:, :1]), vectors.reshape(16, 4, 2).mean(1).repeat(4, 0), atol=1e-4)


def test_codes_are_the_nearest_centroids_level_by_level():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40_000, 6)).astype(np.float32)
    book = fit_codebook(vectors[:500], [8, 5, 3])
    codes = book.encode(vectors)
    for row in [0, 1, 16_383, 16_384, 39_999]:
        left = vectors[row].astype(np.float64)
        for level, centroids in enumerate(book.centroids):
            distances = ((left - centroids) ** 2).sum(1)
            assert codes[row, level] == distances.argmin()
            left = left - centroids[codes[row, level]]
    assert np.array_equal(book.encode(vectors[123:130]), codes[123:130])


def test_the_seed_decides():
    vectors = np.random.default_rng(0).normal(size=(9000, 4)).astype(np.float32)
    one, two, other = (fit_codebook(vectors, [16, 16], seed=seed) for seed in (1, 1, 2))
    assert one.identity == two.identity != other.identity


def test_a_codebook_comes_back(tmp_path):
    vectors = grid()
    book = fit_codebook(vectors, [5, 3])
    book.save(tmp_path / "book.npz")
    again = Codebook.load(tmp_path / "book.npz")
    assert (again.identity, again.sizes, again.width) == (book.identity, (5, 3), 2)
    assert np.array_equal(again.encode(vectors), book.encode(vectors))


def test_what_is_no_codebook_is_refused(tmp_path):
    good = np.zeros((2, 3), np.float32)
    np.savez(tmp_path / "width.npz", level_0=good, level_1=good[:, :2])
    np.savez(tmp_path / "name.npz", level_0=good, level_2=good)
    np.savez(tmp_path / "nan.npz", level_0=good * np.nan)
    np.savez(tmp_path / "pickle.npz", level_0=np.array([{}], dtype=object))
    np.savez(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    for name in ("width", "name", "nan", "pickle", "none", "text", "absent"):
        with pytest.raises(DataError, match=f"{name}.npz: no codebook"):
            Codebook.load(tmp_path / f"{name}.npz")
    with pytest.raises(DataError, match="for vectors of width 3, not 2"):
        Codebook((good,)).encode(np.zeros((1, 2), np.float32))


def test_one_row_fewer_than_codes_is_refused():
    vectors = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    assert codebook_use_of(vectors, [64]).levels[0].used == 64
    with pytest.raises(DataError, match="63 vectors are fewer than 64 codes"):
        fit_codebook(vectors[:63], [4, 64])
    for sizes in ([], [0], [4, -1]):
        with pytest.raises(ConfigError, match="at least one level"):
            fit_codebook(vectors, sizes)


# ---------------------------------------------------------------------- report


def codebook_use_of(vectors, sizes):
    book = fit_codebook(vectors, sizes)
    return codebook_use(book, vectors, book.encode(vectors))


def test_use_is_counted():
    book = Codebook((np.float32([[0], [10], [20], [30]]), np.float32([[-1], [1]])))
    vectors = np.float32([[-1], [-1], [1], [9], [11], [11], [11], [11]])
    use = codebook_use(book, vectors, book.encode(vectors))
    first, second = use.levels
    p = np.array([3, 5]) / 8
    assert (first.size, first.used, first.largest) == (4, 2, 5 / 8)
    assert np.isclose(first.entropy, -(p * np.log2(p)).sum())
    assert np.isclose(first.perplexity, 2**first.entropy)
    assert np.isclose(first.error, 8 / ((vectors - vectors.mean()) ** 2).sum())
    assert (second.used, second.error) == (2, 0.0)
    assert (use.items, use.distinct, use.items_per_code, use.alone, use.fullest) == (8, 4, 2.0, 2 / 8, 4)
    assert len(use.lines()) == 1 + 2 + 2
    assert use.lines()[3].startswith("codes: ")


def test_an_even_use_is_not_warned_about():
    assert codebook_use_of(grid(), [16, 4]).warnings == ()


@pytest.mark.parametrize(
    ("vectors", "said"),
    [
        (np.ones((200, 3)), ["level 1 uses 1 of its 16 codes", "200 of 200 items have the very same code"]),
        (
            np.r_[np.zeros((600, 3)), np.eye(3)[np.arange(60) % 3] * np.arange(60)[:, None]],
            ["have the same code at lev"],
        ),
        (np.arange(16).repeat(10)[:, None] * 1.0, ["level 2 uses 1 of its 16 codes", "level 2 explains nothing"]),
    ],
)
def test_collapse_is_said(vectors, said):
    use = codebook_use_of(vectors.astype(np.float32), [16, 16])
    for what in said:
        assert any(what in warning for warning in use.warnings), use.warnings
    assert use.lines()[-1].startswith("warning: ")


def test_few_items_and_items_of_a_given_codebook_are_not_warned_about():
    vectors = np.ones((200, 3), np.float32)
    book = fit_codebook(vectors, [16, 16])
    codes = book.encode(vectors)
    assert codebook_use(book, vectors, codes).warnings
    assert codebook_use(book, vectors, codes, fitted_here=False).warnings == ()
    assert codebook_use(book, vectors[:3], codes[:3]).warnings == ()


# ---------------------------------------------------------------------- meaning


def test_texts_alike_share_the_beginning_of_their_codes():
    frame = corpus.items()
    texts = (frame["title"] + " " + frame["about"]).tolist()
    vectors = unit_length(HashedTfidf.fit(texts, width=32)(texts))
    codes = fit_codebook(vectors, [8, 4, 4]).encode(vectors)
    for level in (1, 2):
        within, between = corpus.agreement(codes, frame["theme"], level)
        assert within > 4 * between, (level, within, between)
