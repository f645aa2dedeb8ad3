"""A vocabulary on several ranks gives what the whole of it gives on one."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from precision import CASES, logits, ours, plain
from precision import DIVERGENCES as PRECISE
from several import GROUPS
from torch import Tensor

from bench.formulas import assert_as_precise
from sadkern import Projection, TopK, projection, span_kl, topk_logprobs
from sadkern.ranks import Ranks
from sadkern.sides import slots
from sadkern.span_kl import DIVERGENCES
from sadkern.tiles import Head

FORMS = {
    "logits": ("logits", "logits"),
    "projections": ("projection", "projection"),
    "logits, top-k": ("logits", "topk"),
    "projection, top-k": ("projection", "topk"),
    "projection, logits": ("projection", "logits"),
}
ROWS, VOCAB = 11, 37


class Case(NamedTuple):
    student: Any
    teacher: Any
    span_ids: Tensor
    settings: dict[str, Any]


def made(seed: int, form: str, divergence: str, dtype: torch.dtype, hard: str = "") -> Case:
    """A whole one, at random; `hard` names what makes it so."""
    rng = random.Random(f"{seed} {form} {divergence}")
    g = torch.Generator().manual_seed(rng.randrange(2**31))

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=g, dtype=torch.float64)

    def side(kind: str, like: Tensor | None = None) -> Any:
        if kind == "projection":
            bias = normal(VOCAB) if rng.random() < 0.5 else None
            cap = rng.choice((None, 2.0))
            return Projection(normal(ROWS, 5), normal(VOCAB, 5), bias, rng.choice((1.0, 0.5)), cap)
        logits = 2 * normal(ROWS, VOCAB) if like is None else like + 1e-3 * normal(ROWS, VOCAB)
        if hard == "banned":
            logits[:, 3:14] = -torch.inf  # the first rank's part of three, and more
        if hard == "saturated":
            logits[:, rng.randrange(VOCAB)] += 200
        if hard == "far":
            logits += 1e4
        return logits

    first, second = FORMS[form]
    student = side(first)
    near = student if hard == "near" else None
    teacher = side("logits" if second == "topk" else second, near)
    temperature = rng.choice((1.0, 1.7))
    tail = "bucket"
    if second == "topk":
        k = rng.choice((1, 5, VOCAB))
        tail = rng.choice(("bucket", "renormalize", "none"))
        if divergence == "reverse_kl" or hard == "banned":
            tail = "bucket"
        teacher = topk_logprobs(teacher, k, temperature=temperature)
        if rng.random() < 0.5:
            ids = teacher.ids.clone()
            ids[::2, -1] = -1
            teacher = TopK(ids, teacher.logprobs)
    labels = torch.randint(VOCAB, (ROWS,), generator=g)
    labels[::3] = -100
    if hard == "banned":
        labels = torch.where((labels >= 3) & (labels < 14), 20, labels)
    settings = {
        "divergence": divergence, "beta": 0.3, "skew": 0.2, "temperature": temperature,
        "reduction": rng.choice(("span_mean", "token_mean", "sum")), "tail": tail,
        "labels": rng.choice((None, labels)), "chunk_rows": rng.choice((None, 3)),
        "token_weights": rng.choice((None, normal(ROWS).abs().to(dtype))),
    }  # fmt: skip
    settings["ce_weight"] = 0.0 if settings["labels"] is None else 0.7
    span_ids = torch.randint(3, (ROWS,), generator=g)

    def as_dtype(x: Tensor) -> Tensor:
        return x.to(dtype) if x.dtype.is_floating_point else x

    def whole(x: Any) -> Any:
        if isinstance(x, Tensor):
            return as_dtype(x)
        held = {k: as_dtype(t) for k, t in vars(x).items() if isinstance(t, Tensor)}
        return replace(x, **held)

    return Case(whole(student), whole(teacher), span_ids, settings)


def parts(count: int, seed: int) -> list[int]:
    """Where the parts of the vocabulary begin and the last ends: uneven, none empty."""
    cuts = random.Random(seed).sample(range(1, VOCAB), count - 1)
    return [0, *sorted(cuts), VOCAB]


def part(side: Any, begin: int, end: int) -> Any:
    if isinstance(side, Projection):
        bias = None if side.bias is None else side.bias[begin:end]
        return replace(side, weight=side.weight[begin:end], bias=bias)
    return side if isinstance(side, TopK) else side[..., begin:end]


def found(case: Case, group: Any = None) -> tuple[dict[str, Tensor], list[Any]]:
    """All values, and the gradients of the student's tensors."""
    held = slots(case.student)
    for x in held:
        if x is not None:
            x.requires_grad_()
    out = span_kl(
        case.student, case.teacher, case.span_ids, backend="reference", group=group, **case.settings
    )
    out.loss.backward()
    values = {name: x.detach() for name, x in vars(out).items()}
    return values, [None if x is None else x.grad for x in held]


