"""Tables and pictures of plans and results."""

from .ribbon import ribbon
from .tables import Result, comparison_table, error_table, figure6_table

__all__ = ["Result", "comparison_table", "error_table", "figure6_table", "ribbon"]
