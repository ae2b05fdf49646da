"""The compiled loops behind `activations`, on numpy arrays.

Active entries of one side come by position (`start[t]` to `start[t + 1]`, the constant feature last
at each) or by row and feature (`start[row * n_features + feature]` to the next one, positions
ascending).

Pairs that differ in the head alone form a group: they share the products of activations of their
instances, (query i, allowed key j) where both features fire, and differ in the factor on them,
`terms[pair, i - j]` = m M(i - j). Sum, maximum and minimum of the products at each offset are all
that a row's total and extremes need; only what enters a list of strongest contexts is looked for
among the instances. A group belongs to one thread, which sees the rows in order: results do not
depend on the number of threads.
"""

from typing import no_type_check  # the test suite's shape checker must not wrap what numba compiles

import numba
import numpy as np

# sums and extremes vectorise; activations are finite
_FAST = {"reassoc", "contract", "nsz", "nnan"}
_NONE = np.float32(-1)  # stands for an activation, or for the largest product, where there is none
_LARGE = np.finfo(np.float32).max


@numba.njit(cache=True)
@no_type_check
def _make_room(values, positions, strength):
    """Slot at which something enters a list, the others moved down; -1: it does not enter.

    Lists hold the strongest first and are empty where positions are -1; of equals the earlier wins.
    """
    slot = len(values)
    while slot > 0:
        is_empty = positions[slot - 1, 0] < 0
        if not is_empty and abs(values[slot - 1]) >= strength:
            break
        slot -= 1
    if slot == len(values):
        return -1
    for n in range(len(values) - 1, slot, -1):
        values[n] = values[n - 1]
        positions[n] = positions[n - 1]
    return slot


@numba.njit(cache=True)
@no_type_check
def add_features(
    count, total, top_value, top_position, co_firing, first_row, n_pos, start, feature, value
):
    """Add rows of one side; co_firing[a, b] for a < b, or an empty array: not counted."""
    strongest = np.zeros(len(count), np.float32)  # of the row, by feature
    strongest_pos = np.zeros(len(count), np.int32)
    firing = np.zeros_like(count)  # features that fire in the row
    n_rows = (len(start) - 1) // n_pos
    for row in range(n_rows):
        n_firing = 0
        for pos in range(n_pos):
            t = row * n_pos + pos
            first_entry = start[t]
            end_entry = start[t + 1] - 1  # the last one is the constant
            for e in range(first_entry, end_entry):
                a = feature[e]
                count[a] += 1
                total[a] += value[e]
                if strongest[a] == 0:
                    firing[n_firing] = a
                    n_firing += 1
                if value[e] > strongest[a]:
                    strongest[a] = value[e]
                    strongest_pos[a] = pos
                if co_firing.size:
                    for other in range(first_entry, e):
                        co_firing[feature[other], a] += 1
        for a in firing[:n_firing]:
            slot = _make_room(top_value[a], top_position[a], strongest[a])
            if slot >= 0:
                top_value[a, slot] = strongest[a]
                top_position[a, slot, 0] = first_row + row
                top_position[a, slot, 1] = strongest_pos[a]
            strongest[a] = 0


@numba.njit(cache=True)
@no_type_check
def _count_instances(q_pos, k_pos, n_offsets):
    """Number of (query, key) with 0 <= query - key < n_offsets."""
    first = 0  # first key in reach of the query
    end = 0  # end of the keys up to the query
    count = 0
    for i in q_pos:
        while end < len(k_pos) and k_pos[end] <= i:
            end += 1
        while first < end and k_pos[first] <= i - n_offsets:
            first += 1
        count += end - first
    return count


@numba.njit(cache=True, fastmath=_FAST)
@no_type_check
def _products_by_offset(
    total, largest, smallest, dense, few_pos, few_value, many_pos, many_value, mirror
):
    """Sum, maximum and minimum of the products at each offset; returns the number of offsets.

    The side with more firings is laid out in `dense`, and each firing of the other is one sweep
    along it. Offsets i - j grow with i, and with j from the end: `mirror` is 0 where keys are few,
    else the last position.
    """
    for e in range(len(many_pos)):
        dense[abs(mirror - many_pos[e])] = many_value[e]
    # the ends of both sides: positions ascend, and descend where they count from the mirror
    many_first = abs(mirror - many_pos[0])
    many_last = abs(mirror - many_pos[-1])
    few_first = abs(mirror - few_pos[0])
    few_last = abs(mirror - few_pos[-1])
    end = max(many_first, many_last) + 1
    n_offsets = end - min(few_first, few_last)
    total[:n_offsets] = 0
    largest[:n_offsets] = _NONE
    smallest[:n_offsets] = _LARGE
    for e in range(len(few_pos)):
        start = abs(mirror - few_pos[e])
        act = few_value[e]
        sweep = dense[start:end]
        # slices, so that the loop below vectorises
        sums = total[: end - start]
        maxima = largest[: end - start]
        minima = smallest[: end - start]
        for offset in range(len(sweep)):
            product = act * sweep[offset]  # negative where the other side does not fire
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
    key_sum = 0.0
    largest_key = np.float32(0)
    smallest_key = _LARGE
    product_sum = 0.0
    largest[0] = _NONE
    smallest[0] = _LARGE
    n_keys = 0
    for e in range(len(q_pos)):
        while n_keys < len(k_pos) and k_pos[n_keys] <= q_pos[e]:
            act = k_value[n_keys]
            key_sum += act
            largest_key = max(largest_key, act)
            smallest_key = min(smallest_key, act)
            n_keys += 1
        if n_keys:
            product_sum += q_value[e] * key_sum
            largest[0] = max(largest[0], q_value[e] * largest_key)
            smallest[0] = min(smallest[0], q_value[e] * smallest_key)
    total[0] = product_sum
    return 1


