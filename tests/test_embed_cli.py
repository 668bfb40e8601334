"""`mtcl embed` and `mtcl semantic-ids` as a person uses them; mistakes are one line."""

import corpus
import numpy as np
import pandas as pd
import pytest

from mtcl_torchrec.data.contents import read_contents
from mtcl_torchrec.data.prefixes import Prefixes
from mtcl_torchrec.data.vectors import read_codes, read_vectors
from mtcl_torchrec.schema import ConfigError, Feature


@pytest.fixture
def mtcl(command, monkeypatch, tmp_path):
    """Runs the command in a folder with items.parquet and gives (exit status, what it printed, what it said)."""
    monkeypatch.chdir(tmp_path)
    corpus.items().to_parquet("items.parquet")
    return command


def test_from_items_to_codes_of_new_items(mtcl, tmp_path):
    status, said, _ = mtcl(
        "embed", "items.parquet", "--text", "title,about", "-o", "v.parquet", "--width", 32,
        "--semantic-ids", "codes.parquet", "--levels", 2, "--codes", 8,
    )  # fmt: skip
    assert status == 0
    assert "wrote 96 vectors of width 32 to v.parquet" in said
    assert "96 items have" in said
    assert "for new items: --codebook codes.codebook.npz" in said
    vectors, old = read_vectors(tmp_path / "v.parquet"), read_codes(tmp_path / "codes.parquet")
    assert (vectors.key, vectors.vectors.shape) == ("item_id", (96, 32))
    assert (old.sizes, old.codes.shape, old.keys.tolist()) == ((8, 8), (96, 2), vectors.keys.tolist())

    new = {"item_id": ["n1", "n2"], "title": ["pasta pan", "snow coat"], "about": ["steel, for a cook", "against snow"]}
    pd.DataFrame(new).to_parquet("new.parquet")
    status, said, _ = mtcl(
        "embed", "new.parquet", "--text", "title,about", "-o", "n.parquet", "--encoder", "v.tfidf.npz"
    )
    assert status == 0
    status, said, _ = mtcl("semantic-ids", "n.parquet", "-o", "n.codes.parquet", "--codebook", "codes.codebook.npz")
    assert status == 0
    assert "wrote the codes of 2 items of n.parquet" in said
    fresh = read_codes(tmp_path / "n.codes.parquet")
    assert fresh.about["codebook"] == old.about["codebook"]

    # A new item has the first code of items of its theme, and finds their prefix.
    themes = corpus.items().set_index("item_id")["theme"]
    prefixes = Prefixes.of(old.codes, old.sizes)
    for codes, theme in zip(fresh.codes, ["kitchen", "winter"], strict=True):
        alike = themes[[k for k, c in zip(old.keys, old.codes, strict=True) if c[0] == codes[0]]]
        assert (alike == theme).mean() > 0.9
        assert prefixes.numbers(codes[None])[0, 0] > 0


def test_the_same_vectors_through_one_command_or_two(mtcl, tmp_path):
    assert mtcl("embed", "items.parquet", "--text", "title", "-o", "v.parquet", "--semantic-ids", "c.parquet",
                "--codes", "4,3")[0] == 0  # fmt: skip
    assert mtcl("semantic-ids", "v.parquet", "-o", "d.parquet", "--codes", "4,3")[0] == 0
    assert np.array_equal(read_codes(tmp_path / "c.parquet").codes, read_codes(tmp_path / "d.parquet").codes)


