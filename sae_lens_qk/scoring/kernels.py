"""The compiled loops over active x kept entries, on numpy arrays.

Active entries of one side (`start`, `feature`, `value`) come by position: entries `start[t]` to `start[t + 1]` are the
features that fire at position t of the flattened batch. Kept pairs come by query feature: pairs `row_start[a]` to
`row_start[a + 1]` have query feature a (`row_start[head, a]` where pairs are grouped by head first).

Without rotary embeddings M is a number a pair, so it is folded into the weight, and the scores of one query i are

    mixed[b, head] = sum over active a of weight[a, b, head] query_act[i, a]
    scores[head, j] = sum over active b of mixed[b, head] key_act[j, b]

for all heads at once. With them a pair's score depends on i - j, and `mixed[b]` is a vector per head instead:

    mixed[b] = sum over active a of weight[a, b] query_act[i, a] R_i W_Q[a]
    scores[j] = sum over active b of <mixed[b], key_act[j, b] R_j W_K[b]>

Either way the cost per (query, key) is bounded by the active key features, however many pairs are kept. Gradients read the
same sums backwards.
"""

import numba
import numpy as np

_QUERIES = (
    4  # queries that share one pass over the rotated keys, which do not fit in a core's cache
)
_FAST = {
    "reassoc",
    "contract",
    "nsz",
}  # sums may be reordered, so that they vectorise; NaN and inf keep their meaning


@numba.njit(parallel=True, cache=True)
def count_active(counts, acts):
    """counts[t] = number of non-zero activations at position t."""
    for t in numba.prange(len(acts)):
        n = 0
        for feature in range(acts.shape[1]):
            n += acts[t, feature] != 0
        counts[t] = n


@numba.njit(parallel=True, cache=True)
def list_active(start, feature, value, acts):
    """Fill the entries of each position; the last of each is the constant feature."""
    for t in numba.prange(len(acts)):
        at = start[t]
        for a in range(acts.shape[1]):
            if acts[t, a] != 0:
                feature[at], value[at] = a, acts[t, a]
                at += 1
        feature[at], value[at] = acts.shape[1], 1


@numba.njit(cache=True)
def first_firings(n_keys, first, n_pos, k_start, k_feature):
    """Key features of one sequence in the order of their first firing, and how many have fired by each position."""
    seen = np.zeros(n_keys, np.bool_)
    firing = np.empty(min(n_keys, k_start[first + n_pos] - k_start[first]), np.int32)
    n_fired = np.empty(n_pos, np.int32)
    n = 0
    for j in range(n_pos):
        for e in range(k_start[first + j], k_start[first + j + 1]):
            if not seen[k_feature[e]]:
                seen[k_feature[e]] = True
                firing[n] = k_feature[e]
                n += 1
        n_fired[j] = n
    return firing[:n], n_fired


@numba.njit(parallel=True, cache=True, fastmath=_FAST, error_model="numpy")
def plain_scores(
    out,
    lanes,
    n_keys,
    row_start,
    slot,
    weights,
    q_start,
    q_feature,
    q_value,
    k_start,
    k_feature,
    k_value,
):
    """out[row, head, i, j] of all pairs, no rotary embeddings; `weights` are m M.

    `lanes` is a tuple of at least n_heads elements, whose length the compiler knows; slots are key feature * lanes + head.
    """
    batch, n_heads, n_pos, _ = out.shape
    n_lanes = len(lanes)
    for row in numba.prange(batch):
        first = row * n_pos
        firing, n_fired = first_firings(n_keys, first, n_pos, k_start, k_feature)
        mixed = np.zeros(
            n_keys * n_lanes, out.dtype
        )  # where a feature has not fired yet: rubbish, zeroed before it does
        by_key = np.empty((n_pos, n_lanes), out.dtype)
        for i in range(n_pos):
            for b in firing[: n_fired[i]]:
                for lane in range(n_lanes):
                    mixed[b * n_lanes + lane] = 0
            for e in range(q_start[first + i], q_start[first + i + 1]):
                act = q_value[e]
                for p in range(row_start[q_feature[e]], row_start[q_feature[e] + 1]):
                    mixed[slot[p]] += weights[p] * act
            by_key[: i + 1] = 0
            for j in range(i + 1):
                for e in range(k_start[first + j], k_start[first + j + 1]):
                    at, act = k_feature[e] * n_lanes, k_value[e]
                    for lane in range(n_lanes):
                        by_key[j, lane] += mixed[at + lane] * act
            for head in range(n_heads):
                for j in range(i + 1):
                    out[row, head, i, j] = by_key[j, head]


