"""`mtcl embed` and `semantic-ids`: from items' text to vectors, and from vectors to codes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mtcl_torchrec.cli.app import DeviceOption, app, screen
from mtcl_torchrec.cli.stopping import if_stopped
from mtcl_torchrec.config.commands import MAX_CHARS
from mtcl_torchrec.schema import ConfigError

if TYPE_CHECKING:
    from mtcl_torchrec.data.vectors import ItemVectors
    from mtcl_torchrec.text import Embedded

OutOption = Annotated[Path, typer.Option("--out", "-o", help="The Parquet file to write.")]
Sizes = Annotated[str, typer.Option(help="Codes of each level: one number for all, or one for each: 256,64,64.")]
Levels = Annotated[int | None, typer.Option(min=1, help="Levels of a semantic id.  [default: 3]")]
Seed = Annotated[int, typer.Option(min=0, help="Of k-means.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file, and what stands beside it.")]


@app.command()
def embed(
    items: Annotated[list[str], typer.Argument(help="Items, one a row: Parquet or CSV, files or a folder.")],
    text: Annotated[str, typer.Option(help="Columns that make up the text, such as title,genres.")],
    out: OutOption,
    key: Annotated[str, typer.Option(help="The column that says which item it is.")] = "item_id",
    encoder: Annotated[
        str,
        typer.Option(
            help="tfidf (fitted on these items), the .npz of a fitted one, wordllama, minilm, or the folder of a "
            "language model."
        ),
    ] = "tfidf",
    width: Annotated[
        int | None, typer.Option(min=1, help="Of the vectors: tfidf any (128), wordllama 256, 128 or 64.")
    ] = None,
    analyzer: Annotated[
        Literal["word", "char"] | None,
        typer.Option(help="tfidf: words, or characters (languages without spaces, codes).  [default: word]"),
    ] = None,
    pooling: Annotated[
        Literal["mean", "last"] | None,
        typer.Option(help="A folder: mean of the tokens, or the last one (causal models).  [default: mean]"),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a text that a language model reads.  [default: at most 256]")
    ] = None,
    max_chars: Annotated[int, typer.Option(min=1, help="Characters of a text; the rest is not looked at.")] = MAX_CHARS,
    prefix: Annotated[str, typer.Option(help="Before each text, where a model wants one: 'passage: '.")] = "",
    encoding: Annotated[str, typer.Option(help="Of CSV files: utf-8, latin-1, cp1252, ...")] = "utf-8",
    normalise: Annotated[bool, typer.Option(help="Bring each vector to length 1.")] = True,
    half: Annotated[bool, typer.Option("--half", help="Write float16: half the size.")] = False,
    device: DeviceOption = "auto",
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps what was encoded, to go on after a stop.  [default: OUT.cache]"),
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep nothing; a stop starts over.")] = False,
    semantic_ids: Annotated[
        Path | None, typer.Option(help="Then write codes here, too: mtcl semantic-ids OUT -o THIS.")
    ] = None,
    levels: Levels = None,
    codes: Sizes = "",
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Turn items' text into vectors: a file of keys and vectors, for features of kind `vector`.

    **Without anything else:** mtcl embed items.parquet --text title,genres -o vectors.parquet

    **With a language model:** mtcl embed items.csv --text title --encoder minilm -o vectors.parquet

    needs `pip install 'mtcl_torchrec[text]'`.  wordllama takes a fiftieth of minilm's time.
    A folder is one that `save_pretrained` wrote: --encoder models/qwen --pooling last.  Nothing is downloaded, pickles
    are not read, code of a model is not run.

    **New items later:** the same command with the new file goes on with the same space; of tfidf, fitted on the first
    items, give what it wrote beside them: --encoder vectors.tfidf.npz

    An item without text has no row in the file, and a model treats it as an item without a vector.  Longer texts are
    cut; both are said.  What was encoded is kept by content in OUT.cache: after a stop the same command goes on, and
    with new items it encodes the new ones only.  When all is done the folder can be deleted.
    """
    _refuse_existing(out, overwrite)
    if semantic_ids is None and (levels is not None or codes):
        raise ConfigError("--levels and --codes belong to --semantic-ids FILE")
    if no_cache and cache is not None:
        raise ConfigError("give --cache or --no-cache")
    if out.suffix.lower() != ".parquet":
        raise ConfigError(f"--out {out}: the file ends in .parquet")
    state = out.with_suffix(".tfidf.npz")
    if semantic_ids is not None:
        _refuse_existing(semantic_ids, overwrite)
        _refuse_existing(_codebook_beside(semantic_ids), overwrite)
        sizes = _sizes(codes, levels)
    from mtcl_torchrec.data.vectors import read_vectors
    from mtcl_torchrec.text import CachedEncoder, HashedTfidf, ItemTexts, embed_items, open_encoder

    console = screen()
    read = ItemTexts.open(items, _columns(text), key, encoding=encoding, prefix=prefix, max_chars=max_chars)
    if read.numeric:
        holds = "hold" if len(read.numeric) > 1 else "holds"
        what = f"{', '.join(read.numeric)} {holds} numbers, which say little as text"
        typer.echo(f"mtcl: {what}; features of kind dense read numbers", err=True)
    if semantic_ids is not None and len(read) < max(sizes):
        fewer = f"{len(read)} items are fewer than {max(sizes)} codes: take fewer (--codes)"
        later = f"mtcl semantic-ids {out} -o {semantic_ids} --codebook CODES.codebook.npz"
        raise ConfigError(
            f"--semantic-ids would fit another codebook to these {len(read)} items; for new items leave it out, and "
            f"then: {later}"
            if encoder.endswith(".npz")
            else f"{fewer}, or, for new items, {later}"
        )
    encode = open_encoder(
        encoder, read.sample(), width=width, analyzer=analyzer, pooling=pooling, max_tokens=max_tokens, device=device
    )
    if encoder == "tfidf":
        assert isinstance(encode, HashedTfidf)
        # What a stopped run of the same command has left is the same.
        if state.exists() and not overwrite and HashedTfidf.load(state).identity != encode.identity:
            _refuse_existing(state, overwrite)
        encode.save(state)
    if not no_cache:
        encode = CachedEncoder(encode, cache or out.with_name(out.name + ".cache"))
    if not no_cache:
        if_stopped("what was encoded is kept in the cache, the same command goes on")
    with _bar() as bar:
        task = bar.add_task(encoder, total=len(read))
        done = embed_items(
            read, encode, out, normalise=normalise, half=half, progress=lambda n: bar.update(task, completed=n)
        )
    for line in _said(done, out, max_chars):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    if encoder == "tfidf":
        console.print(f"for new items: --encoder {state}", highlight=False, soft_wrap=True, markup=False)
    if semantic_ids is not None:
        _write_semantic_ids(console, read_vectors(out, key), out, semantic_ids, None, sizes, seed, overwrite)


