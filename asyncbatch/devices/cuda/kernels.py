"""The CUDA side of paged attention, in Triton: one kernel for decode steps, and two for chunks of prompts.

All read keys and values through the block tables, where they lie. A program takes one key-value head, the queries that
share it, and a running softmax over the keys (Milakov and Gimelshein 2018).

`_decode`: one query token a row, and contexts that may be long. Each row's context is cut into *splits*, which fill the
GPU when rows are few (Dao et al. 2023, "Flash-Decoding"). The first split also takes the new token and stores its key
and value, and the last program of a row to finish joins the splits: one launch in place of three.
`_store` and `_prefill`: chunks of prompts, in tiles of several query tokens of a row.

What few models ask for (a sliding window, a softcap, sinks, keys and values of different sizes) is chosen when a kernel
is compiled: a model without it gets a kernel without it. With a window, only the tiles of keys are read that lie in it,
in part or whole, and it is these that decode cuts into splits.

A row's result depends on its own queries, keys and length only: the number of splits is fixed for a batcher, where a
split begins follows from the row's length, and splits are joined in their order. Neighbours change no bit.

Only imported where the model is on CUDA. Triton comes with torch on Linux; TRITON_INTERPRET=1 runs it on a CPU.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * LOG2_E), and exp2 is one instruction
_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _bent(scores, SOFTCAP: tl.constexpr):
    """Scores after the softcap, which is given times LOG2_E, while they come divided by it: SOFTCAP * tanh(scores)."""
    if SOFTCAP != 0.0:
        scores = SOFTCAP * (2.0 * tl.sigmoid(2.0 * scores) - 1.0)
    return scores


@triton.jit
def _first_sums(sinks, head, has_sink, M: tl.constexpr, V_DIM_2: tl.constexpr):
    """The running softmax of M queries before any key: the highest score, the weights' sum, the weighted values. A sink
    is a score that has been seen already, without a value."""
    if sinks is not None:
        top = tl.load(sinks + head, mask=has_sink, other=-float("inf")).to(tl.float32) * _LOG2_E
        total = tl.where(has_sink, 1.0, 0.0)
    else:
        top = tl.full([M], -float("inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
    return top, total, tl.zeros([M, V_DIM_2], tl.float32)


@triton.jit
def _of_values(where, DIM: tl.constexpr, V_DIM: tl.constexpr):
    """From an offset in the pool of keys to that in the pool of values, which is laid out alike."""
    return where if DIM == V_DIM else where // DIM * V_DIM


@triton.jit
def _read(pool, where, there, SIZE: tl.constexpr, SIZE_2: tl.constexpr, WHOLE: tl.constexpr):
    """[keys, SIZE_2] of a pool; zeros beyond SIZE and, unless all keys are there (WHOLE), for those that are not."""
    d = tl.arange(0, SIZE_2)
    at = pool + (where[:, None] + d[None, :])
    if WHOLE and SIZE == SIZE_2:
        return tl.load(at)
    elif WHOLE:
        return tl.load(at, mask=(d < SIZE)[None, :], other=0.0)
    else:
        return tl.load(at, mask=there[:, None] & (d < SIZE)[None, :], other=0.0)


@triton.jit
def _attend_to(
    k_pool, v_pool, p_block, p_token, table, keys, end, queries, limit, scale, top, total, sums,
    DIM: tl.constexpr, DIM_2: tl.constexpr, V_DIM: tl.constexpr, V_DIM_2: tl.constexpr, BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Add the keys number `keys` (those before `end`, not beyond each query's `limit`, and not before its window) to
    the running softmax of `queries`: its highest score `top`, the weights' sum `total`, the weighted values `sums`.
    WHOLE: every query sees all of them, so nothing has to be masked."""
    if WHOLE:
        block = tl.load(table + keys // BLOCK).to(tl.int64)
    else:
        block = tl.load(table + keys // BLOCK, mask=keys < end, other=0).to(tl.int64)
    where = block * p_block + (keys % BLOCK) * p_token
    k = _read(k_pool, where, keys < end, DIM, DIM_2, WHOLE)
    v = _read(v_pool, _of_values(where, DIM, V_DIM), keys < end, V_DIM, V_DIM_2, WHOLE)
    scores = tl.dot(queries, tl.trans(k), input_precision=PRECISION)
    if SOFTCAP != 0.0:
        scores = _bent(scores * scale, SOFTCAP)
        scale = 1.0
    if not WHOLE:
        seen = (keys[None, :] <= limit[:, None]) & (keys < end)[None, :]
        if WINDOW:
            seen = seen & (keys[None, :] > limit[:, None] - WINDOW)
        scores = tl.where(seen, scores, -float("inf"))
    # Scaled here, and below within the subtraction: one instruction for both. (A scale is positive.)
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    # A query that has seen nothing yet has -inf everywhere; a 0 in its place keeps nan out.
    base = tl.where(new_top == -float("inf"), 0.0, new_top)
    weights = tl.exp2(scores * scale - base[:, None])
    kept = tl.exp2(top - base)
    sums = sums * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return new_top, total * kept + tl.sum(weights, 1), sums


@triton.jit
def _decode(
    q, q_token, q_head, new_k, new_k_token, new_k_head, new_v, new_v_token, new_v_head,
    k_pool, v_pool, p_block, p_head, p_token, tables, t_row, live_rows, position, out, out_token, out_head,
    parts, logs, arrived, sinks, scale,
    GROUP: tl.constexpr, M: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr, V_DIM: tl.constexpr,
    V_DIM_2: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, TILE: tl.constexpr,
    SPLITS: tl.constexpr, TOGETHER: tl.constexpr, LEAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of one row, for one key-value head. Long because all of it is one launch: the new token's key and value
    are stored, the split is attended to, and the last program of a row joins the splits."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m, d, e = tl.arange(0, M), tl.arange(0, DIM_2), tl.arange(0, V_DIM_2)
    in_k, in_v, head = d < DIM, e < V_DIM, kv_head * GROUP + m
    inside = (m < GROUP)[:, None] & in_v[None, :]
    out_at = out + row * out_token + head[:, None] * out_head + e[None, :]
    live = tl.load(live_rows + row)
    place = tl.load(position + row)  # of the new token, and the number of those before it
    if live == 0:  # padding: zeros
        if split == 0:
            tl.store(out_at, tl.zeros([M, V_DIM_2], tl.float32), mask=inside)
        return
    begin = 0  # of the context
    if WINDOW:
        begin = tl.maximum(place + 1 - WINDOW, 0) // TILE * TILE
    size = tl.cdiv(tl.maximum(tl.cdiv(place - begin, SPLITS), LEAST), TILE) * TILE
    used = tl.maximum(tl.cdiv(place - begin, size), 1)  # splits that have anything in them
    if split >= used:
        return

    there = (m < GROUP)[:, None] & in_k[None, :]
    queries = tl.load(q + row * q_token + head[:, None] * q_head + d[None, :], mask=there, other=0.0)
    # The new token, loaded here by the first split and used after the loop: meanwhile it arrives.
    new_k = tl.load(new_k + row * new_k_token + kv_head * new_k_head + d, mask=d + split * DIM_2 < DIM, other=0.0)
    new_v = tl.load(new_v + row * new_v_token + kv_head * new_v_head + e, mask=e + split * V_DIM_2 < V_DIM, other=0.0)
    tables += row * t_row
    new_block = tl.load(tables + place // BLOCK).to(tl.int64)
    k_pool += kv_head * p_head
    v_pool += _of_values(kv_head * p_head, DIM, V_DIM)
    top, total, sums = _first_sums(sinks, head, m < tl.where(split == 0, GROUP, 0), M, V_DIM_2)
    start = begin + split * size
    end = tl.minimum(place, start + size)
    limit = tl.zeros([M], tl.int32) + place
    # Without a window, the new token sees all of every tile but the last.
    whole = start
    if not WINDOW:
        whole += tl.maximum(end - start, 0) // TILE * TILE
        for n in range(start, whole, TILE):
            top, total, sums = _attend_to(
                k_pool, v_pool, p_block, p_token, tables, n + tl.arange(0, TILE), end, queries, limit, scale,
                top, total, sums, DIM, DIM_2, V_DIM, V_DIM_2, BLOCK, WINDOW, SOFTCAP, PRECISION, True,
            )  # fmt: skip
    for n in range(whole, end, TILE):
        top, total, sums = _attend_to(
            k_pool, v_pool, p_block, p_token, tables, n + tl.arange(0, TILE), end, queries, limit, scale,
            top, total, sums, DIM, DIM_2, V_DIM, V_DIM_2, BLOCK, WINDOW, SOFTCAP, PRECISION, False,
        )  # fmt: skip
    if split == 0:
        where = new_block * p_block + (place % BLOCK) * p_token
        tl.store(k_pool + (where + d), new_k, mask=in_k)
        tl.store(v_pool + (_of_values(where, DIM, V_DIM) + e), new_v, mask=in_v)
        score = tl.sum(queries.to(tl.float32) * new_k.to(tl.float32)[None, :], 1)
        score = _bent(score * scale, SOFTCAP)
        new_top = tl.maximum(top, score)
        kept, weight = tl.exp2(top - new_top), tl.exp2(score - new_top)
        total = total * kept + weight
        sums = sums * kept[:, None] + new_v.to(tl.float32)[None, :] * weight[:, None]
        top = new_top
    result = sums / total[:, None]
    if used == 1:
        tl.store(out_at, result, mask=inside)
        return

    # Leave the split's result for the program that comes last, and see whether that is this one.
    first = (row * tl.num_programs(1) + kv_head) * SPLITS
    within = m[:, None] * V_DIM_2 + e[None, :]
    tl.store(parts + (first + split) * GROUP * V_DIM_2 + within, result, mask=(m < GROUP)[:, None])
    tl.store(logs + (first + split) * GROUP + m, top + tl.log2(total), mask=m < GROUP)
    tl.debug_barrier()  # all threads have stored before one of them says so
    counter = arrived + row * tl.num_programs(1) + kv_head
    if tl.atomic_add(counter, 1, sem="acq_rel") < used - 1:
        return
    tl.store(counter, 0)  # for the next layer
    top = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, V_DIM_2], tl.float32)
    # TOGETHER of them are loaded at once. (With all 64 that a small batch has, the kernel took 26 s to compile, not 3.)
    for several in range(0, used, TOGETHER):
        for one in tl.static_range(TOGETHER):
            part = several + one
            there_too = m < tl.where(part < used, GROUP, 0)
            log = tl.load(logs + (first + part) * GROUP + m, mask=there_too, other=-float("inf"))
            values = tl.load(parts + (first + part) * GROUP * V_DIM_2 + within, mask=there_too[:, None], other=0.0)
            new_top = tl.maximum(top, log)
            base = tl.where(new_top == -float("inf"), 0.0, new_top)
            kept, weight = tl.exp2(top - base), tl.exp2(log - base)
            total = total * kept + weight
            sums = sums * kept[:, None] + values * weight[:, None]
            top = new_top
    tl.store(out_at, sums / total[:, None], mask=inside)


@triton.jit
def _store(
    new_k, new_k_token, new_k_head, new_v, new_v_token, new_v_head, k_pool, v_pool, p_block, p_head, p_token, places,
    KV_HEADS: tl.constexpr, HEADS_2: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr, V_DIM: tl.constexpr,
    V_DIM_2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program stores the key and value of one token, for all heads."""
    token = tl.program_id(0)
    place = tl.load(places + token)
    head, d, e = tl.arange(0, HEADS_2)[:, None], tl.arange(0, DIM_2)[None, :], tl.arange(0, V_DIM_2)[None, :]
    inside = (head < KV_HEADS) & (d < DIM)
    where = (place // BLOCK) * p_block + (place % BLOCK) * p_token + head * p_head
    where_k, where_v = where + d, _of_values(where, DIM, V_DIM) + e
    k = tl.load(new_k + token * new_k_token + head * new_k_head + d, mask=inside)
    tl.store(k_pool + where_k, k, mask=inside)
    inside = (head < KV_HEADS) & (e < V_DIM)
    v = tl.load(new_v + token * new_v_token + head * new_v_head + e, mask=inside)
    tl.store(v_pool + where_v, v, mask=inside)


@triton.jit
def _prefill(
    q, q_token, q_head, k_pool, v_pool, p_block, p_head, p_token, tables, t_row, first, count, position, rows, tokens,
    out, out_token, out_head, sinks, scale,
    ROWS_2: tl.constexpr, TILE_Q: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, DIM: tl.constexpr,
    DIM_2: tl.constexpr, V_DIM: tl.constexpr, V_DIM_2: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of TILE_Q tokens of one row, for one key-value head. The tiles of all rows are counted through, and each
    program finds its own; the last of them, which have the most keys, begin first. What is left of the programs writes
    zeros for the tokens of no row."""
    kv_head, number = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    each = tl.arange(0, ROWS_2)
    counts = tl.load(count + each, mask=each < rows, other=0)
    tiles = tl.cdiv(counts, TILE_Q)
    ends = tl.cumsum(tiles, 0)
    row = tl.sum((ends <= number).to(tl.int32), 0)
    m, d, e = tl.arange(0, M), tl.arange(0, DIM_2), tl.arange(0, V_DIM_2)
    head, in_k, in_v = kv_head * GROUP + m % GROUP, d < DIM, e < V_DIM
    if row >= rows:
        token = tl.sum(counts, 0) + (number - tl.sum(tiles, 0)) * TILE_Q + m // GROUP
        there = ((m < TILE_Q * GROUP) & (token < tokens))[:, None] & in_v[None, :]
        nothing = tl.zeros([M, V_DIM_2], tl.float32)
        tl.store(out + token[:, None] * out_token + head[:, None] * out_head + e[None, :], nothing, there)
        return
    # The tile's queries: its tokens times the query heads that share this key-value head.
    begin_q = (number - tl.sum(tl.where(each == row, ends - tiles, 0), 0)) * TILE_Q
    num_tokens, before = tl.load(count + row), tl.load(position + row)
    token = begin_q + m // GROUP
    inside = (m < TILE_Q * GROUP) & (token < num_tokens)
    there = inside[:, None] & in_k[None, :]
    limit = before + token  # a query sees the keys at places up to its own
    end = before + tl.minimum(num_tokens, begin_q + TILE_Q)
    token += tl.load(first + row)
    queries = tl.load(q + token[:, None] * q_token + head[:, None] * q_head + d[None, :], mask=there, other=0.0)
    top, total, sums = _first_sums(sinks, head, inside, M, V_DIM_2)
    k_pool += kv_head * p_head
    v_pool += _of_values(kv_head * p_head, DIM, V_DIM)
    tables += row * t_row
    # Without a window, all queries see all of the tiles before the first query's own.
    begin = 0
    if WINDOW:
        begin = tl.maximum(before + begin_q + 1 - WINDOW, 0) // TILE * TILE
    else:
        whole = (before + begin_q + 1) // TILE * TILE
        for n in range(0, whole, TILE):
            top, total, sums = _attend_to(
                k_pool, v_pool, p_block, p_token, tables, n + tl.arange(0, TILE), end, queries, limit, scale,
                top, total, sums, DIM, DIM_2, V_DIM, V_DIM_2, BLOCK, WINDOW, SOFTCAP, PRECISION, True,
            )  # fmt: skip
        begin = whole
    for n in range(begin, end, TILE):
        top, total, sums = _attend_to(
            k_pool, v_pool, p_block, p_token, tables, n + tl.arange(0, TILE), end, queries, limit, scale,
            top, total, sums, DIM, DIM_2, V_DIM, V_DIM_2, BLOCK, WINDOW, SOFTCAP, PRECISION, False,
        )  # fmt: skip
    there = inside[:, None] & in_v[None, :]
    tl.store(out + token[:, None] * out_token + head[:, None] * out_head + e[None, :], sums / total[:, None], there)


def decode(
    query, key, value, k_pool, v_pool, tables, live, position, scale, splits, arrived, window=0, softcap=0.0, sinks=None
) -> torch.Tensor:
    """Store one new token a row and attend to all of the row's tokens. Returns [rows, heads, value_size]; zeros for
    padding.

    query: [rows, heads, size]. key: [rows, kv_heads, size]. value: [rows, kv_heads, value_size]. The last dimension is
        contiguous in each.
    k_pool, v_pool: [num_blocks + 1, kv_heads, block_size, size or value_size], laid out alike, without gaps.
    tables: int32 [rows, max_blocks]. live, position: int32 [rows], 0 for padding, and the new token's place.
    splits: into how many parts a context is cut. Fixed for a batcher.
    arrived: int32 [rows * kv_heads], zeros, and zeros again afterwards. It may be longer.
    window: how many tokens a token sees, itself included; 0: all up to itself. softcap, sinks: as for
        `attention.attend_on_cpu`.
    """
    rows, heads, _ = query.shape
    kv_heads, group, value_size = key.shape[1], heads // key.shape[1], value.shape[2]
    sizes, wide = sizes_of(key, value)
    out = torch.empty((rows, heads, value_size), dtype=query.dtype, device=query.device)
    parts = torch.empty(rows, heads, splits, sizes["V_DIM_2"], dtype=torch.float32, device=query.device)
    logs = torch.empty(rows, heads, splits, dtype=torch.float32, device=query.device)
    _decode[(rows, kv_heads, splits)](
        query, *query.stride()[:2], key, *key.stride()[:2], value, *value.stride()[:2],
        k_pool, v_pool, *k_pool.stride()[:3], tables, tables.stride(0), live, position, out, *out.stride()[:2],
        parts, logs, arrived, sinks, scale / softcap if softcap else scale * LOG2_E,
        GROUP=group, M=power_of_2(group, 16), **sizes, BLOCK=k_pool.shape[2], WINDOW=window, SOFTCAP=softcap * LOG2_E,
        **splitting(splits), **tiling(wide, query.dtype, shared_memory(query.device)),
    )  # fmt: skip
    return out


def prefill(
    query, key, value, k_pool, v_pool, places, tables, first, count, position, scale, window=0, softcap=0.0, sinks=None
) -> torch.Tensor:
    """Store N new tokens, which lie in rows, and attend from each to its row's tokens up to itself.

    query, key, value: as for `decode`, with N tokens in place of rows. places: int64 [N], where in a pool (block *
        block_size + place in it) each goes. first, count, position: int32 [rows]; row r has the tokens first[r] to
        first[r] + count[r] - 1, and the first of them is its token number position[r]. Rows lie one after the other
        from token 0 on, without gaps; a count may be 0. The others: as for `decode`.
    Returns [N, heads, value_size]; zeros for a token of no row.
    """
    tokens, heads, _ = query.shape
    kv_heads, group, block = key.shape[1], heads // key.shape[1], k_pool.shape[2]
    sizes, wide = sizes_of(key, value)
    shared = shared_memory(query.device)
    tile_q = query_tile(group, wide, shared)
    rows = tables.shape[0]
    programs = -(-tokens // tile_q) + rows  # as many tiles as there can be: each row's last one may be in part empty
    out = torch.empty((tokens, heads, value.shape[2]), dtype=query.dtype, device=query.device)
    _store[(tokens,)](
        key, *key.stride()[:2], value, *value.stride()[:2], k_pool, v_pool, *k_pool.stride()[:3], places,
        KV_HEADS=kv_heads, HEADS_2=power_of_2(kv_heads), **sizes, BLOCK=block,
    )  # fmt: skip
    _prefill[(kv_heads, programs)](
        query, *query.stride()[:2], k_pool, v_pool, *k_pool.stride()[:3], tables, tables.stride(0),
        first, count, position, rows, tokens, out, *out.stride()[:2],
        sinks, scale / softcap if softcap else scale * LOG2_E, ROWS_2=power_of_2(rows), TILE_Q=tile_q, GROUP=group,
        M=power_of_2(tile_q * group, 16), **sizes, BLOCK=block, WINDOW=window, SOFTCAP=softcap * LOG2_E,
        **tiling(wide, query.dtype, shared // 2),
    )  # fmt: skip
    return out


def sizes_of(key: torch.Tensor, value: torch.Tensor) -> tuple[dict[str, int], int]:
    """The elements of keys and values as the kernels have them, and the wider of the two rounded up."""
    dim, v_dim = key.shape[2], value.shape[2]
    dim_2, v_dim_2 = power_of_2(dim, 16), power_of_2(v_dim, 16)
    return {"DIM": dim, "DIM_2": dim_2, "V_DIM": v_dim, "V_DIM_2": v_dim_2}, max(dim_2, v_dim_2)


def power_of_2(number: int, least: int = 1) -> int:
    """The smallest power of 2 that is not less than `number` and `least`: Triton's tiles have such sizes."""
    return 1 << (max(number, least) - 1).bit_length()


def splitting(splits: int) -> dict:
    """How decode cuts contexts into parts and joins them."""
    return {"SPLITS": splits, "TOGETHER": min(splits, 8), "LEAST": least_split(splits)}


def least_split(splits: int) -> int:
    """The fewest keys of a split: where rows are many, fewer and longer splits fill the GPU as well and begin and join
    less often. H200, 32 rows of the 8B shape, 8 splits of at least 512 keys against 1: 40.7 us a layer against 49.5 at
    context 1024, 74.9 against 79.9 at 2048, 37.3 against 43.4 with mixed lengths, the same at 4096 and 8192 (the
    kernel alone, in CUDA graphs). Of whole steps: 2 splits are faster where all rows are equally long (12.27 ms instead
    of 12.49 at 8192, 8.42 instead of 8.75 at 4096; on another day the gain was within the 5 % by which two openings of
    the same options differ), and slower where they are not (7.37 instead of 5.84). By scripts that are not kept."""
    return max(1, min(512, 4096 // splits))


def query_tile(group: int, dim_2: int, shared_bytes: int) -> int:
    """Tokens of a chunk in one program: as many as make 64 queries, so that their float32 sums stay in registers, but
    their size in bytes at most a third of the shared memory."""
    tile = max(1, 64 // power_of_2(group))
    while tile > 1 and power_of_2(tile * group) * dim_2 * 4 > shared_bytes // 3:
        tile //= 2
    return tile


def tiling(dim_2: int, dtype: torch.dtype, shared_bytes: int) -> dict:
    """Keys in a tile, warps, and stages of the pipeline that loads tiles ahead.

    64 keys, 4 warps and 2 stages, on an H200 with heads of 128 in bfloat16. Of 47 combinations for chunks, with 16, 32
    or 64 tokens, they took the least for most chunks. Of some 50 for decoding, with splits of equal and unequal sizes,
    they were among the best for rows of equal length (4.1 TB/s at context 8191); with mixed lengths 16 splits took 7 %
    less, and 4 % more with equal ones. (By scripts that are not kept.) A GPU with less shared memory gets fewer stages,
    then smaller tiles."""
    size = dtype.itemsize
    tile, stages = 64, 2
    left = shared_bytes - 16 * 1024  # queries, and what Triton needs to change layouts
    while tile > 16 and 2 * tile * dim_2 * size > left:
        tile //= 2
    while stages > 1 and stages * 2 * tile * dim_2 * size > left:
        stages -= 1
    precision = "ieee" if dtype == torch.float32 else None  # float32 stays float32, and is not rounded to tf32
    return {"TILE": tile, "num_warps": 4, "num_stages": stages, "PRECISION": precision}


@functools.lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have."""
    if device.type != "cuda":
        return 64 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
