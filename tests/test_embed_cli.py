"""`mtcl embed` and `mtcl semantic-ids` as a person uses them; mistakes are one line."""

import sys

import corpus
import numpy as np
import pandas as pd
import pytest

from mtcl_torchrec.cli import main
from mtcl_torchrec.data.prefixes import Prefixes
from mtcl_torchrec.data.vectors import read_codes, read_vectors


@pytest.fixture
def mtcl(monkeypatch, capsys, tmp_path):
    """Runs the command in a folder with items.parquet and gives (exit status, what it printed, what it said)."""
    monkeypatch.chdir(tmp_path)
    corpus.items().to_parquet("items.parquet")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mtcl", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out = capsys.readouterr()
        return stopped.value.code or 0, out.out, out.err

    return run


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
        (["items.parquet", "--text", "title", "--key", "id"], "no column 'id'"),
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
