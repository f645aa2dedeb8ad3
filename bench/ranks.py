"""What ranks send one another in a step, and what it takes of memory: `python -m bench.ranks`.

Processes on this machine, gloo between them, and a model that is small: what is counted are the
messages that torch tells of, with their shapes, and the bytes that a rank sends of each as a ring
sends it: of a gathered or scattered whole of S bytes S (R - 1) / R, of a sum twice that. Nothing is
timed. `--write` keeps the table as bench/results/ranks.md; docs/parallel.md reckons with it.

- ideal: the least that has to be sent, see `training` and `shared_vocabulary`.
- memory: of a rank at the worst moment of such a `span_kl`, heads, gradients and all. Of training
  it is `sadkern plan` that says it: here it depends on how soon gloo lets go of what it has sent.
"""

from __future__ import annotations

import argparse
import logging
import math
import multiprocessing
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function

from bench.common import table, versions
from sadkern import Projection, span_kl, topk_logprobs

RESULTS = Path(__file__).parent / "results" / "ranks.md"
HEADER = ("what", "ranks", "messages a step", "sent", "ideal", "sent / ideal", "memory")
WIDTH, TEACHERS_WIDTH, LAYERS, VOCAB = 128, 192, 4, 8000
SEQUENCES, LENGTH = 2, 128  # of each rank; where ranks share the vocabulary, of all together
ROWS = SEQUENCES * LENGTH
SIZES = {"float": 4, "long int": 8}
# By kind of message, the bytes that a rank of so many sends, of the bytes that it gives.
SENT: dict[str, Callable[[int, int], float]] = {
    "all_gather": lambda own, ranks: own * (ranks - 1),
    "reduce_scatter": lambda own, ranks: own * (ranks - 1) / ranks,
    "all_reduce": lambda own, ranks: 2 * own * (ranks - 1) / ranks,
    "broadcast": lambda own, ranks: own,
}


@dataclass
class Counted:
    """A step's: kinds of messages, bytes that a rank sends, bytes of memory at the worst moment."""

    messages: Counter[str]
    sent: float
    memory: int


def counted(prepare: Callable[..., Any], *arguments: Any) -> tuple[Counted, float]:
    """Of the step that is prepared, the third time: the first two make what is there to stay. And
    what has to be sent for it."""
    with profile(
        activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True
    ) as seen:
        step, ideal = prepare(*arguments)
        step()
        step()
        with record_function("counted"):
            step()
    given: list[tuple[str, int]] = []
    scattered: list[int] = []
    events = sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    begin = next(event.start_ns() for event in events if event.name() == "counted")
    now = most = 0
    for event in events:
        name, counts = event.name(), event.start_ns() >= begin
        if name == "[memory]":
            now += event.nbytes()
            most = max(most, now if counts else 0)
        elif counts and name.startswith("gloo:"):
            given.append((next(kind for kind in SENT if kind in name), _bytes(event)))
        elif counts and name == "c10d::_reduce_scatter_base_":
            scattered.append(_bytes(event, 1))
    for own in scattered:  # which gloo does by a sum
        given[given.index(("all_reduce", own))] = ("reduce_scatter", own)
    sent = sum(SENT[kind](own, dist.get_world_size()) for kind, own in given)
    return Counted(Counter(kind for kind, _ in given), sent, most), ideal


def _bytes(event: Any, first: int = 0) -> int:
    """Of the tensors that a rank gives."""
    shapes = event.shapes()[first : first + 1] if first else event.shapes()
    return sum(map(math.prod, shapes)) * SIZES[event.dtypes()[first]]


class Batch:
    """Of one rank: tokens, and what is supervised."""

    def __init__(self, seed: int):
        g = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(1, VOCAB, (SEQUENCES, LENGTH), generator=g)
        self.kinds = torch.randint(3, (ROWS,), generator=g)
        self.rows = self.kinds.nonzero().squeeze(-1)


def model(width: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=width, intermediate_size=3 * width,
            num_hidden_layers=LAYERS, num_attention_heads=4, max_position_embeddings=LENGTH,
        )
    )  # fmt: skip


