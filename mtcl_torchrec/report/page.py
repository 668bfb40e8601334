"""One HTML file without anything from elsewhere: `mtcl report`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtcl_torchrec.report.contents import read_contents
from mtcl_torchrec.report.knowable import RULE as KNOWABLE
from mtcl_torchrec.report.sections import build_report, sharing_answer
from mtcl_torchrec.report.studio import DARK, LIGHT, Studio
from mtcl_torchrec.report.verdict import RULES, Answer
from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.training.directory import replace_file

REPORT = "report.html"
_TEMPLATES = Path(__file__).parent / "templates"
TONES = {"good": "●", "mixed": "◐", "bad": "○", "unknown": "?"}  # beside the colour


def render(template: str, **values: Any) -> str:
    """A page of a template in ``templates/``; whatever text is put in is escaped.

    Raises:
        ConfigError: Jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise ConfigError("a report needs Jinja2: pip install 'mtcl_torchrec[plots]'") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(template).render(light=LIGHT, dark=DARK, tones=TONES, **values)


def write_report(
    run_dir: str | Path, out: str | Path | None = None, *, png: str | Path | None = None,
    baselines: str | Path | None = None, say: Callable[[str], None] = lambda doing: None,
) -> Path:  # fmt: skip
    """Write a run's report.

    Args:
        run_dir: what `train_run` wrote; it may be unfinished, or lack any part.
        out: the file; ``report.html`` in the run directory by default.
        png: a folder into which the pictures also go, as PNGs.
        baselines: where ``baselines.json`` is, if not in the run directory.
        say: is told what is being done.

    Returns:
        The file.  It is the same for the same run.

    Raises:
        ConfigError: matplotlib or Jinja2 is not installed.
        DataError: the folder holds no run, or a damaged one.
    """
    run_dir = Path(run_dir)
    studio = Studio(None if png is None else Path(png), say)
    say(f"reading {run_dir}")
    run = read_contents(run_dir, baselines=None if baselines is None else Path(baselines))
    rules = [*RULES, *([KNOWABLE] if run.evaluation.get("knowable") else [])]
    page = render("report.html", report=build_report(run, studio, say), rules=rules)
    path = run_dir / REPORT if out is None else Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, page)
    return path


def do_tasks_help_in(run_dir: str | Path) -> Answer:
    """What the report of a run says of whether its tasks help each other, without drawing anything.

    Raises:
        DataError: the folder holds no run, or a damaged one.
    """
    return sharing_answer(read_contents(run_dir))