def test_a_second_time_takes_everything_from_the_cache(mtcl, tmp_path):
    frame = corpus.items()
    frame.loc[frame.index[:3], ["title", "about"]] = None
    frame.to_csv("items.csv", index=False, encoding="latin-1")
    arguments = ["embed", "items.csv", "--text", "title,about", "-o", "v.parquet", "--max-chars", 12]
    status, said, _ = mtcl(*arguments, "--encoding", "latin-1")
    assert status == 0
    assert "3 items have no text and no row; the first: items.csv, row 0 (item_id = " in said
    assert "texts were cut at 12 characters; the first: items.csv, row 3" in said
    status, said, _ = mtcl(*arguments, "--overwrite")
    assert status == 0
    assert "93 texts were encoded before" in said
    assert (tmp_path / "v.parquet.cache").is_dir()
    assert mtcl(*arguments, "--overwrite", "--no-cache")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["items.parquet", "--text", "titel"], "no column 'titel' (did you mean 'title'?)"),
        (["items.parquet", "--text", ","], "name at least one column of text"),
        (["items.parquet", "--text", "title", "--key", "id"], "no column 'id', but item_id, title, about, theme"),
        (["items.parquet", "--text", "title", "--key", "itemid"],
         "no column 'itemid' (did you mean 'item_id'?); --key names the one that says which item it is"),
        (["items.parquet", "--text", "title", "--semantic-ids", "c.parquet", "--codes", "97"],
         "96 items are fewer than 97 codes: take fewer (--codes), or, for new items, mtcl semantic-ids v.parquet -o "
         "c.parquet --codebook CODES.codebook.npz"),
        (["items.parquet", "--text", "title", "--semantic-ids", "c.parquet", "--codes", "97", "--encoder", "old.npz"],
         "for new items leave it out, and then: mtcl semantic-ids v.parquet -o c.parquet --codebook"),
        (["items.parquet", "--text", "title", "--semantic-ids", "no/c.parquet"], "no/c.parquet: there is no folder no"),
        (["absent.parquet", "--text", "title"], "no Parquet or CSV file at absent.parquet"),
        (["items.parquet", "--text", "title", "--encoder", "minlm"], "no encoder 'minlm' (did you mean 'minilm'?)"),
        (["items.parquet", "--text", "title", "--codes", "4"], "belong to --semantic-ids"),
        (["items.parquet", "--text", "title", "--cache", "x", "--no-cache"], "--cache or --no-cache"),
        (["items.parquet", "--text", "title", "--pooling", "last"], "encoder tfidf has no option pooling"),
        (["items.parquet", "--text", "title", "--semantic-ids", "c.parquet", "--codes", "x"], "--codes takes a number"),
        (["items.parquet", "--text", "title", "--semantic-ids", "c.parquet", "--codes", "2,3", "--levels", "3"],
         "--levels 3 and --codes 2,3: 2 levels"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_writes_nothing(mtcl, tmp_path, arguments, said):
    status, _, error = mtcl("embed", *arguments, "-o", "v.parquet")
    assert status == 2
    assert said in error
    assert error.count("\n") == 1
    assert error.startswith("mtcl: ")
    assert [p.name for p in tmp_path.iterdir()] == ["items.parquet"]


def test_mistakes_with_codes_are_one_line(mtcl, tmp_path):
    assert mtcl("embed", "items.parquet", "--text", "title", "-o", "v.parquet", "--width", 8)[0] == 0
    for arguments, wanted in (
        (["items.parquet", "-o", "c.parquet"], "no column 'vector'"),
        (["v.parquet", "-o", "v.parquet"], "exists already; --overwrite replaces it"),
        (["v.parquet", "-o", "c.parquet", "--codes", 97], "96 vectors are fewer than 97 codes"),
        (["v.parquet", "-o", "c.parquet", "--codebook", "v.tfidf.npz"], "v.tfidf.npz: no codebook"),
        (["v.parquet", "-o", "c.parquet", "--codebook", "b.npz", "--codes", 4], "no --levels and --codes"),
    ):
        status, _, error = mtcl("semantic-ids", *arguments)
        assert (status, error.count("\n")) == (2, 1)
        assert wanted in error
    assert not (tmp_path / "c.parquet").exists()


def test_what_another_encoder_or_codebook_made_is_not_mixed(mtcl, tmp_path):
    """A new tfidf of new items is another space, in which the old codebook says nothing."""
    assert mtcl("embed", "items.parquet", "--text", "title", "-o", "v.parquet", "--width", 8,
                "--semantic-ids", "c.parquet", "--codes", 4)[0] == 0  # fmt: skip
    corpus.items().iloc[:40].assign(item_id=range(40)).to_parquet("new.parquet")
    assert mtcl("embed", "new.parquet", "--text", "title", "-o", "n.parquet", "--width", 8)[0] == 0
    status, _, said = mtcl("semantic-ids", "n.parquet", "-o", "d.parquet", "--codebook", "c.codebook.npz")
    assert status == 2
    assert "n.parquet: these vectors are of another encoder than those that c.codebook.npz was fitted on" in said
    assert not (tmp_path / "d.parquet").exists()
    assert mtcl("embed", "new.parquet", "--text", "title", "-o", "o.parquet", "--encoder", "v.tfidf.npz")[0] == 0
    assert mtcl("semantic-ids", "o.parquet", "-o", "d.parquet", "--codebook", "c.codebook.npz")[0] == 0
    assert mtcl("semantic-ids", "n.parquet", "-o", "e.parquet", "--codes", 4)[0] == 0

    def content(kind, name):
        file = {"vectors" if kind == "vector" else "codes": str(tmp_path / f"{name}.parquet")}
        return read_contents(Feature(name="x", group="item", kind=kind, column="item_id", embedding_dim=4, **file))

    old, same, other = (content("vector", name) for name in "von")
    assert len(old.grown(same, "x")) == len(old) + 40
    with pytest.raises(ConfigError, match=r"feature 'x': vectors were made by tfidf word .* and now by tfidf word"):
        old.grown(other, "x")
    old, same, other = (content("semantic_id", name) for name in "cde")
    assert len(old.grown(same, "x").keys) == len(old.keys) + 40
    with pytest.raises(ConfigError, match="feature 'x': these codes are of another codebook"):
        old.grown(other, "x")


def test_after_a_stop_the_same_command_goes_on(mtcl, tmp_path):
    arguments = ["embed", "items.parquet", "--text", "title", "-o", "v.parquet", "--width", 8]
    assert mtcl(*arguments)[0] == 0
    whole = read_vectors(tmp_path / "v.parquet").vectors
    (tmp_path / "v.parquet").unlink()  # as if it had been killed before the end
    status, said, _ = mtcl(*arguments)
    assert status == 0
    assert "96 texts were encoded before" in said
    assert np.array_equal(read_vectors(tmp_path / "v.parquet").vectors, whole)
    (tmp_path / "v.parquet").unlink()
    corpus.items().iloc[:50].to_parquet("items.parquet")
    assert "v.tfidf.npz exists already" in mtcl(*arguments)[2]  # that of other items is not lost


def test_numbers_are_doubted_as_text(mtcl, tmp_path):
    frame = corpus.items().assign(price=range(96), weight=0.5)
    frame.to_csv("items.csv", index=False)
    frame.to_parquet("items.parquet", index=False)
    for file in ("items.csv", "items.parquet"):
        arguments = ("embed", file, "-o", "v.parquet", "--width", 8, "--overwrite", "--no-cache", "--text")
        status, _, said = mtcl(*arguments, "title,price,weight")
        assert status == 0
        assert "mtcl: price, weight hold numbers, which say little as text" in said
        assert "hold" not in mtcl(*arguments, "title")[2]
