"""What is known of a run before its first step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedalt.config import parse_config
from fedalt.federation import client
from fedalt.model.fast import packing
from fedalt.model.fast.packing import NotPackable
from fedalt.runs.setup import Experiment, prepare
from micro import settings


def test_the_user_is_told_why_rows_are_padded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*arguments: object, **options: object) -> torch.Tensor:
        raise NotPackable("some feature")

    plain = prepare(parse_config(settings(tmp_path / "run"), "x")).notes
    monkeypatch.setattr(packing, "attend", cannot)
    told = "rows are padded, not packed, on this model: NotPackable: some feature"
    for order, advice in (("strict", "; training.order=bucketed wastes less"), ("bucketed", "")):
        padded = prepare(parse_config(settings(tmp_path / "run", training__order=order), "x")).notes
        assert set(padded) - set(plain) == {told + advice}


def test_two_clients_of_a_higher_rank_need_more_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def needed(experiment: Experiment) -> int:
        """Least free memory, in steps of 4 KiB, with which two clients are on the model at a time."""
        for free in range(0, 1 << 30, 1 << 12):
            monkeypatch.setattr(client, "free_memory", lambda device, free=free: free)
            if experiment.fitting_cohort > 1:
                return free
        raise AssertionError("never")

    low, high = (prepare(parse_config(settings(tmp_path / "run", lora__r=rank), "x")) for rank in (2, 16))
    more = 4 * (high.shape.size() - low.shape.size())  # bytes of one client
    assert needed(high) - needed(low) > 2 * 2 * 2 * more  # two clients, two copies, half of what is free
