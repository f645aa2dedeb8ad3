"""Whether what bench.gpu times is right: every backend against the reference in float64.

By the rule of `bench.formulas.assert_as_precise`. Moreover two runs must give the same bits, and on
a GPU nothing may wait for the device. A check raises where it fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch

from bench.common import name_of
from bench.formulas import assert_as_precise
from bench.gpu.cases import PARTS
from bench.gpu.problems import (
    Problem,
    found_by,
    leaf,
    logit_pair,
    logits_problem,
    projection_problem,
    said_by_torch,
    span_ids,
    topk_problem,
)
from sadkern import backends, span_kl, topk_logprobs
from sadkern.backends import cuda
from sadkern.span_kl import DIVERGENCES, TAILS

KINDS = ("random", "near", "banned")
WAITING = "waiting"  # the part of what guards no timing: a wait makes nothing wrong


class Scope(NamedTuple):
    """How much is checked. Logits in full; the rest in full at the second vocabulary and, at the
    others, of forward KL and jsd in bf16."""

    vocabs: tuple[int, ...] = (37, 5001, 32000, 151936)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    kinds: tuple[str, ...] = KINDS
    divergences: tuple[str, ...] = DIVERGENCES
    rows: int = 64  # at most: of long ones fewer
    k: int = 64
    most: tuple[int, ...] = (32, 256)  # k of the selection

    def rows_of(self, vocab: int) -> int:
        return min(self.rows, max(8, 2**18 // vocab))

    def thorough(self) -> Iterator[tuple[str, torch.dtype, int]]:
        full = self.vocabs[min(1, len(self.vocabs) - 1)]
        yield from product(self.divergences, self.dtypes, (full,))
        few = [x for x in ("forward_kl", "jsd") if x in self.divergences]
        yield from product(few, (torch.bfloat16,), [x for x in self.vocabs if x != full])


QUICK = Scope(vocabs=(37, 32000), dtypes=(torch.float32, torch.bfloat16))


class Check(NamedTuple):
    part: str  # whose timing it guards
    name: str
    run: Callable[[], None]


Serving = list[tuple[str, torch.device]]


def serving(device: torch.device) -> tuple[Serving, dict[str, str]]:
    """The backends that serve there, the native one on the CPU; why the others do not."""
    found: Serving = []
    refused = {}
    for name in backends.NAMES:
        where = torch.device("cpu") if name == "native" else device
        try:
            backends.choose(name, torch.bfloat16, where)
            found.append((name, where))
        except (RuntimeError, ValueError) as error:
            refused[name] = str(error)
    return found, refused


def taken(backend: str, part: str, vocab: int, dtype: torch.dtype, device: torch.device) -> bool:
    """CUDA's kernels take 16-bit rows of full distributions that fit on chip."""
    if backend != "cuda":
        return True
    fits = dtype.itemsize == 2 and vocab <= cuda.longest(device)
    return fits and part in (PARTS[0], PARTS[3])


def supported(name: str, tail: str) -> bool:
    return (name, tail) != ("reverse_kl", "renormalize")  # which would be infinite