@numba.njit(cache=True, fastmath=_FAST)
@no_type_check
def _total_and_extremes(terms, total, largest, smallest):
    """Sum, maximum and minimum of the pair's terms, from those of the products by offset."""
    infinity = np.float32(np.inf)
    term_sum = np.float32(0)
    highest = -infinity
    lowest = infinity
    for offset in range(len(total)):
        term_sum += terms[offset] * total[offset]
        one_end = terms[offset] * largest[offset]
        other_end = terms[offset] * smallest[offset]
        occurs = largest[offset] >= 0
        highest = max(highest, max(one_end, other_end) if occurs else -infinity)
        lowest = min(lowest, min(one_end, other_end) if occurs else infinity)
    return term_sum, highest, lowest


@numba.njit(cache=True)
@no_type_check
def _strongest_instance(terms, n_offsets, q_pos, q_value, k_pos, k_value):
    """(term, query position, key position) of the first strongest instance."""
    strongest = np.float32(0)
    query_pos = -1
    key_pos = -1
    for e in range(len(q_pos)):
        for f in range(len(k_pos)):
            offset = q_pos[e] - k_pos[f]
            if offset < 0:
                break
            if offset >= n_offsets:
                continue
            factor = terms[min(offset, len(terms) - 1)]
            term = q_value[e] * k_value[f] * factor
            if query_pos < 0 or abs(term) > abs(strongest):
                strongest = term
                query_pos = q_pos[e]
                key_pos = k_pos[f]
    return strongest, query_pos, key_pos


@numba.njit(parallel=True, cache=True)
@no_type_check
def add_pairs(
    count,
    total,
    highest,
    lowest,
    top_value,
    top_position,
    n_tasks,
    first_row,
    n_pos,
    n_offsets,
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
    """Add rows of the pairs in some groups.

    Pairs `group_start[g]` to `group_start[g + 1]` have the features `group_query[g]` and
    `group_key[g]`; offsets i - j from `n_offsets` on are not allowed.
    """
    n_rows = (len(q_start) - 1) // n_queries
    n_groups = len(group_query)
    for task in numba.prange(n_tasks):
        dense = np.full(n_pos, _NONE)
        sums = np.empty(n_pos, np.float32)  # by offset, as the next two
        largest = np.empty(n_pos, np.float32)
        smallest = np.empty(n_pos, np.float32)
        # in turn: the constant query, last, has the most instances
        for group in range(task, n_groups, n_tasks):
            for row in range(n_rows):
                q = row * n_queries + group_query[group]
                k = row * n_keys + group_key[group]
                i = q_pos[q_start[q] : q_start[q + 1]]
                j = k_pos[k_start[k] : k_start[k + 1]]
                query_acts = q_value[q_start[q] : q_start[q + 1]]
                key_acts = k_value[k_start[k] : k_start[k + 1]]
                n_instances = _count_instances(i, j, n_offsets)
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
                n = min(n, n_offsets)
                for pair in range(group_start[group], group_start[group + 1]):
                    pair_terms = terms[pair, :n]
                    term_sum, high, low = _total_and_extremes(
                        pair_terms, sums[:n], largest[:n], smallest[:n]
                    )
                    count[pair] += n_instances
                    total[pair] += term_sum
                    highest[pair] = max(highest[pair], high)
                    lowest[pair] = min(lowest[pair], low)
                    strength = max(high, -low)
                    slot = _make_room(top_value[pair], top_position[pair], strength)
                    if slot >= 0:
                        position = top_position[pair, slot]
                        position[0] = first_row + row
                        top_value[pair, slot], position[1], position[2] = _strongest_instance(
                            terms[pair], n_offsets, i, query_acts, j, key_acts
                        )
