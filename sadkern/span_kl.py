"""The public function: a divergence per span between student and teacher, with its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sadkern import ops, sides
from sadkern.dtensors import local
from sadkern.reduction import REDUCTIONS
from sadkern.sides import Projection, Side, TopK

DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "tvd",
)
TAILS = ("bucket", "renormalize", "none")


@dataclass(frozen=True)
class SpanLoss:
    """What `span_kl` returns. Only `loss` carries a gradient; all else is a detached by-product.

    S is the number of spans, `...` the leading shape of the logits; everything is fp32 (fp64 for
    fp64 logits) but where noted, in nats, and 0 in rows that are not supervised.
    """

    loss: Tensor
    """[]: `sum_s span_weights[s] span_loss[s]`"""
    span_loss: Tensor
    """[S]: each span's reduced divergence (plus `ce_weight` times its cross-entropy), unweighted"""
    span_count: Tensor
    """[S] int64: supervised rows of each span"""
    per_token: Tensor
    """[...]: each row's divergence"""
    cross_entropy: Tensor
    """[...]: each row's cross-entropy to its hard label, at temperature 1; 0 without labels"""
    teacher_entropy: Tensor
    """[...]: entropy of the teacher at `temperature`; of a `TopK` without one, that of what it
    gives"""
    agreement: Tensor
    """[...] bool: student and teacher have the same most likely token"""
    tail_mass: Tensor
    """[...]: probability that a `TopK` teacher leaves out; 0 with any other"""


