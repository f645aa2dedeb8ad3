"""What bench.gpu times: the shapes, their inputs, and who takes part.

A case is described without a GPU; `contest` makes its inputs on one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from bench import projections
from bench.common import Run, copying, name_of
from bench.formulas import eager, eager_topk
from bench.gpu.problems import BETA
from sadkern import backends, span_kl, topk_logprobs
from sadkern.projection import tile_bytes

PARTS = ("logits", "projection", "topk-teacher", "topk")
NEEDS = {"Liger": "liger_kernel", "TRL": "trl"}  # first word of a contestant -> its module
# Both backends, whichever of them `auto`, which is called sadkern, chooses.
EITHER = ("sadkern, triton", "sadkern, cuda")
FLOORS = ("copy", "four GEMMs")  # what nothing undercuts: no contestants, but timed in turns too
COPIED = {"cuda": 1 << 30, "cpu": 1 << 20}  # bytes


@dataclass(frozen=True)
class Case:
    """One shape of one part."""

    part: str
    rows: int
    vocab: int
    divergence: str = "forward_kl"
    k: int = 0
    widths: tuple[int, int] = (0, 0)  # D of student and teacher
    supervised: float = 1.0
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        said = f"({self.rows}, {self.vocab})"
        if self.part != "topk":
            said = f"{self.divergence} {said}"
        if self.k:
            said += f", K = {self.k}"
        if self.part == "projection":
            student, teacher = self.widths
            said += f", D = {student} from {teacher}, {self.supervised:.0%} supervised"
        return said

    @property
    def needs(self) -> int:
        """Bytes of memory for the inputs, sadkern's own call and the copy; peers may need more."""
        size, logits = self.dtype.itemsize, self.rows * self.vocab
        likely = 8 * self.rows * self.k
        if self.part == "projection":
            student, teacher = self.widths
            inputs = (self.rows + self.vocab) * (student + teacher) * size
            gradients = (self.rows + self.vocab) * student * size + 4 * self.vocab * student
            own = inputs + gradients + tile_bytes("cuda", 4 * self.vocab * student)
        elif self.part == "topk":
            own = logits * size + likely
        else:
            own = 3 * logits * size + likely
        return own + 2 * COPIED["cuda"]

    def shape(self) -> dict[str, object]:
        """Of the results."""
        return {**vars(self), "widths": list(self.widths), "dtype": name_of(self.dtype)}


SHAPES = ((8192, 32000), (2048, 128256))  # N, V: 0.5 GB of bf16 logits
CASES = (
    *(Case("logits", *shape, name) for shape in SHAPES for name in ("forward_kl", "jsd")),
    Case("projection", 8192, 32000, widths=(4096, 5120), supervised=0.4),
    Case("projection", 8192, 128256, widths=(4096, 4096), supervised=0.4),
    *(Case("topk-teacher", *shape, k=k) for shape in SHAPES for k in (64, 256)),
    *(Case("topk", *shape, k=k) for shape in SHAPES for k in (32, 256)),
)


