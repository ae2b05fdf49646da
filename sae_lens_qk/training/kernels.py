"""The compiled loops of training: sums over active entries, the divergence, pair statistics."""

import numba
import numpy as np

_FAST = {"reassoc", "contract", "nsz"}  # sums may be reordered; NaN and inf keep their meaning

# Spreads codes over a table: 2^64 / golden ratio, odd, as a signed number
_HASH_FACTOR = np.int64(-7046029254386353131)


@numba.njit(
    parallel=True,
    cache=True,
    fastmath=_FAST,
    error_model="numpy",
)
def sum_rows(out, start, index, weight, rows):
    """out[n] = sum over entries e from start[n] to start[n + 1] of weight[e] rows[index[e]]."""
    for n in numba.prange(len(out)):
        out[n] = 0
        for e in range(start[n], start[n + 1]):
            row = rows[index[e]]
            factor = weight[e]
            for c in range(out.shape[1]):
                out[n, c] += factor * row[c]


@numba.njit(
    parallel=True,
    cache=True,
    fastmath=_FAST,
    error_model="numpy",
)
def row_products(out, start, index, vectors, rows):
    """out[e] = <vectors[n], rows[index[e]]> for the entries e from start[n] to start[n + 1]."""
    for n in numba.prange(len(vectors)):
        vector = vectors[n]
        for e in range(start[n], start[n + 1]):
            row = rows[index[e]]
            product = vectors.dtype.type(0)
            for c in range(vectors.shape[1]):
                product += vector[c] * row[c]
            out[e] = product


@numba.njit(
    parallel=True,
    cache=True,
    fastmath=_FAST,
    error_model="numpy",
)
def softmax_kl(kl, gradient, scores, pattern, log_pattern, first_keys):
    """kl[row, head, i] = KL(P || softmax of scores) over the allowed keys, first_keys[i] to i.

    gradient = softmax - P, the derivative of kl; zero at keys that are not allowed.
    """
    batch, n_heads, n_pos, _ = scores.shape
    for task in numba.prange(batch * n_heads):
        row = task // n_heads
        head = task % n_heads
        for i in range(n_pos):
            # views of the allowed keys alone: loops over whole ranges vectorise
            allowed = slice(first_keys[i], i + 1)
            n_keys = i + 1 - first_keys[i]
            s = scores[row, head, i, allowed]
            P = pattern[row, head, i, allowed]
            log_P = log_pattern[row, head, i, allowed]
            softmax = gradient[row, head, i, allowed]
            largest = s[0]
            for j in range(1, n_keys):
                largest = max(largest, s[j])
            total = scores.dtype.type(0)
            for j in range(n_keys):
                exponential = np.exp(s[j] - largest)
                softmax[j] = exponential
                total += exponential
            log_normaliser = np.log(total) + largest
            inverse = 1 / total
            divergence = scores.dtype.type(0)
            for j in range(n_keys):
                if P[j] != 0:  # NaN stays NaN
                    divergence += P[j] * (log_P[j] - s[j] + log_normaliser)
                softmax[j] = softmax[j] * inverse - P[j]
            kl[row, head, i] = divergence
            gradient[row, head, i, : first_keys[i]] = 0
            gradient[row, head, i, i + 1 :] = 0


@numba.njit(cache=True)
def _slot_of(keys, code):
    """Where `code` is, or would go, in a table of a power of two slots; empty slots hold -1."""
    last_slot = len(keys) - 1
    slot = ((code * _HASH_FACTOR) >> np.int64(20)) & last_slot
    while keys[slot] != code and keys[slot] != -1:
        slot = (slot + 1) & last_slot
    return slot


@numba.njit(parallel=True, cache=True)
def add_statistics(
    keys,
    sums,
    filled,
    next_feature,
    floor,
    limit,
    contributions,
    pattern,
    first_keys,
    features,
    first_row,
    q_pos,
    k_pos,
    k_local,
    firing,
    n_fired,
    n_keys,
    n_heads,
    head,
):
    """Add what one head of one sequence says about its pairs to the tables.

    `sums [table, slot, 3]` are importance, effect and count. `contributions [q_entry, k_entry]` are
    the unmasked terms c of one score; rows `first_row[f]` to `first_row[f + 1]` are the firings of
    `features[f]`; the keys `first_keys[i]` to i are allowed. Query feature a belongs to table
    a % n_tables. A table that holds more than `limit` pairs stops before its next feature, and
    `next_feature[table]` says at which; new pairs below `floor` are not taken in.
    """
    n_tables = len(keys)
    for table in numba.prange(n_tables):
        # of one query: sums over keys of P c and of P c^2, by key feature
        mean = np.zeros(len(firing), np.float32)
        mean_square = np.zeros(len(firing), np.float32)
        # of one query feature: importance, effect and count, by key feature
        subtotals = np.zeros((len(firing), 3), np.float32)
        for f in range(next_feature[table], len(features)):
            a = features[f]
            if a % n_tables != table:
                continue
            if filled[table] + len(firing) > limit:
                break
            subtotals[:] = 0
            for q in range(first_row[f], first_row[f + 1]):
                i = q_pos[q]
                for e in range(len(k_pos)):
                    j = k_pos[e]
                    if j < first_keys[i]:
                        continue
                    if j > i:
                        break
                    b = k_local[e]
                    c = contributions[q, e]
                    p = pattern[i, j]
                    mean[b] += p * c
                    mean_square[b] += p * c * c
                    subtotals[b, 1] += c
                    subtotals[b, 2] += 1
                # the key features that fired up to i have the first ranks
                for b in range(n_fired[i]):
                    # rounding can make it negative where c is constant over keys
                    variance = mean_square[b] - mean[b] * mean[b]
                    subtotals[b, 0] += np.float32(0.5) * max(variance, np.float32(0))
                    mean[b] = 0
                    mean_square[b] = 0
            # one look-up per pair and sequence, not per position
            for b in range(len(firing)):
                if subtotals[b, 2] > 0:
                    code = (np.int64(a) * n_keys + firing[b]) * n_heads + head
                    slot = _slot_of(keys[table], code)
                    if keys[table, slot] == -1:
                        if subtotals[b, 0] < floor:
                            continue
                        keys[table, slot] = code
                        filled[table] += 1
                    for s in range(3):
                        sums[table, slot, s] += subtotals[b, s]
            next_feature[table] = f + 1
        else:
            next_feature[table] = len(features)


@numba.njit(cache=True)
def insert_all(keys, sums, codes, values):
    """Fill an empty table."""
    for n in range(len(codes)):
        slot = _slot_of(keys, codes[n])
        keys[slot] = codes[n]
        sums[slot] = values[n]
