"""What tests share: poisoned memory, a seed, instruction sets, threads."""

from __future__ import annotations

import os
from traceback import format_exception

# Before anything imports triton: its kernels run on the CPU, see sadkern/backends/triton.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from several import Several
from small_models import RECORDS, small_tokenizer

from sadkern import build_info
from sadkern.backends import native
from sadkern.data import prepare

ISAS = build_info().get("isas", [])


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Memory that no kernel wrote reads as NaN, so that forgetting to write shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=ISAS)
def isa(request):
    """Each instruction set that this processor runs, in turn."""
    native.core().choose_isa(request.param)
    yield request.param
    native.core().choose_isa(ISAS[0])


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Four processes that form groups."""
    processes = Several(4, str(tmp_path_factory.mktemp("group") / "store"))
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="session")
def examples(tokenizer):
    """`RECORDS`, segmented and tokenised."""
    return prepare(RECORDS, tokenizer)


@pytest.fixture(scope="module")
def one_thread():
    """Models as small as tests' are slower on two, and slower by far on a machine that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Without a compiled core what needs it is skipped; SADKERN_NATIVE=1 had refused to install."""
    try:
        return (yield)
    except Exception as error:
        # As it is, or wrapped by what the test used.
        if native.missing() and native.missing() in "".join(format_exception(error)):
            pytest.skip(native.missing())
        raise


@pytest.fixture
def not_compiled():
    """What torch.compile would make, such as an 8-bit optimizer's update."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")
