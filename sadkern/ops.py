"""The torch.library operators: schemas, fakes and autograd, and the only door to the backends.

    sadkern::span_kl        rows -> loss, diagnostics and the gradients, out of place
    sadkern::span_kl_       the same, the gradient over the student's logits
    sadkern::topk           rows -> a teacher's most likely tokens
    sadkern::sample         rows -> tokens drawn from a teacher, weighted
    sadkern::with_gradient  a loss whose gradient is already there: the one autograd rule
    sadkern::scale_         what that rule's backward does

A kernel computes loss and gradient together, so what needs a gradient is not differentiated: it is
attached. Checks that need the values of tensors stand here, since an operator's body runs under
`torch.compile` too. A side comes packed, see `sadkern.sides`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sadkern import backends, projection, reduction, sampling, sides
from sadkern.ranks import Ranks
from sadkern.sides import Projection, Side, TopK

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Tensors = list[Tensor | None]

# What both forms of the operator take after their own first arguments, and what both give.
ARGUMENTS = (
    "str teacher_kind, Tensor?[] teacher, float[] teacher_numbers, Tensor span_ids, Tensor? rows, "
    "Tensor? token_weights, Tensor? labels, Tensor? num_tokens, float[] span_weights, "
    "str divergence, float mix, float temperature, str reduction, float ce_weight, str tail, "
    "int? chunk_rows, float? grad_filter_eps, str? group"
)
OUTPUTS = (
    "Tensor loss, Tensor span_loss, Tensor span_count, Tensor per_token, Tensor cross_entropy, "
    "Tensor teacher_entropy, Tensor agreement, Tensor tail_mass"
)
POSITIVE = 1e-3  # what rounding may make of a log-probability of 0
TOPK = "(Tensor ids, Tensor logprobs, Tensor tail_mass, Tensor entropy, Tensor lse)"


@torch.library.custom_op(
    "sadkern::span_kl",
    mutates_args=(),
    schema="(str student_kind, Tensor?[] student, float[] student_numbers, str backend, "
    f"bool[] with_gradient, {ARGUMENTS}) -> ({OUTPUTS}, Tensor[] gradients)",
)
def span_kl(
    student_kind: str,
    student: Tensors,
    student_numbers: list[float],
    backend: str,
    with_gradient: Sequence[bool],  # of each of the student's tensors
    *arguments: Any,
) -> Any:
    """`OUTPUTS` and the gradients: each of its tensor's shape, or [0] where none is wanted."""
    side = sides.unpack(student_kind, student, student_numbers)
    assert not isinstance(side, TopK)
    teacher = sides.unpack(*arguments[:3])
    chosen = _choose(backend, side, teacher)
    gradients = [
        chosen.empty(x.shape, x.dtype, x.device) if wanted and x is not None else None
        for x, wanted in zip(student, with_gradient, strict=True)
    ]
    outputs = _span_kl(chosen, side, gradients, teacher, *arguments[3:])
    nothing = sides.first_tensor(side)
    return *outputs, [nothing.new_empty(0) if x is None else x for x in gradients]


@torch.library.custom_op(
    "sadkern::span_kl_",
    mutates_args=("student",),
    schema=f"(Tensor(a!) student, str backend, {ARGUMENTS}) -> ({OUTPUTS})",
)
def span_kl_(student: Tensor, backend: str, *arguments: Any) -> Any:
    """`OUTPUTS`; the gradient is left in the logits `student`."""
    teacher = sides.unpack(*arguments[:3])
    return _span_kl(_choose(backend, student, teacher), student, [student], teacher, *arguments[3:])


def _choose(name: str, student: Side, teacher: Side) -> ModuleType:
    device = sides.first_tensor(student).device
    return backends.choose(name, projection.dtype_of(student, teacher), device)


