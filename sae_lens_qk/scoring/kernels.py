"""The compiled loops over active entries and listed pairs, on numpy arrays.

`queries` and `keys` are `entries.ActiveEntries`: entries `start[t]` to `start[t + 1]` are the
features that fire at position t of the flattened batch. `pairs` are `compiled.QueryMajor` or
`compiled.HeadMajor`: pairs `row_start[a]` to `row_start[a + 1]` have query feature a
(`row_start[head, a]` where pairs are grouped by head first). Query i may attend to the keys
`first_keys[i]` to i of its sequence; `first_keys` never decreases.

Without rotary embeddings M is a number per pair, so it is folded into the weight, and the scores of
one query i are

    mixed[b, head] = sum over active a of weight[a, b, head] query_act[i, a]
    scores[head, j] = sum over active b of mixed[b, head] key_act[j, b]

for all heads at once. With them a pair's score depends on i - j, and `mixed[b]` is a vector per
head instead:

    mixed[b] = sum over active a of weight[a, b] query_act[i, a] R_i W_Q[a]
    scores[j] = sum over active b of <mixed[b], key_act[j, b] R_j W_K[b]>

Either way the cost per (query, key) is bounded by the active key features, however many pairs are
listed. Gradients read the same sums backwards.

Tuples are taken apart before the parallel loops: a loop that reads fields is slower, one that
writes to a tuple's arrays loses what it writes.
"""

import numba
import numpy as np

# Queries that share one pass over the rotated keys, which do not fit in a core's cache. The loops
# over the four are written out, so that the compiler keeps their sums in registers.
_GROUP = 4
# Sums may be reordered, so that they vectorise; NaN and inf keep their meaning.
_FAST = {"reassoc", "contract", "nsz"}


# Active entries


@numba.njit(parallel=True, cache=True)
def count_active(counts, acts):
    """counts[t] = number of non-zero activations at position t."""
    for t in numba.prange(len(acts)):
        n_active = 0
        for a in range(acts.shape[1]):
            n_active += acts[t, a] != 0
        counts[t] = n_active


@numba.njit(parallel=True, cache=True)
def list_active(feature, value, start, acts):
    """Fill the entries of each position; the last of each is the constant feature."""
    for t in numba.prange(len(acts)):
        e = start[t]
        for a in range(acts.shape[1]):
            if acts[t, a] != 0:
                feature[e] = a
                value[e] = acts[t, a]
                e += 1
        feature[e] = acts.shape[1]
        value[e] = 1


@numba.njit(cache=True)
def first_firings(n_keys, start, feature):
    """Key features of one sequence in the order of their first firing.

    Args:
        start: [pos + 1] of the sequence.
    Returns:
        The features, and how many of them have fired by each position.
    """
    n_pos = len(start) - 1
    has_fired = np.zeros(n_keys, np.bool_)
    firing = np.empty(min(n_keys, start[n_pos] - start[0]), np.int32)
    n_fired = np.empty(n_pos, np.int32)
    n = 0
    for j in range(n_pos):
        for e in range(start[j], start[j + 1]):
            b = feature[e]
            if not has_fired[b]:
                has_fired[b] = True
                firing[n] = b
                n += 1
        n_fired[j] = n
    return firing[:n], n_fired


@numba.njit(cache=True)
def firing_ranks(firing, n_keys):
    """Row of each key feature in `firing`, past its end for features that do not fire."""
    ranks = np.full(n_keys, len(firing), np.int32)
    ranks[firing] = np.arange(len(firing))
    return ranks


# Without rotary embeddings


@numba.njit(
    parallel=True,
    cache=True,
    fastmath=_FAST,
    error_model="numpy",
)
def plain_scores(scores, lanes, first_keys, pairs, weights, queries, keys):
    """scores[row, head, i, j] of all pairs at allowed keys; `weights` are m M.

    `lanes` is a tuple of at least n_heads elements, whose length the compiler knows.
    """
    batch, n_heads, n_pos, _ = scores.shape
    n_keys, row_start, slots = pairs
    query_starts, query_feature, query_value = queries
    key_starts, key_feature, key_value = keys
    n_lanes = len(lanes)
    for row in numba.prange(batch):
        query_start = query_starts[row * n_pos : (row + 1) * n_pos + 1]
        key_start = key_starts[row * n_pos : (row + 1) * n_pos + 1]
        firing, n_fired = first_firings(n_keys, key_start, key_feature)
        # rubbish where a feature has not fired yet, zeroed before it does
        mixed = np.zeros(n_keys * n_lanes, scores.dtype)  # [key feature * lane]
        key_scores = np.empty((n_pos, n_lanes), scores.dtype)
        for i in range(n_pos):
            for b in firing[: n_fired[i]]:
                for lane in range(n_lanes):
                    mixed[b * n_lanes + lane] = 0
            for e in range(query_start[i], query_start[i + 1]):
                a = query_feature[e]
                act = query_value[e]
                for p in range(row_start[a], row_start[a + 1]):
                    mixed[slots[p]] += weights[p] * act
            key_scores[first_keys[i] : i + 1] = 0
            for j in range(first_keys[i], i + 1):
                for e in range(key_start[j], key_start[j + 1]):
                    slot = key_feature[e] * n_lanes
                    act = key_value[e]
                    for lane in range(n_lanes):
                        key_scores[j, lane] += mixed[slot + lane] * act
            for head in range(n_heads):
                for j in range(first_keys[i], i + 1):
                    scores[row, head, i, j] = key_scores[j, head]


