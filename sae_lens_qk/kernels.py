"""The compiled loops over active x kept entries, on numpy arrays.

Active entries of one side come sorted by (sequence, feature, position): entries `start[row, a]` to `start[row, a + 1]` are
the positions `pos` at which feature a fires in that sequence, with activations `val`. `kernel[pair, offset]` is
M[a, b, h](offset), with a single column where there are no rotary embeddings.
"""

import numba
import numpy as np


@numba.njit(parallel=True, cache=True)
def scatter_scores(scores, weights, head_order, head_start, q_start, q_pos, q_val, k_start, k_pos, k_val, pairs, kernel):
    """scores[row, h, i, j] += weight * query_act * key_act * M(i - j), for every pair and allowed key."""
    batch, n_heads = scores.shape[0], scores.shape[1]
    rotary = kernel.shape[1] > 1
    for task in numba.prange(batch * n_heads):  # no two tasks write the same scores
        row, head = task // n_heads, task % n_heads
        head_scores = scores[row, head]
        for order in range(head_start[head], head_start[head + 1]):
            pair = head_order[order]
            weight, a, b = weights[pair], pairs[pair, 0], pairs[pair, 1]
            k_first, k_end = k_start[row, b], k_start[row, b + 1]
            if weight == 0 or k_first == k_end:
                continue
            M = kernel[pair]
            for q in range(q_start[row, a], q_start[row, a + 1]):
                i = q_pos[q]
                row_scores = head_scores[i]
                factor = weight * q_val[q]
                for k in range(k_first, k_end):
                    j = k_pos[k]
                    if j > i:
                        break
                    row_scores[np.uint32(j)] += factor * k_val[k] * M[np.uint32(i - j) if rotary else np.uint32(0)]


@numba.njit(parallel=True, cache=True)
def gather_gradient(grad_weights, grad_scores, q_start, q_pos, q_val, k_start, k_pos, k_val, pairs, kernel):
    """The same sum read backwards: grad_weights[pair] = sum of grad_scores * query_act * key_act * M(i - j)."""
    batch = grad_scores.shape[0]
    rotary = kernel.shape[1] > 1
    for pair in numba.prange(len(pairs)):
        a, b, head = pairs[pair, 0], pairs[pair, 1], pairs[pair, 2]
        M = kernel[pair]
        total = 0.0
        for row in range(batch):
            k_first, k_end = k_start[row, b], k_start[row, b + 1]
            if k_first == k_end:
                continue
            head_grad = grad_scores[row, head]
            for q in range(q_start[row, a], q_start[row, a + 1]):
                i = q_pos[q]
                row_grad = head_grad[i]
                inner = 0.0
                for k in range(k_first, k_end):
                    j = k_pos[k]
                    if j > i:
                        break
                    inner += row_grad[np.uint32(j)] * k_val[k] * M[np.uint32(i - j) if rotary else np.uint32(0)]
                total += q_val[q] * inner
        grad_weights[pair] = total


@numba.njit(parallel=True, cache=True, fastmath=True)  # fastmath: the inner products vectorise; this only ranks
def add_importance(table, pattern, q_start, q_pos, q_vec, k_start, k_pos, k_vec):
    """table[h, a, b] += 1/2 sum_i [sum_j P c^2 - (sum_j P c)^2] for one sequence.

    `q_vec`, `k_vec` [entry, heads, d_head] are decoder rows, rotated to their positions and times their activations.
    """
    n_heads, d_query = table.shape[:2]
    per_kv, d_head = n_heads // k_vec.shape[1], q_vec.shape[2]
    firing = np.nonzero(k_start[1:] - k_start[:-1])[0]
    for head in numba.prange(n_heads):
        kv = head // per_kv
        for a in range(d_query):
            for q in range(q_start[a], q_start[a + 1]):
                i = q_pos[q]
                for b in firing:
                    first, second = np.float32(0), np.float32(0)
                    for k in range(k_start[b], k_start[b + 1]):
                        j = k_pos[k]
                        if j > i:
                            break
                        c = np.float32(0)
                        for d in range(d_head):
                            c += q_vec[q, head, d] * k_vec[k, kv, d]
                        first += pattern[head, i, j] * c
                        second += pattern[head, i, j] * c * c
                    table[head, a, b] += np.float32(0.5) * max(second - first * first, np.float32(0))
