"""A folder imports only from folders before it, so that a newcomer can read them one after the other."""

import ast
from pathlib import Path

import mtcl_torchrec

ORDER = (
    "schema", "config", "data", "text", "modules", "models", "evaluation", "fusing", "training",
    "baselines", "report", "serving", "cli",
)  # fmt: skip


def imported(path):
    """Our own modules that a file names anywhere, also inside of functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_go_one_way():
    root = Path(mtcl_torchrec.__file__).parent
    found = {}
    for path in root.rglob("*.py"):
        room = path.relative_to(root).parts[0].removesuffix(".py")
        if room in ORDER:
            names = [name.split(".")[1] for name in imported(path) if name.startswith("mtcl_torchrec.")]
            found[str(path)] = [n for n in names if n in ORDER and ORDER.index(n) > ORDER.index(room)]
    assert len(found) > 100
    assert {path: names for path, names in found.items() if names} == {}
    folders = {p.name for p in root.iterdir() if (p / "__init__.py").is_file()}
    assert folders <= set(ORDER)