@numba.njit(
    parallel=True,
    cache=True,
    fastmath=_FAST,
    error_model="numpy",
)
def plain_gradients(
    grad_weights,
    grad_query_values,
    grad_key_values,
    grad_scores,
    lanes,
    first_keys,
    pairs,
    weights,
    queries,
    keys,
):
    """Gradients of `plain_scores`.

    Where only the weights' gradients are asked for, the others are empty.

    Args:
        grad_weights: [block, pair], to be summed over blocks of rows.
        grad_query_values, grad_key_values: [entry].
    """
    batch, n_heads, n_pos, _ = grad_scores.shape
    n_keys, row_start, slots = pairs
    query_starts, query_feature, query_value = queries
    key_starts, key_feature, key_value = keys
    n_lanes = len(lanes)
    n_blocks = len(grad_weights)
    needs_acts = len(grad_key_values) > 0
    for block in numba.prange(n_blocks):
        block_grad_weights = grad_weights[block]
        # lanes past the last head stay zero
        key_grads = np.zeros((n_pos, n_lanes), grad_scores.dtype)
        for row in range(block, batch, n_blocks):
            query_start = query_starts[row * n_pos : (row + 1) * n_pos + 1]
            key_start = key_starts[row * n_pos : (row + 1) * n_pos + 1]
            firing, n_fired = first_firings(n_keys, key_start, key_feature)
            # [key feature * lane], zero until a feature fires
            mixed_grad = np.zeros(n_keys * n_lanes, grad_scores.dtype)
            mixed = np.zeros_like(mixed_grad)
            for i in range(n_pos):
                for b in firing[: n_fired[i]]:
                    for lane in range(n_lanes):
                        mixed_grad[b * n_lanes + lane] = 0
                        mixed[b * n_lanes + lane] = 0
                for head in range(n_heads):
                    for j in range(first_keys[i], i + 1):
                        key_grads[j, head] = grad_scores[row, head, i, j]
                for j in range(first_keys[i], i + 1):
                    for e in range(key_start[j], key_start[j + 1]):
                        slot = key_feature[e] * n_lanes
                        act = key_value[e]
                        for lane in range(n_lanes):
                            mixed_grad[slot + lane] += key_grads[j, lane] * act
                for e in range(query_start[i], query_start[i + 1]):
                    begin = row_start[query_feature[e]]
                    end = row_start[query_feature[e] + 1]
                    act = query_value[e]
                    for p in range(begin, end):
                        block_grad_weights[p] += mixed_grad[slots[p]] * act
                    if needs_acts:
                        grad_act = grad_scores.dtype.type(0)
                        for p in range(begin, end):
                            grad_act += mixed_grad[slots[p]] * weights[p]
                            mixed[slots[p]] += weights[p] * act
                        grad_query_values[e] = grad_act
                if needs_acts:
                    for j in range(first_keys[i], i + 1):
                        for e in range(key_start[j], key_start[j + 1]):
                            slot = key_feature[e] * n_lanes
                            grad_act = grad_scores.dtype.type(0)
                            for lane in range(n_lanes):
                                grad_act += key_grads[j, lane] * mixed[slot + lane]
                            grad_key_values[e] += grad_act


# With rotary embeddings


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
def _rotated_keys(key_start, key_feature, key_value, W_K, kv_head, cos, sin):
    """key_act R_j W_K[b] of each active entry of a sequence: [entry, d_head]."""
    first_entry = key_start[0]
    rotated = np.empty((key_start[-1] - first_entry, W_K.shape[2]), W_K.dtype)
    for j in range(len(key_start) - 1):
        for e in range(key_start[j], key_start[j + 1]):
            key = rotated[e - first_entry]
            _rotate_into(key, W_K[key_feature[e], kv_head], key_value[e], cos[j], sin[j])
    return rotated


