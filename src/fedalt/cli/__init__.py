"""The command ``fedalt``. The only room that prints."""

from __future__ import annotations

import errno
import sys


def main() -> None:
    """Entry point: 0 done, 2 the user's input is wrong, 1 anything else."""
    import click

    from fedalt.cli.app import app
    from fedalt.cli.command import usage_line
    from fedalt.cli.show import complain
    from fedalt.errors import UserError, shortened
    from fedalt.runtime import keep_freed_memory, keep_libraries_quiet

    keep_libraries_quiet()
    keep_freed_memory()
    try:
        code = app(prog_name="fedalt", standalone_mode=False)
    except (UserError, click.UsageError) as error:
        complain(usage_line(error) if isinstance(error, click.UsageError) else str(error))
        sys.exit(2)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        complain(f"{shortened(str(error.filename))}: too long for the name of a file or folder")
        sys.exit(2)
    except click.Abort:
        sys.exit(1)
    if code:
        sys.exit(code)
