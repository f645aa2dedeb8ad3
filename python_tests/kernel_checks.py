"""Checks of a kernel that do not ask which."""

from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from held import IDS, WEIGHTS, generator, gradients, in_dtype, leaf, leaves, likely
from precision import DIVERGENCES, logits, ours, plain

from bench.formulas import assert_as_precise, coarse_in_torch, divergence_of_logs, logits_in_torch
from sadkern import TopK, span_kl, topk_logprobs

LAYOUTS = ("sliced", "transposed", "odd offset", "odd rows", "entries", "4d")


def precision_of_logits(backend, name, case, vocab, dtype, rows=3):
    """By the rule, of values and gradients."""
    if case == "huge":
        # About 1e4 each error is a few roundings: the largest of many rows are compared, of short
        # ones.
        vocab, rows = 37, 32
    s, t = logits(case, vocab, dtype, rows=rows)
    got = ours(s, t, *DIVERGENCES[name], backend)
    exact = ours(s.double(), t.double(), *DIVERGENCES[name], "reference")
    torchs = plain(s, t, *DIVERGENCES[name])
    assert_as_precise(got[0], exact[0], torchs[0], torch.float32)
    if name == "tvd" and case == "huge":
        return  # p = q = 1/2 up to rounding: at its kink
    assert_as_precise(got[1], exact[1], torchs[1], dtype)


def everything_at_once(backend, vocab, dtype, teacher, inplace):
    """Labels, temperature, weights, padding; and rows that are not supervised, whose logits are not
    to be read."""
    s, t = logits("random", vocab, dtype, rows=12)
    wide = torch.nn.functional.pad(s, (0, 13), value=3.0)
    ids = torch.tensor([[1, 2, 0, 1], [0, 2, 2, 1], [1, 0, 1, 2]])
    labels = torch.randint(0, vocab, (3, 4))
    labels[0, 0] = -100
    wide[ids.view(-1) == 0] = torch.nan
    if teacher == "topk":
        t, wide = likely(t, 9), wide[:, :vocab]
        t = TopK(t.ids.view(3, 4, 9), t.logprobs.view(3, 4, 9), t.tail_mass.view(3, 4))
    else:
        t = t.view(3, 4, vocab)
    options = {
        "divergence": "reverse_kl", "temperature": 1.7, "labels": labels, "ce_weight": 0.6,
        "token_weights": torch.rand(3, 4),
    }  # fmt: skip
    results = []
    for name, wanted in ((backend, dtype), ("reference", torch.float64), ("reference", dtype)):
        leaf = wide.to(wanted).view(3, 4, -1).requires_grad_()
        other = t.to(wanted) if isinstance(t, torch.Tensor) else t
        out = span_kl(
            leaf * 1.0, other, ids, backend=name, inplace=inplace and name == backend, **options
        )
        out.loss.backward()
        results.append((out, leaf.grad))
    (got, gradient), (exact, exact_gradient), (torchs, _) = results
    for field in (
        "loss", "span_loss", "per_token", "cross_entropy", "teacher_entropy", "tail_mass",
    ):  # fmt: skip
        values = (getattr(x, field) for x in (got, exact, torchs))
        assert_as_precise(*values, torch.float32, what=field)
    assert torch.equal(got.agreement, exact.agreement)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=eps + 1e-5, atol=1e-7)
    assert not gradient[ids == 0].any()


def any_layout(backend, layout, dtype, topk=True):
    """Rows anywhere give what they give side by side, to the last bit."""
    s, t = (x.view(2, 2, 3, 64) for x in logits("random", 64, dtype, rows=12))
    views = {
        "sliced": lambda x: torch.cat([x, x], 2)[:, :, :3],
        "transposed": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
        "odd offset": lambda x: torch.nn.functional.pad(x, (1, 1))[..., 1:-1],
        "odd rows": lambda x: torch.nn.functional.pad(x, (0, 1))[..., :-1],
        "entries": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "4d": lambda x: torch.cat([torch.cat([x, x], 2)[:, :, :3]] * 2, 1)[:, :2],
    }
    ids = torch.tensor([1, 2, 0] * 4).view(2, 2, 3)
    teacher = topk_logprobs(t, 5, backend=backend)
    for side in (t, teacher) if topk else (t,):
        plain_leaf = s.clone().requires_grad_()
        span_kl(plain_leaf, side, ids, backend=backend).loss.backward()
        for inplace in (False, True):
            leaf = s.clone().requires_grad_()
            other = views[layout](side) if isinstance(side, torch.Tensor) else side
            span_kl(
                views[layout](leaf) * 1, other, ids, backend=backend, inplace=inplace
            ).loss.backward()
            assert torch.equal(leaf.grad, plain_leaf.grad)
    moved = topk_logprobs(views[layout](t), 5, backend=backend)
    for got, expected in zip(vars(moved).values(), vars(teacher).values(), strict=True):
        assert torch.equal(got, expected)


