"""The two papers' experiments, repeated on real measurements."""

from .adalayernet import AdalayernetSettings, run_adalayernet
from .green import GreenSettings, run_green
from .store import load_study
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