def _span_kl(
    backend: ModuleType,
    student: Tensor | Projection,  # [..., V] or of [..., D]
    gradients: Sequence[Tensor | None],
    teacher: Side,  # [..., V'], of [..., D'] or [..., K]
    span_ids: Tensor,  # [...]
    rows: Tensor | None,  # [M]
    token_weights: Tensor | None,  # [...]
    labels: Tensor | None,  # [...]
    num_tokens: Tensor | None,  # [S] or [1]
    span_weights: Sequence[float],  # [S]
    divergence: str,
    mix: float,
    temperature: float,
    reduction_name: str,
    ce_weight: float,
    tail: str,
    chunk_rows: int | None,
    grad_filter_eps: float | None,
    group: str | None,
) -> Outputs:
    ranks, vocab = None, sides.common_vocabulary(student, teacher)
    if group is not None:
        if rows is None:
            rows = projection.places(span_ids != 0)
        theirs = None if isinstance(teacher, TopK) else sides.vocabulary(teacher)
        own = sides.vocabulary(student)
        ranks = Ranks(group, own, theirs, len(rows), span_ids.device)
        vocab = ranks.vocab
    check_values(
        span_ids, len(span_weights), rows, token_weights, labels, teacher, tail, vocab
    )  # fmt: skip
    wide = sides.precision(student, teacher)
    member = reduction.membership(span_ids, len(span_weights))
    counts = reduction.span_sums(member, torch.ones_like(span_ids))
    normaliser = reduction.normaliser(
        counts.to(wide), None if num_tokens is None else num_tokens.to(wide), reduction_name
    )
    per_span = torch.stack([member.new_full((), weight, dtype=wide) for weight in span_weights])
    weights = reduction.row_weights(member, per_span, normaliser, token_weights)
    found = projection.divergence_rows(
        backend,
        student,
        teacher,
        span_ids != 0,
        rows,
        weights,
        labels,
        gradients,
        chunk_rows=chunk_rows,
        grad_filter_eps=grad_filter_eps,
        ranks=ranks,
        divergence=divergence,
        mix=mix,
        temperature=temperature,
        ce_weight=ce_weight,
        tail=tail,
    )
    values = found.per_token
    if labels is not None:
        values = values + ce_weight * found.cross_entropy
    if token_weights is not None:
        values = values * token_weights.to(wide)
    span_loss = reduction.share(reduction.span_sums(member, values), normaliser)
    loss = (per_span * span_loss).sum()
    return loss, span_loss, counts, *found


@span_kl.register_fake
def _(
    student_kind: str,
    student: Tensors,
    student_numbers: list[float],
    backend: str,
    with_gradient: Sequence[bool],
    *arguments: Any,
) -> Any:
    side = sides.unpack(student_kind, student, student_numbers)
    nothing = sides.first_tensor(side)
    gradients = [
        x.new_empty(x.shape) if wanted and x is not None else nothing.new_empty(0)
        for x, wanted in zip(student, with_gradient, strict=True)
    ]
    return *_fake_outputs(side, *arguments), gradients


@span_kl_.register_fake
def _(student: Tensor, backend: str, *arguments: Any) -> Any:
    return _fake_outputs(student, *arguments)


def _fake_outputs(student: Side, *arguments: Any) -> Outputs:
    wide = sides.precision(student, sides.unpack(*arguments[:3]))
    span_ids, span_weights = arguments[3], arguments[8]
    spans, rows = (len(span_weights),), span_ids.shape
    return (
        span_ids.new_empty((), dtype=wide),
        span_ids.new_empty(spans, dtype=wide),
        span_ids.new_empty(spans, dtype=torch.int64),
        span_ids.new_empty(rows, dtype=wide),
        span_ids.new_empty(rows, dtype=wide),
        span_ids.new_empty(rows, dtype=wide),
        span_ids.new_empty(rows, dtype=torch.bool),
        span_ids.new_empty(rows, dtype=wide),
    )


def check_values(
    span_ids: Tensor,
    num_spans: int,
    rows: Tensor | None,
    token_weights: Tensor | None,
    labels: Tensor | None,
    teacher: Side,
    tail: str,
    vocab: int,
) -> None:
    """Raises ValueError for what only the values tell, naming the first row that is wrong.

    On CPU tensors only: elsewhere looking would make the host wait for the device.
    """
    if span_ids.device.type != "cpu":
        return

    def refuse(wrong: Tensor, name: str, values: Tensor, expected: str) -> None:
        if wrong.any():
            row = wrong.nonzero()[0].tolist()
            raise ValueError(f"{name}{row} is {values[tuple(row)].item()}, expected {expected}")

    outside = (span_ids < 0) | (span_ids > num_spans)
    refuse(outside, "span_ids", span_ids, f"0 to {num_spans}: there are {num_spans} span_weights")
    supervised = span_ids != 0
    if rows is not None and not torch.equal(
        rows.sort().values, supervised.reshape(-1).nonzero().squeeze(-1)
    ):
        raise ValueError(
            f"rows has {len(rows)} indices that are not those of the {int(supervised.sum())} "
            "supervised rows: expected span_ids.flatten().nonzero().squeeze(-1)"
        )
    if token_weights is not None:
        unusable = supervised & ~token_weights.isfinite()
        refuse(unusable, "token_weights", token_weights, "a finite number")
    if labels is not None:
        unknown = supervised & (labels != -100) & ((labels < 0) | (labels >= vocab))
        refuse(unknown, "labels", labels, f"-100 or 0 to {vocab - 1}, the common vocabulary")
    if isinstance(teacher, TopK):
        unknown = (teacher.ids < -1) | (teacher.ids >= vocab)
        expected = f"-1 (no entry) or 0 to {vocab - 1}, the student's vocabulary"
        among = supervised.unsqueeze(-1)
        refuse(unknown & among, "teacher.ids", teacher.ids, expected)
        if tail != "none":  # which takes weights, of any size
            above = among & (teacher.ids >= 0) & (teacher.logprobs > POSITIVE)
            expected = "at most 0: natural logarithms of probabilities"
            refuse(above, "teacher.logprobs", teacher.logprobs, expected)