def far_rows(backend):
    """Rows 2^31 + 5 entries apart: only their addresses are that large."""
    stride, vocab = 2**31 + 5, 8
    s, t = logits("random", vocab, torch.bfloat16, rows=3)
    # Memory that is there when it is touched: three pages.
    backing = torch.UntypedStorage._new_shared(2 * (2 * stride + vocab))
    far = torch.empty(0, dtype=torch.bfloat16).set_(backing, 0, (3, vocab), (stride, 1))
    far.copy_(s)
    ids = torch.tensor([1, 2, 1])
    expected, found = s.clone(), topk_logprobs(t, 3, backend=backend)
    out = span_kl(expected, t, ids, inplace=True, backend=backend)
    assert torch.equal(span_kl(far, t, ids, inplace=True, backend=backend).loss, out.loss)
    assert torch.equal(far, expected)
    far.copy_(t)
    assert torch.equal(span_kl(s, far, ids, backend=backend).loss, out.loss)
    assert torch.equal(topk_logprobs(far, 3, backend=backend).ids, found.ids)


def launched_where_tensors_are(backend, monkeypatch, watch):
    """Kernels are launched on the current device: it is that of their tensors meanwhile.
    `watch(launching)` has `launching` called at every launch. Returns how many there were."""
    current, launches = [], []

    @contextmanager
    def device_of(tensor):
        current.append(tensor.shape)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    watch(lambda: launches.append(current[:]))
    s, t = logits("random", 64, torch.bfloat16, rows=3)
    leaf = s.clone().requires_grad_()
    (2 * span_kl(leaf, t, torch.tensor([1, 2, 0]), backend=backend).loss).backward()
    teacher = topk_logprobs(t, 5, backend=backend)
    if backend == "triton":
        span_kl(s, teacher, torch.tensor([1, 2, 0]), backend=backend)
    assert launches
    assert all(at == [s.shape] for at in launches)
    return len(launches)


def check_selection(x, k, found, temperature=1.0):
    """Against a stable sort, and float64."""
    ids = torch.sort(x.double(), dim=-1, descending=True, stable=True).indices[..., :k]
    assert torch.equal(found.ids.long(), ids)
    lp = (x.double() / temperature).log_softmax(-1)
    plain = (x.float() / temperature).log_softmax(-1)
    exact = {
        "logprobs": (lp.gather(-1, ids), plain.gather(-1, ids)),
        "tail_mass": tuple(y.exp().scatter(-1, ids, 0).sum(-1) for y in (lp, plain)),
        "entropy": tuple(-torch.where(y.exp() > 0, y.exp() * y, 0.0).sum(-1) for y in (lp, plain)),
        "lse": tuple((y / temperature).logsumexp(-1) for y in (x.double(), x.float())),
    }
    for name, (truth, torchs) in exact.items():
        assert_as_precise(getattr(found, name), truth, torchs, torch.float32)


def check_ties(x, k, found):
    """Against a stable sort, and what that leaves."""
    ids = torch.sort(x, dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(found.ids.long(), ids)
    p = x.double().softmax(-1)
    torch.testing.assert_close(
        found.tail_mass.double(), p.scatter(-1, ids, 0.0).sum(-1), rtol=1e-5, atol=1e-7
    )


def loss_in_torch(student, teacher, ids, labels, weights, name, mix, tail, temperature, ce_weight):
    """The whole formula as one would write it, with `reduction="sum"`; autograd does the rest."""
    raw = logits_in_torch(student)
    lq = F.log_softmax(raw / temperature, -1)
    if isinstance(teacher, TopK):
        lq, lp = coarse_in_torch(lq, teacher, tail)
    else:
        lp = F.log_softmax(logits_in_torch(teacher).to(raw.dtype) / temperature, -1)
    value = divergence_of_logs(lq, lp, name, mix)
    hard = F.cross_entropy(raw.flatten(0, -2), labels.flatten(), reduction="none").view_as(value)
    return ((ids != 0) * weights.to(value.dtype) * (value + ce_weight * hard)).sum()


def check_gradients(student, teacher, name, *, tail="bucket", temperature=1.0, backend="native",
                    ids=IDS, weights=WEIGHTS):  # fmt: skip
    """Of every tensor of the student: error against float64 <= 2x the same in PyTorch + eps."""
    divergence, mix = DIVERGENCES[name]
    vocab = logits_in_torch(student).shape[-1]
    labels = torch.randint(0, vocab, ids.shape, generator=generator(9))
    labels[0, 0] = -100

    def in_torch(dtype):
        s = leaf(student, dtype)
        t = in_dtype(teacher, dtype)
        loss_in_torch(
            s, t, ids, labels, weights, divergence, mix, tail, temperature, 0.3
        ).backward()
        return gradients(s)

    got = leaf(student)
    span_kl(
        got, teacher, ids, divergence=divergence, beta=mix, skew=mix, reduction="sum", tail=tail,
        temperature=temperature, token_weights=weights, labels=labels, ce_weight=0.3,
        chunk_rows=4, backend=backend,
    ).loss.backward()  # fmt: skip
    dtype = leaves(student)[0].dtype
    for mine, exact, torchs in zip(
        gradients(got), in_torch(torch.float64), in_torch(dtype), strict=True
    ):
        assert mine.dtype == dtype
        assert_as_precise(mine, exact, torchs, dtype)
