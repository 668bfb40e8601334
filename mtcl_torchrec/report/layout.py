"""What a page is made of: an answer to each question, and sections of sentences, pictures and tables."""

from __future__ import annotations

from dataclasses import dataclass, field

from mtcl_torchrec.report.studio import Picture
from mtcl_torchrec.report.tables import Table
from mtcl_torchrec.report.verdict import Answer


@dataclass
class Section:
    """A part of the page.

    Args:
        key: its anchor.
        title: its heading.
        text: sentences before the rest.
        pictures, tables: what it shows.
        missing: what it would show, and how to get it.
        code: shown folded, such as the run's YAML.
    """

    key: str
    title: str
    text: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    code: str = ""


@dataclass
class Report:
    """A page.

    Args:
        title: of the run.
        subtitle: what was judged.
        answers: the verdict.
        sections: in the order of the page.
        notes: what is missing altogether.
        worth: what the fused score is worth, in a line; empty where that is not known.
        glossary: label and explanation of each measure on the page.
    """

    title: str
    subtitle: str
    answers: list[Answer]
    sections: list[Section]
    notes: list[str]
    worth: str = ""
    glossary: list[tuple[str, str]] = field(default_factory=list)
