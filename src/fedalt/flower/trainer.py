"""``python -m fedalt.flower.trainer STATE``: the process of a site that holds the base model between rounds.

It reads STATE/site.json, listens on a Unix socket that STATE/trainer.json names, and answers one request at a time. It
ends when its standard input closes, with the process that started it.

A frame, either way: two unsigned 64-bit numbers, the bytes of the header and of the block, and then both.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from fedalt.errors import UserError
from fedalt.files import read_json, write_json
from fedalt.flower.requests import Reply, Request, SiteError

SITE, TRAINER = "site.json", "trainer.json"
PATIENCE = 120.0
"""Seconds to wait for a trainer that is being started anew, from when the last one was gone."""
WRONG = 2
"""Status with which a trainer ends that cannot begin; its last line says why."""
_FRAME = struct.Struct(">QQ")


def ask(state: Path, request: Request) -> Reply:
    """Ask the trainer of a site; where it dies over it, ask the one that follows."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        got = None
        with suppress(OSError, UserError, EOFError, KeyError), socket.socket(socket.AF_UNIX) as line:
            line.connect(read_json(state / TRAINER)["socket"])
            try:
                _send(line, request.header, request.block)
                got = _receive(line)
            finally:
                until = time.monotonic() + PATIENCE
        if got:
            return Reply.parse(*got)
        time.sleep(0.2)
    raise SiteError("trainer", f"{state}: no trainer answers; is fedalt site running?")


def main() -> NoReturn:
    """Serve until the standard input closes; what is wrong from the beginning is one line and ``WRONG``."""
    from fedalt.runtime import keep_freed_memory, keep_libraries_quiet

    keep_libraries_quiet()
    keep_freed_memory()
    try:
        _run(Path(sys.argv[1]).absolute())
    except UserError as error:
        _say(f"error: {error}")
        os._exit(WRONG)  # a thread waits for the standard input, and Python would wait for the thread


def _run(state: Path) -> NoReturn:
    with suppress(UserError, KeyError):  # what a kill left
        shutil.rmtree(Path(read_json(state / TRAINER)["socket"]).parent, ignore_errors=True)
    folder = _short_folder()
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            path = f"{folder}/trainer.sock"
            listener.bind(path)
            listener.listen()
            write_json(state / TRAINER, {"socket": path, "pid": os.getpid()})
            _serve(listener, site_in(state))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _short_folder() -> str:
    """A socket's path may have no more than 107 bytes."""
    try:
        return tempfile.mkdtemp(prefix="fedalt-")
    except OSError as error:
        raise UserError(f"nothing can be written where temporary files go ({error.strerror})") from None


def site_in(state: Path) -> Any:
    """The site of a state folder, as its ``site.json`` has it."""
    from fedalt.flower.consent import Consent
    from fedalt.flower.own import site_rows
    from fedalt.flower.site import Site
    from fedalt.registry import hold_plugins
    from fedalt.runs.setup import Bases

    said = read_json(state / SITE)
    hold_plugins(said.get("plugins", ()))
    rows = site_rows({name: said.get(name) for name in ("data", "model", "device")} | said.get("own", {}))
    consent = Consent(frozenset(said.get("share", ())), said.get("allow_two", False))
    key = Path(said["key"]) if said.get("key") else None
    return Site(said["client"], state, Bases(), rows, consent, key=key, note=_say)


def _serve(listener: socket.socket, site: Any) -> NoReturn:
    while True:
        line, _ = listener.accept()
        with line, suppress(OSError, EOFError, UserError):  # who asked is gone, and will ask again, or asks nonsense
            reply = _answered(site, Request.parse(*_receive(line)))
            _send(line, reply.header, reply.block)


def _answered(site: Any, request: Request) -> Reply:
    try:
        answered: Reply = site.answer(request)
    except Exception as error:
        traceback.print_exc()
        return Reply.failed(request, site.client, error)
    return answered


def _end_with_parent(folder: str) -> None:
    """A kill -9 of whoever started this process closes its end of the pipe."""
    while sys.stdin.buffer.read(1):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _send(line: socket.socket, header: str, block: bytes) -> None:
    text = header.encode()
    line.sendall(_FRAME.pack(len(text), len(block)) + text)
    if block:  # the other end may have answered and gone when there is nothing more to come
        line.sendall(block)


def _receive(line: socket.socket) -> tuple[str, bytes]:
    header, block = _FRAME.unpack(_exactly(line, _FRAME.size))
    return _exactly(line, header).decode(), _exactly(line, block)


def _exactly(line: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    view, have = memoryview(data), 0
    while have < count:
        got = line.recv_into(view[have:])
        if not got:
            raise EOFError
        have += got
    return bytes(data)


if __name__ == "__main__":
    main()
