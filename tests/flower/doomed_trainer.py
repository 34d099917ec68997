"""``doomed_trainer.py STATE WHERE HOW``: a site's trainer that dies once, and the one that follows it.

WHERE is ``training``, ``reply``, or a file operation of ``trap.py`` inside STATE.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from fedalt.flower import site, trainer
from trap import Kill, lay_trap


def doom(state: Path, where: str, how: str) -> None:
    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if where == "training":
        site.client_round = die  # type: ignore[assignment]
    elif where == "reply":
        send = trainer._send

        def half(line: socket.socket, header: str, block: bytes) -> None:
            if '"loss"' not in header:
                return send(line, header, block)
            if how == "half":
                line.sendall(trainer._FRAME.pack(len(header.encode()), len(block)) + header.encode()[:20])
            return die()

        trainer._send = half
    else:
        lay_trap(Kill(where, how), state)


def main() -> None:
    state, where, how = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    for doomed in (True, False):
        child = os.fork()
        if not child:
            if doomed:
                doom(state, where, how)
            trainer.main()
        status = os.waitpid(child, 0)[1]
        (state / f"status{doomed:d}").write_text(str(status))


if __name__ == "__main__":
    main()
