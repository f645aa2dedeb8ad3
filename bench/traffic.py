"""Bytes that the Triton kernels move, counted without a GPU: `python -m bench.traffic`.

Triton's interpreter runs the kernels on CPU tensors, as planned for sm_80, and every load and store
goes through a counter: what a mask leaves out is not counted, and an address that an instruction
names more than once counts once. So it is what kernels ask of memory, whether or not a cache has
it, and not a time.

A line of the table is a call, forward and backward, in bytes per entry of the student's logits
(of logits x logits: per pair).

- reads of a logit, on average of both sides: 1 where a row is kept on chip, else one a sweep. With
  them go those of the map of a top-k teacher's tokens, a byte an entry, which a cache holds. (A
  program zeroes its map before its first row. Here that is every row or so; on a device it is few.)
- again: what more elements of an instruction ask for of an address that it has named, which costs
  no memory traffic.
- PyTorch: not counted but computed, the least that what must run around the kernels can move, each
  operator reading its operands and writing its result once. Liger's kernels take log-probabilities:
  log_softmax of both sides and its backward, in the logits' dtype, and for its jsd a copy of the
  student's and the fp32 loss of each entry, zeroed and summed.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import numpy as np
import torch
import triton
import triton.language as tl
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from bench.common import table, versions
from sadkern import TopK, span_kl, topk_logprobs
from sadkern.backends import triton as backend
from sadkern.span_kl import DIVERGENCES

RESULTS = Path(__file__).parent / "results" / "traffic.md"
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
VOCABULARIES = (32000, 128256)
K = 64  # of top-k teachers
HEADER = ("kernel", "dtype", "V", "reads", "loaded", "stored", "total", "again", "PyTorch")

if isinstance(tl.sum, triton.JITFunction) or not backend.INTERPRETED:
    raise RuntimeError(
        "triton was imported before bench.traffic and would compile: expected TRITON_INTERPRET=1 "
        "in the environment from the start"
    )


@dataclass
class Bytes:
    """What kernels have asked of memory."""

    loaded: int = 0
    stored: int = 0
    again: int = 0  # for an address that the same instruction had named already


@contextmanager
def counted() -> Iterator[Bytes]:
    """Counts what the kernels launched meanwhile load and store; an atomic operation does both."""
    found = Bytes()

    def count(pointers: Any, mask: Any) -> int:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        chosen = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        distinct = np.unique(chosen).size
        found.again += (chosen.size - distinct) * size
        return distinct * size

    def counting(name: str, place: int, mask: int, loads: bool, stores: bool) -> Any:
        original = getattr(InterpreterBuilder, name)

        def wrapper(self: Any, *given: Any, **options: Any) -> Any:
            moved = count(given[place], given[mask])
            found.loaded += moved * loads
            found.stored += moved * stores
            return original(self, *given, **options)

        return wrapper

    # (All others are made of these.) Where pointers and mask stand among the arguments:
    with patch.multiple(
        InterpreterBuilder,
        create_masked_load=counting("create_masked_load", 0, 1, True, False),
        create_masked_store=counting("create_masked_store", 0, 2, False, True),
        create_atomic_rmw=counting("create_atomic_rmw", 1, 3, True, True),
    ):
        yield found


Run = Callable[[Tensor, Tensor], Bytes]  # of student and teacher


class Line(NamedTuple):
    """A call, and what there is to know before it is made."""

    kernel: str
    dtype: torch.dtype
    vocab: int
    run: Run
    sides: int  # of V entries, that are read
    around: int  # bytes per entry that PyTorch moves besides, at least


def logits(rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Student, which requires a gradient, and teacher."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(rows, vocab, generator=generator).to(dtype) for _ in range(2))
    return student.requires_grad_(), teacher


def ours(
    student: Tensor,
    teacher: Tensor | TopK,
    divergence: str = "forward_kl",
    *,
    supervised: bool = True,
    inplace: bool = False,
) -> Bytes:
    """Of `span_kl`, forward and backward."""
    span_ids = torch.full(student.shape[:-1], int(supervised))
    given = student * 1 if inplace else student
    with counted() as found:
        span_kl(
            given, teacher, span_ids, divergence=divergence, inplace=inplace, backend="triton"
        ).loss.backward()
    return found


def to_topk(student: Tensor, teacher: Tensor) -> Bytes:
    """Of `span_kl` to a top-k teacher."""
    return ours(student, topk_logprobs(teacher, K, backend="triton"))


def selection(student: Tensor, teacher: Tensor) -> Bytes:
    """Of `topk_logprobs`."""
    with counted() as found:
        topk_logprobs(teacher, K, backend="triton")
    return found


def liger_jsd(student: Tensor, teacher: Tensor) -> Bytes:
    """Of Liger's jsd between log-probabilities, by its Triton kernel."""
    from liger_kernel.ops.jsd import LigerJSDFunction

    # What it has for other hardware is looked for first, and missed with a warning.
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)
    q, p = student.log_softmax(-1), teacher.log_softmax(-1)
    with counted() as found:
        LigerJSDFunction.apply(q, p, None, 0.5, -100, "nvidia-triton").backward()
    return found


