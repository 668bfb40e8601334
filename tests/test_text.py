"""Items' text to vectors: what is read, what tf-idf makes of it, what a cache keeps, and what bad input comes to."""

import os
import signal

import corpus
import numpy as np
import pandas as pd
import pytest

from mtcl_torchrec.data.vectors import read_vectors
from mtcl_torchrec.schema import ConfigError, DataError
from mtcl_torchrec.text import CachedEncoder, HashedTfidf, ItemTexts, embed_items, open_encoder


class Letters:
    """Counts letters, and how often it was asked."""

    identity = "letters 1"

    def __init__(self, fail_at=None):
        self.asked, self.fail_at = [], fail_at

    def __call__(self, texts):
        if len(self.asked) == self.fail_at:
            raise KeyboardInterrupt
        self.asked.append(list(texts))
        return np.array([[text.count(letter) for letter in "abcdefgh"] for text in texts], np.float64)


def texts_of(items):
    return [text for part in items.parts(3) for text in part.texts]


def opened(path, *columns, key="item_id", **options):
    return ItemTexts.open([str(path)], columns, key, **options)


# ---------------------------------------------------------------------- reading


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_columns_become_one_text(tmp_path, kind):
    path = tmp_path / f"items.{kind}"
    frame = pd.DataFrame(
        {
            "item_id": [5, 6, 7, 8, 9],
            "title": ["  A \n boat ", None, "", "NA", 'with "quotes", and\nlines'],
            "year": [1995, None, 2001.5, None, 3],
        }
    )
    frame.to_parquet(path) if kind == "parquet" else frame.to_csv(path, index=False)
    items = opened(path, "title", "year", prefix="item: ")
    year = {"parquet": ["1995", "", "2001.5", "", "3"], "csv": ["1995.0", "", "2001.5", "", "3.0"]}[kind]
    assert items.keys.tolist() == [5, 6, 7, 8, 9]
    assert texts_of(items) == [
        f"item: A boat. {year[0]}", "", f"item: {year[2]}", "item: NA", f'item: with "quotes", and lines. {year[4]}',
    ]  # fmt: skip


def test_lists_and_categories_are_text(tmp_path):
    frame = pd.DataFrame({"item_id": ["a", "b"], "genres": [["Drama", None, "War"], []], "kind": ["x", None]})
    frame["kind"] = frame["kind"].astype("category")
    frame.to_parquet(tmp_path / "items.parquet")
    assert texts_of(opened(tmp_path / "items.parquet", "kind", "genres")) == ["x. Drama, War", ""]


def test_several_files_are_one_catalogue(tmp_path):
    pd.DataFrame({"item_id": [1, 2], "title": ["a", "b"]}).to_parquet(tmp_path / "1.parquet")
    pd.DataFrame({"title": ["c"], "item_id": ["x"]}).to_csv(tmp_path / "2.csv", index=False)
    items = opened(tmp_path, "title")
    assert items.keys.tolist() == ["1", "2", "x"]
    assert texts_of(items) == ["a", "b", "c"]
    assert items.locate(2) == f"{tmp_path}/2.csv, row 0 (item_id = 'x')"
    pd.DataFrame({"title": ["c"], "item_id": ["2"]}).to_csv(tmp_path / "3.csv", index=False)
    with pytest.raises(DataError, match=r"3.csv, row 0: item_id = '2' is there already, in .*1.parquet, row 1"):
        opened(tmp_path, "title")


