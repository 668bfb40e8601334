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


def test_what_a_package_offers_is_said_alike_to_readers_to_python_and_to_type_checkers():
    """Where each name is imported from when it is first used, and when a type checker reads it."""
    root, found = Path(mtcl_torchrec.__file__).parent, 0
    for path in root.rglob("__init__.py"):
        tree = ast.parse(path.read_text())
        given = {
            target.id: ast.literal_eval(node.value)
            for node in tree.body if isinstance(node, ast.Assign) for target in node.targets
            if isinstance(target, ast.Name) and target.id in ("__all__", "_HOMES")
        }  # fmt: skip
        if "_HOMES" in given:
            checked = next(node for node in tree.body if isinstance(node, ast.If))
            homes = {part.module: sorted(alias.name for alias in part.names) for part in checked.body}
            assert homes == {module: sorted(names) for module, names in given["_HOMES"].items()}, path
            assert sorted(given["__all__"]) == sorted(name for names in homes.values() for name in names), path
            found += 1
    assert found


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
