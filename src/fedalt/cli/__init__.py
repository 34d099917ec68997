"""The command ``fedalt``. The only room that prints."""

from __future__ import annotations

import errno
import sys

_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "could not create a primitive")


def main() -> None:
    """Entry point: 0 done, 2 the user's input is wrong, 1 anything else."""
    import click

    from fedalt.cli.app import app
    from fedalt.cli.flags import usage_line
    from fedalt.cli.show import complain
    from fedalt.errors import UserError
    from fedalt.runtime import keep_freed_memory, keep_libraries_quiet

    keep_libraries_quiet()
    keep_freed_memory()
    try:
        code = app(prog_name="fedalt", standalone_mode=False)
    except (UserError, click.UsageError) as error:
        complain(usage_line(error) if isinstance(error, click.UsageError) else str(error))
        sys.exit(2)
    except (OSError, MemoryError, RuntimeError, ValueError) as error:
        line = _of_the_machine(error)
        if line is None:
            raise
        complain(line)
        sys.exit(2)
    except click.Abort:
        sys.exit(1)
    if code:
        sys.exit(code)


def _of_the_machine(error: Exception) -> str | None:
    """What an error says that comes of the size of what was asked for, or of a name that no file can have."""
    from fedalt.errors import shortened

    text = str(error)
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"{shortened(str(error.filename))}: too long for the name of a file or folder"
    if isinstance(error, ValueError) and "null byte" in text:
        return "the name of a file or folder holds a NUL, which no name can"
    if isinstance(error, MemoryError) or any(words in text.lower() for words in _NO_MEMORY):
        return (
            "too little memory; less is needed with a smaller training.batch_size, data.cutoff or lora.r, "
            f"or federation.cohort=1 ({shortened(text) or 'MemoryError'})"
        )
    return None
