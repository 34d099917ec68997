"""The least that any program with this base must do: import torch and transformers, and load it."""

from __future__ import annotations

from fedalt.benchmarks.sides.command import base, children_peak, python
from fedalt.benchmarks.task import Job, Outcome, Spec
from fedalt.model.base import resolve_source

_PROGRAM = """
import sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
model.to("cuda" if torch.cuda.is_available() else "cpu")
"""


def prepare(spec: Spec) -> Job:
    """Everything before the clock: nothing, it is a process of its own."""
    folder = resolve_source(base(spec))

    def play() -> Outcome:
        python("-c", _PROGRAM, folder, spec.dtype)
        return Outcome(memory={"process": children_peak()})

    return Job(lambda: None, play)
