"""Tables of plans and results, what a run records, and the report of a run."""

from .columns import run_table
from .html import page, write_page
from .record import class_rows, record
from .run import Run, load_run
from .tables import Result, comparison_table, error_table, figure6_table

__all__ = [
    "Result",
    "Run",
    "class_rows",
    "comparison_table",
    "error_table",
    "figure6_table",
    "load_run",
    "page",
    "record",
    "run_table",
    "write_page",
]
