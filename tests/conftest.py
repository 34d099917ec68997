"""What tests would otherwise take over from whoever started them."""

import functools
import os
import signal
import sys
from collections.abc import Iterator

import pytest
import typer

from fedalt.registry import _PLUGINS, ALL

for name in ("COLUMNS", "LINES"):  # the width of tables: readline notes the terminal's, and workers inherit it
    os.environ.pop(name, None)
# a job in the background ignores Ctrl-C, and so would every process that a test starts
signal.signal(signal.SIGINT, signal.default_int_handler)

typer.main.get_command = functools.cache(typer.main.get_command)  # a process needs it once, tests a thousand times
os.fsync = lambda descriptor: None  # what a killed process has written is there; a machine that fails is not tested


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What a test registers is gone when it ends, and so are the modules of its files."""
    before, modules = [dict(registry._entries) for registry in ALL], set(sys.modules)
    complete, plugins = [registry._complete for registry in ALL], dict(_PLUGINS)
    yield
    _PLUGINS.clear()
    _PLUGINS.update(plugins)
    for registry, entries, whole in zip(ALL, before, complete, strict=True):
        ours = {name: entry for name, entry in registry._entries.items() if entry.origin == "fedalt"}
        registry._entries, registry._complete = {**ours, **entries}, registry._complete or whole
    for name in set(sys.modules) - modules:
        if name.startswith("fedalt_plugin_"):
            del sys.modules[name]