@numba.njit(parallel=True, cache=True, fastmath=_FAST, error_model="numpy")
def plain_gradients(
    grad_weights,
    grad_q_value,
    grad_k_value,
    grad,
    lanes,
    n_keys,
    row_start,
    slot,
    weights,
    q_start,
    q_feature,
    q_value,
    k_start,
    k_feature,
    k_value,
):
    """Gradients of `plain_scores`: grad_weights [block, pair], to be summed over blocks, grad_q_value, grad_k_value [entry].

    Where only the weights' gradients are wanted, the others are empty.
    """
    batch, n_heads, n_pos, _ = grad.shape
    n_lanes, n_blocks, of_acts = len(lanes), len(grad_weights), len(grad_k_value) > 0
    for block in numba.prange(n_blocks):
        of_weights = grad_weights[block]
        by_key = np.zeros((n_pos, n_lanes), grad.dtype)
        for row in range(block, batch, n_blocks):
            first = row * n_pos
            firing, n_fired = first_firings(n_keys, first, n_pos, k_start, k_feature)
            mixed_grad = np.zeros(n_keys * n_lanes, grad.dtype)  # zero until a feature fires
            mixed = np.zeros_like(mixed_grad)
            for i in range(n_pos):
                for b in firing[: n_fired[i]]:
                    for lane in range(n_lanes):
                        mixed_grad[b * n_lanes + lane] = 0
                        mixed[b * n_lanes + lane] = 0
                for head in range(n_heads):
                    for j in range(i + 1):
                        by_key[j, head] = grad[row, head, i, j]
                for j in range(i + 1):
                    for e in range(k_start[first + j], k_start[first + j + 1]):
                        at, act = k_feature[e] * n_lanes, k_value[e]
                        for lane in range(n_lanes):
                            mixed_grad[at + lane] += by_key[j, lane] * act
                for e in range(q_start[first + i], q_start[first + i + 1]):
                    begin, end, act = (
                        row_start[q_feature[e]],
                        row_start[q_feature[e] + 1],
                        q_value[e],
                    )
                    for p in range(begin, end):
                        of_weights[p] += mixed_grad[slot[p]] * act
                    if of_acts:
                        of_act = grad.dtype.type(0)
                        for p in range(begin, end):
                            of_act += mixed_grad[slot[p]] * weights[p]
                            mixed[slot[p]] += weights[p] * act
                        grad_q_value[e] = of_act
                if of_acts:
                    for j in range(i + 1):
                        for e in range(k_start[first + j], k_start[first + j + 1]):
                            at = k_feature[e] * n_lanes
                            of_act = grad.dtype.type(0)
                            for lane in range(n_lanes):
                                of_act += by_key[j, lane] * mixed[at + lane]
                            grad_k_value[e] += of_act


@numba.njit(cache=True)
def numbers(firing, n_keys):
    """Row of each key feature in `firing`, past its end for features that do not fire."""
    local = np.full(n_keys, len(firing), np.int32)
    local[firing] = np.arange(len(firing))
    return local


@numba.njit(cache=True, fastmath=_FAST)
def _rotate_into(out, vector, factor, cos, sin):
    """out = factor R vector: rotate-half on the first 2 len(cos) numbers."""
    half = len(cos)
    for f in range(half):
        out[f] = factor * (vector[f] * cos[f] - vector[half + f] * sin[f])
        out[half + f] = factor * (vector[half + f] * cos[f] + vector[f] * sin[f])
    for d in range(2 * half, len(vector)):
        out[d] = factor * vector[d]


