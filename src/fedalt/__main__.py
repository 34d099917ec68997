"""``python -m fedalt`` is the command ``fedalt``."""

from fedalt.cli import main

main()
