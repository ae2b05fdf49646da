"""The compiled loops behind `activations`, on numpy arrays.

Active entries of one side come by position (`start[t]` to `start[t + 1]`, the constant feature last at each) or by row and
feature (`start[row * n_features + feature]` to the next one, positions ascending).

Pairs that differ in the head alone form a group: they share the products of activations of their instances, (query i, key
j <= i) where both features fire, and differ in the factor on them, `terms[pair, i - j]` = m M(i - j). Sum, maximum and
minimum of the products at each offset are all that a row's total and extremes need; only what enters a list of strongest
contexts is looked for among the instances. A group belongs to one thread, which sees the rows in order: results do not
depend on the number of threads.
"""

from typing import no_type_check  # the test suite's shape checker must not wrap what numba compiles

import numba
import numpy as np

_FAST = {
    "reassoc",
    "contract",
    "nsz",
    "nnan",
}  # sums and extremes vectorise; activations are finite
_NONE = np.float32(-1)  # stands for an activation, or for the largest product, where there is none
_LARGE = np.finfo(np.float32).max


@numba.njit(cache=True)
@no_type_check
def _make_room(values, places, strength):
    """Where something enters a list, strongest first and empty where places are -1: behind the equally strong; or -1."""
    at = len(values)
    while at > 0 and (places[at - 1, 0] < 0 or abs(values[at - 1]) < strength):
        at -= 1
    if at == len(values):
        return -1
    for n in range(len(values) - 1, at, -1):
        values[n], places[n] = values[n - 1], places[n - 1]
    return at