class _Number(float):
    """A number that a kernel may cast: the interpreter hands it on as it came."""

    def to(self, dtype: object) -> float:
        return float(self)


def liger_kl(student: Tensor, teacher: Tensor) -> Bytes:
    """Of Liger's forward KL between log-probabilities."""
    from liger_kernel.ops.kl_div import LigerKLDivLossFunction

    q, p = student.log_softmax(-1), teacher.log_softmax(-1)
    with counted() as found:
        LigerKLDivLossFunction.apply(q, p, "sum", True, _Number(1e-10)).backward()
    return found


def lines() -> Iterator[Line]:
    """All that is counted."""

    for dtype, vocab in product(NAMES, VOCABULARIES):
        size = dtype.itemsize
        softmaxes = 7 * size  # of both sides, and backward of one
        calls: list[tuple[str, Run, int, int]] = [
            *((f"span_kl, {x}", partial(ours, divergence=x), 2, 0) for x in DIVERGENCES),
            ("span_kl, not supervised", partial(ours, supervised=False), 2, 0),
            (f"span_kl, top-{K} teacher", to_topk, 1, 0),
            (f"topk_logprobs, K={K}", selection, 1, 0),
            ("Liger, jsd", liger_jsd, 2, softmaxes + 2 * size + 8),
            ("Liger, forward KL", liger_kl, 2, softmaxes),
        ]
        for kernel, run, sides, around in calls:
            if find_spec("liger_kernel") or not kernel.startswith("Liger"):
                yield Line(kernel, dtype, vocab, run, sides, around)


def cells(line: Line, rows: int) -> list[str]:
    """Of the table: bytes per entry."""
    start = [line.kernel, NAMES[line.dtype], str(line.vocab)]
    try:
        found = line.run(*logits(rows, line.vocab, line.dtype))
    except Exception as error:  # of a peer's, in a version that the interpreter cannot run
        if not line.kernel.startswith("Liger"):
            raise
        return [*start, f"not run: {error}", *[""] * 5]
    entries = rows * line.vocab
    reads = round(2 * found.loaded / (entries * line.sides * line.dtype.itemsize)) / 2
    moved = (found.loaded, found.stored, found.loaded + found.stored, found.again)
    numbers = (f"{x / entries:.2f}" for x in moved)
    return [*start, f"{reads:g}", *numbers, str(line.around)]


def said_versions() -> str:
    """Of what was counted and what counted."""
    found = versions(("triton", "torch", "liger-kernel"))
    return ", ".join(f"{package} {of}" for package, of in found.items())


def markdown(found: list[list[str]], rows: int) -> str:
    """The table, and how to read it."""
    title, _, notes = (__doc__ or "").partition("\n")
    lines = [
        f"# {title.partition(',')[0]}",
        "",
        f"`python -m bench.traffic --write`, {rows} rows a call; {said_versions()}.",
        notes,
        *table(HEADER, found),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.traffic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=2, help="of each call (default: 2)")
    parser.add_argument("--only", default="", help="lines whose kernel has this in its name")
    parser.add_argument("--write", action="store_true", help=f"the table into {RESULTS.name}")
    options = parser.parse_args(arguments)
    chosen = [line for line in lines() if options.only in line.kernel]
    if not chosen:
        known = ", ".join(sorted({line.kernel for line in lines()}))
        parser.error(f"--only {options.only}: expected a part of one of {known}")
    if options.write and options.only:
        parser.error("--write keeps the whole table: expected no --only beside it")
    progress = track(chosen, "counting", console=Console(stderr=True))
    found = [cells(line, options.rows) for line in progress]
    shown = Table(*HEADER, box=SIMPLE_HEAD, padding=0, title=f"bytes per entry, {said_versions()}")
    for row in found:
        shown.add_row(*row)
    Console().print(shown)
    if options.write:
        RESULTS.write_text(markdown(found, options.rows))


if __name__ == "__main__":
    main()