@torch.library.custom_op(
    "sadkern::topk",
    mutates_args=(),
    schema="(str kind, Tensor?[] source, float[] numbers, int k, float temperature, "
    f"int? chunk_rows, str backend) -> {TOPK}",
)
def topk(
    kind: str,
    source: Tensors,
    numbers: list[float],
    k: int,
    temperature: float,
    chunk_rows: int | None,
    backend: str,
) -> Any:
    """The fields of a `TopK`: the `k` likeliest tokens."""
    side = sides.unpack(kind, source, numbers)
    chosen = _choose(backend, side, side)
    if isinstance(side, Tensor):
        return _fields(chosen.topk_rows(side, k, temperature))
    return _by_tiles(chosen, side, chunk_rows, k, lambda x: chosen.topk_rows(x, k, temperature))


@torch.library.custom_op(
    "sadkern::sample",
    mutates_args=(),
    schema="(str kind, Tensor?[] source, float[] numbers, int n, float temperature, int seed, "
    f"int? chunk_rows) -> {TOPK}",
)
def sample(
    kind: str,
    source: Tensors,
    numbers: list[float],
    n: int,
    temperature: float,
    seed: int,
    chunk_rows: int | None,
) -> Any:
    """The fields of a `TopK`: `n` draws."""
    side = sides.unpack(kind, source, numbers)
    generator = torch.Generator(sides.first_tensor(side).device).manual_seed(seed)
    return _by_tiles(
        _choose("auto", side, side), side, chunk_rows, n,
        lambda x: sampling.sample_rows(x, n, temperature, generator),
    )  # fmt: skip


def _fields(found: TopK) -> tuple[Tensor, ...]:
    return tuple(vars(found).values())


def _by_tiles(
    backend: ModuleType,
    source: Side,
    chunk_rows: int | None,
    k: int,
    of_tile: Callable[[Tensor], TopK],
) -> tuple[Tensor, ...]:
    """What `of_tile` finds in each tile of logits, put together."""
    assert not isinstance(source, TopK)
    sizes = sides.rows_of(source)
    flat = _empty_topk(source, torch.Size([sizes.numel()]), k)
    begin = 0
    for tile in projection.logit_tiles(backend, source, chunk_rows):
        for out, found in zip(flat, _fields(of_tile(tile)), strict=True):
            out[begin : begin + len(tile)] = found
        begin += len(tile)
    return tuple(out.view(*sizes, *out.shape[1:]) for out in flat)


def _empty_topk(source: Side, sizes: torch.Size, k: int) -> tuple[Tensor, ...]:
    like, wide = sides.first_tensor(source), sides.precision(source)
    return _fields(sides.empty_topk(like, sizes, k, wide))


@topk.register_fake
def _(kind: str, source: Tensors, numbers: list[float], k: int, *settings: Any) -> Any:
    side = sides.unpack(kind, source, numbers)
    return _empty_topk(side, sides.rows_of(side), k)


@sample.register_fake
def _(kind: str, source: Tensors, numbers: list[float], n: int, *settings: Any) -> Any:
    side = sides.unpack(kind, source, numbers)
    return _empty_topk(side, sides.rows_of(side), n)


@torch.library.custom_op("sadkern::with_gradient", mutates_args=())
def with_gradient(
    loss: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor], backend: str
) -> Tensor:
    """`loss`, whose derivative with respect to `inputs[i]` is `gradients[i]`, made by `backend`."""
    return loss.clone()


@with_gradient.register_fake
def _(loss: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor], backend: str) -> Tensor:
    return torch.empty_like(loss)


@torch.library.custom_op("sadkern::scale_", mutates_args=("gradient",))
def scale_(gradient: Tensor, factor: Tensor, backend: str) -> None:
    """gradient *= factor; a factor of 1, the usual case, touches nothing."""
    backends.choose(backend, gradient.dtype, gradient.device).scale_(gradient, factor)


@scale_.register_fake
def _(gradient: Tensor, factor: Tensor, backend: str) -> None:
    return None


def _save(
    ctx: Any, inputs: tuple[Tensor, Sequence[Tensor], Sequence[Tensor], str], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs[2])
    ctx.backend = inputs[3]


def _backward(ctx: Any, dloss: Tensor) -> tuple[None, list[Tensor], list[None], None]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "span_kl has no second derivative: its gradient is computed in the forward pass. "
            "Got a backward pass with create_graph=True, expected create_graph=False"
        )
    gradients: Sequence[Tensor] = ctx.saved_tensors
    if torch._C._autograd._get_current_graph_task_keep_graph():
        # retain_graph=True: a later backward pass needs the gradient unscaled.
        return None, [gradient * dloss for gradient in gradients], [None] * len(gradients), None
    for gradient in gradients:
        scale_(gradient, dloss, ctx.backend)
    return None, list(gradients), [None] * len(gradients), None


with_gradient.register_autograd(_backward, setup_context=_save)
