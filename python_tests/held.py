"""Sides as users hold them, for tests: made alike whatever their kind, and turned into others."""

from __future__ import annotations

import itertools

import torch

from sadkern import Projection, TopK, topk_logprobs

STUDENTS = ("logits", "projection")
TEACHERS = ("logits", "projection", "topk")
COMBINATIONS = list(itertools.product(STUDENTS, TEACHERS))

# A batch of spans and token weights.
IDS = torch.tensor([[1, 2, 0, 1, 1], [0, 0, 2, 2, 1], [2, 1, 1, 0, 2]])
WEIGHTS = torch.tensor([[1.0, 0.5, 9.0, 2.0, 1.0], [3.0, 1.0, 1.0, 0.25, 1.0], [1.0] * 5])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make(kind, rows, vocab, generator, *, width=6, softcap=4.0, k=5, dtype=torch.float32):
    """One side of `rows` (a shape), with logits of a like spread whatever it is."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    if kind == "logits":
        return 2 * normal(*rows, vocab)
    if kind == "topk":
        return topk_logprobs(2 * normal(*rows, vocab).float(), k)
    weight = 2 / width**0.5 * normal(vocab, width)
    return Projection(normal(*rows, width), weight, normal(vocab), 1.3, softcap)


def likely(teacher, k):
    """The TopK of `teacher` [N, V] in plain PyTorch, in fp32."""
    lp = teacher.double().log_softmax(-1)
    values, ids = lp.topk(k, -1)
    mass = lp.exp().scatter(-1, ids, 0.0).sum(-1)
    return TopK(ids.int(), values.float(), mass.float())


def mapped(side, f):
    """The same side of `f` of its tensors; a TopK is what it is."""
    if isinstance(side, TopK):
        return side
    if isinstance(side, torch.Tensor):
        return f(side)
    tensors = (None if x is None else f(x) for x in (side.hidden, side.weight, side.bias))
    return Projection(*tensors, side.scale, side.softcap)


def leaf(side, dtype=None):
    """The same with a gradient to be had, perhaps in another dtype."""
    return mapped(side, lambda x: x.detach().to(dtype or x.dtype).clone().requires_grad_())


def in_dtype(side, dtype):
    return mapped(side, lambda x: x.detach().to(dtype))


def leaves(side):
    """Its tensors that can have a gradient."""
    if isinstance(side, torch.Tensor):
        return [side]
    return [x for x in (side.hidden, side.weight, side.bias) if x is not None]


def gradients(side):
    return [x.grad for x in leaves(side)]
