"""``adalayer`` and ``python -m adalayer_native``."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """The command line; Ctrl-C is one line also while it is still being loaded."""
    try:
        from adalayer_native import cli
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
