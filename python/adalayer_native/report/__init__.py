"""Tables of plans and results, what a run records, and the report of a run."""

from typing import TYPE_CHECKING

from .._lazy import lazy

if TYPE_CHECKING:
    from .columns import run_table
    from .html import page, write_page
    from .record import class_rows, compiled, record
    from .run import COMPARISON, Run, load_run
    from .tables import Result, comparison_table, error_table, figure6_table

__all__ = [
    "COMPARISON",
    "Result",
    "Run",
    "class_rows",
    "comparison_table",
    "compiled",
    "error_table",
    "figure6_table",
    "load_run",
    "page",
    "record",
    "run_table",
    "write_page",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "columns": ["run_table"],
        "html": ["page", "write_page"],
        "record": ["class_rows", "compiled", "record"],
        "run": ["COMPARISON", "Run", "load_run"],
        "tables": ["Result", "comparison_table", "error_table", "figure6_table"],
    },
)