@pytest.mark.parametrize(
    ("frame", "columns", "said"),
    [
        ({"item_id": [1, 2, 1], "title": list("abc")}, ["title"], "row 2: item_id = '1' is there already, in .*row 0"),
        ({"item_id": [1, None], "title": list("ab")}, ["title"], "row 1: key 'item_id' is missing"),
        ({"item_id": [1.5], "title": ["a"]}, ["title"], "integers or text"),
        ({"item_id": [], "title": []}, ["title"], "no rows"),
        ({"item_id": [1], "titel": ["a"]}, ["title"], r"no column 'title' \(did you mean 'titel'\?\)"),
        ({"itemid": [1], "title": ["a"]}, ["title"], r"no column 'item_id' \(did you mean 'itemid'\?\)"),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_wrong_tables_are_refused_in_one_line(tmp_path, frame, columns, said, kind):
    path = tmp_path / f"items.{kind}"
    frame = pd.DataFrame(frame)
    frame.to_parquet(path) if kind == "parquet" else frame.to_csv(path, index=False)
    with pytest.raises(DataError, match=said) as error:
        opened(path, *columns)
    assert "\n" not in str(error.value)
    assert path.name in str(error.value)


def test_bytes_and_structs_are_no_text(tmp_path):
    pd.DataFrame({"item_id": [1], "a": [b"x"], "b": [{"c": 1}]}).to_parquet(tmp_path / "items.parquet")
    for column in "ab":
        with pytest.raises(DataError, match=f"column '{column}' holds .*, no text"):
            texts_of(opened(tmp_path / "items.parquet", column))


def test_a_csv_in_another_encoding_is_named_by_line_and_byte(tmp_path):
    path = tmp_path / "items.csv"
    content = 'item_id,title\n1,"two\nlines"\n2,Misérables\n'.encode("latin-1")
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"line 4, byte {content.index(0xE9)}: 0xe9 is no UTF-8 text; .*latin-1"):
        texts_of(opened(path, "title"))
    assert texts_of(opened(path, "title", encoding="latin-1")) == ["two lines", "Misérables"]
    path.write_text("item_id,title\n1,Misérables\n", encoding="utf-16")
    assert texts_of(opened(path, "title", encoding="utf-16")) == ["Misérables"]
    path.write_text("item_id,title\n1,Misérables\n", encoding="utf-8-sig")
    assert texts_of(opened(path, "title")) == ["Misérables"]
    with pytest.raises(ConfigError, match="no encoding 'latin-17'"):
        opened(path, "title", encoding="latin-17")
    path.write_bytes("item_id,titlé\né1,x\n".encode("latin-1"))
    with pytest.raises(DataError, match="line 1, byte 12: 0xe9 is no UTF-8 text"):
        opened(path, "title")


def test_a_byte_far_into_a_file_is_found(tmp_path):
    """Behind a block's end, with a character that lies on it."""
    path = tmp_path / "items.csv"
    head = "item_id,title\n" + "".join(f"{i},{'é' * 9}x\n" for i in range(60_000))
    content = head.encode() + b"x,\xc3(\n"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"line 60002, byte {len(head.encode()) + 2}: 0xc3 is no"):
        texts_of(opened(path, "title"))


def test_rows_of_unequal_width_are_one_clear_line(tmp_path):
    (tmp_path / "items.csv").write_text("item_id,title\n1,a\n2,b,c\n")
    with pytest.raises(DataError, match=r"items.csv: cannot be read \(.*Expected 2 columns, got 3") as error:
        texts_of(opened(tmp_path / "items.csv", "title"))
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_ten_megabytes_of_text_are_cut_and_said(tmp_path, kind):
    path = tmp_path / f"items.{kind}"
    frame = pd.DataFrame({"item_id": [1, 2], "title": ["a b", "ab " * 3_500_000]})
    frame.to_parquet(path) if kind == "parquet" else frame.to_csv(path, index=False)
    encoder, out = Letters(), tmp_path / "v.parquet"
    done = embed_items(opened(path, "title", max_chars=100), encoder, out)
    assert (done.items, done.cut) == (2, 1)
    assert done.first["cut"].endswith("row 1 (item_id = '2')")
    assert [len(text) for text in encoder.asked[0]] == [3, 100]


# ---------------------------------------------------------------------- embedding


