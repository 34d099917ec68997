"""Flower's log, shortened to what somebody who watches it wants to know."""

from __future__ import annotations

import re

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_FRAME = re.compile(r"[╭╮╰╯│─]+( Error)?")
_LEVEL = re.compile(r"^(?:\S+Z )?(INFO|WARNING|ERROR|DEBUG) ?:? *(?:\[uvicorn\.\w+\] )?")
_LONG = re.compile(r" \(ID: [0-9a-f]+\)|^\[/v1[^]]*\]\[ApiError:\d+\] | with public key: b'[^']*'")
_NOISE = re.compile(
    r'^$|"(GET|POST) /|^(Started|Finished) server process|[Aa]pplication (startup|shutdown)|^FastAPI lifespan'
    r"|^SuperLinkLifespan|^\[RUN \d+(, ROUND \S+)?\]|^Sending: "
    r"|^Shutting down|^(Received|Sent) successfully|^ControlServicer|^\[Fleet\.(GetRun|GetFab|PushMessages|PushObject)"
    r"|^Start(ing)? (`flwr-\w+` process|Flower SuperExec|logstream)|^Exiting logstream|^Uvicorn running"
    r"|Starting the SuperLink (Runtime|Control)|^All logs for run|^Connection attempt failed, retrying"
    r"|^(Exception in thread|Using SuperLink|Recommended property|Successfully (installed|started))"
    r"|^Flower App configuration warnings|^- Recommended property|^For more information, visit|^SuperExec terminated"
    r"|Listing all (runs|nodes)"
)


def plain(line: str) -> str:
    """A line without colours, frames, level and time."""
    return _LEVEL.sub("", _FRAME.sub("", _COLOURS.sub("", line)).rstrip()).strip()


def shortened(line: str) -> str | None:
    """What to show of a line of Flower's log, or nothing."""
    text = plain(line)
    return None if _NOISE.search(text) else _LONG.sub("", text)
