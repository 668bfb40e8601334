"""One file that holds others, with a manifest of their sizes and hashes; nothing is read that does not match it."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from mtcl_torchrec.schema import DataError

MANIFEST = "manifest.json"
MANIFEST_LIMIT = 64 * 2**20  # bytes: it names files and columns, and holds no data
_CHUNK = 2**20


def write_archive(path: Path, folder: Path, about: Mapping[str, Any]) -> str:
    """Put all files of a folder into one, uncompressed ZIP; a file that stands at `path` is replaced at the end, whole.

    Args:
        path: of the new file.
        folder: what it will hold.
        about: the rest of the manifest, JSON.

    Returns:
        SHA-256 of the new file, in hex.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    members = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files
    }
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(MANIFEST, json.dumps({**about, "members": members}, indent=1))
            for name in members:
                archive.write(folder / name, name)
        digest = _sha256(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return digest


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest alone; nothing else of the file is looked at.

    Raises:
        DataError: no such file, or none of this kind.
    """
    return _opened(path, lambda archive: _manifest(path, archive))


def extract(path: Path, target: Path, *, sha256: str | None = None) -> dict[str, Any]:
    """Unpack a file into an empty folder after comparing all its members with its manifest.

    Args:
        sha256: of the whole file, as `write_archive` returned it; the manifest can only tell damage, this can tell that
            the file is the one that was made.

    Returns:
        The manifest.

    Raises:
        DataError: a member is missing, is too many, or does not match, or the file is not the one of `sha256`.
    """
    if sha256 is not None and path.is_file() and _sha256(path) != sha256.lower():
        raise DataError(f"{path}: its SHA-256 is not {sha256}: it is another file, or was changed")

    def unpack(archive: zipfile.ZipFile) -> dict[str, Any]:
        check_sizes(archive)
        manifest = _manifest(path, archive)
        members = manifest["members"]
        there = [name for name in archive.namelist() if name != MANIFEST]
        if sorted(there) != sorted(members):
            odd = sorted(set(there) ^ set(members)) or sorted(name for name in there if there.count(name) > 1)
            raise DataError(f"{path}: {odd[0]!r} is in the file or in its manifest alone, or twice")
        for name, expected in members.items():
            _extract_member(path, archive, name, expected, target)
        return manifest

    return _opened(path, unpack)


def check_sizes(archive: zipfile.ZipFile) -> None:
    """See that members are stored as they are, and are together no larger than the file.

    Raises:
        ValueError: a few bytes would become many.
    """
    members = archive.infolist()
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{member.filename!r} is compressed")
    assert archive.fp is not None
    if sum(member.file_size for member in members) > archive.fp.seek(0, os.SEEK_END):
        raise ValueError("its members say to be larger than the file")


def _extract_member(path: Path, archive: zipfile.ZipFile, name: str, expected: Mapping[str, Any], target: Path) -> None:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name or ":" in name or str(parts) != name:
        raise DataError(f"{path}: {name!r} is no name of a member")
    if archive.getinfo(name).file_size != expected["bytes"]:
        raise DataError(f"{path}: {name} has {archive.getinfo(name).file_size} bytes instead of {expected['bytes']}")
    file = target / parts
    file.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with archive.open(name) as source, file.open("wb") as copy:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            copy.write(chunk)
    if digest.hexdigest() != expected["sha256"]:
        raise DataError(f"{path}: {name} does not match the SHA-256 in the manifest: the file is damaged")


def _opened(path: Path, read: Callable[[zipfile.ZipFile], dict[str, Any]]) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            return read(archive)
    except DataError:
        raise
    except (zipfile.BadZipFile, EOFError, LookupError, TypeError, ValueError, AttributeError, RuntimeError,
            FileExistsError, NotADirectoryError, IsADirectoryError, struct.error) as error:  # fmt: skip
        raise DataError(f"{path}: no exported model, or a damaged one ({error})") from None


def _manifest(path: Path, archive: zipfile.ZipFile) -> dict[str, Any]:
    if MANIFEST not in archive.namelist():
        raise DataError(f"{path}: no exported model ({MANIFEST} is missing)")
    if archive.getinfo(MANIFEST).file_size > MANIFEST_LIMIT:
        raise DataError(f"{path}: its manifest is larger than {MANIFEST_LIMIT >> 20} MiB")
    manifest: dict[str, Any] = json.loads(archive.read(MANIFEST))
    if not isinstance(manifest, dict) or not isinstance(manifest.get("members"), dict):
        raise DataError(f"{path}: its manifest names no members")
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
