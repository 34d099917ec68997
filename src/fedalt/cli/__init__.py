"""The command ``fedalt``. The only room that prints."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point: 0 done, 2 the user's input is wrong, 1 anything else."""
    from fedalt.allocator import keep_freed_memory
    from fedalt.cli.app import app
    from fedalt.cli.show import complain
    from fedalt.errors import UserError
    from fedalt.quiet import keep_libraries_quiet

    keep_libraries_quiet()
    keep_freed_memory()
    try:
        app()
    except UserError as error:
        complain(str(error))
        sys.exit(2)
