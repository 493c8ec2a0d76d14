"""Every error that this package raises on purpose.

All of them derive from :class:`AdaError`, so that ``except AdaError`` catches whatever the
package refuses, and from ``ValueError`` (a missing extra: from ``ImportError``, a cluster that does
not come up: from ``RuntimeError``), so that code which does not know the package still behaves as
it would with any other wrong value. Messages name the layer, tensor or file, what was expected and
what came instead.
"""

from __future__ import annotations

__all__ = [
    "AdaError",
    "BudgetError",
    "CalibrationError",
    "ClusterError",
    "DataError",
    "DeviceError",
    "EnergyError",
    "FileFormatError",
    "InputError",
    "MissingExtraError",
    "PlanError",
    "UnsupportedModelError",
]


class AdaError(Exception):
    """Base of all errors that this package raises on purpose."""


class BudgetError(AdaError, ValueError):
    """A budget that is ill-formed, or that no plan can meet."""


class UnsupportedModelError(AdaError, ValueError):
    """A model, or a part of one, that the package cannot analyse, trace or convert."""


class CalibrationError(AdaError, ValueError):
    """Calibration data that cannot be used: an empty loader, NaN, infinity, wrong shape."""


class ClusterError(AdaError, RuntimeError):
    """Ray cannot be started on this machine, or the cluster that was named cannot be joined."""


class DataError(AdaError, ValueError):
    """A dataset that cannot be read: missing directory, unreadable or oversized image."""


class DeviceError(AdaError, ValueError):
    """A GPU that is missing or cannot run the kernels, or a build that has none for it."""


class EnergyError(AdaError, ValueError):
    """Energy that cannot be metered: an unknown country, or a meter that gives nothing."""


class FileFormatError(AdaError, ValueError):
    """A file that is missing, corrupt, or does not hold what its reader expects."""


class InputError(AdaError, ValueError):
    """A tensor that a compiled engine cannot take: wrong number, type, shape, device or size."""


class MissingExtraError(AdaError, ImportError):
    """A package of an optional extra is not installed; the message names the extra."""


class PlanError(AdaError, ValueError):
    """A plan that names an unknown layer or holds a value out of range."""
