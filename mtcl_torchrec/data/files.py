"""Whether a run's files are still the same ones."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

from mtcl_torchrec.config import RunConfig
from mtcl_torchrec.data.source import find_files
from mtcl_torchrec.schema import DataError

SPLITS = ("train", "val", "test", "log")
_WHOLE = 2**30  # bytes up to which a file is read, in a second or two
_EDGE = 65_536  # of each end of a larger one; the footer of Parquet, at its end, has the extremes of all columns


def files_fingerprint(run: RunConfig) -> str:
    """Equal for the same files of data, vectors and codes, wherever they stand: by their names and contents.

    Of a file above a gigabyte, its size, both ends and the time of its last change stand for the contents.

    Raises:
        DataError: a file is missing.
    """
    digest = sha256()
    named = [getattr(run.data, split) or [] for split in SPLITS]
    paths = [path for paths in named for path in find_files(paths)]
    for feature in run.data_schema.features:
        paths += [Path(path) for path in (feature.vectors, feature.codes) if path is not None]
    for path in paths:
        try:
            about = path.stat()
            large = about.st_size > _WHOLE
            digest.update(repr((path.name, about.st_size, about.st_mtime_ns if large else 0)).encode())
            with path.open("rb") as file:
                if large:
                    digest.update(file.read(_EDGE))
                    file.seek(about.st_size - _EDGE)
                while part := file.read(2**20):
                    digest.update(part)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error})") from None
    return digest.hexdigest()[:16]


def without_paths(run: dict[str, Any]) -> dict[str, Any]:
    """A run as plain data without where its files are, in place: what they hold counts, see `files_fingerprint`.

    Example:
        >>> without_paths({"data": {"log": ["../events.parquet"], "val_fraction": 0.1}})
        {'data': {'val_fraction': 0.1}}
    """
    for split in SPLITS:
        run["data"].pop(split, None)
    for feature in run.get("schema", {}).get("features", ()):
        for kind in ("vectors", "codes"):
            if feature.get(kind) is not None:
                feature[kind] = True
    for block in (*run.get("statistics", ()), *run.get("histories", ())):
        if block.get("prepared") is not None:
            block["prepared"] = True
    return run
