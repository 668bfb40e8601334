"""A run as a page that a person reads: verdict, pictures, tables, in one HTML file."""

from mtcl_torchrec.report.compare import Compared, compare_html, from_differences
from mtcl_torchrec.report.page import write_report

__all__ = ["Compared", "compare_html", "from_differences", "write_report"]