@numba.njit(
    parallel=True,
    cache=True,
    fastmath=_FAST,
    error_model="numpy",
)
def rotary_scores(scores, first_keys, pairs, weights, queries, keys, decoders):
    """scores[row, head, i, j] of all pairs at allowed keys; `decoders` are `RotaryDecoders`."""
    batch, n_heads, n_pos, _ = scores.shape
    row_start, pair_key = pairs
    query_starts, query_feature, query_value = queries
    key_starts, key_feature, key_value = keys
    W_Q, W_K, cos, sin = decoders
    n_keys, n_kv_heads, d_head = W_K.shape
    zero = scores.dtype.type(0)
    for task in numba.prange(batch * n_heads):
        row = task // n_heads
        head = task % n_heads
        kv_head = head // (n_heads // n_kv_heads)
        query_start = query_starts[row * n_pos : (row + 1) * n_pos + 1]
        key_start = key_starts[row * n_pos : (row + 1) * n_pos + 1]
        first_entry = key_start[0]
        firing, n_fired = first_firings(n_keys, key_start, key_feature)
        ranks = firing_ranks(firing, n_keys)
        rotated_keys = _rotated_keys(key_start, key_feature, key_value, W_K, kv_head, cos, sin)
        mixed = np.empty((len(firing), _GROUP, d_head), scores.dtype)
        query = np.empty(d_head, scores.dtype)
        for i0 in range(0, n_pos, _GROUP):
            last = min(i0 + _GROUP, n_pos) - 1
            mixed[: n_fired[last]] = 0
            for i in range(i0, last + 1):
                for e in range(query_start[i], query_start[i + 1]):
                    a = query_feature[e]
                    _rotate_into(query, W_Q[a, head], query_value[e], cos[i], sin[i])
                    for p in range(row_start[head, a], row_start[head, a + 1]):
                        b = ranks[pair_key[p]]
                        weight = weights[p]
                        if b < n_fired[i]:
                            for d in range(d_head):
                                mixed[b, i - i0, d] += weight * query[d]
            group_scores = scores[row, head, i0 : last + 1]
            for j in range(first_keys[i0], last + 1):
                s0, s1, s2, s3 = zero, zero, zero, zero
                for e in range(key_start[j], key_start[j + 1]):
                    group = mixed[ranks[key_feature[e]]]  # [query of the group, d_head]
                    key = rotated_keys[e - first_entry]
                    for d in range(d_head):
                        s0 += group[0, d] * key[d]
                        s1 += group[1, d] * key[d]
                        s2 += group[2, d] * key[d]
                        s3 += group[3, d] * key[d]
                for lane, score in enumerate((s0, s1, s2, s3)):
                    i = i0 + lane
                    if i <= last and first_keys[i] <= j <= i:
                        group_scores[lane, j] = score


# The next three are inlined: called as functions, they make the loops half as fast.


@numba.njit(inline="always")
def _add_outer(group, factors, vector):
    """group[query] += factors[query] vector, for the queries of a group."""
    g0, g1, g2, g3 = factors
    for d in range(len(vector)):
        group[0, d] += g0 * vector[d]
        group[1, d] += g1 * vector[d]
        group[2, d] += g2 * vector[d]
        group[3, d] += g3 * vector[d]


@numba.njit(inline="always")
def _add_combination(vector, factors, group):
    """vector += sum over the queries of a group of factors[query] group[query]."""
    g0, g1, g2, g3 = factors
    for d in range(len(vector)):
        vector[d] += g0 * group[0, d] + g1 * group[1, d] + g2 * group[2, d] + g3 * group[3, d]


@numba.njit(inline="always")
def _add_row_gradient(grad_row, decoder_row, act, vector_grad):
    """Gradients of act * decoder_row, given the product's: adds the row's, returns the act's."""
    grad_act = vector_grad.dtype.type(0)
    for d in range(len(vector_grad)):
        grad_act += vector_grad[d] * decoder_row[d]
        grad_row[d] += act * vector_grad[d]
    return grad_act


