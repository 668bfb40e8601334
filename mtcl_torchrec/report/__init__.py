"""A run as a page that a person reads: verdict, pictures, tables, in one HTML file."""

from mtcl_torchrec.report.compare import Compared, compare_html, from_differences
from mtcl_torchrec.report.page import do_tasks_help_in, write_report
from mtcl_torchrec.report.verdict import Answer

__all__ = ["Answer", "Compared", "compare_html", "do_tasks_help_in", "from_differences", "write_report"]
