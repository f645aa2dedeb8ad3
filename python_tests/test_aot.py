"""The kernels for GPUs, compiled ahead of time for chips that this machine need not have."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from sadkern.backends import cuda

ROOT = Path(__file__).parents[1]
DIVERGENCES = {"forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"}
# What a program may take on each, in KiB.
SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227}


def compiled(*chips: str) -> tuple[list[dict], list[dict]]:
    """Of Triton, and of CUDA."""
    # In a process of its own: in this one kernels are interpreted.
    done = subprocess.run(
        [sys.executable, "-m", "bench.aot", "--json", "--chips", *chips],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout)
    return tuple(
        [row for row in table if ("CUDA" in row["kernel"]) is of_cuda] for of_cuda in (False, True)
    )


def check(table: list[dict], *chips: str) -> None:
    assert {row["chip"] for row in table} == set(chips)
    for row in table:
        assert row["stack"] == 0, row
        assert row["shared"] <= SHARED[row["chip"]] << 10, row
        assert 0 < row["registers"] <= 255
    for chip in chips:
        rows = [row for row in table if row["chip"] == chip]
        assert {row["kernel"] for row in rows} == {"span_kl", "span_kl_topk", "topk", "scale"}
        ways = ("kept", "swept") if chip in ("sm_80", "sm_86", "sm_89") else ("swept",)
        for kernel in ("span_kl", "span_kl_topk"):
            found = {(row["divergence"], row["rows"].split(",")[0]) for row in rows
                     if row["kernel"] == kernel}  # fmt: skip
            assert found == {(name, way) for name in DIVERGENCES for way in ways}
        assert {row["tail"] for row in rows} == {None, "bucket", "renormalize", "none"}
        assert {row["logits"] for row in rows} == {"fp32", "bf16", "fp16", "fp32, gradient bf16"}


def check_cuda(table: list[dict], *chips: str) -> None:
    """Of each chip that they were built for every divergence, dtype and way; in the registers that
    1024 threads have."""
    built = [] if cuda.missing() else cuda.built().split(", ")
    chips = tuple(chip for chip in chips if chip in built)
    for row in table:
        assert row["stack"] == 0, row
        assert row["shared"] <= SHARED[row["chip"].rstrip("a")] << 10, row
        assert 0 < row["registers"] <= 64, row
    found = [(row["chip"], row["logits"], row["rows"], row["divergence"]) for row in table]
    ways = {"on chip, 32 warps", "on chip, by entries, 32 warps"}
    assert sorted(found, key=str) == sorted(
        product(chips, ("bf16", "fp16"), ways, (*DIVERGENCES, None)), key=str
    )


def test_no_kernel_spills_on_sm_86_and_sm_90():
    of_triton, of_cuda = compiled("86", "90")
    check(of_triton, "sm_86", "sm_90")
    check_cuda(of_cuda, "sm_86", "sm_90a")


@pytest.mark.slow
def test_no_kernel_spills_on_the_other_chips():
    of_triton, of_cuda = compiled("80", "89", "100")
    check(of_triton, "sm_80", "sm_89", "sm_100")
    check_cuda(of_cuda, "sm_80", "sm_89")


def test_a_kernel_that_would_not_do_is_named():
    script = """
from bench import aot
from sadkern.backends.triton import plans
# A row of 32768 in the registers of 128 threads: it cannot be.
plans.TABLES[(8, 0)]["state", True] = plans.Choice(4096, 4)
aot.kernels = lambda: []
aot.cases = lambda chip, cases=aot.cases: list(cases(chip))[:1]
raise SystemExit(aot.main(["--chips", "86", "--check"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "1 kernels, 1 refused" in done.stderr
    assert "spills" in done.stderr
    assert "'divergence': 'forward_kl'" in done.stderr
