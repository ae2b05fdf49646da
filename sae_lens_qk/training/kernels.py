"""The compiled loops of training: sums over active entries, the divergence, pair statistics."""

import numba
import numpy as np

_FAST = {"reassoc", "contract", "nsz"}  # sums may be reordered; NaN and inf keep their meaning


@numba.njit(parallel=True, cache=True, fastmath=_FAST, error_model="numpy")
def sum_rows(out, start, index, weight, rows):
    """out[n] = sum over entries e from start[n] to start[n + 1] of weight[e] rows[index[e]]."""
    for n in numba.prange(len(out)):
        out[n] = 0
        for e in range(start[n], start[n + 1]):
            row, factor = rows[index[e]], weight[e]
            for c in range(out.shape[1]):
                out[n, c] += factor * row[c]


@numba.njit(parallel=True, cache=True, fastmath=_FAST, error_model="numpy")
def row_products(out, start, index, left, rows):
    """out[e] = <left[n], rows[index[e]]> for the entries e from start[n] to start[n + 1]."""
    for n in numba.prange(len(left)):
        vector = left[n]
        for e in range(start[n], start[n + 1]):
            row = rows[index[e]]
            product = left.dtype.type(0)
            for c in range(left.shape[1]):
                product += vector[c] * row[c]
            out[e] = product


@numba.njit(parallel=True, cache=True, fastmath=_FAST, error_model="numpy")
def softmax_kl(kl, grad, scores, pattern, log_pattern):
    """kl[row, head, i] = KL(P || softmax of scores) over keys j <= i, and grad = softmax - P, its derivative."""
    batch, n_heads, n_pos, _ = scores.shape
    for task in numba.prange(batch * n_heads):
        row, head = task // n_heads, task % n_heads
        for i in range(n_pos):
            s, P = scores[row, head, i], pattern[row, head, i]
            largest = s[0]
            for j in range(1, i + 1):
                largest = max(largest, s[j])
            total = scores.dtype.type(0)
            for j in range(i + 1):
                made = np.exp(s[j] - largest)
                grad[row, head, i, j] = made
                total += made
            shift, inverse = np.log(total) + largest, 1 / total
            divergence = scores.dtype.type(0)
            for j in range(i + 1):
                if P[j] != 0:  # NaN stays NaN
                    divergence += P[j] * (log_pattern[row, head, i, j] - s[j] + shift)
                grad[row, head, i, j] = grad[row, head, i, j] * inverse - P[j]
            kl[row, head, i] = divergence
            grad[row, head, i, i + 1 :] = 0


@numba.njit(cache=True)
def _slot_of(keys, code):
    """Where `code` is, or would go, in a table of a power of two slots; empty slots hold -1."""
    at = ((code * np.int64(-7046029254386353131)) >> np.int64(20)) & (len(keys) - 1)
    while keys[at] != code and keys[at] != -1:
        at = (at + 1) & (len(keys) - 1)
    return at


@numba.njit(parallel=True, cache=True)
def add_statistics(
    keys,
    sums,
    filled,
    done,
    floor,
    limit,
    contributions,
    pattern,
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
    """Add what one head of one sequence says about its pairs to `sums [table, slot, 3]`: importance, effect, count.

    `contributions [q_entry, k_entry]` are the unmasked terms c of one score; rows `first_row[f]` to `first_row[f + 1]` are
    the firings of `features[f]`. Query feature a belongs to table a % n_tables. A table that holds more than `limit` pairs
    stops before its next feature, and `done[table]` says at which; new pairs below `floor` are not taken in.
    """
    n_tables = len(keys)
    for table in numba.prange(n_tables):
        mean, square = np.zeros((2, len(firing)), np.float32)
        found = np.zeros((len(firing), 3), np.float32)
        for f in range(done[table], len(features)):
            a = features[f]
            if a % n_tables != table:
                continue
            if filled[table] + len(firing) > limit:
                break
            found[:] = 0
            for q in range(first_row[f], first_row[f + 1]):
                i = q_pos[q]
                for e in range(len(k_pos)):
                    j = k_pos[e]
                    if j > i:
                        break
                    b, c, p = k_local[e], contributions[q, e], pattern[i, j]
                    mean[b] += p * c
                    square[b] += p * c * c
                    found[b, 1] += c
                    found[b, 2] += 1
                for b in range(n_fired[i]):
                    found[b, 0] += np.float32(0.5) * max(
                        square[b] - mean[b] * mean[b], np.float32(0)
                    )
                    mean[b], square[b] = 0, 0
            for b in range(len(firing)):
                if found[b, 2] > 0:
                    code = (np.int64(a) * n_keys + firing[b]) * n_heads + head
                    at = _slot_of(keys[table], code)
                    if keys[table, at] == -1:
                        if found[b, 0] < floor:
                            continue
                        keys[table, at] = code
                        filled[table] += 1
                    for s in range(3):
                        sums[table, at, s] += found[b, s]
            done[table] = f + 1
        else:
            done[table] = len(features)


@numba.njit(cache=True)
def insert_all(keys, sums, codes, values):
    """Fill an empty table."""
    for n in range(len(codes)):
        at = _slot_of(keys, codes[n])
        keys[at] = codes[n]
        sums[at] = values[n]
