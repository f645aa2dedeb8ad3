"""A teacher on ranks of its own: some processes teach, others train, each kind with whatever groups
it has for itself, and between both a link beside those.

    # on the one that teaches
    link = Link("node0:29600", rank=2, students=2)
    teach(OnlineTeacher(model), link)

    # on each of the two that train
    link = Link("node0:29600", rank=rank, students=2)
    with DistantTeacher(link) as teacher:
        SADTrainer(student, teacher, ...).train()

What goes over the link are tokens one way and the other way hidden states, with the teacher's head
once at the beginning, or the likeliest tokens alone. It is TCP, from host to host: a teacher may be
on another kind of device. With `teacher_lookahead` it works while the student is trained.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from sadkern.sides import Projection, Side, TopK, moved
from sadkern.teacher.heads import Heads
from sadkern.teacher.online import OnlineTeacher, check_tokens
from sadkern.teacher.source import Example
from sadkern.topk import topk_logprobs

logger = logging.getLogger(__name__)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64)
TIMEOUT = timedelta(minutes=10)
LARGEST = 16 << 30
DIMENSIONS = 8  # of a tensor, at most
FIELDS = ("attention_mask", "position_ids")  # of a batch, beside its tokens, at most one


class LinkError(RuntimeError):
    """The other end is not there, or no longer, or does not say what is expected of it."""


class Link:
    """Between ranks 0 .. students - 1, which train, and those that teach, which come after them.
    Student i is taught by the (i mod teachers)-th.

    Args:
        address: "host:port" at which the first teacher waits for all others.
        rank: this process's among both kinds.
        students: how many train.
        teachers: how many teach.
        timeout: how long one waits for another, from the first meeting to the last message.
        largest: bytes of a tensor that another may send, for which memory is taken before it comes;
            the teacher's head, and hidden states of a batch's rows, are to fit.

    ValueError: a rank or an address that is none. LinkError: the others have not come in time.
    """

    def __init__(
        self, address: str, *, rank: int, students: int, teachers: int = 1,
        timeout: timedelta = TIMEOUT, largest: int = LARGEST,
    ):  # fmt: skip
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"address={address!r}: expected host:port, such as node0:29600")
        if students < 1 or teachers < 1 or not 0 <= rank < students + teachers:
            raise ValueError(
                f"rank={rank} of {students} students and {teachers} teachers: expected one of each "
                f"at least, and a rank of 0 to {students + teachers - 1}"
            )
        self.address, self.rank, self.students, self.teachers = address, rank, students, teachers
        self.largest = largest
        try:
            store = dist.TCPStore(
                host, int(port), None, rank == students, timeout, wait_for_workers=False
            )
            self._group: Any = dist.ProcessGroupGloo(store, rank, students + teachers, timeout)
        except Exception as error:
            raise LinkError(
                f"rank {rank} has not met the others at {address}: expected {students} students "
                f"and {teachers} teachers within {timeout} ({error})"
            ) from None

    @property
    def own_students(self) -> list[int]:
        """Of a rank that teaches."""
        return list(range(self.rank - self.students, self.students, self.teachers))

    @property
    def own_teacher(self) -> int:
        """Of a rank that trains."""
        return self.students + self.rank % self.teachers

    def send(self, other: int, *tensors: Tensor | None) -> None:
        """To rank `other`, from wherever they are. ValueError: one is of a dtype that is none of
        `DTYPES`, and nothing was sent."""
        for x in tensors:
            if x is not None and x.dtype not in DTYPES:
                known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
                raise ValueError(f"a tensor of {x.dtype} cannot be sent: expected one of {known}")
        for x in tensors:
            shape = [-1] if x is None else [DTYPES.index(x.dtype), *x.shape]
            self._wait(other, self._group.send, torch.tensor([len(shape)]))
            self._wait(other, self._group.send, torch.tensor(shape))
            if x is not None and x.numel():
                # (As bytes, since gloo does not know every type.)
                flat = x.detach().cpu().contiguous().flatten().view(torch.uint8)
                self._wait(other, self._group.send, flat)

    def receive(self, other: int, count: int) -> list[Tensor | None]:
        """What rank `other` has sent, so many. LinkError: it is no message of this kind of link."""
        found: list[Tensor | None] = []
        for _ in range(count):
            (size,) = self._numbers(other, 1)
            if not 1 <= size <= 1 + DIMENSIONS:
                self._refuse(other, f"the shape of a tensor in {size} numbers")
            kind, *sizes = self._numbers(other, size)
            if kind == -1 and not sizes:
                found.append(None)
                continue
            if not 0 <= kind < len(DTYPES) or any(length < 0 for length in sizes):
                self._refuse(other, f"a tensor of kind {kind} and shape {sizes}")
            # (Of one without elements too, since torch multiplies what else it has.)
            size = math.prod(max(length, 1) for length in sizes) * DTYPES[kind].itemsize
            if size > self.largest:
                what = f"a tensor of {DTYPES[kind]} {sizes}, which are {size:,} bytes"
                self._refuse(
                    other, what, f"at most largest={self.largest:,}, or a link with a larger one"
                )
            x = torch.empty(sizes, dtype=DTYPES[kind])
            if x.numel():
                self._wait(other, self._group.recv, x.flatten().view(torch.uint8))
            found.append(x)
        return found

    def receive_numbers(self, other: int, count: int) -> list[float]:
        """A tensor `[count]` that rank `other` has sent. LinkError: it is another."""
        (x,) = self.receive(other, 1)
        if x is None or x.shape != (count,):
            got = "nothing" if x is None else f"a tensor {list(x.shape)}"
            self._refuse(other, f"{got} in place of {count} numbers")
        return x.tolist()

    def _numbers(self, other: int, count: int) -> list[int]:
        numbers = torch.zeros(count, dtype=torch.int64)
        self._wait(other, self._group.recv, numbers)
        return numbers.tolist()

    def _refuse(
        self, other: int, what: str, expected: str = "the same sadkern on both ends"
    ) -> NoReturn:
        raise LinkError(
            f"rank {other} of the link at {self.address} sent {what}: expected {expected}"
        )

    def _wait(self, other: int, operation: Callable[..., Any], x: Tensor) -> None:
        try:
            operation([x], other, 0).wait()
        except RuntimeError as error:
            who = (
                f"student {other}" if other < self.students else f"teacher {other - self.students}"
            )
            raise LinkError(
                f"{who} (rank {other} of the link at {self.address}) does not answer: expected it "
                f"to run until all are done ({str(error).splitlines()[0]})"
            ) from None


def teach(
    teacher: OnlineTeacher, link: Link, *, k: int | None = None, temperature: float = 1.0
) -> int:
    """Answers this rank's students until each has dismissed it; how many batches that were.

    `k`: None has them make the teacher's logits from its hidden states, exactly; else they are
    told its `k` likeliest tokens at `temperature`. A batch that it cannot answer is refused to the
    student that sent it, and nobody else hears of it.
    """
    head = teacher.head
    facts = [float(k or 0), temperature, head.scale, head.softcap or 0.0, teacher.embeddings]
    for student in link.own_students:
        link.send(student, torch.tensor(facts, dtype=torch.float64))
        if k is None:
            link.send(student, head.weight, head.bias)
    left, answered = link.own_students, 0
    while left:
        for student in list(left):
            (field,) = link.receive_numbers(student, 1)
            if field < 0:
                left.remove(student)
                continue
            rows, ids, other = link.receive(student, 3)
            try:
                answer = _answer(teacher, rows, ids, other, int(field), k, temperature)
            except Exception as error:
                logger.exception("a batch of student %d has no answer", student)
                said = f"{type(error).__name__}: {error}".encode()
                answer = [torch.tensor(list(said), dtype=torch.int64), *[None] * 5]
            link.send(student, *answer)
            answered += 1
    return answered


def _answer(
    teacher: OnlineTeacher, rows: Any, ids: Any, other: Tensor | None, field: int,
    k: int | None, temperature: float,
) -> list[Tensor | None]:  # fmt: skip
    """Nothing went wrong, and the tensors of the signal."""
    device = teacher.head.weight.device
    inputs = {"input_ids": ids.to(device)}
    if other is not None:
        inputs[FIELDS[field]] = other.to(device)
    signal = teacher(rows.to(device), **inputs)
    if k is None:
        return [None, signal.hidden, *[None] * 4]
    with torch.no_grad():
        return [None, *vars(topk_logprobs(signal, k, temperature=temperature)).values()]


class DistantTeacher:
    """The teacher at the other end of a `link`, of a rank that trains: a `TeacherSource`.

    LinkError: it does not answer. RuntimeError: it has refused a batch, and says why. ValueError:
    a batch cannot be sent, and was not.
    """

    def __init__(self, link: Link):
        self.link = link
        facts = link.receive_numbers(link.own_teacher, 5)
        k, self.temperature, scale, softcap, embeddings = facts
        self.k, self.embeddings = int(k), int(embeddings)
        if not self.k:
            weight, bias = link.receive(link.own_teacher, 2)
            assert weight is not None
            nothing = weight.new_empty(0, weight.shape[1])
            self._heads = Heads(Projection(nothing, weight, bias, scale, softcap or None))

    def __call__(self, rows: Tensor, **inputs: Any) -> Side:
        """See `TeacherSource`."""
        beside = [name for name in inputs if name != "input_ids"]
        if len(beside) > 1 or not {*beside} <= {*FIELDS}:
            raise ValueError(
                f"a distant teacher is sent input_ids with {' and '.join(beside)}: expected at "
                f"most one of {' and '.join(FIELDS)} beside them"
            )
        field = FIELDS.index(beside[0]) if beside else 0
        other = inputs.get(FIELDS[field])
        self.link.send(
            self.link.own_teacher, torch.tensor([field]), rows, inputs["input_ids"], other
        )
        refusal, *found = self.link.receive(self.link.own_teacher, 6)
        if refusal is not None:
            said = bytes(refusal.tolist()).decode(errors="replace")
            raise RuntimeError(f"the teacher at {self.link.address} has no answer: {said}")
        first = found[0]
        assert first is not None
        if self.k:
            ids, logprobs, *rest = found
            assert ids is not None
            assert logprobs is not None
            return moved(TopK(ids, logprobs, *rest), rows.device)
        return self._heads.of(first.to(rows.device))

    def expect(self, examples: Sequence[Example], *, tokenizer: Any, temperature: float) -> None:
        """ValueError: a token that it has no embedding of, or another temperature than its own."""
        check_tokens(examples, self.embeddings, "teacher")
        if self.k and temperature != self.temperature:
            raise ValueError(
                f"temperature={temperature}, and the teacher at {self.link.address} tells its "
                f"likeliest tokens at {self.temperature}: expected the same"
            )

    def dismiss(self) -> None:
        """Lets the teacher go: this student asks nothing any more."""
        self.link.send(self.link.own_teacher, torch.tensor([-1]))

    def __enter__(self) -> DistantTeacher:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(LinkError):  # it has gone already, of which its last answer told
            self.dismiss()
