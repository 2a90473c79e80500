"""KV writes, rotary embeddings, norms and gates in Triton."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize_on_alignment=["slots"])
def write(
    stored_keys,
    stored_values,
    keys,
    values,
    slots,
    key_stride,
    value_stride,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Store the keys and values of one token. Grid: tokens."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    index = tl.arange(0, SIZE)
    real = index < WIDTH
    key = tl.load(keys + token * key_stride + index, mask=real)
    value = tl.load(values + token * value_stride + index, mask=real)
    tl.store(stored_keys + slot * WIDTH + index, key, mask=real)
    tl.store(stored_values + slot * WIDTH + index, value, mask=real)


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
def rotate(
    queries,
    keys,
    values,
    qkv,
    positions,
    slots,
    cosine,
    sine,
    q_norm,
    k_norm,
    token_stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    AT_ONCE: tl.constexpr,
    NORMED: tl.constexpr,
):
    """Some heads of one token: queries, keys or values, in that order in ``qkv``. Both halves of a
    head are in one program. Grid: head groups, tokens."""
    head = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    token = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, HALF)
    in_half = dims < HEAD_DIM // 2
    real = (head < HEADS + 2 * KV_HEADS)[:, None] & in_half[None, :]
    at = qkv + token * token_stride + head[:, None] * HEAD_DIM + dims[None, :]
    first = tl.load(at, mask=real, other=0.0).to(tl.float32)
    second = tl.load(at + HEAD_DIM // 2, mask=real, other=0.0).to(tl.float32)
    turned = (head < HEADS + KV_HEADS)[:, None]
    is_query = (head < HEADS)[:, None]
    if NORMED:
        square = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        inverse = tl.rsqrt(square / HEAD_DIM + eps)[:, None]
        first = tl.where(
            turned, first * inverse * _weights(q_norm, k_norm, dims, in_half, is_query), first
        )
        dims_second = dims + HEAD_DIM // 2
        second = tl.where(
            turned,
            second * inverse * _weights(q_norm, k_norm, dims_second, in_half, is_query),
            second,
        )
    position = tl.load(positions + token).to(tl.int64)
    place = position * (HEAD_DIM // 2) + dims
    cos = tl.where(turned, tl.load(cosine + place, mask=in_half, other=0.0)[None, :], 1.0)
    sin = tl.where(turned, tl.load(sine + place, mask=in_half, other=0.0)[None, :], 0.0)
    slot = tl.load(slots + token).to(tl.int64)
    kind = queries.dtype.element_ty
    left = (first * cos - second * sin).to(kind)
    right = (second * cos + first * sin).to(kind)
    # Each head goes to one of three tensors.
    target = queries + (token * HEADS + head[:, None]) * HEAD_DIM + dims[None, :]
    tl.store(target, left, mask=real & is_query)
    tl.store(target + HEAD_DIM // 2, right, mask=real & is_query)
    kv_head = head[:, None] - HEADS
    target = keys + (slot * KV_HEADS + kv_head) * HEAD_DIM + dims[None, :]
    is_key = turned & (head >= HEADS)[:, None]
    tl.store(target, left, mask=real & is_key)
    tl.store(target + HEAD_DIM // 2, right, mask=real & is_key)
    target = values + (slot * KV_HEADS + kv_head - KV_HEADS) * HEAD_DIM + dims[None, :]
    is_value = (head >= HEADS + KV_HEADS)[:, None]
    tl.store(target, left, mask=real & is_value)
    tl.store(target + HEAD_DIM // 2, right, mask=real & is_value)


@triton.jit
def _weights(q_norm, k_norm, dims, in_half, is_query):
    """The weights of the norms of queries or keys, by head [heads, half]."""
    of_queries = tl.load(q_norm + dims, mask=in_half, other=0.0).to(tl.float32)
    of_keys = tl.load(k_norm + dims, mask=in_half, other=0.0).to(tl.float32)
    return tl.where(is_query, of_queries[None, :], of_keys[None, :])


@triton.jit
def add_norm(
    normed,
    total,
    hidden,
    residual,
    weight,
    width,
    eps,
    SIZE: tl.constexpr,
):
    """One token: the sum, rounded, and its norm. Grid: tokens."""
    token = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, SIZE)
    real = index < width
    at = token * width + index
    added = tl.load(hidden + at, mask=real, other=0.0).to(tl.float32)
    added += tl.load(residual + at, mask=real, other=0.0).to(tl.float32)
    rounded = added.to(total.dtype.element_ty)
    tl.store(total + at, rounded, mask=real)
    wide = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    scaled = wide * inverse * tl.load(weight + index, mask=real, other=0.0).to(tl.float32)
    tl.store(normed + at, scaled.to(normed.dtype.element_ty), mask=real)


@triton.jit
def gate(out, gate_up, inner, SIZE: tl.constexpr):
    """A part of one token. Grid: parts, tokens."""
    token = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    real = index < inner
    at = gate_up + token * 2 * inner + index
    opening = tl.load(at, mask=real, other=0.0).to(tl.float32)
    up = tl.load(at + inner, mask=real, other=0.0).to(tl.float32)
    gated = opening * tl.sigmoid(opening) * up
    tl.store(out + token * inner + index, gated.to(out.dtype.element_ty), mask=real)