class Contest(NamedTuple):
    """A case's inputs and, by name, what makes each contestant ready: that may fail."""

    leaves: list[Tensor]  # that gather gradients
    makers: dict[str, Callable[[], Run]]
    logits: list[Tensor]  # that sadkern's kernel reads, and one like their gradient

    def reset(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None


def contestants(part: str) -> list[str]:
    """Names, without the floors; those that are not installed included."""
    return {
        "logits": ["sadkern", *EITHER, "eager", "torch.compile", "Liger"],
        "projection": [
            *("sadkern", "eager", "eager, rows", "torch.compile, rows", "Liger, rows", "TRL, rows"),
        ],
        "topk-teacher": ["sadkern", "eager", "torch.compile"],
        "topk": ["sadkern", *EITHER, "torch.topk + logsumexp", "torch.compile"],
    }[part]


def missing(name: str) -> str | None:
    """The module that a contestant needs, if it is not there."""
    module = NEEDS.get(name.partition(",")[0])
    return module if module and find_spec(module) is None else None


def bytes_moved(case: Case) -> int:
    """The least that a kernel must move: each logit once, its gradient once, a top-k's few numbers.
    (What it reads again may come from a cache.)"""
    tensors = {"logits": 3, "topk-teacher": 2, "topk": 1}[case.part]
    return tensors * case.rows * case.vocab * case.dtype.itemsize + 8 * case.rows * case.k


def tiles_of(case: Case, logits: list[Tensor]) -> int | None:
    """Of Triton's kernel for such rows, 0 where none are kept; None where it does not serve."""
    device = logits[0].device
    try:
        backends.choose("triton", case.dtype, device)
    except (RuntimeError, ValueError):
        return None
    from sadkern.backends.triton import plans

    kernels = {"topk-teacher": "span_kl_topk", "topk": "topk"}
    kernel = kernels.get(case.part) or plans.kind_of(case.divergence)
    return plans.choose(kernel, plans.capability_of(device), case.vocab, *logits).TILES


def contest(case: Case, device: torch.device) -> Contest:
    """On `device`, with the copy among the contestants."""
    made = {
        "logits": _logits,
        "projection": _projection,
        "topk-teacher": _topk_teacher,
        "topk": _topk,
    }[case.part](case, torch.Generator(device).manual_seed(0))
    size = COPIED[device.type]
    made.makers["copy"] = lambda: copying(torch.empty(size, dtype=torch.uint8, device=device))
    return made


# Contests.


def _normal(case: Case, generator: torch.Generator) -> Tensor:
    made = torch.empty(case.rows, case.vocab, dtype=case.dtype, device=generator.device)
    return made.normal_(0, 2.0, generator=generator)


def ours_by(run: Callable[[str], Run]) -> dict[str, Callable[[], Run]]:
    """Of each backend that takes part, what makes it ready; one that does not serve is refused."""
    named = {"sadkern": "auto", **{name: name.partition(", ")[2] for name in EITHER}}
    return {name: partial(run, backend) for name, backend in named.items()}


def _logits(case: Case, generator: torch.Generator) -> Contest:
    student, teacher = (_normal(case, generator) for _ in range(2))
    student.requires_grad_()
    ids = 1 + torch.arange(case.rows, device=student.device) % 2
    name = case.divergence

    def liger() -> Run:
        from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss

        kl = LigerKLDIVLoss(reduction="batchmean", log_target=True)
        loss = kl if name == "forward_kl" else LigerJSD(beta=BETA)
        return lambda: loss(student.log_softmax(-1), teacher.log_softmax(-1)).backward()

    def compiled() -> Run:
        fast = torch.compile(eager, dynamic=False)
        return lambda: fast(student, teacher, name, BETA).backward()

    def ours(backend: str) -> Run:
        options = {"divergence": name, "beta": BETA, "reduction": "token_mean"}

        def run() -> None:
            out = span_kl(student, teacher, ids, backend=backend, **options)  # type: ignore[arg-type]
            out.loss.backward()

        return run

    makers: dict[str, Callable[[], Run]] = {
        **ours_by(ours),
        "eager": lambda: lambda: eager(student, teacher, name, BETA).backward(),
        "torch.compile": compiled,
        "Liger": liger,
    }
    return Contest([student], makers, [student, teacher, student])


def _projection(case: Case, generator: torch.Generator) -> Contest:
    x = projections.inputs(
        case.rows, case.vocab, case.widths, case.supervised, case.dtype, generator.device
    )

    def of_rows(hidden: Tensor, weight: Tensor, theirs: Tensor, their_weight: Tensor) -> Tensor:
        # (As it was measured: logits stay while their logarithms are made.)
        return eager(hidden @ weight.t(), theirs @ their_weight.t())

    makers: dict[str, Callable[[], Run]] = {
        "sadkern": lambda: projections.ours(x, rows=x.rows),
        "eager": lambda: projections.eager(x),
        "eager, rows": lambda: projections.on_rows(x, of_rows),
        "torch.compile, rows": lambda: projections.on_rows(
            x, torch.compile(of_rows, dynamic=False)
        ),
        "Liger, rows": lambda: projections.liger_rows(x),
        "TRL, rows": lambda: projections.trl_rows(x),
        "four GEMMs": lambda: projections.four_products(x),
    }
    return Contest(x.leaves, makers, [])


def _topk_teacher(case: Case, generator: torch.Generator) -> Contest:
    teacher = topk_logprobs(_normal(case, generator), case.k)
    student = _normal(case, generator).requires_grad_()
    ids = 1 + torch.arange(case.rows, device=student.device) % 2

    def ours() -> None:
        span_kl(student, teacher, ids, reduction="token_mean").loss.backward()

    def compiled() -> Run:
        fast = torch.compile(eager_topk, dynamic=False)
        return lambda: fast(student, teacher).backward()

    makers: dict[str, Callable[[], Run]] = {
        "sadkern": lambda: ours,
        "eager": lambda: lambda: eager_topk(student, teacher).backward(),
        "torch.compile": compiled,
    }
    return Contest([student], makers, [student, student])


def _topk(case: Case, generator: torch.Generator) -> Contest:
    x = _normal(case, generator)

    def plain() -> object:
        return torch.topk(x, case.k, -1), torch.logsumexp(x, -1)

    makers: dict[str, Callable[[], Run]] = {
        **ours_by(lambda backend: lambda: topk_logprobs(x, case.k, backend=backend)),
        "torch.topk + logsumexp": lambda: plain,
        "torch.compile": lambda: torch.compile(plain, dynamic=False),
    }
    return Contest([], makers, [x])