@app.command(name="semantic-ids")
def semantic_ids(
    vectors: Annotated[Path, typer.Argument(help="A vectors file, such as `mtcl embed` writes.")],
    out: OutOption,
    key: Annotated[str | None, typer.Option(help="Its key column, where it has further columns.")] = None,
    levels: Levels = None,
    codes: Sizes = "",
    codebook: Annotated[
        Path | None, typer.Option(help="Take this fitted codebook (.npz): codes for new items.  Default: fit one.")
    ] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Turn vectors into semantic ids: a code of a few numbers for each item; items alike share its beginning.

    Residual k-means: the first level has the nearest of 64 centroids, the next one the nearest to what is left over,
    and so on.  A feature of kind `semantic_id` looks up every prefix of the code, so that a new item has the vectors of
    the items it is like.

    **Fit:** mtcl semantic-ids vectors.parquet -o codes.parquet --levels 3 --codes 64

    writes codes.parquet, and the codebook beside it as codes.codebook.npz, and shows how evenly the codes are used: a
    level of which few codes carry most items (a low perplexity) says little.

    **New items later:** mtcl semantic-ids new.parquet -o new_codes.parquet --codebook codes.codebook.npz
    """
    _refuse_existing(out, overwrite)
    if codebook is not None and (levels is not None or codes):
        raise ConfigError("--codebook has its levels and codes: no --levels and --codes")
    sizes = None if codebook is not None else _sizes(codes, levels)
    from mtcl_torchrec.data.vectors import read_vectors

    read = read_vectors(vectors, key)
    _write_semantic_ids(screen(), read, vectors, out, codebook, sizes, seed, overwrite)


def _write_semantic_ids(
    console: Console,
    read: ItemVectors,
    whence: Path,
    out: Path,
    saved: Path | None,
    sizes: list[int] | None,
    seed: int,
    overwrite: bool,
) -> None:
    """Fit a codebook, or take a saved one; write the codes, show how it is used."""
    import numpy as np

    from mtcl_torchrec.data.vectors import same_space, write_codes
    from mtcl_torchrec.text import Codebook, codebook_use, fit_codebook

    book_path = saved or _codebook_beside(out)
    if sizes is None:
        book = Codebook.load(book_path)
        if not same_space(book.encoder, read.encoder):
            raise ConfigError(
                f"{whence}: these vectors are of another encoder than those that {book_path} was fitted on and have "
                "no codes in it; encode the items as the first ones were (of tfidf, --encoder takes the .npz)"
            )
    else:
        _refuse_existing(book_path, overwrite)
        book = replace(fit_codebook(read.vectors, sizes, seed=seed), encoder=read.encoder)
        book.save(book_path)
    found = book.encode(read.vectors)
    about: dict[str, Any] = {"codebook": book.identity, "vectors": dict(read.about)}
    write_codes(out, read.keys, found, book.sizes, key=read.key, about=about)
    lines = codebook_use(book, np.asarray(read.vectors), found, fitted_here=sizes is not None).lines()
    lines.append(f"wrote the codes of {len(read):,} items of {whence} to {out}")
    lines.append(f"for new items: --codebook {book_path}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _said(done: Embedded, out: Path, max_chars: int) -> list[str]:
    """What came of it, and what was done to texts that were not as usual."""
    lines = [f"wrote {done.items:,} vectors of width {done.width} to {out} in {done.seconds:.1f} s"]
    if done.found:
        lines.append(f"{done.found:,} texts were encoded before")
    if done.empty:
        lines.append(f"{done.empty:,} items have no text and no row; the first: {done.first['empty']}")
    if done.unknown:
        lines.append(
            f"{done.unknown:,} items have no row, their text tells nothing; the first: {done.first['unknown']}"
        )
    if done.cut:
        lines.append(f"{done.cut:,} texts were cut at {max_chars:,} characters; the first: {done.first['cut']}")
    if done.cut_tokens:
        lines.append(f"{done.cut_tokens:,} texts have more tokens than the model reads; see --max-tokens")
    return lines


def _codebook_beside(codes: Path) -> Path:
    return codes.with_suffix(".codebook.npz")


def _columns(text: str) -> list[str]:
    return [column.strip() for column in text.split(",") if column.strip()]


def _sizes(codes: str, levels: int | None) -> list[int]:
    """Codes of each level."""
    try:
        sizes = [int(size) for size in (codes or "64").split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise ConfigError(f"--codes takes a number, or one for each level, such as 256,64,64, not {codes!r}")
    if len(sizes) == 1:
        return sizes * (levels or 3)
    if levels not in (None, len(sizes)):
        raise ConfigError(f"--levels {levels} and --codes {codes}: {len(sizes)} levels")
    return sizes


def _refuse_existing(path: Path, overwrite: bool) -> None:
    """Also where it could not be written: to say so after hours of encoding would be late."""
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists already; --overwrite replaces it")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}")


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
