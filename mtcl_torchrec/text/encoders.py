"""What an encoder is, and the encoder of a name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mtcl_torchrec.schema import ConfigError, DataError, nearest

Encoder = Callable[[list[str]], Any]
"""From n texts to an (n, d) float array.

It may have the attributes ``identity`` (a str that differs wherever the vectors would; a cache needs it) and ``cut``
(how many texts it has read only the beginning of).
"""

Pooling = Literal["mean", "last"]
Device = Literal["auto", "cpu", "cuda"]
NAMES = ("tfidf", "wordllama", "minilm")


def open_encoder(
    name: str,
    fit_on: Iterable[str] = (),
    *,
    width: int | None = None,
    analyzer: Literal["word", "char"] | None = None,
    pooling: Pooling | None = None,
    max_tokens: int | None = None,
    device: Device = "auto",
) -> Encoder:
    """The encoder of a name or path.

    Args:
        name: ``"tfidf"`` (fitted here), the path of a fitted one (.npz), ``"wordllama"``, ``"minilm"``, or the folder
            of a language model: one of sentence-transformers, or any of Hugging Face with its weights in safetensors.
        fit_on: texts that ``tfidf`` is fitted on.
        width: d, of ``tfidf`` (128) and ``wordllama`` (256, 128 or 64).
        analyzer: what ``tfidf`` counts, words and pairs of them, or groups of characters.
        pooling: of a folder without a pooling of its own: mean of all tokens, or the last one's (causal models).
        max_tokens: of a text that a language model reads (256).
        device: of a language model.

    Raises:
        ConfigError: there is no such encoder, its package is missing, or it has no such option.
    """
    from mtcl_torchrec.text.language_models import SentenceEncoder, WordLlamaEncoder, open_folder
    from mtcl_torchrec.text.tfidf import HashedTfidf

    path = Path(name)
    if name == "tfidf":
        _refuse(name, pooling=pooling, max_tokens=max_tokens)
        return HashedTfidf.fit(fit_on, width=width or 128, analyzer=analyzer or "word")
    if name == "wordllama":
        _refuse(name, analyzer=analyzer, pooling=pooling, max_tokens=max_tokens)
        return WordLlamaEncoder(width or 256)
    if name == "minilm":
        _refuse(name, analyzer=analyzer, width=width, pooling=pooling)
        return SentenceEncoder.minilm(device=device, max_tokens=max_tokens)
    if path.suffix == ".npz":
        _refuse(f"fitted {name}", analyzer=analyzer, width=width, pooling=pooling, max_tokens=max_tokens)
        return HashedTfidf.load(path)
    if path.is_dir():
        _refuse(f"model {name}", analyzer=analyzer, width=width)
        return open_folder(path, pooling=pooling, max_tokens=max_tokens, device=device)
    raise ConfigError(
        f"no encoder {name!r}{nearest(name, NAMES)}: one of {', '.join(NAMES)}, the .npz of a fitted tfidf, or the "
        f"folder of a language model on this machine (nothing is downloaded)"
    )


def _refuse(name: str, **options: Any) -> None:
    for option, value in options.items():
        if value is not None:
            raise ConfigError(f"encoder {name} has no option {option}")


def checked_vectors(vectors: Any, texts: list[str], width: int | None = None) -> np.ndarray:
    """What an encoder gave for some texts, as (n, d) float32.

    Args:
        width: d of the vectors before these.

    Raises:
        DataError: they are not (n, d), of another width than those before, or not finite.
    """
    array = np.asarray(vectors)
    if array.ndim != 2 or len(array) != len(texts) or not array.shape[1] or array.dtype.kind not in "fiu":
        raise DataError(
            f"an encoder gives numbers ({len(texts)}, d) for {len(texts)} texts, not {array.dtype} {array.shape}"
        )
    if width is not None and array.shape[1] != width:
        raise DataError(f"an encoder gave vectors of width {width}, and then of {array.shape[1]}")
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, dtype=np.float32)
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        text = texts[int(np.argmin(finite))]
        raise DataError(f"the encoder's vector of {text[:60]!r} is not finite")
    return array


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """(n, d) float32: each row at length 1; a row of zeros stays."""
    length = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return (vectors / np.where(length > 0, length, 1.0)).astype(np.float32)