@numba.njit(cache=True)
@no_type_check
def add_features(
    count, total, top_value, top_place, together, first_row, n_pos, start, feature, value
):
    """Add rows of one side; together[a, b] for a < b, or an empty array where it is not wanted."""
    best, best_pos, firing = (
        np.zeros(len(count), np.float32),
        np.zeros(len(count), np.int32),
        np.zeros_like(count),
    )
    for row in range((len(start) - 1) // n_pos):
        n_firing = 0
        for pos in range(n_pos):
            begin, end = start[row * n_pos + pos], start[row * n_pos + pos + 1] - 1
            for e in range(begin, end):
                a = feature[e]
                count[a] += 1
                total[a] += value[e]
                if best[a] == 0:
                    firing[n_firing] = a
                    n_firing += 1
                if value[e] > best[a]:
                    best[a], best_pos[a] = value[e], pos
                if together.size:
                    for other in range(begin, e):
                        together[feature[other], a] += 1
        for a in firing[:n_firing]:
            at = _make_room(top_value[a], top_place[a], best[a])
            if at >= 0:
                top_value[a, at] = best[a]
                top_place[a, at, 0], top_place[a, at, 1] = first_row + row, best_pos[a]
            best[a] = 0


@numba.njit(cache=True)
@no_type_check
def _count_instances(q_pos, k_pos):
    n_keys, count = 0, 0
    for i in q_pos:
        while n_keys < len(k_pos) and k_pos[n_keys] <= i:
            n_keys += 1
        count += n_keys
    return count


@numba.njit(cache=True, fastmath=_FAST)
@no_type_check
def _products_by_offset(
    total, largest, smallest, dense, few_pos, few_value, many_pos, many_value, mirror
):
    """Sum, maximum and minimum of the products at each offset; returns the number of offsets.

    The side with more firings is laid out in `dense`, and each firing of the other is one sweep along it. Offsets i - j grow
    with i, and with j from the end: `mirror` is 0 where keys are few, else the last position.
    """
    for e in range(len(many_pos)):
        dense[abs(mirror - many_pos[e])] = many_value[e]
    end = max(abs(mirror - many_pos[0]), abs(mirror - many_pos[-1])) + 1
    n_offsets = end - min(abs(mirror - few_pos[0]), abs(mirror - few_pos[-1]))
    total[:n_offsets], largest[:n_offsets], smallest[:n_offsets] = 0, _NONE, _LARGE
    for e in range(len(few_pos)):
        start, act = abs(mirror - few_pos[e]), few_value[e]
        many, sums, maxima, minima = (
            dense[start:end],
            total[: end - start],
            largest[: end - start],
            smallest[: end - start],
        )
        for offset in range(len(many)):
            product = act * many[offset]
            sums[offset] += max(product, np.float32(0))
            maxima[offset] = max(maxima[offset], product)
            minima[offset] = min(minima[offset], product if product >= 0 else _LARGE)
    for e in range(len(many_pos)):
        dense[abs(mirror - many_pos[e])] = _NONE
    return n_offsets


@numba.njit(cache=True)
@no_type_check
def _products(total, largest, smallest, q_pos, q_value, k_pos, k_value):
    """The same in one walk along both lists where offsets do not matter: there is one."""
    sum_of_keys, largest_key, smallest_key, n_keys = 0.0, np.float32(0), _LARGE, 0
    sum_of_products, largest[0], smallest[0] = 0.0, _NONE, _LARGE
    for e in range(len(q_pos)):
        while n_keys < len(k_pos) and k_pos[n_keys] <= q_pos[e]:
            act = k_value[n_keys]
            sum_of_keys, largest_key, smallest_key = (
                sum_of_keys + act,
                max(largest_key, act),
                min(smallest_key, act),
            )
            n_keys += 1
        if n_keys:
            sum_of_products += q_value[e] * sum_of_keys
            largest[0] = max(largest[0], q_value[e] * largest_key)
            smallest[0] = min(smallest[0], q_value[e] * smallest_key)
    total[0] = sum_of_products
    return 1


@numba.njit(cache=True, fastmath=_FAST)
@no_type_check
def _total_and_extremes(terms, total, largest, smallest):
    infinity = np.float32(np.inf)
    added, highest, lowest = np.float32(0), -infinity, infinity
    for offset in range(len(total)):
        one, other, exists = (
            terms[offset] * largest[offset],
            terms[offset] * smallest[offset],
            largest[offset] >= 0,
        )
        added += terms[offset] * total[offset]
        highest = max(highest, max(one, other) if exists else -infinity)
        lowest = min(lowest, min(one, other) if exists else infinity)
    return added, highest, lowest


@numba.njit(cache=True)
@no_type_check
def _strongest(terms, q_pos, q_value, k_pos, k_value):
    """(term, query position, key position) of the first strongest instance."""
    found, query_pos, key_pos = np.float32(0), -1, -1
    for e in range(len(q_pos)):
        for f in range(len(k_pos)):
            if k_pos[f] > q_pos[e]:
                break
            term = q_value[e] * k_value[f] * terms[min(q_pos[e] - k_pos[f], len(terms) - 1)]
            if query_pos < 0 or abs(term) > abs(found):
                found, query_pos, key_pos = term, q_pos[e], k_pos[f]
    return found, query_pos, key_pos


@numba.njit(parallel=True, cache=True)
@no_type_check
def add_pairs(
    count,
    total,
    highest,
    lowest,
    top_value,
    top_place,
    n_tasks,
    first_row,
    n_pos,
    terms,
    group_start,
    group_query,
    group_key,
    n_queries,
    n_keys,
    q_start,
    q_pos,
    q_value,
    k_start,
    k_pos,
    k_value,
):
    """Add rows; pairs `group_start[g]` to `group_start[g + 1]` have the features `group_query[g]` and `group_key[g]`."""
    n_rows, n_groups = (len(q_start) - 1) // n_queries, len(group_query)
    for task in numba.prange(n_tasks):
        dense, sums = np.full(n_pos, _NONE), np.empty(n_pos, np.float32)
        largest, smallest = np.empty(n_pos, np.float32), np.empty(n_pos, np.float32)
        for group in range(
            task, n_groups, n_tasks
        ):  # in turn: the constant query, last, has the most instances
            for row in range(n_rows):
                q, k = row * n_queries + group_query[group], row * n_keys + group_key[group]
                i, query_acts = (
                    q_pos[q_start[q] : q_start[q + 1]],
                    q_value[q_start[q] : q_start[q + 1]],
                )
                j, key_acts = (
                    k_pos[k_start[k] : k_start[k + 1]],
                    k_value[k_start[k] : k_start[k + 1]],
                )
                n_instances = _count_instances(i, j)
                if n_instances == 0:
                    continue
                if terms.shape[1] == 1:
                    n = _products(sums, largest, smallest, i, query_acts, j, key_acts)
                elif len(j) <= len(i):
                    n = _products_by_offset(
                        sums, largest, smallest, dense, j, key_acts, i, query_acts, 0
                    )
                else:
                    n = _products_by_offset(
                        sums, largest, smallest, dense, i, query_acts, j, key_acts, n_pos - 1
                    )
                for pair in range(group_start[group], group_start[group + 1]):
                    added, high, low = _total_and_extremes(
                        terms[pair, :n], sums[:n], largest[:n], smallest[:n]
                    )
                    count[pair] += n_instances
                    total[pair] += added
                    highest[pair], lowest[pair] = max(highest[pair], high), min(lowest[pair], low)
                    at = _make_room(top_value[pair], top_place[pair], max(high, -low))
                    if at >= 0:
                        place = top_place[pair, at]
                        place[0] = first_row + row
                        top_value[pair, at], place[1], place[2] = _strongest(
                            terms[pair], i, query_acts, j, key_acts
                        )
