"""What the process keeps between steps; tried in a process of its own, since it holds for the life of one."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

SHAPES = """
import ctypes
from fedalt.runtime import keep_freed_memory
keep_freed_memory()
import torch
from fedalt.model.fast.patches import _linear, _pack

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena o s h mapped u f used free keep".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
packed, x = _pack(torch.randn(32, 32)), torch.randn(1000, 32)
used = []
for tokens in range(100, 600):
    _linear(x[:tokens], packed, None)
    used.append(libc.mallinfo2().used + libc.mallinfo2().mapped)
print(used[-1] - used[100])
"""
"""A product for each of 500 numbers of tokens; prints the bytes that the last 400 of them left behind."""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc")
def test_numbers_of_tokens_seen_once_leave_nothing_behind() -> None:
    """oneDNN compiles a kernel for each; a quarter of a megabyte each would stay."""
    caches = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    environment = {name: value for name, value in os.environ.items() if name not in caches}
    done = subprocess.run([sys.executable, "-c", SHAPES], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) < 20e6
