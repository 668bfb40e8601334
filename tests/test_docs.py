"""What documents name exists: files, anchors, modules, scripts, commands and their options."""

import importlib
import re
from pathlib import Path

import pytest
import typer
from test_rooms import ORDER

from mtcl_torchrec.cli.commands import app

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/NOTES.md")
COMMANDS = {
    name: {option for p in command.params for option in (*p.opts, *p.secondary_opts)} | {"--help"}
    for name, command in typer.main.get_command(app).commands.items()
}


@pytest.fixture(params=DOCUMENTS)
def document(request):
    path = ROOT / request.param
    return path, path.read_text(encoding="utf-8")


def is_there(dotted):
    """Whether a module, or what a module holds, can be imported by this name."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def anchors(text):
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere(document):
    path, text = document
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("http://", "https://")):
            file, _, anchor = link.partition("#")
            to = path.parent / file if file else path
            assert to.exists(), link
            assert not anchor or anchor in anchors(to.read_text(encoding="utf-8")), link


def test_files_and_names_of_the_package_exist(document):
    _, text = document
    for code in re.findall(r"`([^`\n]+)`", text):
        code = re.sub(r"--(?:out|json|picture)[ =]\S+", "", code)  # which the command writes
        for file in re.findall(r"(?<![\w/])(?:mtcl_torchrec|benchmarks|tests|packaging)/[\w./-]*\w", code):
            assert (ROOT / file).exists(), file
        for name in re.findall(r"(?<![\w/.])mtcl_torchrec(?:\.\w+)+", code):
            assert is_there(name), name


def test_the_map_of_the_code_names_what_there_is():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = "|".join(ORDER)
    names = re.findall(rf"`((?:{rooms})(?:\.\w+)+)`", text)
    assert len(names) > 40
    assert [name for name in names if name != "models.py" and not is_there(f"mtcl_torchrec.{name}")] == []
    files = re.findall(rf"`((?:{rooms})/[\w/]*(?:\.py)?)`", text)
    assert [file for file in files if not (ROOT / "mtcl_torchrec" / file).exists()] == []
    assert [room for room in ORDER if f"| `{room}/`" not in text and f"| `{room}.py`" not in text] == []


def test_commands_and_their_options_exist(document):
    path, text = document
    text = re.sub(r"\\\n\s*", "", text)
    for name, rest in re.findall(r"(?<![\w/.])(?:mtcl|-m mtcl_torchrec) ([a-z][a-z-]*)([^`\n#|]*)", text):
        assert name in COMMANDS, f"mtcl {name}"
        given = set(re.findall(r"(?<![\w-])(--[a-z][\w-]*|-[a-z])(?![\w-])", rest))
        assert given <= COMMANDS[name], f"mtcl {name}{rest}"
    scripts = {file: file.read_text(encoding="utf-8") for file in (ROOT / "benchmarks").glob("*.py")}
    anywhere = set.union(*COMMANDS.values()) | set(re.findall(r'"(--[\w-]+)"', "".join(scripts.values())))
    for file, rest in re.findall(r"python ((?:benchmarks/)?\w+\.py)([^`\n]*)", text):
        known = scripts.get(ROOT / file)
        assert known is not None or (path.parent / file).exists(), file
        for option in re.findall(r"(?<![\w-])(--[a-z][\w-]*)", rest):
            assert option in anywhere, f"{file} {option}"
    for line in re.findall(r"`([^`\n]+)`", text):
        if line.startswith("--"):
            assert line.split()[0].rstrip(",;") in anywhere, line
