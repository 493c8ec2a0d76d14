"""The two papers' experiments, repeated on real measurements."""

from typing import TYPE_CHECKING

from .._lazy import lazy

if TYPE_CHECKING:
    from .adalayernet import AdalayernetSettings, run_adalayernet
    from .folder import load_study
    from .green import GreenSettings, run_green
    from .text import section, write_report

__all__ = [
    "AdalayernetSettings",
    "GreenSettings",
    "load_study",
    "run_adalayernet",
    "run_green",
    "section",
    "write_report",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "adalayernet": ["AdalayernetSettings", "run_adalayernet"],
        "green": ["GreenSettings", "run_green"],
        "folder": ["load_study"],
        "text": ["section", "write_report"],
    },
)