@numba.njit(cache=True, fastmath=_FAST)
def _rotated_keys(first, n_pos, k_start, k_feature, k_value, W_K, kv_head, cos, sin):
    """key_act R_j W_K[b] of each active entry of a sequence: [entry, d_head]."""
    start = k_start[first]
    keys = np.empty((k_start[first + n_pos] - start, W_K.shape[2]), W_K.dtype)
    for j in range(n_pos):
        for e in range(k_start[first + j], k_start[first + j + 1]):
            _rotate_into(keys[e - start], W_K[k_feature[e], kv_head], k_value[e], cos[j], sin[j])
    return keys


@numba.njit(parallel=True, cache=True, fastmath=_FAST, error_model="numpy")
def rotary_scores(
    out,
    row_start,
    pair_key,
    weights,
    q_start,
    q_feature,
    q_value,
    k_start,
    k_feature,
    k_value,
    W_Q,
    W_K,
    cos,
    sin,
):
    """out[row, head, i, j] of all pairs; W_Q [d_query + 1, head, d_head] holds the scale, cos and sin are [pos, freq]."""
    batch, n_heads, n_pos, _ = out.shape
    d_head, zero = W_Q.shape[2], out.dtype.type(0)
    for task in numba.prange(batch * n_heads):
        row, head = task // n_heads, task % n_heads
        first, kv_head = row * n_pos, head // (n_heads // W_K.shape[1])
        start = k_start[first]
        firing, n_fired = first_firings(len(W_K), first, n_pos, k_start, k_feature)
        local = numbers(firing, len(W_K))
        keys = _rotated_keys(first, n_pos, k_start, k_feature, k_value, W_K, kv_head, cos, sin)
        mixed = np.empty((len(firing), _QUERIES, d_head), out.dtype)
        query = np.empty(d_head, out.dtype)
        for i0 in range(0, n_pos, _QUERIES):
            last = min(i0 + _QUERIES, n_pos) - 1
            mixed[: n_fired[last]] = 0
            for i in range(i0, last + 1):
                for e in range(q_start[first + i], q_start[first + i + 1]):
                    a = q_feature[e]
                    _rotate_into(query, W_Q[a, head], q_value[e], cos[i], sin[i])
                    for p in range(row_start[head, a], row_start[head, a + 1]):
                        b, weight = local[pair_key[p]], weights[p]
                        if b < n_fired[i]:
                            for d in range(d_head):
                                mixed[b, i - i0, d] += weight * query[d]
            rows = out[row, head, i0 : last + 1]
            for j in range(last + 1):
                s0, s1, s2, s3 = zero, zero, zero, zero
                for e in range(k_start[first + j], k_start[first + j + 1]):
                    four, key = mixed[local[k_feature[e]]], keys[e - start]
                    for d in range(d_head):
                        s0 += four[0, d] * key[d]
                        s1 += four[1, d] * key[d]
                        s2 += four[2, d] * key[d]
                        s3 += four[3, d] * key[d]
                for i, score in enumerate((s0, s1, s2, s3)):
                    if j <= i0 + i <= last:
                        rows[i, j] = score


