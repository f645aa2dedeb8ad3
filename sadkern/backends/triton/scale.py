"""A gradient times that of its loss, a row per program: nothing where it is 1, as it mostly is,
which the host does not learn."""

from __future__ import annotations

import triton
import triton.language as tl

from sadkern.backends.triton import row as rows


@triton.jit
def kernel(
    gradient, gradient_inner, gradient_outer, gradient_stride,  # [..., n]
    factor,  # [] of any dtype
    n, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    by = tl.load(factor).to(tl.float32)
    if by != 1:
        DTYPE: tl.constexpr = gradient.dtype.element_ty
        row = rows.row_pointer(
            gradient, tl.program_id(0), gradient_inner, gradient_outer, gradient_stride
        )
        for begin in tl.range(0, n, TILE, num_stages=STAGES):
            entries = rows.wide(rows.load(row, begin, n, TILE, False), DTYPE, False)
            rows.store(row, begin, n, by * entries, TILE)