def on_rank(rank: int, count: int, cases: list[tuple]) -> list[Any]:
    everything = []
    for seed, *how in cases:
        whole, cuts = made(seed, *how), parts(count, seed)
        own = [part(x, *cuts[rank : rank + 2]) for x in whole[:2]]
        own = [x.clone() if isinstance(x, Tensor) else x for x in own]
        if isinstance(own[0], Projection):
            own[0] = replace(own[0], weight=own[0].weight.clone())
            if own[0].bias is not None:
                own[0] = replace(own[0], bias=own[0].bias.clone())
        everything.append(found(Case(*own, *whole[2:]), GROUPS[count]))
    return everything


def together(each: list[tuple[dict[str, Tensor], list[Any]]], whole: Case) -> list[Any]:
    """The student's gradients of all parts as one; what every rank has is the same on each."""
    grads = list(zip(*(gradients for _, gradients in each), strict=True))
    if isinstance(whole.student, Projection):
        hidden, weight, bias = grads
        for x in hidden[1:]:
            assert torch.equal(x, hidden[0])
        return [hidden[0], torch.cat(weight), None if bias[0] is None else torch.cat(bias)]
    return [torch.cat(grads[0], -1)]


def assert_same(case: tuple, each: list[Any], **tolerance: float) -> None:
    whole = made(*case)
    values, gradients = found(whole)
    for own, _ in each:
        for name, expected in values.items():
            torch.testing.assert_close(own[name], expected, equal_nan=True, **tolerance)
    for got, expected in zip(together(each, whole), gradients, strict=True):
        if expected is not None:
            torch.testing.assert_close(got, expected, equal_nan=True, **tolerance)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_form_and_divergence_is_that_of_the_whole(several, count):
    cases = [
        (seed, form, divergence, torch.float64)
        for seed, (form, divergence) in enumerate(itertools.product(FORMS, DIVERGENCES))
    ]
    each = several.run(count, on_rank, count, cases)
    for i, case in enumerate(cases):
        assert_same(case, [x[i] for x in each], rtol=1e-9, atol=1e-12)


HARD = ("banned", "saturated", "far", "near")


def test_so_it_is_for_rows_that_are_hard(several):
    """Tokens that are impossible on both sides, a whole part of them too; one that is all but
    certain; logits far from 0; sides close to each other."""
    cases = [
        (seed, form, divergence, torch.float64, hard)
        for seed, (hard, form, divergence) in enumerate(
            itertools.product(HARD, ("logits", "logits, top-k"), DIVERGENCES)
        )
    ]
    each = several.run(3, on_rank, 3, cases)
    for i, case in enumerate(cases):
        assert_same(case, [x[i] for x in each], rtol=1e-7, atol=1e-11)