def span_kl(
    student: Tensor | Projection,
    teacher: Tensor | Projection | TopK,
    span_ids: Tensor,
    *,
    span_weights: Sequence[float] = (1.0, 1.0),
    divergence: str = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    temperature: float = 1.0,
    reduction: str = "span_mean",
    num_tokens: float | Sequence[float] | Tensor | None = None,
    token_weights: Tensor | None = None,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    tail: str = "bucket",
    rows: Tensor | None = None,
    chunk_rows: int | None = None,
    grad_filter_eps: float | None = None,
    inplace: bool = False,
    backend: str = "auto",
    group: ProcessGroup | None = None,
) -> SpanLoss:
    """Divergence between the next-token distributions of a student and a teacher, span by span.

    With q = softmax(student / temperature) and p = softmax(teacher / temperature), row i of span s
    contributes its divergence D_i, and

        loss = sum_s span_weights[s] * sum_{i in s} token_weights_i (D_i + ce_weight CE_i) / n_s

    which are equations (4) to (6) of *Structured Agent Distillation for Large Language Model* for
    `forward_kl` and `reduction="sum"`, and (13) for `ce_weight`. Loss and gradient come out of one
    pass over the logits; rows with `span_ids == 0` are neither read nor given a gradient.

    Each side is what one holds of it. From a `Projection` the logits are made for a few supervised
    rows at a time and turned into their gradient on the spot; that of hidden states, weight and
    bias, each where it requires one, is complete after the forward pass. With a `TopK` teacher the
    divergence is one between coarsened distributions: a bucket for each of its tokens and, for
    `tail="bucket"`, one for all others together. Such a divergence, reverse KL and jsd included, is
    never negative and never more than that of the full distributions.

    Args:
        student: logits `[..., V]`, fp32, bf16 or fp16 (fp64: on the reference backend), or a
            `Projection` of hidden states `[..., D]`.
        teacher: logits `[..., V']`, a `Projection` (of another D, if need be) or a `TopK`
            `[..., K]`, of the same leading shape and device; logits on both sides are of one dtype.
            Where V and V' differ (padded vocabularies) the common prefix is compared, as if the
            rest were -inf.
        span_ids: integers `[...]`: 0 not supervised, 1 REASON, 2 ACT, up to `len(span_weights)`.
            They belong to rows, and row p predicts token p + 1.
        span_weights: one weight per span.
        divergence: `forward_kl` KL(p||q), `reverse_kl` KL(q||p), `jsd` (of `beta`; 0 is forward
            and 1 reverse KL, as in TRL), `skew_forward_kl` KL(p || skew p + (1 - skew) q),
            `skew_reverse_kl` KL(q || skew q + (1 - skew) p) or `tvd` sum |p - q| / 2.
        beta: the teacher's share of the mixture of `jsd`, in [0, 1].
        skew: in [0, 1].
        temperature: divides both sides' logits. The loss is not multiplied by its square.
        reduction: `span_mean` (n_s the supervised rows of span s), `token_mean` (n_s those of all
            spans together) or `sum` (n_s = 1).
        num_tokens: n_s in place of this call's own counts: S numbers for `span_mean`, one for
            `token_mean`. With the counts of a whole batch, the gradients of its parts add up to the
            batch's own.
        token_weights: `[...]`, a factor of each row.
        labels: int64 `[...]`, the hard target of each row (that is token p + 1), -100 for none.
        ce_weight: factor of the cross-entropy to `labels`, taken at temperature 1.
        tail: of a `TopK` teacher. `bucket`: all other tokens are one bucket on both sides.
            `renormalize`: the teacher's tokens are given all of its mass, the others none (reverse
            KL would be infinite and is refused). `none`: the sum runs over the teacher's tokens
            alone, with the weights that they have; for `sample_logprobs`. The student is
            normalised over V in each case.
        rows: int64 `[M]`, the places of the supervised rows in `span_ids.flatten()`, where they are
            known already: with projections on a device nobody then waits to count them.
        chunk_rows: supervised rows whose logits exist at a time; None takes as many as fit 64 MiB
            for both sides' (on CUDA 256 MiB, or half of what the weight's gradient is summed up in,
            if that is more). Without a projection it says nothing.
        grad_filter_eps: leaves out of the two products of a `Projection`'s backward pass the tokens
            whose logits' gradient is, in all rows of a chunk, at most this times the largest row
            weight r of the chunk. What is missing from the gradient of a hidden state is then at
            most `eps r |scale|` times the sum of the norms of their weights, from that of their
            weights `eps r |scale|` times the sum of the norms of the chunk's hidden states.
        inplace: the gradient is written over the student's logits, which are then gone: their
            version counter says so to autograd.
        group: the ranks that share the vocabulary, if any: each has rows of its own part of it, in
            the order of ranks, uneven ones too, of logits or of head weight and bias, on both
            sides. All else is the same on every rank: hidden states, the ids of a `TopK`, labels,
            which are of the whole vocabulary. So are then the values and the gradient of hidden
            states, while that of a part is its own. DTensors that are `Shard` in the vocabulary,
            as of torch's tensor parallelism, bring their group along.
        backend: `auto` (for fp32, bf16 and fp16 the compiled kernels on the CPU, Triton's on an
            NVIDIA GPU; else the reference), `native`, `triton`, `cuda` or `reference`. With a
            group the reference alone.

    Returns:
        A `SpanLoss`. An empty span contributes 0, and so does an empty batch.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit, a teacher that requires a
            gradient; the message says what was got and what was expected.
        RuntimeError: `backend` names one that is missing here.

    Example:
        >>> import torch
        >>> from sadkern import Projection, TopK, span_kl
        >>> student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 0.0]])
        >>> out = span_kl(student, teacher, torch.tensor([1, 2, 0]))
        >>> [round(x, 4) for x in out.span_loss.tolist()]  # KL of REASON and of ACT
        [0.0, 0.4621]
        >>> out.loss.backward()
        >>> student.grad[2].tolist()  # not supervised
        [0.0, 0.0]
        >>> hidden, head = torch.ones(3, 1), torch.tensor([[1.0], [0.0]], requires_grad=True)
        >>> likely = TopK(torch.tensor([[0], [1], [0]]), torch.tensor([[0.5], [0.9], [0.8]]).log())
        >>> out = span_kl(Projection(hidden, head), likely, torch.tensor([1, 2, 0]))
        >>> [round(x, 4) for x in out.tail_mass.tolist()]
        [0.5, 0.1, 0.0]
    """
    student, teacher, name = local(student, teacher, group)
    if name is not None and backend not in ("auto", "reference"):
        raise ValueError(
            f"backend={backend!r} has no kernels for a vocabulary on several ranks: expected auto "
            "or reference"
        )
    _check(student, teacher, span_ids, token_weights, labels, rows)
    divergence, mix = _canonical(divergence, beta, skew)
    if tail not in TAILS:
        raise ValueError(f"tail={tail!r}: expected one of {', '.join(TAILS)}")
    if isinstance(teacher, TopK) and tail == "renormalize" and divergence == "reverse_kl":
        raise ValueError(
            "reverse_kl with tail='renormalize' is infinite, since the teacher is given no mass "
            "outside its tokens: expected tail='bucket', or another divergence"
        )
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows}: expected None or a positive number")
    if grad_filter_eps is not None and not 0 <= grad_filter_eps < float("inf"):
        raise ValueError(f"grad_filter_eps={grad_filter_eps}: expected None or a number >= 0")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}: expected one of {', '.join(REDUCTIONS)}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: expected a positive number")
    if isinstance(span_weights, int | float):
        raise ValueError(f"span_weights={span_weights}: expected numbers, one per span")
    weights = [float(weight) for weight in span_weights]
    if not weights or not all(0 <= weight < float("inf") for weight in weights):
        raise ValueError(f"span_weights={weights}: expected numbers >= 0, one per span")
    if ce_weight and labels is None:
        raise ValueError(f"ce_weight={ce_weight} but labels is None: expected labels [...]")
    counts = _num_tokens(num_tokens, len(weights), reduction, span_ids.device)

    kind, tensors, numbers = sides.pack(student)
    given = sides.slots(student)
    wanted = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in given]
    arguments = (
        *sides.pack(teacher), span_ids, rows, token_weights, labels, counts, weights, divergence,
        mix, float(temperature), reduction, float(ce_weight), tail, chunk_rows, grad_filter_eps,
        name,
    )  # fmt: skip
    if inplace:
        loss, *rest = ops.span_kl_(_inplace(student), backend, *arguments)
        gradients = tensors
    else:
        loss, *rest, gradients = ops.span_kl(kind, tensors, numbers, backend, wanted, *arguments)
    if any(wanted):
        pairs = zip(given, gradients, wanted, strict=True)
        inputs, found = zip(*((x, dx) for x, dx, is_wanted in pairs if is_wanted), strict=True)
        loss = ops.with_gradient(loss, list(inputs), list(found), backend)
    return SpanLoss(loss, *rest)