def check_problem(
    make: Callable[[], Problem], dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """One problem on one backend. Where half precision overflows PyTorch, fp32 speaks for it."""
    problem = make().to(device)
    exact = found_by(problem.to(torch.float64), "reference")
    plain = said_by_torch(problem)
    if dtype.itemsize == 2:
        wide = said_by_torch(problem.to(torch.float32))
        plain = {k: torch.where(x.isfinite(), x.float(), wide[k].float()) for k, x in plain.items()}
    got = found_by(problem, backend)
    for what in plain:
        assert_as_precise(got[what], exact[what], plain[what], what=what)


def check_selection(
    rows: int, vocab: int, dtype: torch.dtype, k: int, backend: str, device: torch.device
) -> None:
    """`topk_logprobs` against a stable sort and float64."""
    x = logit_pair("random", rows, vocab, dtype)[0].to(device)
    found = topk_logprobs(x, k, backend=backend)
    exact, plain = (topk_logprobs(y, k, backend="reference") for y in (x.double(), x.float()))
    assert torch.equal(found.ids, exact.ids), "ids are not those of a stable sort"
    for what in ("logprobs", "tail_mass", "entropy", "lse"):
        got, truth, torchs = (getattr(y, what) for y in (found, exact, plain))
        assert_as_precise(got, truth, torchs, what=what)


def check_same_bits(
    make: Callable[[], Problem], dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """Twice the same."""
    problem = make().to(device)
    first, second = (found_by(problem, backend) for _ in range(2))
    for what, got in first.items():
        assert torch.equal(got, second[what]), f"{what}: two runs differ"


def check_nothing_waits(
    make: Callable[[], Problem], dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """Forward and backward without a synchronisation; where there is no GPU, that they run."""
    problem = make().to(device)
    student, _ = leaf(problem.student)
    ids = span_ids(problem.rows, device)
    rows = ids.nonzero().squeeze(-1)

    def run() -> None:
        span_kl(student, problem.teacher, ids, rows=rows, backend=backend).loss.backward()

    run()  # compiles, and allocates the gradients
    if device.type != "cuda":
        return
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def checks(scope: Scope, on: Serving) -> Iterator[Check]:
    """All of them; nothing is made before one is run."""
    for at in on:
        yield from _checks(scope, *at)


def _checks(scope: Scope, backend: str, device: torch.device) -> Iterator[Check]:
    rows, said = scope.rows_of, f"on {backend}"

    def of(
        part: str, name: str, check: Any, vocab: int, dtype: torch.dtype, make: Any, like: str = ""
    ) -> Iterator[Check]:
        if taken(backend, like or part, vocab, dtype, device):
            named = f"{name} {name_of(dtype)}, {said}"
            yield Check(part, named, partial(check, make, dtype, backend, device))

    logits, projection, topk_teacher, topk = PARTS
    for name, dtype, kind, vocab in product(
        scope.divergences, scope.dtypes, scope.kinds, scope.vocabs
    ):
        make = partial(logits_problem, kind, name, rows(vocab), vocab, dtype)
        yield from of(logits, f"{name} {kind} V={vocab}", check_problem, vocab, dtype, make)
    for name, dtype, vocab in scope.thorough():
        make = partial(logits_problem, "random", name, rows(vocab), vocab, dtype, True)
        yield from of(logits, f"{name} labelled V={vocab}", check_problem, vocab, dtype, make)
        make = partial(projection_problem, name, rows(vocab), vocab, dtype)
        yield from of(projection, f"{name} V={vocab}", check_problem, vocab, dtype, make)
        for tail in TAILS:
            if supported(name, tail):
                make = partial(topk_problem, name, tail, rows(vocab), vocab, dtype, scope.k)
                said_of = f"{name} {tail} V={vocab}"
                yield from of(topk_teacher, said_of, check_problem, vocab, dtype, make)
    for dtype, vocab, k in product(scope.dtypes, scope.vocabs, scope.most):
        if k <= vocab and taken(backend, topk, vocab, dtype, device):
            run = partial(check_selection, rows(vocab), vocab, dtype, k, backend, device)
            yield Check(topk, f"selection K={k} V={vocab} {name_of(dtype)}, {said}", run)
    vocab, dtype = scope.vocabs[min(2, len(scope.vocabs) - 1)], torch.bfloat16
    problems = {
        logits: partial(logits_problem, "random", "jsd", rows(vocab), vocab, dtype),
        projection: partial(projection_problem, "jsd", rows(vocab), vocab, dtype),
        topk_teacher: partial(topk_problem, "jsd", "bucket", rows(vocab), vocab, dtype, scope.k),
    }
    for part, make in problems.items():
        yield from of(part, "determinism", check_same_bits, vocab, dtype, make)
        if backend in ("triton", "cuda"):
            said_of = f"{part} waits for nothing,"
            yield from of(WAITING, said_of, check_nothing_waits, vocab, dtype, make, like=part)