def precisely_on_rank(rank: int, jobs: list[tuple], vocab: int, dtype: torch.dtype) -> list[Any]:
    cuts, everything = (0, 5, vocab // 2, vocab), []
    for case, name in jobs:
        sides = logits(case, vocab, dtype, rows=3)
        own = (x[:, cuts[rank] : cuts[rank + 1]] for x in sides)
        everything.append(ours(*own, *PRECISE[name], "auto", group=GROUPS[3]))
    return everything


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_as_precise_as_pytorch_is_on_one(several, dtype):
    vocab, jobs = 1001, list(itertools.product(set(CASES) - {"huge"}, PRECISE))
    each = several.run(3, precisely_on_rank, jobs, vocab, dtype)
    for (case, name), *found_by in zip(jobs, *each, strict=True):
        s, t = logits(case, vocab, dtype, rows=3)
        exact = ours(s.double(), t.double(), *PRECISE[name], "reference")
        torchs = plain(s, t, *PRECISE[name])
        where = f"{name} {case}"
        assert_as_precise(found_by[0][0], exact[0], torchs[0], torch.float32, what=where)
        gradient = torch.cat([dx for _, dx in found_by], -1)
        assert_as_precise(gradient, exact[1], torchs[1], dtype, what=where)


def impossible_on_rank(rank: int) -> list[Any]:
    """Of the student alone, of the teacher alone, what the second rank has."""
    everything = []
    for side in (0, 1):
        sides = [torch.tensor([[0.0, 1.0], [2.0, 0.5]], dtype=torch.float64) for _ in range(2)]
        sides[side][1] = -torch.inf
        own = [x[rank : rank + 1].clone() for x in sides]
        own[0].requires_grad_()
        out = span_kl(*own, torch.tensor([1]), group=GROUPS[2], reduction="sum")
        out.loss.backward()
        everything.append((out.loss.item(), own[0].grad))
    return everything


def test_what_only_the_student_cannot_say_is_infinitely_far(several):
    each = several.run(2, impossible_on_rank)
    assert [rank[0][0] for rank in each] == [float("inf")] * 2
    p = torch.tensor([0.0, 1.0, 2.0, 0.5], dtype=torch.float64).softmax(0)
    within = p[:2].sum()
    assert [rank[1][0] for rank in each] == pytest.approx([-within.log().item()] * 2)
    expected = torch.cat([p[:2] - p[:2] / within, p[2:]])
    torch.testing.assert_close(torch.cat([rank[1][1] for rank in each], -1)[0], expected)


def by_bytes_on_rank(rank: int, case: tuple) -> Any:
    """On a device a chunk's bytes are a share of those of the weight's gradient."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projection, "tile_bytes", lambda kind, summed: 8 * summed)
        return on_rank(rank, 3, [case])[0]


def test_ranks_have_as_many_chunks_whatever_their_parts(several):
    seed = 35  # with no `chunk_rows`
    case = (seed, "projections", "jsd", torch.float64)
    assert made(*case).settings["chunk_rows"] is None
    sizes = [end - begin for begin, end in itertools.pairwise(parts(3, seed))]
    assert max(sizes) > 2 * min(sizes)
    assert_same(case, several.run(3, by_bytes_on_rank, case), rtol=1e-9, atol=1e-12)


def inplace_on_rank(rank: int, case: tuple) -> list[Any]:
    whole, cuts = made(*case), parts(2, 0)
    s, t = (part(x, *cuts[rank : rank + 2]).clone() for x in whole[:2])
    leaf = s.requires_grad_()
    student = leaf * 1
    version = student._version
    out = span_kl(
        student, t, whole.span_ids, group=GROUPS[2], inplace=True, **whole.settings
    )  # fmt: skip
    out.loss.backward()
    return [leaf.grad, student.detach(), student._version - version]


def test_inplace_the_gradient_is_where_the_logits_were(several):
    case = (5, "logits", "jsd", torch.float64)
    each = several.run(2, inplace_on_rank, case)
    _, (expected,) = found(made(*case))
    torch.testing.assert_close(torch.cat([x[0] for x in each], -1), expected)
    for gradient, student, versions in each:
        torch.testing.assert_close(student, gradient)
        assert versions > 0


def compiled_on_rank(rank: int, case: tuple) -> list[Any]:
    whole, cuts = made(*case), parts(2, 0)
    own = [part(x, *cuts[rank : rank + 2]).clone() for x in whole[:2]]

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return span_kl(
            student, teacher, whole.span_ids, group=GROUPS[2], **whole.settings
        ).loss  # fmt: skip

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = own[0].clone().requires_grad_()
        value = function(leaf, own[1])
        value.backward()
        found.append((value.detach(), leaf.grad))
    return found


def test_compiled_it_is_the_same(several):
    for eager, compiled in several.run(2, compiled_on_rank, (4, "logits", "tvd", torch.float64)):
        for got, expected in zip(compiled, eager, strict=True):
            assert torch.equal(got, expected)


def told_on_rank(rank: int, case: tuple) -> list[tuple[str, list[int], int]]:
    """Every message, and how many tiles had been filled when it was waited for."""
    told: list[tuple[str, list[int], int]] = []
    filled = [0]
    fill = Head.fill

    def counted(self: Head, *arguments: Any) -> Tensor:
        filled[0] += 1
        return fill(self, *arguments)

    def watched(name: str) -> Any:
        send = getattr(Ranks, name)

        def sent(self: Ranks, x: Tensor) -> Any:
            wait = send(self, x)

            def waited() -> Tensor:
                told.append((name, list(x.shape), filled[0]))
                return wait()

            return waited

        return sent

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Head, "fill", counted)
        for name in ("gathered", "summed"):
            patch.setattr(Ranks, name, watched(name))
        whole, cuts = made(*case), parts(2, 0)
        own = [part(x, *cuts[rank : rank + 2]) for x in whole[:2]]
        settings = {**whole.settings, "chunk_rows": 3, "labels": None, "ce_weight": 0.0}
        found(Case(*own, torch.ones(ROWS, dtype=torch.long), settings), GROUPS[2])
    return told


def test_a_row_costs_a_few_numbers_while_the_next_chunk_is_projected(several):
    """One message a chunk and one sum of its hidden states' gradient; nothing is as wide as V."""
    for divergence, sums in (("forward_kl", 0), ("jsd", 1)):
        case = (1, "projections", divergence, torch.float64)
        for told in several.run(2, told_on_rank, case):
            assert told.pop(0)[:2] == ("gathered", [3])  # who has what
            states = [x for x in told if x[0] == "gathered"]
            assert [shape[1] for _, shape, _ in states] == [3, 3, 3, 2]
            assert {shape[0] for _, shape, _ in states} == {6 + (divergence == "forward_kl")}
            # Each is waited for when the logits of the next chunk, of both sides, are there.
            assert [filled for *_, filled in states] == [4, 6, 8, 8]
            summed = [shape for name, shape, _ in told if name == "summed"]
            assert sorted(summed) == sorted(
                [[n, 5] for n in (3, 3, 3, 2)] + sums * [[2, 3], [2, 3], [2, 3], [2, 2]]
            )


def refused_on_rank(rank: int, what: str) -> str:
    student = torch.zeros(3, 4 + rank)
    teacher, ids, more = student, torch.tensor([1, 2, 0]), {}
    if what == "tokens":
        teacher = torch.zeros(3, 5)
    elif what == "rows":
        ids = torch.tensor([1, 2, rank])
    elif what == "labels":
        more = {"labels": torch.tensor([0, 9, 0])}
    elif what == "backend":
        more = {"backend": "native"}
    with pytest.raises(ValueError, match="expected") as raised:
        span_kl(student, teacher, ids, group=GROUPS[2], **more)
    return str(raised.value)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("tokens", "rank 0 of 2 has 4 tokens of the student's vocabulary and 5 of the teacher's"),
        ("rows", "rank . has . supervised rows and rank . has ., expected the same rows"),
        ("labels", r"labels\[1\] is 9, expected -100 or 0 to 8"),
        ("backend", "backend='native' has no kernels for a vocabulary on several ranks"),
    ],
)
def test_what_does_not_fit_is_refused_by_all(several, what, said):
    for message in several.run(2, refused_on_rank, what):
        assert re.search(said, message)
