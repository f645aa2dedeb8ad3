"""A teacher on ranks of its own says what it would say here."""

from __future__ import annotations

import re
import socket
from datetime import timedelta
from typing import Any

import pytest
import torch
from small_models import RECORDS, small_model, small_tokenizer
from small_trainers import trainer_for

from sadkern import TopK, topk_logprobs
from sadkern.data import SpanCollator, inputs_of, prepare
from sadkern.sides import slots
from sadkern.teacher import DistantTeacher, Link, LinkError, OnlineTeacher, teach

BEFORE_LONG = timedelta(seconds=20)


@pytest.fixture
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def batches(packed: bool) -> list[dict[str, Any]]:
    examples = prepare(RECORDS, small_tokenizer())
    return [SpanCollator(0, packed=packed)(examples[i : i + 3]) for i in range(6)]


def asked(rank: int, address: str, students: int, teachers: int, k: int | None, dtype: Any) -> Any:
    """Of a student, what it was told; of a teacher, how often it was asked."""
    link = Link(address, rank=rank, students=students, teachers=teachers, timeout=BEFORE_LONG)
    if rank >= students:
        return teach(OnlineTeacher(small_model(1).to(dtype)), link, k=k, temperature=1.5)
    with DistantTeacher(link) as teacher:
        return [
            slots(teacher(batch["rows"], **inputs_of(batch)))
            for packed in (False, True)
            for batch in batches(packed)[rank::students]
        ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [None, 7])
@pytest.mark.parametrize(("students", "teachers"), [(1, 1), (2, 2), (3, 1), (1, 2)])
def test_it_says_what_it_would_say_here(several, address, students, teachers, k, dtype):
    count = students + teachers
    found = several.run(count, asked, address, students, teachers, k, dtype)
    here = OnlineTeacher(small_model(1).to(dtype))
    for rank, told in enumerate(found[:students]):
        mine = [b for packed in (False, True) for b in batches(packed)[rank::students]]
        for batch, tensors in zip(mine, told, strict=True):
            expected: Any = here(batch["rows"], **inputs_of(batch))
            if k is not None:
                expected = topk_logprobs(expected, k, temperature=1.5)
            for got, x in zip(tensors, slots(expected), strict=True):
                assert (got is None and x is None) or torch.equal(got, x)
    assert sum(found[students:]) == 12


def trained(rank: int, address: str, folder: str, k: int | None) -> Any:
    link = Link(address, rank=rank, students=1, timeout=BEFORE_LONG)
    if rank:
        return teach(OnlineTeacher(small_model(1)), link, k=k)
    with DistantTeacher(link) as teacher:
        return losses(folder, teacher, teacher_lookahead=2)


def losses(folder: Any, teacher: Any, **settings: Any) -> list[float]:
    trainer = trainer_for(
        folder, small_model(0), teacher, prepare(RECORDS, small_tokenizer()), max_steps=4,
        per_device_train_batch_size=3, **settings,
    )  # fmt: skip
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("k", [None, 7])
def test_a_trainer_learns_from_it(several, address, tmp_path, k):
    found, answered = several.run(2, trained, address, tmp_path / "distant", k)
    here: Any = OnlineTeacher(small_model(1))
    source = here if k is None else lambda rows, **x: topk_logprobs(here(rows, **x), k)
    assert found == losses(tmp_path / "here", source)
    assert answered >= 4  # and what it had begun ahead


def refused(rank: int, address: str) -> Any:
    link = Link(address, rank=rank, students=1, timeout=BEFORE_LONG)
    if rank:
        return teach(OnlineTeacher(small_model(1)), link, k=5, temperature=2.0)
    said = []
    with DistantTeacher(link) as teacher:
        rows = torch.tensor([0])
        for examples, temperature in (([{"input_ids": [999]}], 2.0), ([{"input_ids": [1]}], 1.0)):
            with pytest.raises(ValueError, match="expected") as raised:
                teacher.expect(examples, tokenizer=None, temperature=temperature)
            said.append(str(raised.value))
        with pytest.raises(RuntimeError) as refusal:
            teacher(rows, input_ids=torch.tensor([[999, 3]]))
        said.append(str(refusal.value))
        after = teacher(rows, input_ids=torch.tensor([[9, 3]]))
        assert isinstance(after, TopK)
    return said


def test_what_it_cannot_answer_is_refused_and_it_goes_on(several, address):
    (token, temperature, batch), answered = several.run(2, refused, address)
    assert "token id 999 is beyond the teacher's 300 embeddings" in token
    assert re.search(r"temperature=1.0, and the teacher at .* tells .* at 2.0", temperature)
    assert re.search("the teacher at .* has no answer: IndexError", batch)
    assert answered == 2