def test_items_without_text_have_no_row(tmp_path):
    frame = pd.DataFrame({"item_id": list("pqrst"), "title": ["abc", None, " \n", "xyz", "b"], "n": [np.nan] * 5})
    frame.to_parquet(tmp_path / "items.parquet")
    done = embed_items(opened(tmp_path / "items.parquet", "title", "n"), Letters(), tmp_path / "v.parquet", part_rows=2)
    read = read_vectors(tmp_path / "v.parquet")
    assert read.keys.tolist() == ["p", "t"]
    assert np.allclose(np.linalg.norm(read.vectors, axis=1), 1)
    assert (done.items, done.empty, done.unknown, done.width) == (2, 2, 1, 8)
    assert done.first["empty"].endswith("row 1 (item_id = 'q')")
    assert done.first["unknown"].endswith("row 3 (item_id = 's')")
    assert read.about["text"] == ["title", "n"]
    frame.assign(title=None).to_parquet(tmp_path / "items.parquet")
    with pytest.raises(DataError, match="none of the 5 items has a text in title, n"):
        embed_items(opened(tmp_path / "items.parquet", "title", "n"), Letters(), tmp_path / "w.parquet")
    assert not (tmp_path / "w.parquet").exists()


@pytest.mark.parametrize(
    ("encoder", "said"),
    [
        (lambda texts: np.zeros((len(texts) + 1, 2)), r"an encoder gives numbers \(3, d\)"),
        (lambda texts: np.zeros(len(texts)), r"an encoder gives numbers \(3, d\)"),
        (lambda texts: texts, r"an encoder gives numbers \(3, d\)"),
        (lambda texts: np.array([[1.0], [np.nan], [1.0]]), "vector of 'b' is not finite"),
        (lambda texts: np.array([[1.0], [1e300], [1.0]]), "vector of 'b' is not finite"),
        (lambda texts: np.ones((len(texts), len(texts))), "width 3, and then of 1"),
    ],
)
def test_an_encoder_that_is_none_is_refused(tmp_path, encoder, said):
    pd.DataFrame({"item_id": range(4), "title": list("abcd")}).to_parquet(tmp_path / "items.parquet")
    with pytest.raises(DataError, match=said):
        embed_items(opened(tmp_path / "items.parquet", "title"), encoder, tmp_path / "v.parquet", part_rows=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["items.parquet"]


def test_half_precision_is_written_as_such(tmp_path):
    pd.DataFrame({"item_id": [1, 2], "title": ["abc", "cab"]}).to_parquet(tmp_path / "items.parquet")
    embed_items(opened(tmp_path / "items.parquet", "title"), Letters(), tmp_path / "v.parquet", half=True)
    assert read_vectors(tmp_path / "v.parquet").vectors.dtype == np.float16


# ---------------------------------------------------------------------- cache


def test_each_text_is_encoded_once(tmp_path):
    first, second = Letters(), Letters()
    cached = CachedEncoder(first, tmp_path)
    one = cached(["a", "b", "a"])
    assert first.asked == [["a", "b"]]
    assert np.array_equal(one, Letters()(["a", "b", "a"]))
    again = CachedEncoder(second, tmp_path)
    assert np.array_equal(again(["b", "c", "a"]), Letters()(["b", "c", "a"]))
    assert second.asked == [["c"]]
    assert (again.found, again.encoded, len(again)) == (2, 1, 3)
    assert again([]).shape == (0, 8)


def test_encoders_have_caches_of_their_own(tmp_path):
    CachedEncoder(Letters(), tmp_path)(["a"])
    other = CachedEncoder(lambda texts: np.full((len(texts), 3), 7.0), tmp_path, identity="seven")
    assert other(["a"]).tolist() == [[7.0, 7.0, 7.0]]
    with pytest.raises(ConfigError, match="identity"):
        CachedEncoder(lambda texts: texts, tmp_path)


def test_a_broken_file_of_a_cache_is_encoded_again(tmp_path):
    cached = CachedEncoder(Letters(), tmp_path)
    cached(["a", "b"])
    cached(["c"])
    files = sorted(cached.folder.glob("*.npy"), key=lambda p: p.stat().st_size)
    files[1].write_bytes(files[1].read_bytes()[:-5])
    (cached.folder / "junk.npy").write_bytes(b"junk")
    encoder = Letters()
    again = CachedEncoder(encoder, tmp_path)
    assert np.array_equal(again(["a", "b", "c"]), Letters()(["a", "b", "c"]))
    assert encoder.asked == [["a", "b"]]


def test_wrong_vectors_are_not_kept(tmp_path):
    with pytest.raises(DataError, match="not finite"):
        CachedEncoder(lambda texts: np.full((len(texts), 3), np.nan), tmp_path, identity="x")(["a"])
    assert len(CachedEncoder(Letters(), tmp_path, identity="x")) == 0


@pytest.mark.parametrize("moment", ["encoding", "writing"])
def test_after_a_kill_what_was_done_is_there(tmp_path, moment):
    """A process that is killed in its third part: two parts are whole, nothing of the third is taken for done."""
    parts = [[f"{letter}{i}" for i in range(5)] for letter in "abcd"]

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            encoder = Letters()
            cached = CachedEncoder(encoder, tmp_path)
            for number, part in enumerate(parts):
                if number == 2 and moment == "encoding":
                    cached.encoder = die
                elif number == 2:
                    os.fsync = die
                cached(part)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    encoder = Letters()
    cached = CachedEncoder(encoder, tmp_path)
    assert len(cached) == 10
    assert len(list(cached.folder.glob("*.writing"))) == (moment == "writing")
    assert all(np.array_equal(cached(part), Letters()(part)) for part in parts)
    assert encoder.asked == parts[2:]


def test_processes_share_a_cache(tmp_path):
    parts = [[f"{letter}{i % 7}{j}" for j in range(6)] for i in range(12) for letter in "ab"]
    children = []
    for number in range(3):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                cached = CachedEncoder(Letters(), tmp_path)
                for part in parts[number:] + parts[:number]:
                    assert np.array_equal(cached(part), Letters()(part))
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    encoder = Letters()
    cached = CachedEncoder(encoder, tmp_path)
    assert len(cached) == len({text for part in parts for text in part})
    assert all(np.array_equal(cached(part), Letters()(part)) for part in parts)
    assert encoder.asked == []


def test_embedding_goes_on_where_it_was_stopped(tmp_path):
    names = [f"{'abcdefgh'[i % 8]} item {i}" for i in range(50)]
    pd.DataFrame({"item_id": range(50), "title": names}).to_parquet(tmp_path / "items.parquet")
    items, out = opened(tmp_path / "items.parquet", "title"), tmp_path / "v.parquet"
    with pytest.raises(KeyboardInterrupt):
        embed_items(items, CachedEncoder(Letters(fail_at=3), tmp_path / "cache"), out, part_rows=10)
    assert not out.exists()
    encoder, seen = Letters(), []
    done = embed_items(items, CachedEncoder(encoder, tmp_path / "cache"), out, part_rows=10, progress=seen.append)
    assert (done.found, sum(map(len, encoder.asked)), seen) == (30, 20, [10, 20, 30, 40, 50])
    embed_items(items, Letters(), tmp_path / "w.parquet")
    assert np.array_equal(read_vectors(out).vectors, read_vectors(tmp_path / "w.parquet").vectors)


# ---------------------------------------------------------------------- tf-idf


def test_tfidf_is_what_scikit_learn_makes_of_words():
    """The same space but for hashing: all cosines are those of TfidfVectorizer, as no direction is left out."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = (corpus.items()["title"] + " " + corpus.items()["about"]).tolist()
    wanted = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit_transform(texts)
    vectors = HashedTfidf.fit(texts, width=96)(texts)
    assert np.allclose(vectors @ vectors.T, (wanted @ wanted.T).toarray(), atol=1e-4)


def test_tfidf_knows_near_from_far_and_new_words_from_none():
    frame = corpus.items()
    encoder = HashedTfidf.fit(frame["title"] + " " + frame["about"], width=16)
    pan, wok, drums, none = encoder(["a pan for the stove", "wok for the stove", "drum kit on stage", "qwertz"])
    assert pan @ wok > 3 * abs(pan @ drums)
    assert not none.any()
    assert encoder([]).shape == (0, 16)


def test_tfidf_is_deterministic_and_comes_back(tmp_path):
    texts = corpus.items()["about"].tolist()
    one, two = HashedTfidf.fit(texts, width=8), HashedTfidf.fit(texts, width=8)
    assert one.identity == two.identity
    one.save(tmp_path / "t.npz")
    again = HashedTfidf.load(tmp_path / "t.npz")
    assert again.identity == one.identity
    assert np.array_equal(again(["for new plants"]), one(["for new plants"]))
    assert HashedTfidf.fit(texts[1:], width=8).identity != one.identity


def test_tfidf_of_fewer_texts_than_numbers_is_padded():
    vectors = HashedTfidf.fit(["red scarf"], width=4)(["red scarf", "red hat"])
    assert vectors.shape == (2, 4)
    assert np.count_nonzero(vectors) == 2


def test_tfidf_of_characters_forgives_spelling_and_needs_no_spaces():
    encoder = HashedTfidf.fit(["東京の地図", "京都の地図", "大阪城公園"], width=3, analyzer="char")
    tokyo, kyoto, osaka = encoder(["東京地図", "京都地図", "大阪公園"])
    assert tokyo @ kyoto > 3 * abs(tokyo @ osaka)


def test_what_is_no_tfidf_is_refused(tmp_path):
    for texts, said in (
        ([], "there is no text to learn from: all are empty"),
        (["", "!"], "no text among 2 has a word"),
    ):
        with pytest.raises(DataError, match=said):
            HashedTfidf.fit(texts)
    fitted = HashedTfidf.fit(["red scarf"], width=2)
    np.savez(tmp_path / "a.npz", tfidf="word", buckets=fitted.buckets, idf=fitted.idf, components=fitted.idf)
    np.savez(tmp_path / "b.npz", tfidf=np.array([{}], dtype=object), buckets=1, idf=1, components=1)
    (tmp_path / "c.npz").write_bytes(b"PK\x03\x04")
    for name in "abcd":
        with pytest.raises(DataError, match=f"{name}.npz: no fitted tfidf"):
            HashedTfidf.load(tmp_path / f"{name}.npz")


# ---------------------------------------------------------------------- names


def test_encoders_are_opened_by_name(tmp_path):
    fitted = open_encoder("tfidf", ["red scarf"], width=3)
    assert fitted(["red"]).shape == (1, 3)
    fitted.save(tmp_path / "t.npz")
    assert open_encoder(str(tmp_path / "t.npz")).identity == fitted.identity


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("wordlama", {}, r"no encoder 'wordlama' \(did you mean 'wordllama'\?\)"),
        ("no/such/folder", {}, "nothing is downloaded"),
        ("tfidf", {"pooling": "mean"}, "encoder tfidf has no option pooling"),
        ("wordllama", {"max_tokens": 3}, "encoder wordllama has no option max_tokens"),
        ("minilm", {"width": 3}, "encoder minilm has no option width"),
        ("x.npz", {"width": 3}, "encoder fitted x.npz has no option width"),
        (".", {"analyzer": "char"}, "encoder model . has no option analyzer"),
        (".", {}, "no folder of a language model"),
    ],
)
def test_options_that_do_nothing_are_refused(tmp_path, monkeypatch, name, options, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        open_encoder(name, ["red scarf"], **options)
