"""``python bound.py SIGNAL PARENT PROGRAM …`` becomes a program that gets the signal when its parent dies (Linux).

A file of its own that is run as it is, because nothing but an exec is safe between fork and exec of a threaded process.
"""

import ctypes
import os
import sys

_SET_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG."""


def main() -> None:
    """Bind this process to its parent, and become the program."""
    number, parent, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, int(number))
    if os.getppid() != int(parent):  # it died before
        sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
