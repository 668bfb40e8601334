"""Vectors of texts that were encoded before, on disk: by what the text is and what the encoder is."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import numpy as np

from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.text.encoders import Encoder, checked_vectors

ABOUT = "about.json"
_DIGEST = 16
_STALE_SECONDS = 3600


class CachedEncoder:
    """An encoder that encodes each text once, also over several processes one after the other or at once.

    Each call writes one file with the texts that were new; it appears under its name when it is whole, so after a kill
    everything up to the last call is there.  Memory: 16 bytes and an index entry for each text; vectors stay on disk.

    Args:
        encoder: any.
        folder: of the cache; each encoder has a folder of its own in it.
        identity: differs wherever the vectors would; the default is `encoder.identity`.

    Attributes:
        found, encoded: how many texts had their vectors when the cache was opened, and how many went to the encoder;
            a text that comes again is in neither.

    Raises:
        ConfigError: the encoder has no identity.
    """

    def __init__(self, encoder: Encoder, folder: Path, identity: str | None = None) -> None:
        identity = identity if identity is not None else getattr(encoder, "identity", None)
        if not identity:
            raise ConfigError(
                "a cache needs the encoder's identity: give CachedEncoder(..., identity=NAME AND VERSION)"
            )
        self.encoder = encoder
        self.identity = identity
        self.found = self.encoded = 0
        self.folder = folder / blake2b(identity.encode(), digest_size=12).hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._parts: list[np.ndarray] = []
        self._index: dict[bytes, tuple[int, int]] = {}
        self._width: int | None = None
        about = self.folder / ABOUT
        if not about.exists():
            _write_whole(about, json.dumps({"identity": identity}).encode())
        for path in sorted(self.folder.iterdir()):
            if path.suffix == ".npy":
                self._open(path)
            elif path.suffix == ".writing":
                with suppress(FileNotFoundError):  # another process has just finished it
                    if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                        path.unlink()  # of a process that was killed

        self._parts_before = len(self._parts)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def cut(self) -> int:
        """As of the encoder."""
        return int(getattr(self.encoder, "cut", 0))

    def __call__(self, texts: list[str]) -> np.ndarray:
        """(n, d) float32.

        Raises:
            DataError: the encoder gave no finite (n, d); nothing of it is kept.
        """
        digests = [blake2b(text.encode(), digest_size=_DIGEST).digest() for text in texts]
        new = {d: text for d, text in zip(digests, texts, strict=True) if d not in self._index}
        if new:
            vectors = checked_vectors(self.encoder(list(new.values())), list(new.values()), self._width)
            self._keep(list(new), vectors)
        elif not texts and self._width is None:
            return checked_vectors(self.encoder([]), [])
        self.encoded += len(new)
        out = np.empty((len(texts), self._width or 0), np.float32)
        for row, digest in enumerate(digests):
            part, at = self._index[digest]
            self.found += part < self._parts_before
            out[row] = self._parts[part]["vector"][at]
        return out

    def _keep(self, digests: list[bytes], vectors: np.ndarray) -> None:
        kind = np.dtype([("digest", f"V{_DIGEST}"), ("vector", "<f4", (vectors.shape[1],))])
        rows = np.empty(len(digests), kind)
        rows["digest"] = np.frombuffer(b"".join(digests), f"V{_DIGEST}")
        rows["vector"] = vectors
        path = self.folder / f"{blake2b(b''.join(digests), digest_size=12).hexdigest()}.npy"
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.writing")
        with unfinished.open("wb") as file:
            np.save(file, rows, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        self._open(path)

    def _open(self, path: Path) -> None:
        """Take a file in; one that is broken is taken away: its texts are encoded again."""
        try:
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
            digests, width = rows["digest"], rows["vector"].shape[1]
            whole = digests.dtype == f"V{_DIGEST}" and rows["vector"].dtype == np.dtype("<f4")
        except FileNotFoundError:
            return  # another process took it away
        except (OSError, ValueError, IndexError, EOFError):
            whole, width = False, 0
        if not whole or self._width not in (None, width):
            path.unlink(missing_ok=True)
            return
        self._width = width
        self._index.update((digest.tobytes(), (len(self._parts), row)) for row, digest in enumerate(digests))
        self._parts.append(rows)


def _write_whole(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.writing")
    unfinished.write_bytes(content)
    unfinished.replace(path)
