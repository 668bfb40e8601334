"""Fill the tables of benchmarks/README.md from what was measured: nothing between their marks is written by hand.

    python benchmarks/tables.py                     # all
    python benchmarks/tables.py --only peers input
    python benchmarks/tables.py --check             # 1 where the file says something else than the results do

Between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->`` go the tables and the picture of ``results/NAME.json``, with
the machine, the versions, the commit, the date and the command.  What the README of the project says of speed comes
from the same results (`headline.py`).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from document import CONSOLE, tables_of
from headline import speed

HERE = Path(__file__).parent
FRONT = HERE.parent / "README.md"
NOT_YET = "Not measured yet."
_MARKED = re.compile(r"(<!-- (?P<name>\w+): begin -->\n)(?P<inside>.*?)(<!-- (?P=name): end -->)", re.S)


def filled(text: str, results: Path, only: list[str] | None = None) -> str:
    """The text with what its marks ask for.

    Args:
        results: folder of ``NAME.json``.
        only: the marks that are filled; None fills all.

    Raises:
        SystemExit: a mark is asked for that is not there.
    """
    names = [match["name"] for match in _MARKED.finditer(text)]
    for name in only or ():
        if name not in names:
            raise SystemExit(f"no table {name!r} to fill; there are {', '.join(names)}")

    def fill(match: re.Match[str]) -> str:
        if only and match["name"] not in only:
            return match[0]
        inside = speed(results) if match["name"] == "speed" else section(results / f"{match['name']}.json")
        return f"{match[1]}{inside}\n{match[4]}"

    return _MARKED.sub(fill, text)


def section(path: Path) -> str:
    """A benchmark's tables, picture and origin as Markdown."""
    if not path.exists():
        return NOT_YET
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise SystemExit(f"{path} is no JSON ({error}); make it anew with --show {path.stem}.jsonl") from None
    if not document["results"]:
        return NOT_YET
    parts = [table.markdown() for table in tables_of(document)]
    if document["picture"] and (path.parent / document["picture"]).exists():
        parts.append(f"![{document['benchmark']}]({path.parent.name}/{document['picture']})")
    incomplete = " Incomplete: some of it has failed." if document["complete"] is False else ""
    commands = ", ".join(f"`{command}`" for command in document.get("commands") or [document["about"]["command"]])
    parts.append(f"{commands}: {document['measured']}.{incomplete}")
    return "\n\n".join(parts)


def main() -> int:
    """Fill, or say what is stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these tables alone")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 where it is not what results say")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md", help="(%(default)s)")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="(%(default)s)")
    given = parser.parse_args()
    readmes = [given.readme, *([FRONT] if given.readme == HERE / "README.md" and not given.only else [])]
    return max(_brought_up_to_date(readme, given.results, given.only, check=given.check) for readme in readmes)


def _brought_up_to_date(readme: Path, results: Path, only: list[str] | None, *, check: bool) -> int:
    before = readme.read_text(encoding="utf-8")
    after = filled(before, results, only)
    if after == before:
        CONSOLE.print(f"{readme} says what the results do")
        return 0
    if check:
        stale = [
            old["name"] for old, new in zip(_MARKED.finditer(before), _MARKED.finditer(after), strict=True)
            if old["inside"] != new["inside"]
        ]  # fmt: skip
        CONSOLE.print(f"{readme} is stale: {', '.join(stale)}; fill it with: python benchmarks/tables.py")
        return 1
    readme.write_text(after, encoding="utf-8")
    CONSOLE.print(f"filled {readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
