"""The kernels held by float64 and by plain PyTorch, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from precision import (
    BACKENDS,
    CASES,
    DIVERGENCES,
    HALVES,
    logits,
    ours,
    plain,
)

from bench.formulas import assert_as_precise


def check(name, student, teacher, temperature=1.0):
    """Value and gradient of the kernel."""
    divergence, mix = DIVERGENCES[name]
    unit = max(1, 1 / temperature)  # of the gradient, where rounding is counted in units of 1

    def at(s, t, backend):
        value, gradient = ours(s, t, divergence, mix, backend, temperature=temperature)
        return value, gradient.double() / unit

    got = at(student, teacher, "native")
    exact = at(student.double(), teacher.double(), "reference")
    value, gradient = plain(student / temperature, teacher / temperature, divergence, mix)
    peer = (value, gradient / temperature / unit)
    # Values leave the kernel in fp32 whatever came in; gradients in the logits' own dtype.
    stored = (torch.float32, student.dtype)
    for mine, truth, torchs, dtype in zip(got, exact, peer, stored, strict=True):
        assert_as_precise(mine, truth, torchs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_precision(name, case, dtype, isa):
    for vocab in (2, 5, 37, 1000, 4099):
        check(name, *logits(case, vocab, dtype))


@pytest.mark.parametrize("temperature", [0.5, 1.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_precision_with_a_temperature(name, dtype, temperature, isa):
    for case in ("random", "near", "huge", "far", "banned"):
        for vocab in (3, 257, 4097):
            check(name, *logits(case, vocab, dtype), temperature)


@pytest.mark.parametrize("vocab", [32000, 50257, 151936])
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_of_real_vocabularies(name, vocab, dtype):
    for case in ("random", "near", "equal"):
        check(name, *logits(case, vocab, dtype, rows=2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_that_only_the_student_bans_costs_infinitely_much(backend):
    s, t = logits("random", 40, torch.float32, rows=2)
    s[0, 7] = -torch.inf
    forward, _ = ours(s, t, "forward_kl", 0.0, backend)
    assert forward[0] == torch.inf
    assert forward[1].isfinite()
    for name in ("jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"):
        value, gradient = ours(s, t, *DIVERGENCES[name], backend)
        assert value.isfinite().all()
        assert gradient[0, 7] == 0
        assert gradient.isfinite().all()
    # The other way round it is the reverse KL that does not forgive.
    assert ours(t, s, "reverse_kl", 0.0, backend)[0][0] == torch.inf


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_comes_out_as_nan_in_its_row_alone(backend, name, side):
    s, t = logits("random", 40, torch.float32, rows=3)
    (s if side == "student" else t)[1, 5] = torch.nan
    value, gradient = ours(s, t, *DIVERGENCES[name], backend)
    assert value.isnan().tolist() == [False, True, False]
    assert gradient[1].isnan().all()
    assert gradient[[0, 2]].isfinite().all()
