"""What `span_kl` refuses, and that its words say what was got and what was expected."""

from __future__ import annotations

import pytest
import torch

from sadkern import Projection, span_kl
from sadkern.backends import native

S = torch.randn(2, 3, 7)
IDS = torch.tensor([[1, 2, 0], [0, 1, 1]])


def call(student=S, teacher=S, span_ids=IDS, **options):
    return span_kl(student, teacher, span_ids, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"student": [1.0]}, r"student is a list, expected logits \(a Tensor\), a Projection"),
        ({"student": S.long()}, "student has dtype torch.int64, expected floating-point"),
        ({"student": S[..., :0]}, r"student has shape \[2, 3, 0\], expected \[..., V\] with V > 0"),
        (
            {"teacher": S.clone().requires_grad_()},
            "teacher requires a gradient.* expected teacher.detach()",
        ),
        (
            {"teacher": S.double()},
            "student is torch.float32 and teacher torch.float64, expected one dtype",
        ),
        ({"teacher": S[:1]}, r"teacher has shape \[1, 3, 7\], expected \[2, 3, 'V'\]"),
        ({"span_ids": IDS.float()}, "span_ids has dtype torch.float32, expected integers"),
        ({"span_ids": IDS.to(torch.complex128)}, "dtype torch.complex128, expected integers"),
        ({"span_ids": IDS[0]}, r"span_ids has shape \[3\], expected \[2, 3\]"),
        ({"span_ids": IDS + 1}, r"span_ids\[0, 1\] is 3, expected 0 to 2"),
        ({"span_ids": IDS - 1}, r"span_ids\[0, 2\] is -1, expected 0 to 2"),
        ({"token_weights": torch.ones(2)}, r"token_weights has shape \[2\], expected \[2, 3\]"),
        (
            {"token_weights": torch.full((2, 3), torch.nan)},
            r"token_weights\[0, 0\] is nan, expected a finite number",
        ),
        (
            {"labels": IDS.int(), "ce_weight": 1.0},
            "labels has dtype torch.int32, expected torch.int64",
        ),
        ({"labels": IDS + 6, "ce_weight": 1.0}, r"labels\[0, 0\] is 7, expected -100 or 0 to 6"),
        ({"ce_weight": 1.0}, "ce_weight=1.0 but labels is None"),
        ({"divergence": "kl"}, "divergence='kl': expected one of forward_kl, reverse_kl, jsd"),
        ({"divergence": "jsd", "beta": 1.5}, r"beta=1.5: expected a number in \[0, 1\]"),
        ({"divergence": "skew_forward_kl", "skew": -0.1}, r"skew=-0.1: expected a number in"),
        ({"reduction": "mean"}, "reduction='mean': expected one of span_mean, token_mean, sum"),
        ({"temperature": 0.0}, "temperature=0.0: expected a positive number"),
        ({"temperature": float("nan")}, "temperature=nan: expected a positive number"),
        ({"span_weights": ()}, r"span_weights=\[\]: expected numbers >= 0"),
        ({"span_weights": (1.0, float("nan"))}, "span_weights=.*nan.*: expected numbers >= 0"),
        ({"num_tokens": [1, 2, 3]}, "num_tokens has 3 numbers, expected 2"),
        ({"num_tokens": 4.0, "reduction": "sum"}, "num_tokens is given but reduction='sum'"),
        ({"chunk_rows": 0}, "chunk_rows=0: expected None or a positive number"),
        ({"grad_filter_eps": -1.0}, "grad_filter_eps=-1.0: expected None or a number >= 0"),
        ({"rows": IDS.flatten().int()}, r"rows is torch.int32 \[6\], expected torch.int64"),
        ({"span_ids": IDS.numpy()}, "span_ids is a ndarray, expected a Tensor: torch.as_tensor"),
        ({"labels": [1, 2]}, "labels is a list, expected a Tensor"),
        ({"backend": "gpu"}, "backend='gpu': expected auto, reference, native, triton, cuda"),
        ({"inplace": True, "student": S.clone().requires_grad_()}, "would overwrite a leaf"),
        (
            {"inplace": True, "student": S[:1].expand(2, 3, 7)},
            "rows with memory of their own, got an expanded student",
        ),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(**arguments)


HIDDEN, WEIGHT = torch.randn(2, 3, 4), torch.randn(7, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": [1.0]}, "hidden is a list, expected a Tensor"),
        ({"hidden": HIDDEN.long()}, "hidden has dtype torch.int64, expected floating-point"),
        ({"weight": WEIGHT.t()}, r"weight has shape \[4, 7\], expected \['V', 4\]: "),
        ({"weight": WEIGHT[:0]}, r"weight has shape \[0, 4\], expected \['V', 4\]"),
        ({"bias": WEIGHT}, r"bias has shape \[7, 4\], expected \[7\]"),
        ({"bias": torch.zeros(6)}, r"bias has shape \[6\], expected \[7\]"),
        ({"scale": 0.0}, "scale=0.0: expected a finite number other than 0"),
        ({"scale": float("nan")}, "scale=nan: expected a finite number"),
        ({"softcap": -30.0}, "softcap=-30.0: expected None or a positive number"),
        ({"weight": WEIGHT.to("meta")}, "weight is on meta, expected cpu as "),
    ],
)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_refused_projections(side, arguments, message):
    projection = Projection(**{"hidden": HIDDEN, "weight": WEIGHT, **arguments})
    with pytest.raises(ValueError, match=rf"{side}\.{message}"):
        call(**{side: projection})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"teacher": Projection(HIDDEN[:1], WEIGHT)},
            r"teacher.hidden has shape \[1, 3, 4\], expected \[2, 3, 'D'\]",
        ),
        (
            {"teacher": Projection(HIDDEN, WEIGHT.clone().requires_grad_())},
            r"teacher.weight requires a gradient.* expected teacher.weight.detach\(\)",
        ),
        (
            {"student": Projection(HIDDEN, WEIGHT), "inplace": True},
            "inplace=True overwrites logits, but a Projection has none that last",
        ),
        (
            {"teacher": torch.nn.Parameter(S[:1], requires_grad=False)},
            r"teacher has shape \[1, 3, 7\], expected \[2, 3, 'V'\]",
        ),
        ({"student": Projection(HIDDEN, WEIGHT), "teacher": S.to("meta")}, "teacher is on meta"),
    ],
)
def test_refused_combinations(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(**arguments)


def test_a_backend_that_does_not_take_the_dtype():
    with pytest.raises(
        ValueError, match="backend='native' takes float32, bfloat16, float16 logits"
    ):
        call(S.double(), S.double(), backend="native")


def test_a_backend_that_does_not_serve_the_device():
    # Asked of the backend itself: on `meta`, torch runs an operator's fake in its place.
    refusal = native.serves(S.dtype, torch.device("meta"))
    assert isinstance(refusal, RuntimeError)
    assert "backend='native' serves CPU tensors, got device meta" in str(refusal)


def test_devices_that_differ():
    with pytest.raises(ValueError, match="teacher is on meta, expected cpu as the student"):
        call(teacher=S.to("meta"))


def test_a_weight_that_is_not_supervised_may_be_anything():
    weights = torch.where(IDS == 0, torch.nan, 1.0)
    assert call(teacher=S.flip(-1), token_weights=weights).loss.isfinite()


def test_more_leading_dimensions_than_the_core_takes():
    deep = S.view(1, 1, 1, 1, 1, 1, 1, 2, 3, 7)
    with pytest.raises(ValueError, match="9 leading dimensions, expected at most 8"):
        span_kl(deep, deep, IDS.view(deep.shape[:-1]), backend="native")
