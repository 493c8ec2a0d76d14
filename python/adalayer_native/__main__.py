"""``python -m adalayer_native``: the command line."""

from adalayer_native.cli import main

main()