def _canonical(divergence: str, beta: float, skew: float) -> tuple[str, float]:
    """The divergence and its one parameter; the ends of `beta` and `skew` are plain KLs."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence={divergence!r}: expected one of {', '.join(DIVERGENCES)}")
    if divergence == "jsd":
        if not 0 <= beta <= 1:
            raise ValueError(f"beta={beta}: expected a number in [0, 1]")
        if beta in (0, 1):
            return ("reverse_kl" if beta else "forward_kl"), 0.0
        return divergence, float(beta)
    if divergence.startswith("skew"):
        if not 0 <= skew <= 1:
            raise ValueError(f"skew={skew}: expected a number in [0, 1]")
        if skew == 0:
            return divergence.removeprefix("skew_"), 0.0
        return divergence, float(skew)
    return divergence, 0.0


def _num_tokens(
    given: float | Sequence[float] | Tensor | None,
    num_spans: int,
    reduction: str,
    device: torch.device,
) -> Tensor | None:
    if given is None:
        return None
    if reduction == "sum":
        raise ValueError(
            "num_tokens is given but reduction='sum' divides by nothing: expected None"
        )
    if not isinstance(given, Tensor):
        # (Filled in on the device: a copy to it would be waited for.)
        numbers = given if isinstance(given, Sequence) else [given]
        given = torch.stack(
            [torch.full((), x, dtype=torch.float64, device=device) for x in numbers]
        )
    counts = given.to(device, torch.float64, non_blocking=True).reshape(-1)
    expected = num_spans if reduction == "span_mean" else 1
    if counts.numel() != expected:
        raise ValueError(
            f"num_tokens has {counts.numel()} numbers, expected {expected} for "
            f"reduction={reduction!r} and {num_spans} spans"
        )
    return counts


def _check(
    student: Tensor | Projection,
    teacher: Side,
    span_ids: Tensor,
    token_weights: Tensor | None,
    labels: Tensor | None,
    rows: Tensor | None,
) -> None:
    sides.check("student", student)
    sides.check("teacher", teacher)
    if isinstance(student, TopK):
        raise ValueError("student is a TopK, expected logits (a Tensor) or a Projection")
    for name, tensor in sides.tensors_of(teacher).items():
        if tensor.requires_grad:
            raise ValueError(
                f"teacher{name} requires a gradient, but span_kl trains the student alone: "
                f"expected teacher{name}.detach(), or the teacher's forward under torch.no_grad()"
            )
    if (
        isinstance(student, Tensor)
        and isinstance(teacher, Tensor)
        and student.dtype != teacher.dtype
    ):
        raise ValueError(
            f"student is {student.dtype} and teacher {teacher.dtype}, expected one dtype: "
            f"teacher.to({student.dtype})"
        )
    sizes = sides.rows_of(student)
    if sides.rows_of(teacher) != sizes:
        last = {Projection: "D", TopK: "K"}.get(type(teacher), "V")
        tensor = sides.first_tensor(teacher)
        name = next(iter(sides.tensors_of(teacher)))
        raise ValueError(
            f"teacher{name} has shape {list(tensor.shape)}, expected {[*sizes, last]} as the "
            "student's"
        )
    per_row = {"span_ids": span_ids, "token_weights": token_weights, "labels": labels}
    for name, given in {**per_row, "rows": rows}.items():
        if given is not None and not isinstance(given, Tensor):
            raise ValueError(
                f"{name} is a {type(given).__name__}, expected a Tensor: torch.as_tensor({name})"
            )
    kind = span_ids.dtype
    if kind.is_floating_point or kind.is_complex or kind == torch.bool:
        raise ValueError(f"span_ids has dtype {kind}, expected integers")
    if rows is not None and (rows.ndim != 1 or rows.dtype != torch.int64):
        raise ValueError(f"rows is {rows.dtype} {list(rows.shape)}, expected torch.int64 ['M']")
    if labels is not None and labels.dtype != torch.int64:
        raise ValueError(f"labels has dtype {labels.dtype}, expected torch.int64")
    for name, given in per_row.items():
        if given is not None and given.shape != sizes:
            raise ValueError(
                f"{name} has shape {list(given.shape)}, expected {list(sizes)}: one per row"
            )
    device = sides.first_tensor(student).device
    placed = {"teacher": sides.first_tensor(teacher), **per_row, "rows": rows}
    for name, given in placed.items():
        if given is not None and given.device != device:
            raise ValueError(f"{name} is on {given.device}, expected {device} as the student")


def _inplace(student: Tensor | Projection) -> Tensor:
    """The logits to be overwritten."""
    if isinstance(student, Projection):
        raise ValueError(
            "inplace=True overwrites logits, but a Projection has none that last: expected "
            "inplace=False"
        )
    if student.is_leaf and student.requires_grad:
        raise ValueError(
            "inplace=True would overwrite a leaf that requires a gradient: expected the output of "
            "a model, or inplace=False"
        )
    dimensions = zip(student.stride(), student.shape, strict=True)
    if any(stride == 0 and size > 1 for stride, size in dimensions):
        raise ValueError(
            "inplace=True needs rows with memory of their own, got an expanded student: "
            "expected student.contiguous(), or inplace=False"
        )
    return student.detach()
