"""What every test shares: poisoned memory, seeds, and the precision rule."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Memory that no kernel wrote reads as NaN, so that forgetting to write shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
