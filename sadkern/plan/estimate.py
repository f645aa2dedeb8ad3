"""A step's memory, worked out.

Weights, gradients and optimizer states are counted; what a layer keeps for its backward pass and
what that takes is tracked of a model of two layers, a second's work, and is the same for every
other layer; the rest is what the chunk loop is known to ask for. A step's moments are then
compared, and the worst is the estimate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn

from sadkern.plan import track
from sadkern.plan.models import config_of, empty_model, linear_layers, shallow
from sadkern.plan.others import BF16, FP32, OTHERS, Sizes
from sadkern.plan.setting import Setting
from sadkern.projection import tile_bytes

FEW_TOKENS = 512  # a vocabulary whose head and loss take next to nothing
BLOCK = 256  # entries of an 8-bit optimizer's scale
LEAST = 4096  # entries of a state that is in 8 bits


class Moment(NamedTuple):
    """Bytes alive at one moment of a step."""

    name: str
    student: int
    teacher: int
    optimizer: int
    gradients: int
    activations: int
    loss: int  # tiles, the head's gradient as it is summed up, the teacher's signal

    @property
    def total(self) -> int:
        return sum(self[1:])


@dataclass(frozen=True)
class Estimate:
    """Of a setting."""

    setting: Setting
    moments: tuple[Moment, ...]

    @property
    def worst(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def peak(self) -> int:
        return self.worst.total


class Counted(NamedTuple):
    """Of a model: numbers of entries."""

    weights: tuple[int, ...]  # of each of its tensors
    matrices: tuple[tuple[int, int], ...]  # those that adapters and quantisers take
    head: int
    embedding: int  # 0 where it is the head
    layer: int  # all of one layer
    width: int
    vocab: int
    layers: int
    buffers: int  # bytes


class Layer(NamedTuple):
    """Bytes."""

    kept: int  # for its backward pass, without checkpointing
    working: int  # while that runs, of one layer, beside what others keep
    gradients: int  # of its own weights by then


def estimate(setting: Setting, device: str = "cuda", loss: str | None = None) -> Estimate:
    """On a kind of device, of which tiles depend; `loss`: of `OTHERS`, in place of sadkern's.
    ValueError: a model that is not known."""
    return Estimate(setting, tuple(_moments(setting, device, loss)))


def compared(setting: Setting) -> dict[str, Estimate]:
    """With each of `OTHERS`, which but for the first need the teacher beside them."""
    first, *rest = OTHERS
    beside = (
        setting
        if setting.teacher_source.startswith("online")
        else replace(setting, teacher_source="online")
    )
    found = {first: estimate(setting, loss=first)}
    return found | {name: estimate(beside, loss=name) for name in rest}


def largest_batch(setting: Setting, budget: int, most: int = 4096) -> int:
    """That fits a budget of bytes; 0 where none does."""
    fits = [0]
    low, high = 1, most
    while low <= high:
        batch = (low + high) // 2
        if estimate(replace(setting, batch=batch)).peak <= budget:
            fits.append(batch)
            low = batch + 1
        else:
            high = batch - 1
    return max(fits)


def _moments(x: Setting, device: str, other: str | None) -> Iterator[Moment]:
    student = counted(x.student)
    layer = _scaled(x)
    full = x.method == "full"
    adapters = () if full else _adapters(student, x.rank)
    trained = student.weights if full else adapters
    size = BF16 if full else FP32
    shares = x.shares
    weights = (BF16 * sum(student.weights) + FP32 * sum(adapters)) // shares + student.buffers
    optimizer = sum(_states(count // shares, size, x.optimizer) for count in trained)
    gradients = 0 if x.in_backward else size * sum(trained) // shares
    buckets = gradients if x.gpus > 1 and not x.fsdp else 0  # DDP's, in which they are sent
    teacher, passing = _teacher(x)
    inputs = BF16 * x.tokens * student.width  # of one layer
    kept = inputs if x.checkpointing else layer.kept
    signal, working = _loss(x, student, device)
    if other is not None:
        sizes = Sizes(x.tokens, x.rows, student.vocab, student.width, full, x.likely)
        working = OTHERS[other](sizes)
    head = BF16 * student.head if full else 0
    whole = BF16 * student.head if shares > 1 else 0

    def moment(name: str, gradients: int, activations: int, loss: int) -> Moment:
        return Moment(name, weights, teacher, optimizer, gradients + buckets, activations, loss)

    yield moment("the teacher's forward pass", 0, passing, 0)
    yield moment("the loss", 0, student.layers * kept + inputs, signal + working + whole)
    begun = 0 if x.in_backward else (head + layer.gradients) // shares
    last = student.layers * kept + layer.working
    if shares == 1:
        yield moment("the last layer's backward pass", begun, last, signal)
        done = gradients
        if gradients and full:
            done += layer.gradients - size * (student.layer + student.embedding)
        yield moment("the first layer's backward pass", done, kept + layer.working, signal)
    else:  # the gradients before are sent, the weights after fetched
        yield moment("the last layer's backward pass", begun, last + head, signal)
        done, sent = gradients, 0
        if full:
            done -= size * (2 * student.layer + student.embedding) // shares
            sent = size * student.layer
        second = 2 * kept + layer.working + sent
        yield moment("the second layer's backward pass", done, second, signal)
    yield moment("the optimizer's step", gradients, inputs, 0)


def _loss(x: Setting, student: Counted, device: str) -> tuple[int, int]:
    """Bytes of the teacher's signal, and of what the chunk loop asks for beside it."""
    signal, sides, teacher_width = 0, 1, 0
    if x.likely:
        signal = x.rows * (x.k * (4 + FP32) + 2 * FP32)
    else:
        teacher_width, sides = counted(x.teacher).width, 2
        signal = BF16 * x.rows * teacher_width
    sums = FP32 * student.head if x.method == "full" else 0
    entry = sides * FP32 + (BF16 if device == "cuda" else 0)  # else the gradient is in place
    chunk = min(x.rows, max(1, tile_bytes(device, sums) // (student.vocab * entry)))
    tiles = chunk * student.vocab * entry
    gathered = chunk * (BF16 * (student.width + teacher_width) + (FP32 + BF16) * student.width)
    hidden = 2 * BF16 * x.rows * student.width  # supervised ones and their gradient
    return signal, tiles + gathered + hidden + sums + sums // 2


def _teacher(x: Setting) -> tuple[int, int]:
    """Bytes of its weights, and of its own forward pass."""
    if x.likely:
        return 0, 0
    teacher = counted(x.teacher)
    if x.teacher_source == "hidden":
        return BF16 * teacher.head, 0
    count = sum(teacher.weights)
    if x.fsdp:  # a layer is there whole, and the next
        shared = BF16 * (count - teacher.head) // x.shares + BF16 * teacher.head + teacher.buffers
        return shared, _passing(x.teacher, x.batch, x.seq_len) + 2 * BF16 * teacher.layer
    passing = _passing(x.teacher, x.batch, x.seq_len)
    if x.teacher_source == "online":
        return BF16 * count + teacher.buffers, passing
    packed = sum(prod(shape) for shape in teacher.matrices)
    largest = max(prod(shape) for shape in teacher.matrices)
    four_bit = packed // 2 + packed // 64 + FP32 * (packed // (64 * 256))
    return BF16 * (count - packed) + four_bit + teacher.buffers, passing + BF16 * largest


def _adapters(student: Counted, rank: int) -> tuple[int, ...]:
    return tuple(rank * side for shape in student.matrices for side in shape)


def _states(count: int, size: int, optimizer: str) -> int:
    """Bytes of Adam's two, of a tensor of so many entries."""
    if optimizer == "adamw8bit" and count >= LEAST and count % BLOCK == 0:
        return 2 * (count + FP32 * (count // BLOCK) + FP32 * 256)
    return 2 * size * count


@lru_cache(64)
def counted(name: str) -> Counted:
    """A model's numbers, without its weights."""
    config = config_of(name)
    with torch.device("meta"):
        model = empty_model(config)
    layers = max((x for x in model.modules() if isinstance(x, nn.ModuleList)), key=len)
    matrices: list[Any] = [x.weight for x in linear_layers(model)]
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    return Counted(
        tuple(x.numel() for x in model.parameters()),
        tuple((x.shape[0], x.shape[1]) for x in matrices),
        head.numel(),
        0 if embedding is head else embedding.numel(),
        sum(x.numel() for x in layers[0].parameters()),
        head.shape[1],
        head.shape[0],
        len(layers),
        sum(x.nbytes for x in model.buffers()),
    )


def _scaled(x: Setting) -> Layer:
    """What a layer takes is in proportion to a batch; its weights and their gradients are not."""
    of = x.student, x.method, x.rank
    found = _layer(*of, x.in_backward, x.checkpointing, x.seq_len)
    kept, working = found.kept * x.batch, found.working * x.batch
    if x.fsdp:
        lines = _shared_layer(*of, x.checkpointing, x.seq_len, x.gpus)
        working = max(at_one + slope * (x.batch - 1) for at_one, slope in lines)
    return Layer(kept, working, found.gradients)


@lru_cache(64)
def _layer(
    student: str, method: str, rank: int, in_backward: bool, checkpointing: bool, seq_len: int
) -> Layer:
    """Of one sequence. Tracked of eight, in models of so few layers and so small a vocabulary that
    nothing else is seen."""
    batch = 8
    alike = Setting(
        student=student, method=method, rank=rank, in_backward=in_backward, optimizer="adamw",
        checkpointing=checkpointing, batch=batch, seq_len=seq_len, k=1,
    )  # fmt: skip
    two, three = (_tracked(alike, layers) for layers in (2, 3))
    kept = three.rest - two.rest
    all_of_one = BF16 * counted(student).layer
    own = two.gradients if method == "full" else 0
    if own >= all_of_one:  # the last layer's, which are there
        own -= all_of_one
    return Layer(kept // batch, (two.rest - 2 * kept) // batch, own)


@lru_cache(64)
def _shared_layer(
    student: str, method: str, rank: int, checkpointing: bool, seq_len: int, gpus: int
) -> tuple[tuple[int, int], ...]:
    """What is at work while a layer and the one before it are there whole. Bytes of one sequence,
    and how many more for each other one: few sequences have their worst moment elsewhere than many
    do, and so there are two such lines, of which the higher one holds."""
    kept = _layer(student, method, rank, False, checkpointing, seq_len).kept
    # The worst moment of three layers: the second one's backward pass, while the third's gradients
    # are on their way; or, where all is kept, the third's.
    layers, sent = (2, BF16 * counted(student).layer) if checkpointing else (3, 0)

    def working(batch: int) -> int:
        alike = Setting(
            student=student, method=method, rank=rank, in_backward=False, optimizer="adamw",
            checkpointing=checkpointing, batch=batch, seq_len=seq_len, k=1, gpus=gpus, fsdp=True,
        )  # fmt: skip
        sending = sent if method == "full" else 0
        return _tracked(alike, 3).rest - layers * kept * batch - sending

    lines = []
    for few, more in ((1, 2), (8, 16)):
        slope = (working(more) - working(few)) // (more - few)
        lines.append((working(few) - slope * (few - 1), slope))
    return tuple(lines)


def _tracked(x: Setting, layers: int) -> track.Tracked:
    config = shallow(config_of(x.student), layers)
    config.vocab_size = FEW_TOKENS
    return track.tracked(x, student=config)


@lru_cache(64)
def _passing(teacher: str, batch: int, seq_len: int) -> int:
    """Bytes of a forward pass without gradient, of which one layer is alive at a time."""
    config: Any = config_of(teacher)
    width = counted(teacher).width
    known = (getattr(config, name, None) for name in ("intermediate_size", "ffn_dim"))
    inner = next((size for size in known if size), 4 * width)
    return BF16 * batch * seq_len * (3 * width + 3 * inner)
