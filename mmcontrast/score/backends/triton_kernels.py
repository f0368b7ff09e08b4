"""The two kernels of the Triton backend: a tile's partial reductions, and a tile's weights. Loaded with the backend only.

Both compute a tile of scores with one product in fp32 accumulators, and finish it where it lies. Each program writes to
places of its own, so results do not depend on the order of execution.
A launch covers the rows from row0 to n and the columns from column0 to m of the block, whose x, y, ids, scales, values and
gradients it is given whole; what it writes is as large as its part, R × C.
Shapes: N, M rows and columns of the block; BM, BN rows and columns of a tile; BK the width of one step of the product.
"""

import triton
import triton.language as tl

LOG_SUM_EXP, SOFTPLUS_SUM, SUM, MAXIMUM = (tl.constexpr(kind) for kind in range(4))
NEGATIVES, POSITIVES = tl.constexpr(0), tl.constexpr(1)
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
SAFE_RANGE = tl.constexpr(86.0)  # binary: within it of a common shift, fp32 exponentials neither overflow nor lose digits
SMALL = tl.constexpr(0.03125)  # below it log(1 + u) by its series, exact to fp32; log(1.0 + u) loses digits there


@triton.jit
def place(n, m, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Return the tile of this program: GROUP rows of tiles are traversed together, for the caches."""
    pid = tl.program_id(0)
    tiles_n, tiles_m = tl.cdiv(n, BM), tl.cdiv(m, BN)
    first = pid // (GROUP * tiles_m) * GROUP
    size = tl.minimum(tiles_n - first, GROUP)
    within = pid % (GROUP * tiles_m)
    return first + within % size, within // size


@triton.jit
def dot_products(
    x, y, row, column, D, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Return x·y [BM, BN] in fp32 from a row and a column on; x and y are tensor descriptors, which read zeros outside."""
    dots = tl.zeros((BM, BN), tl.float32)
    for start in range(0, D, BK):
        dots = tl.dot(x.load([row, start]), y.load([column, start]).T, dots, input_precision=PRECISION)
    return dots


@triton.jit
def special(row_ids, column_ids, rows, columns, n, m):
    """Return whether the tile extends past the edge, and whether a row and a column of it may have the same group."""
    ids_n, ids_m = tl.load(row_ids + tl.minimum(rows, n - 1)), tl.load(column_ids + tl.minimum(columns, m - 1))
    meet = (tl.min(ids_n) <= tl.max(ids_m)) & (tl.min(ids_m) <= tl.max(ids_n))
    return (tl.max(rows) >= n) | (tl.max(columns) >= m), meet


@triton.jit
def keep(values, other, row_ids, column_ids, rows, columns, n, m, ragged, meet, OVER: tl.constexpr):
    """Return values where a candidate counts, else `other`; most tiles leave nothing out, and load no ids."""
    if OVER == POSITIVES:
        if meet:
            ids_n = tl.load(row_ids + rows, mask=rows < n, other=0)
            ids_m = tl.load(column_ids + columns, mask=columns < m, other=0)
            kept = (ids_n[:, None] == ids_m[None, :]) & (rows < n)[:, None] & (columns < m)[None, :]
            values = tl.where(kept, values, other)
        else:
            values = tl.zeros_like(values) + other
    else:
        if OVER == NEGATIVES:
            if meet:
                ids_n = tl.load(row_ids + rows, mask=rows < n, other=0)
                ids_m = tl.load(column_ids + columns, mask=columns < m, other=0)
                values = tl.where(ids_n[:, None] != ids_m[None, :], values, other)
        if ragged:
            values = tl.where((rows < n)[:, None] & (columns < m)[None, :], values, other)
    return values


@triton.jit
def softplus(z):
    u = tl.exp(-tl.abs(z))
    series = u * (1.0 - u * (0.5 - u * (0.3333333333 - u * (0.25 - u * 0.2))))
    return tl.maximum(z, 0.0) + tl.where(u < SMALL, series, tl.log(1.0 + u))


@triton.jit
def terms(
    z, row_ids, column_ids, rows, columns, n, m, ragged, meet, KIND: tl.constexpr, FACTOR: tl.constexpr, OVER: tl.constexpr
):  # fmt: skip
    """Return what is reduced [BM, BN], the identity where a candidate does not count; for log-sum-exps the binary exponents."""
    if KIND == LOG_SUM_EXP:
        t = keep(z * FACTOR, float("-inf"), row_ids, column_ids, rows, columns, n, m, ragged, meet, OVER)
    elif KIND == SOFTPLUS_SUM:
        t = keep(softplus(z), 0.0, row_ids, column_ids, rows, columns, n, m, ragged, meet, OVER)
    elif KIND == SUM:
        t = keep(z, 0.0, row_ids, column_ids, rows, columns, n, m, ragged, meet, OVER)
    else:
        t = keep(z, float("-inf"), row_ids, column_ids, rows, columns, n, m, ragged, meet, OVER)
    return t


@triton.jit
def reduce(t, DIM: tl.constexpr, KIND: tl.constexpr):
    """Reduce along one dimension."""
    if KIND == LOG_SUM_EXP:
        top = tl.max(t, DIM)
        top = tl.where(top == float("-inf"), 0.0, top)
        out = (tl.log2(tl.sum(tl.exp2(t - tl.expand_dims(top, DIM)), DIM)) + top) * LN2
    elif KIND == MAXIMUM:
        out = tl.max(t, DIM)
    else:
        out = tl.sum(t, DIM)
    return out


@triton.jit
def reduce_both(
    z, row_ids, column_ids, rows, columns, n, m, ragged, meet, KIND: tl.constexpr, FACTOR: tl.constexpr, OVER: tl.constexpr
):  # fmt: skip
    """Reduce along both dimensions; both log-sum-exps from one exponential relative to the tile's maximum if all are in
    range."""
    t = terms(z, row_ids, column_ids, rows, columns, n, m, ragged, meet, KIND, FACTOR, OVER)
    if KIND == LOG_SUM_EXP:
        row_top, column_top = tl.max(t, 1), tl.max(t, 0)
        top = tl.max(row_top)
        low_n = tl.min(tl.where(row_top == float("-inf"), top, row_top))
        low_m = tl.min(tl.where(column_top == float("-inf"), top, column_top))
        if top - tl.minimum(low_n, low_m) <= SAFE_RANGE:  # false if nothing is kept: then it is NaN
            e = tl.exp2(t - top)
            row_part = (tl.log2(tl.sum(e, 1)) + top) * LN2
            column_part = (tl.log2(tl.sum(e, 0)) + top) * LN2
        else:
            row_part, column_part = reduce(t, 1, KIND), reduce(t, 0, KIND)
    else:
        row_part, column_part = reduce(t, 1, KIND), reduce(t, 0, KIND)
    return row_part, column_part


@triton.jit
def reduce_tiles(
    x, y, row_ids, column_ids, row_scale, column_scale, bias, row_out, column_out,
    row0, column0, n, m, D,
    KINDS: tl.constexpr, EXPONENTS: tl.constexpr, OVERS: tl.constexpr,
    BOTH: tl.constexpr, PER_ANCHOR: tl.constexpr, BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write each tile's reductions to row_out [K, tiles of C, R] and column_out [K, tiles of R, C], for the caller to merge."""
    R, C = n - row0, m - column0
    tile_n, tile_m = place(R, C, BM, BN, GROUP)
    offsets_n, offsets_m = tile_n * BM + tl.arange(0, BM), tile_m * BN + tl.arange(0, BN)
    rows, columns = row0 + offsets_n, column0 + offsets_m
    some_rows, some_columns = tl.minimum(rows, n - 1), tl.minimum(columns, m - 1)
    ragged, meet = special(row_ids, column_ids, rows, columns, n, m)
    dots = dot_products(x, y, row0 + tile_n * BM, column0 + tile_m * BN, D, BM, BN, BK, PRECISION)

    if PER_ANCHOR:
        z = dots * tl.load(row_scale + some_rows)[:, None]
    else:
        z = dots * tl.load(row_scale)
    if BIAS:
        z += tl.load(bias)
    row_at, column_at = row_out + tile_m * R + offsets_n, column_out + tile_n * C + offsets_m
    row_step, column_step = tl.cdiv(C, BN) * R, tl.cdiv(R, BM) * C
    zc = z
    if BOTH and PER_ANCHOR:
        zc = dots * tl.load(column_scale + some_columns)[None, :]
        if BIAS:
            zc += tl.load(bias)
    for r in tl.static_range(len(KINDS)):
        at_n, at_m = row_at + r * row_step, column_at + r * column_step
        if BOTH and not PER_ANCHOR:
            row_part, column_part = reduce_both(
                z, row_ids, column_ids, rows, columns, n, m, ragged, meet, KINDS[r], EXPONENTS[r] * LOG2E, OVERS[r]
            )
            tl.store(at_n, row_part, mask=rows < n)
            tl.store(at_m, column_part, mask=columns < m)
        else:
            t = terms(z, row_ids, column_ids, rows, columns, n, m, ragged, meet, KINDS[r], EXPONENTS[r] * LOG2E, OVERS[r])
            tl.store(at_n, reduce(t, 1, KINDS[r]), mask=rows < n)
            if BOTH:
                t = terms(zc, row_ids, column_ids, rows, columns, n, m, ragged, meet, KINDS[r], EXPONENTS[r] * LOG2E, OVERS[r])
                tl.store(at_m, reduce(t, 0, KINDS[r]), mask=columns < m)


@triton.jit
def derivative(
    z, value, grad, row_ids, column_ids, rows, columns, n, m, ragged, meet,
    KIND: tl.constexpr, FACTOR: tl.constexpr, OVER: tl.constexpr,
):  # fmt: skip
    """Return grad · ∂ reduction / ∂ z of one direction [BM, BN]; value (LSE: binary) and grad broadcast to it."""
    if KIND == LOG_SUM_EXP:
        w = tl.exp2(z * FACTOR - value) * grad
    elif KIND == SOFTPLUS_SUM:
        w = tl.sigmoid(z) * grad
    else:
        w = tl.zeros_like(z) + grad
    return keep(w, 0.0, row_ids, column_ids, rows, columns, n, m, ragged, meet, OVER)


@triton.jit
def derivative_of_both(
    z, value, grad, column_value, column_grad, row_ids, column_ids, rows, columns, n, m, ragged, meet,
    KIND: tl.constexpr, FACTOR: tl.constexpr, OVER: tl.constexpr,
):  # fmt: skip
    """Return the sum of both directions, with values and gradients [BM] and [BN]; for log-sum-exps from one exponential, if the
    values of the tile are in its range: e^{z−m} · (g_i e^{m−R_i} + h_j e^{m−C_j})."""
    if KIND == LOG_SUM_EXP:
        top = tl.maximum(tl.max(value), tl.max(column_value))
        if top - tl.minimum(tl.min(value), tl.min(column_value)) <= SAFE_RANGE:
            both = (grad * tl.exp2(top - value))[:, None] + (column_grad * tl.exp2(top - column_value))[None, :]
            w = derivative(z, top, both, row_ids, column_ids, rows, columns, n, m, ragged, meet, KIND, FACTOR, OVER)
        else:
            w = derivative(
                z, value[:, None], grad[:, None], row_ids, column_ids, rows, columns, n, m, ragged, meet, KIND, FACTOR, OVER
            ) + derivative(
                z, column_value[None, :], column_grad[None, :],
                row_ids, column_ids, rows, columns, n, m, ragged, meet, KIND, FACTOR, OVER,
            )  # fmt: skip
    else:
        both = grad[:, None] + column_grad[None, :]
        w = derivative(z, 0.0, both, row_ids, column_ids, rows, columns, n, m, ragged, meet, KIND, FACTOR, OVER)
    return w


@triton.jit
def weigh_tiles(
    x, y, row_ids, column_ids, row_scale, column_scale, bias,
    row_values, column_values, row_grads, column_grads,
    w_out, bias_out, row_scale_out, column_scale_out,
    row0, column0, n, m, N, M, D,
    KINDS: tl.constexpr, EXPONENTS: tl.constexpr, OVERS: tl.constexpr,
    BOTH: tl.constexpr, PER_ANCHOR: tl.constexpr, BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write w_out [R, C] = ∂loss/∂z (times the scales where they are per anchor), from the final values and their gradients
    [K, N] and [K, M] (of log-sum-exps: binary values, gradients times the exponent).

    And each tile's sums: bias_out [tiles of R, tiles of C], row_scale_out [tiles of C, R], column_scale_out [tiles of R, C].
    """
    R, C = n - row0, m - column0
    tile_n, tile_m = place(R, C, BM, BN, GROUP)
    offsets_n, offsets_m = tile_n * BM + tl.arange(0, BM), tile_m * BN + tl.arange(0, BN)
    rows, columns = row0 + offsets_n, column0 + offsets_m
    some_rows, some_columns = tl.minimum(rows, n - 1), tl.minimum(columns, m - 1)
    ragged, meet = special(row_ids, column_ids, rows, columns, n, m)
    dots = dot_products(x, y, row0 + tile_n * BM, column0 + tile_m * BN, D, BM, BN, BK, PRECISION)

    if PER_ANCHOR:
        row_factor = tl.load(row_scale + some_rows)[:, None]
        z = dots * row_factor
        if BOTH:
            column_factor = tl.load(column_scale + some_columns)[None, :]
            zc = dots * column_factor
    else:
        z = dots * tl.load(row_scale)
    if BIAS:
        z += tl.load(bias)
        if PER_ANCHOR and BOTH:
            zc += tl.load(bias)
    w = tl.zeros((BM, BN), tl.float32)
    if PER_ANCHOR:
        wc = tl.zeros((BM, BN), tl.float32)  # separate, as the columns have their own scales
    for r in tl.static_range(len(KINDS)):
        if KINDS[r] != MAXIMUM:
            value, grad = tl.load(row_values + r * N + some_rows), tl.load(row_grads + r * N + some_rows)
            if BOTH:
                column_value = tl.load(column_values + r * M + some_columns)
                column_grad = tl.load(column_grads + r * M + some_columns)
            if BOTH and not PER_ANCHOR:
                w += derivative_of_both(
                    z, value, grad, column_value, column_grad,
                    row_ids, column_ids, rows, columns, n, m, ragged, meet, KINDS[r], EXPONENTS[r] * LOG2E, OVERS[r],
                )  # fmt: skip
            else:
                w += derivative(
                    z, value[:, None], grad[:, None],
                    row_ids, column_ids, rows, columns, n, m, ragged, meet, KINDS[r], EXPONENTS[r] * LOG2E, OVERS[r],
                )  # fmt: skip
                if BOTH:
                    wc += derivative(
                        zc, column_value[None, :], column_grad[None, :],
                        row_ids, column_ids, rows, columns, n, m, ragged, meet, KINDS[r], EXPONENTS[r] * LOG2E, OVERS[r],
                    )  # fmt: skip
    if BIAS:
        d_bias = tl.sum(w)
        if PER_ANCHOR:
            d_bias += tl.sum(wc)
        tl.store(bias_out + tile_n * tl.cdiv(C, BN) + tile_m, d_bias)
    if PER_ANCHOR:
        tl.store(row_scale_out + tile_m * R + offsets_n, tl.sum(w * dots, 1), mask=rows < n)
        w *= row_factor
        if BOTH:
            tl.store(column_scale_out + tile_n * C + offsets_m, tl.sum(wc * dots, 0), mask=columns < m)
            w += wc * column_factor
    w_at = w_out + offsets_n.to(tl.int64)[:, None] * C + offsets_m[None, :]
    tl.store(w_at, w.to(w_out.dtype.element_ty), mask=(rows < n)[:, None] & (columns < m)[None, :])
