"""Names of a package that are imported at first use, so that a mistake is answered before torch is loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

TORCH = ("torch", "torchrec", "fbgemm_gpu")
_NEEDED = (
    "mtcl_torchrec is a plugin to TorchRec and needs torch, torchrec and FBGEMM builds that match each other "
    "(torch 2.13 with torchrec 1.8 and FBGEMM 1.8; torch 2.11 with 1.6).  On this machine they do not import: "
)


def lazily(package: str, homes: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package (PEP 562) whose names live in its modules.

    Args:
        package: its ``__name__``.
        homes: module -> names that the package offers of it.

    Raises:
        ImportError: of a name, where torch, TorchRec or FBGEMM cannot be imported; it says which belong together.

    Example:
        >>> get, names = lazily("mtcl_torchrec", {"mtcl_torchrec.schema": ["Task"]})
        >>> get("Task").binary("click").kind, names()
        ('binary', ['Task'])
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            found = getattr(import_module(home_of[name]), name)
        except ImportError as error:
            raise explained(error) from error
        setattr(sys.modules[package], name, found)  # the next time it is an ordinary attribute
        return found

    return get, lambda: sorted(home_of)


def explained(error: ImportError) -> ImportError:
    """The error of an import; where it is torch's, TorchRec's or FBGEMM's, with what they need.

    Example:
        >>> str(explained(ImportError("no libfbgemm.so", name="fbgemm_gpu")))[-51:]
        'On this machine they do not import: no libfbgemm.so'
    """
    whose = (error.name or "").partition(".")[0]
    return ImportError(f"{_NEEDED}{error}", name=error.name) if whose in TORCH else error