def unsendable(rank: int, address: str) -> Any:
    link = Link(address, rank=rank, students=1, timeout=BEFORE_LONG)
    if rank:
        return teach(OnlineTeacher(small_model(1)), link)
    said = []
    rows, ids = torch.tensor([0]), torch.tensor([[9, 3]])
    ones = torch.ones_like(ids)
    with DistantTeacher(link) as teacher:
        for inputs in (
            {"attention_mask": ones.bool()},
            {"attention_mask": ones, "position_ids": ones},
            {"token_type_ids": ones},
        ):
            with pytest.raises(ValueError, match="expected") as raised:
                teacher(rows, input_ids=ids, **inputs)
            said.append(str(raised.value))
        # Nothing of them has gone out that would be taken for the next.
        answer = teacher(rows, input_ids=ids, attention_mask=ones)
    return said, slots(answer)


def test_what_cannot_be_sent_is_refused_before_any_of_it_is(several, address):
    (said, got), answered = several.run(2, unsendable, address)
    assert "torch.bool cannot be sent: expected one of float32, bfloat16" in said[0]
    assert "input_ids with attention_mask and position_ids: expected at most one of" in said[1]
    assert "input_ids with token_type_ids: expected at most one of" in said[2]
    assert answered == 1
    expected = OnlineTeacher(small_model(1))(torch.tensor([0]), input_ids=torch.tensor([[9, 3]]))
    for x, y in zip(got, slots(expected), strict=True):
        assert (x is None and y is None) or torch.equal(x, y)


def malformed(rank: int, address: str, messages: list[list[int]], largest: int) -> Any:
    """What the one says to whom the other sends those numbers in place of its facts."""
    link = Link(address, rank=rank, students=1, timeout=BEFORE_LONG, largest=largest)
    if rank:
        for message in messages:
            link._wait(0, link._group.send, torch.tensor(message))
        return link.receive(0, 1)
    try:
        with pytest.raises(LinkError) as raised:
            DistantTeacher(link)
    finally:
        link.send(1, None)
    return str(raised.value)


SAME = "expected the same sadkern on both ends"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([[0]], f"the shape of a tensor in 0 numbers: {SAME}"),
        ([[1 << 50]], f"the shape of a tensor in 1125899906842624 numbers: {SAME}"),
        ([[2], [6, 3]], f"a tensor of kind 6 and shape [3]: {SAME}"),
        ([[2], [-1, 3]], f"a tensor of kind -1 and shape [3]: {SAME}"),
        ([[2], [0, -4]], f"a tensor of kind 0 and shape [-4]: {SAME}"),
        ([[2], [5, 4], [1, 2, 3, 4]], f"a tensor [4] in place of 5 numbers: {SAME}"),
        ([[1], [-1]], f"nothing in place of 5 numbers: {SAME}"),
        (
            [[2], [3, 13]],
            "a tensor of torch.float64 [13], which are 104 bytes: expected at most largest=100, or "
            "a link with a larger one",
        ),
        ([[4], [0, 0, 1 << 40, 1 << 40]], "which are 4,835,703,278,458,516,698,824,704 bytes"),
        ([[3], [0, 1 << 40, 1 << 40]], "which are 4,835,703,278,458,516,698,824,704 bytes"),
    ],
)
def test_what_is_no_message_is_told(several, address, messages, said):
    told, _ = several.run(2, malformed, address, messages, 100)
    assert told.startswith(f"rank 1 of the link at {address} sent ")
    assert said in told


def left_alone(rank: int, address: str) -> Any:
    link = Link(address, rank=rank, students=1, timeout=BEFORE_LONG)
    if rank:
        link.send(0, torch.tensor([0.0, 1.0, 1.0, 0.0, 300.0], dtype=torch.float64))
        link.send(0, torch.zeros(3, 2), None)
        return None  # and its link with it
    teacher = DistantTeacher(link)
    with pytest.raises(LinkError) as raised:
        teacher(torch.tensor([0]), input_ids=torch.tensor([[9, 3]]))
    return str(raised.value)


def test_when_it_is_gone_that_is_said(several, address):
    said, _ = several.run(2, left_alone, address)
    assert re.match(r"teacher 0 \(rank 1 of the link at .*\) does not answer: expected", said)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"address": "node0"}, "address='node0': expected host:port"),
        ({"rank": 3}, "rank=3 of 2 students and 1 teachers: .* 0 to 2"),
    ],
)
def test_a_link_that_is_none_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        Link(**{"address": "node0:1", "rank": 0, "students": 2, **given})


def test_whom_nobody_meets_says_so():
    with pytest.raises(LinkError, match="rank 0 has not met the others"):
        Link("127.0.0.1:9", rank=0, students=1, timeout=timedelta(seconds=2))