@numba.njit(
    parallel=True,
    cache=True,
    fastmath=_FAST,
    error_model="numpy",
)
def rotary_gradients(
    grad_weights,
    grad_query_values,
    grad_key_values,
    grad_W_Q,
    grad_W_K,
    grad_scores,
    first_keys,
    pairs,
    weights,
    queries,
    keys,
    decoders,
):
    """Gradients of `rotary_scores`.

    Where only the weights' gradients are asked for, the others are empty.

    Args:
        grad_weights: [block, pair], to be summed over blocks of rows.
        grad_query_values, grad_key_values: [head, entry].
        grad_W_Q, grad_W_K: [block, head, feature, d_head].
    """
    batch, n_heads, n_pos, _ = grad_scores.shape
    row_start, pair_key = pairs
    query_starts, query_feature, query_value = queries
    key_starts, key_feature, key_value = keys
    W_Q, W_K, cos, sin = decoders
    minus_sin = -sin
    n_keys, n_kv_heads, d_head = W_K.shape
    n_blocks = len(grad_weights)
    needs_all = grad_W_Q.size > 0
    zero = grad_scores.dtype.type(0)
    one = grad_scores.dtype.type(1)
    for task in numba.prange(n_blocks * n_heads):
        block = task // n_heads
        head = task % n_heads
        kv_head = head // (n_heads // n_kv_heads)
        query, query_grad, unrotated = np.empty((3, d_head), grad_scores.dtype)
        group_grads = np.empty((n_pos, _GROUP), grad_scores.dtype)
        for row in range(block, batch, n_blocks):
            query_start = query_starts[row * n_pos : (row + 1) * n_pos + 1]
            key_start = key_starts[row * n_pos : (row + 1) * n_pos + 1]
            first_entry = key_start[0]
            firing, n_fired = first_firings(n_keys, key_start, key_feature)
            ranks = firing_ranks(firing, n_keys)
            rotated_keys = _rotated_keys(key_start, key_feature, key_value, W_K, kv_head, cos, sin)
            key_grads = np.zeros_like(rotated_keys) if needs_all else rotated_keys[:0]
            mixed_grad = np.empty((len(firing), _GROUP, d_head), grad_scores.dtype)
            mixed = np.empty_like(mixed_grad)
            for i0 in range(0, n_pos, _GROUP):
                last = min(i0 + _GROUP, n_pos) - 1
                group_grads[first_keys[i0] : last + 1] = 0
                for i in range(i0, last + 1):
                    row_grads = grad_scores[row, head, i, first_keys[i] : i + 1]
                    group_grads[first_keys[i] : i + 1, i - i0] = row_grads
                mixed_grad[: n_fired[last]] = 0
                for j in range(first_keys[i0], last + 1):
                    g0, g1, g2, g3 = group_grads[j]
                    for e in range(key_start[j], key_start[j + 1]):
                        group = mixed_grad[ranks[key_feature[e]]]
                        _add_outer(group, (g0, g1, g2, g3), rotated_keys[e - first_entry])
                if needs_all:
                    mixed[: n_fired[last]] = 0
                for i in range(i0, last + 1):
                    for e in range(query_start[i], query_start[i + 1]):
                        a = query_feature[e]
                        act = query_value[e]
                        _rotate_into(query, W_Q[a, head], act, cos[i], sin[i])
                        query_grad[:] = 0
                        for p in range(row_start[head, a], row_start[head, a + 1]):
                            b = ranks[pair_key[p]]
                            weight = weights[p]
                            if b < n_fired[i]:
                                grad_weight = zero
                                for d in range(d_head):
                                    grad_weight += query[d] * mixed_grad[b, i - i0, d]
                                grad_weights[block, p] += grad_weight
                                if needs_all:
                                    for d in range(d_head):
                                        query_grad[d] += weight * mixed_grad[b, i - i0, d]
                                        mixed[b, i - i0, d] += weight * query[d]
                        if needs_all:
                            grad_row = grad_W_Q[block, head, a]
                            decoder_row = W_Q[a, head]
                            _rotate_into(unrotated, query_grad, one, cos[i], minus_sin[i])
                            grad_query_values[head, e] = _add_row_gradient(
                                grad_row, decoder_row, act, unrotated
                            )
                if needs_all:
                    for j in range(first_keys[i0], last + 1):
                        g0, g1, g2, g3 = group_grads[j]
                        for e in range(key_start[j], key_start[j + 1]):
                            group = mixed[ranks[key_feature[e]]]
                            key_grad = key_grads[e - first_entry]
                            _add_combination(key_grad, (g0, g1, g2, g3), group)
            if needs_all:
                for j in range(n_pos):
                    for e in range(key_start[j], key_start[j + 1]):
                        b = key_feature[e]
                        act = key_value[e]
                        grad_row = grad_W_K[block, head, b]
                        key_grad = key_grads[e - first_entry]
                        decoder_row = W_K[b, kv_head]
                        _rotate_into(unrotated, key_grad, one, cos[j], minus_sin[j])
                        grad_key_values[head, e] = _add_row_gradient(
                            grad_row, decoder_row, act, unrotated
                        )
