"""What a page is made of: an answer to each question, and sections of sentences, pictures and tables."""

from __future__ import annotations

from dataclasses import dataclass, field

from mtcl_torchrec.report.studio import Picture
from mtcl_torchrec.report.tables import Table
from mtcl_torchrec.report.verdict import Answer

TERMS = [  # of the page's glossary, before the measures
    ("task", "what is predicted of a row: whether an event happens, which class, or a number"),
    ("head", "the part of the network that predicts one task; an event's own head ranks by that prediction alone"),
    ("fused score", "one number in [0, 1] made of all heads' predictions, by which rows are ranked"),
    ("request", "rows that are ranked against each other: of a request, or else of a user"),
    (
        "popularity",
        "the share of an item's training rows in which the event happened, smoothed; of several events, fused",
    ),
    ("twin", "the same network, trained on one task alone"),
    ("expert, gate", "a part of the network that tasks share, and what decides how much of each a task takes"),
]


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
        worth, worth_note: what the fused score is worth, in a line, and what that counts; empty where it is not known.
        glossary: label and explanation of each measure on the page.
    """

    title: str
    subtitle: str
    answers: list[Answer]
    sections: list[Section]
    notes: list[str]
    worth: str = ""
    worth_note: str = ""
    glossary: list[tuple[str, str]] = field(default_factory=list)