def training(wrap: str) -> tuple[Callable[[], object], float]:
    """A step of a student beside its teacher, and what has to be sent for it."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    from sadkern.forward import head_projection, supervised_loss
    from sadkern.plan.sharded import known_of
    from sadkern.teacher import OnlineTeacher
    from sadkern.train.setup import shard_teacher

    student, ranks = model(WIDTH), dist.get_world_size()
    projection, teacher = head_projection(student), OnlineTeacher(model(TEACHERS_WIDTH))
    wrapped: Any = student
    weights = bytes_of(student)
    ideal = 0.0
    if wrap == "ddp":
        wrapped = DistributedDataParallel(student)
        ideal = 2 * weights
    elif wrap == "fsdp":
        # A layer is gathered for the forward pass and again for the backward, and the embedding
        # with it; the head is there until its gradient is. The teacher's layers come once.
        tail = bytes_of(student.lm_head) + bytes_of(student.model.norm)
        teachers = bytes_of(teacher.model) - bytes_of(teacher.model.lm_head)
        ideal = 2 * (weights - tail) + tail + weights + teachers
        known = known_of(init_device_mesh("cpu", (ranks,), mesh_dim_names=("ranks",)))
        fsdp2_prepare_model(known, student)
        shard_teacher(teacher, known)
    batch = Batch(dist.get_rank())
    kinds = batch.kinds[batch.rows]

    def step() -> None:
        signal = teacher(batch.rows, input_ids=batch.ids)
        counts = [float((kinds == kind).sum()) for kind in (1, 2)]

        def loss_of(own: Any) -> Tensor:
            return span_kl(own, signal, kinds, num_tokens=counts, chunk_rows=64).loss

        supervised_loss(wrapped, batch.rows, loss_of, projection, input_ids=batch.ids).backward()
        student.zero_grad()

    return step, ideal * (ranks - 1) / ranks


def shared_vocabulary(settings: dict[str, Any], state: int, sums: int) -> Any:
    """`span_kl` on heads of which each rank has a part. What has to be sent: of a row `state`
    numbers to every other rank, `sums` to be added up, and the gradient of its hidden states."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    g = torch.Generator().manual_seed(0)
    hidden, theirs = (torch.randn(ROWS, d, generator=g) for d in (WIDTH, TEACHERS_WIDTH))
    heads = [torch.randn(VOCAB, d, generator=g) for d in (WIDTH, TEACHERS_WIDTH)]
    teacher: Any = Projection(theirs, heads[1])
    if settings.get("teacher") == "topk":
        teacher = topk_logprobs(teacher, 64)
    own, others = (x.tensor_split(ranks)[rank].clone() for x in heads)
    own.requires_grad_()
    if isinstance(teacher, Projection):
        teacher = Projection(theirs, others)
    kinds = Batch(0).kinds
    rows = int((kinds != 0).sum())
    hidden.requires_grad_()
    given = {name: x for name, x in settings.items() if name not in ("teacher", "labels")}
    if settings.get("labels"):
        labels = torch.randint(VOCAB, (ROWS,), generator=g)
        given |= {"labels": labels, "ce_weight": 0.5}

    def step() -> None:
        group = dist.group.WORLD
        out = span_kl(Projection(hidden, own), teacher, kinds, group=group, chunk_rows=64, **given)
        out.loss.backward()
        hidden.grad = own.grad = None

    numbers = ranks * state + 2 * (sums + WIDTH)
    return step, 4 * rows * numbers * (ranks - 1) / ranks


def bytes_of(module: Any) -> int:
    return sum(x.nbytes for x in module.parameters())


WAYS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "alone": (training, ("",)),
    "DDP": (training, ("ddp",)),
    "FSDP2, teacher too": (training, ("fsdp",)),
    "vocabulary, forward KL": (shared_vocabulary, ({}, 7, 0)),
    "vocabulary, reverse KL and hard labels": (
        shared_vocabulary, ({"divergence": "reverse_kl", "labels": True}, 13, 0),
    ),
    "vocabulary, jsd": (shared_vocabulary, ({"divergence": "jsd"}, 6, 2)),
    "vocabulary, forward KL, top-64 teacher": (shared_vocabulary, ({"teacher": "topk"}, 5, 2)),
}  # fmt: skip


def _serve(rank: int, ranks: int, path: str, results: Any) -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
    for name, (prepare, arguments) in WAYS.items():
        found = counted(prepare, *arguments)
        if not rank:
            results.put((name, *found))
    dist.barrier()
    dist.destroy_process_group()


def measured(ranks: int) -> list[tuple[str, Counted, float]]:
    """Of every way, by that many processes."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, f"{folder}/store", results)
        processes = [context.Process(target=_serve, args=(i, *arguments)) for i in range(ranks)]
        for process in processes:
            process.start()
        found = [results.get(timeout=60) for _ in track(WAYS, f"{ranks} ranks")]
        for process in processes:
            process.join()
    return found


def lines(found: dict[int, list[tuple[str, Counted, float]]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name in WAYS:
        for ranks, ways in found.items():
            one, ideal = next((x, ideal) for own, x, ideal in ways if own == name)
            if name == "alone" and ranks != min(found):
                continue
            messages = ", ".join(f"{n} {kind}" for kind, n in sorted(one.messages.items()))
            rows.append((
                name, "1" if name == "alone" else str(ranks), messages or "none",
                f"{one.sent / 1e3:.0f} kB", f"{ideal / 1e3:.0f} kB",
                f"{one.sent / ideal:.3f}" if ideal else "",
                f"{one.memory / 1e6:.1f} MB" if WAYS[name][0] is shared_vocabulary else "",
            ))  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ranks",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="numbers of processes")
    parser.add_argument("--write", action="store_true", help=f"keep the table as {RESULTS.name}")
    arguments = parser.parse_args()
    if min(arguments.ranks) < 2:
        parser.error(f"--ranks {min(arguments.ranks)}: expected 2 or more, of which one sends")
    found = {ranks: measured(ranks) for ranks in arguments.ranks}
    rows = lines(found)
    shown = Table(*HEADER, box=SIMPLE_HEAD)
    for line in rows:
        shown.add_row(*line)
    Console().print(shown)
    if arguments.write:
        RESULTS.write_text(document(rows))


SAYS = f"""\
# What ranks send one another in a step

`python -m bench.ranks --write` with {{used}}: counted between processes on one machine.

A student of {LAYERS} layers, {WIDTH} wide, and a teacher {TEACHERS_WIDTH} wide, V = {VOCAB}, in
fp32; {SEQUENCES} sequences of {LENGTH} tokens on each rank, two thirds of them supervised, in
chunks of 64 rows. Where ranks share the vocabulary it is `span_kl` alone, of both heads, on the
same rows. Sent: by a rank, as in a ring. Memory: of a rank at the worst moment of such a `span_kl`,
heads, gradients and all; what a rank takes in training `sadkern plan` says, since here it depends
on how soon gloo lets go of what it has sent.

"""


def document(found: list[tuple[str, ...]]) -> str:
    used = ", ".join(f"{name} {v}" for name, v in versions(["torch", "accelerate"]).items())
    return SAYS.format(used=used) + "\n".join(table(HEADER, found)) + "\n"


if __name__ == "__main__":
    main()
