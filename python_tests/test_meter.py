"""What is logged of memory."""

from __future__ import annotations

import resource

import pytest
import torch

from sadkern.train.meter import _peak_memory


@pytest.mark.parametrize("used", [False, True])
def test_memory_is_a_gpus_where_one_is_used_and_not_where_one_is_only_there(monkeypatch, used):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**29 if used else 0)
    of_host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert _peak_memory() == pytest.approx(1.5 if used else of_host, rel=0.1)
