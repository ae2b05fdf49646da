"""The portable engine: the same sums in torch operations, on any device."""

import torch


class _TorchScores(torch.autograd.Function):
    """The same sums in torch operations, one coordinate of the vectors at a time; for any device.

    q_vectors [entry, head or 1, width], k_vectors [entry, kv_head or 1, width]: rotated, times activation and scale.
    """

    @staticmethod
    def forward(ctx, weights, q_vectors, k_vectors, q_at, k_at, indices, sizes, spec):  # type: ignore[override]
        batch, n_pos, n_heads, _, _ = sizes
        ctx.save_for_backward(weights, q_vectors, k_vectors)
        ctx.problem = q_at, k_at, indices, sizes
        ctx.spec = spec
        scores = weights.new_zeros(batch, n_heads, n_pos, n_pos)
        for head, _, kept, Q, K, _, _ in _coordinates(weights, q_vectors, k_vectors, *ctx.problem):
            mixed = torch.sparse.mm(kept, Q).T.unflatten(
                0, (batch, n_pos)
            )  # [batch, pos_q, d_key_1]
            scores[:, head] += mixed @ K
        return scores * spec.allowed_mask(n_pos, scores.device)

    @staticmethod
    def backward(ctx, grad_scores):  # type: ignore[override]
        weights, q_vectors, k_vectors = ctx.saved_tensors
        q_at, k_at, indices, sizes = ctx.problem
        batch, n_pos = sizes[:2]
        grad_scores = grad_scores * ctx.spec.allowed_mask(n_pos, grad_scores.device)
        grad_weights, grad_q, grad_k = (
            torch.zeros_like(t) for t in (weights, q_vectors, k_vectors)
        )
        for head, rows, kept, Q, K, of_q, of_k in _coordinates(
            weights, q_vectors, k_vectors, *ctx.problem
        ):
            of_mixed = (grad_scores[:, head] @ K.mT).flatten(0, 1).T  # [d_key_1, batch * pos]
            query, key, _ = indices[rows].unbind(dim=1)
            per_chunk = max(1, (1 << 24) // Q.shape[1])
            for chunk, a, b in zip(
                rows.split(per_chunk), query.split(per_chunk), key.split(per_chunk), strict=True
            ):
                grad_weights[chunk] += (Q[a] * of_mixed[b]).sum(dim=1)
            grad_q[of_q] += torch.sparse.mm(kept.T, of_mixed)[q_at[1], q_at[0]]
            mixed = torch.sparse.mm(kept, Q).T.unflatten(0, (batch, n_pos))
            grad_k[of_k] += (grad_scores[:, head].mT @ mixed).flatten(0, 1)[k_at[0], k_at[1]]
        return grad_weights, grad_q, grad_k, None, None, None, None, None


def _coordinates(weights, q_vectors, k_vectors, q_at, k_at, indices, sizes):
    """For each head and coordinate: the head, its pairs, their weights [d_key_1, d_query_1], and both sides densely."""
    batch, n_pos, n_heads, n_queries, n_keys = sizes
    for head in range(n_heads):
        rows = (indices[:, 2] == head).nonzero()[:, 0]
        query, key, _ = indices[rows].unbind(dim=1)
        kept = torch.sparse_coo_tensor(
            torch.stack([key, query]), weights[rows], (n_keys, n_queries), check_invariants=False
        ).coalesce()
        q_head, k_head = (head * t.shape[1] // n_heads for t in (q_vectors, k_vectors))
        for d in range(q_vectors.shape[2]):
            of_q, of_k = (slice(None), q_head, d), (slice(None), k_head, d)
            Q = weights.new_zeros(n_queries, batch * n_pos)
            Q[q_at[1], q_at[0]] = q_vectors[of_q]
            K = weights.new_zeros(n_keys, batch * n_pos)
            K[k_at[1], k_at[0]] = k_vectors[of_k]
            yield head, rows, kept, Q, K.unflatten(1, (batch, n_pos)).transpose(0, 1), of_q, of_k