@numba.njit(parallel=True, cache=True, fastmath=_FAST, error_model="numpy")
def rotary_gradients(
    grad_weights,
    grad_q_value,
    grad_k_value,
    grad_W_Q,
    grad_W_K,
    grad,
    row_start,
    pair_key,
    weights,
    q_start,
    q_feature,
    q_value,
    k_start,
    k_feature,
    k_value,
    W_Q,
    W_K,
    cos,
    sin,
):
    """Gradients of `rotary_scores`, each summed over blocks of rows.

    grad_weights [block, pair]; grad_q_value, grad_k_value [head, entry]; grad_W_Q, grad_W_K [block, head, feature, d_head].
    Where only the weights' gradients are wanted, the others are empty.
    """
    batch, n_heads, n_pos, _ = grad.shape
    n_blocks, d_head, of_all = len(grad_weights), W_Q.shape[2], grad_W_Q.size > 0
    zero, one = grad.dtype.type(0), grad.dtype.type(1)
    for task in numba.prange(n_blocks * n_heads):
        block, head = task // n_heads, task % n_heads
        kv_head = head // (n_heads // W_K.shape[1])
        query, query_grad, back = np.empty((3, d_head), grad.dtype)
        of_scores = np.empty((n_pos, _QUERIES), grad.dtype)
        for row in range(block, batch, n_blocks):
            first = row * n_pos
            start = k_start[first]
            firing, n_fired = first_firings(len(W_K), first, n_pos, k_start, k_feature)
            local = numbers(firing, len(W_K))
            keys = _rotated_keys(first, n_pos, k_start, k_feature, k_value, W_K, kv_head, cos, sin)
            keys_grad = np.zeros_like(keys) if of_all else keys[:0]
            mixed_grad = np.empty((len(firing), _QUERIES, d_head), grad.dtype)
            mixed = np.empty_like(mixed_grad)
            for i0 in range(0, n_pos, _QUERIES):
                last = min(i0 + _QUERIES, n_pos) - 1
                of_scores[:] = 0
                for i in range(i0, last + 1):
                    of_scores[: i + 1, i - i0] = grad[row, head, i, : i + 1]
                mixed_grad[: n_fired[last]] = 0
                for j in range(last + 1):
                    g0, g1, g2, g3 = of_scores[j]
                    for e in range(k_start[first + j], k_start[first + j + 1]):
                        four, key = mixed_grad[local[k_feature[e]]], keys[e - start]
                        for d in range(d_head):
                            four[0, d] += g0 * key[d]
                            four[1, d] += g1 * key[d]
                            four[2, d] += g2 * key[d]
                            four[3, d] += g3 * key[d]
                if of_all:
                    mixed[: n_fired[last]] = 0
                for i in range(i0, last + 1):
                    for e in range(q_start[first + i], q_start[first + i + 1]):
                        a = q_feature[e]
                        _rotate_into(query, W_Q[a, head], q_value[e], cos[i], sin[i])
                        query_grad[:] = 0
                        for p in range(row_start[head, a], row_start[head, a + 1]):
                            b, weight = local[pair_key[p]], weights[p]
                            if b < n_fired[i]:
                                of_weight = zero
                                for d in range(d_head):
                                    of_weight += query[d] * mixed_grad[b, i - i0, d]
                                grad_weights[block, p] += of_weight
                                if of_all:
                                    for d in range(d_head):
                                        query_grad[d] += weight * mixed_grad[b, i - i0, d]
                                        mixed[b, i - i0, d] += weight * query[d]
                        if of_all:
                            _rotate_into(back, query_grad, one, cos[i], -sin[i])
                            of_act = zero
                            for d in range(d_head):
                                of_act += back[d] * W_Q[a, head, d]
                                grad_W_Q[block, head, a, d] += q_value[e] * back[d]
                            grad_q_value[head, e] = of_act
                if of_all:
                    for j in range(last + 1):
                        g0, g1, g2, g3 = of_scores[j]
                        for e in range(k_start[first + j], k_start[first + j + 1]):
                            four, key_grad = mixed[local[k_feature[e]]], keys_grad[e - start]
                            for d in range(d_head):
                                key_grad[d] += (
                                    g0 * four[0, d]
                                    + g1 * four[1, d]
                                    + g2 * four[2, d]
                                    + g3 * four[3, d]
                                )
            if of_all:
                for j in range(n_pos):
                    for e in range(k_start[first + j], k_start[first + j + 1]):
                        b = k_feature[e]
                        _rotate_into(back, keys_grad[e - start], one, cos[j], -sin[j])
                        of_act = zero
                        for d in range(d_head):
                            of_act += back[d] * W_K[b, kv_head, d]
                            grad_W_K[block, head, b, d] += k_value[e] * back[d]
                        grad_k_value[head, e] = of_act
