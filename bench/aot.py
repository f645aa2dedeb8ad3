"""What the kernels take on the chips they are for, without one: `python -m bench.aot`.

Every Triton kernel is compiled ahead of time as the backend would launch it, each choice of
`sadkern.backends.triton.plans` at the longest rows that it serves; of the CUDA kernels it is what
was built of them here. The machine code is asked for its registers, its stack (where what does not
fit the registers is spilled to) and its shared memory. `--check` ends with status 1 where a kernel
spills or takes more than the chip has.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported: these are compiled

import torch
import triton
from rich.console import Console
from rich.progress import track
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.aot_cuda import kernels
from bench.common import table
from bench.machine_code import Usage, resources
from sadkern.backends import cuda
from sadkern.backends import triton as backend
from sadkern.backends.triton import plans
from sadkern.span_kl import DIVERGENCES

RESULTS = Path(__file__).parent / "results" / "aot.md"
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
FP32, BF16, FP16 = NAMES
LONG = 151936  # a vocabulary whose rows no chip keeps

# Of the kernels' parameters; what is not here is an int32.
TYPES = {
    "*fp32": "row_weights per_token cross_entropy teacher_entropy logprobs given_mass "
    "given_entropy tail_mass entropy lse factor",
    "*i64": "labels",
    "*i32": "ids candidate_ids counters",
    "*i8": "marks",
    "*u8": "supervised agreement",
    "fp32": "mix inv_temperature ce_weight inv_softcap",
}
TYPE = {name: kind for kind, names in TYPES.items() for name in names.split()}
ALIGNED = ("_outer", "_stride", "vocab")  # as those of real models are


class Case(NamedTuple):
    """One kernel, compiled for one chip."""

    capability: tuple[int, int]
    kernel: str  # a module of sadkern.backends.triton
    rows: str  # what is read, for people
    plan: plans.Plan
    constants: dict[str, Any]
    types: dict[str, str]  # of the logits and their gradient


def cases(capability: tuple[int, int]) -> Iterator[Case]:
    """All that is compiled for a chip: every divergence and tail, and of the rest what differs."""
    extras = ("HAS_LABELS", "SOFTEN", "HAS_SOFTCAP")
    constants: dict[str, Any]
    kept, wide = 32768, 16384  # the longest rows that are kept: of packed entries, of others
    for name in DIVERGENCES:
        kind = plans.kind_of(name)
        for dtype, gradient, vocab, optional in (
            (BF16, BF16, kept, True),
            (BF16, BF16, kept, False),
            (FP16, FP16, kept, True),
            (BF16, BF16, wide - 1, True),
            (FP32, FP32, wide, True),
            (FP32, BF16, wide, True),
            (BF16, BF16, LONG, True),
            (BF16, BF16, LONG, False),
            (FP32, FP32, LONG, True),
            (FP32, BF16, LONG, True),
        ):
            constants = {
                **dict.fromkeys(extras, optional), "DIVERGENCE": name, "HAS_GRADIENT": True,
            }  # fmt: skip
            yield _case(capability, "span_kl", kind, vocab, dtype, gradient, constants)
        for dtype, vocab, k, tail in (
            *product((BF16, FP32), (kept, LONG), (64, 1024), ("bucket",)),
            *product((BF16,), (kept, LONG), (64,), ("renormalize", "none")),
        ):
            if (name, tail) == ("reverse_kl", "renormalize"):
                continue
            constants = {
                **dict.fromkeys(extras, True), "DIVERGENCE": name, "TAIL": tail, "K": k,
                "HAS_GRADIENT": True, "HAS_MASS": True, "HAS_ENTROPY": True,
            }  # fmt: skip
            yield _case(
                capability, "span_kl_topk", "span_kl_topk", vocab, dtype, dtype, constants, k
            )
    for dtype, vocab, k in product((BF16, FP16, FP32), (kept, wide, LONG), (64, 1024)):
        constants = {"CANDIDATES": backend.candidates_of(k)}
        yield _case(capability, "topk", "topk", vocab, dtype, dtype, constants, k)
    for dtype in NAMES:
        yield _case(capability, "scale", "scale", LONG, dtype, dtype, {})


def _case(
    capability: tuple[int, int],
    kernel: str,
    kind: str,
    vocab: int,
    dtype: torch.dtype,
    gradient: torch.dtype,
    constants: dict[str, Any],
    tokens: int = 0,
) -> Case:
    logits, dlogits = (torch.empty(1, vocab, dtype=x, device="meta") for x in (dtype, gradient))
    types = {
        "student": dtype,
        "teacher": dtype,
        "logits": dtype,
        "dstudent": gradient,
        "gradient": gradient,
    }
    return Case(
        capability,
        kernel,
        NAMES[dtype] + (f", gradient {NAMES[gradient]}" if gradient is not dtype else ""),
        plans.choose(kind, capability, vocab, logits, dlogits, tokens=tokens),
        constants,
        {name: f"*{NAMES[x]}" for name, x in types.items()},
    )


def compiled(case: Case) -> Usage:
    """What the kernel takes."""
    kernel = import_module(f"sadkern.backends.triton.{case.kernel}").kernel
    plan = case.plan._asdict()
    options = {"num_warps": plan.pop("num_warps"), "maxnreg": plan.pop("maxnreg")}
    constants = {x: y for x, y in plan.items() if x in kernel.arg_names} | case.constants
    if not constants.get("HAS_LABELS", True):
        constants["labels"] = None
    kinds = {**TYPE, **case.types}
    signature = {
        name: "constexpr" if name in constants else kinds.get(name, "i32")
        for name in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and name.endswith(ALIGNED))
    }
    major, minor = case.capability
    made = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", 10 * major + minor, 32),
        options={**options, **backend.OPTIONS},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        said = resources(file.name)
    found = dict(re.findall(r"(REG|STACK):(\d+)", said))
    return Usage(int(found["REG"]), int(found["STACK"]), made.metadata.shared)


def described(case: Case) -> dict[str, Any]:
    """What was compiled, for people and machines."""
    plan, constants = case.plan, case.constants
    way = f"kept, {plan.TILES} x {plan.TILE}" if plan.TILES else f"swept, {plan.TILE}"
    return {
        "chip": "sm_{}{}".format(*case.capability),
        "kernel": case.kernel,
        "logits": case.rows,
        "rows": f"{way}, {plan.num_warps} warps",
        "divergence": constants.get("DIVERGENCE"),
        "tail": constants.get("TAIL"),
        "k": constants.get("K", constants.get("CANDIDATES", 0) // 2) or None,
        "labels, softcap": constants.get("HAS_LABELS"),
    }


def markdown(found: list[dict[str, Any]]) -> str:
    """What differs only in divergence, tail, K and options is one line: the most any takes."""
    chips = list(dict.fromkeys(row["chip"] for row in found))
    groups: dict[tuple[str, ...], dict[str, list[dict[str, Any]]]] = {}
    for row in found:
        key = tuple(row[name] for name in ("kernel", "logits", "rows"))
        groups.setdefault(key, {}).setdefault(row["chip"], []).append(row)

    def cell(rows: list[dict[str, Any]]) -> str:
        if not rows:
            return ""
        most = (max(row[name] for row in rows) for name in Usage._fields)
        return "{} / {} / {}".format(*most) + f" ({len(rows)})"

    lines = [
        "# What the kernels take, compiled ahead of time",
        "",
        f"`python -m bench.aot --write` with triton {triton.__version__} and nvcc "
        f"({cuda.missing() or cuda.built()}), without a GPU.",
        "",
        "Each cell: registers / bytes of stack, both of a thread, / bytes of shared memory of a",
        "program; in brackets, of how many kernels (divergences, tails, K) that is the most.",
        "Where the stack is 0, nothing is spilled. Rows that are kept stay in registers, so many",
        "tiles of so many entries, and are read once; others are swept, tile by tile. Of the CUDA",
        "kernels the shared memory is that of the longest rows.",
        "",
        *table(
            ["kernel", "logits", "rows", *chips],
            ([*key, *(cell(of.get(chip, [])) for chip in chips)] for key, of in groups.items()),
        ),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__)
    known = ["{}{}".format(*x) for x in plans.SHARED]
    parser.add_argument("--chips", nargs="+", choices=known, default=known, help="all by default")
    parser.add_argument("--write", action="store_true", help=f"the table into {RESULTS.name}")
    parser.add_argument("--json", action="store_true", help="the table to standard output")
    parser.add_argument("--check", action="store_true", help="status 1 where a kernel would not do")
    options = parser.parse_args(arguments)
    chips = [x for x in plans.SHARED if "{}{}".format(*x) in options.chips]
    everything = [case for chip in chips for case in cases(chip)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(compiled, everything, chunksize=4)
        console = Console(stderr=True)
        usages = list(track(made, "compiling", total=len(everything), console=console))
    found = [(described(x), x.capability, y) for x, y in zip(everything, usages, strict=True)]
    found += [one for one in kernels() if one[1] in chips]
    rows = [{**row, **usage._asdict()} for row, _, usage in found]
    refused = [f"{row}: {why}" for row, chip, usage in found if (why := usage.refused(chip))]
    if options.write:
        RESULTS.write_text(markdown(rows))
    if options.json:
        print(json.dumps(rows))
    print(*refused, f"{len(rows)} kernels, {len(refused)} refused", sep="\n", file=sys.stderr)
    return int(bool(refused) and options.check)


if __name__ == "__main__":
    sys.exit(main())
