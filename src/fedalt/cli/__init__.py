"""The command ``fedalt``. The only room that prints."""

from __future__ import annotations

import errno
import signal
import sys
import threading
from types import FrameType

_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "could not create a primitive")


def main() -> None:
    """Entry point: 0 done, 2 the user's input is wrong, 1 anything else, 128 + N stopped by signal N."""
    import click

    from fedalt.cli.app import app
    from fedalt.cli.flags import usage_line
    from fedalt.cli.show import complain
    from fedalt.errors import LeftError, UserError
    from fedalt.runtime import keep_freed_memory, keep_libraries_quiet

    keep_libraries_quiet()
    keep_freed_memory()
    if threading.current_thread() is threading.main_thread():
        for number in _NAMES:
            if signal.getsignal(number) != signal.SIG_IGN:  # as of a job in the background
                signal.signal(number, _stop)
    left = ""
    try:
        code = app(prog_name="fedalt", standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:  # libraries in C may make another error of an interrupt
        left = str(error) if isinstance(error, LeftError) else ""
        if not _asked:
            if isinstance(error, click.Abort):
                sys.exit(1)
            if isinstance(error, click.UsageError):
                line: str | None = usage_line(error)
            else:
                line = str(error) if isinstance(error, UserError) else _of_the_machine(error)
            if line is None:
                raise
            complain(line)
            sys.exit(2)
    if _asked:
        starts = sys.argv[1:2] in (["run"], ["compare"])
        safe = "finished rounds are safe, --resume goes on from there" if starts else "nothing is left half written"
        complain(f"stopped by {_NAMES[_asked[0]]}; {left or safe}")
        sys.exit(128 + _asked[0])
    if code:
        sys.exit(code)


_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_asked: list[signal.Signals] = []


class _Stop(KeyboardInterrupt):
    """Not the class itself: where one went through ``exec``, Python ends as if nobody had caught it."""


def _stop(number: int, frame: FrameType | None) -> None:
    _asked.append(signal.Signals(number))
    raise _Stop


def _of_the_machine(error: BaseException) -> str | None:
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
