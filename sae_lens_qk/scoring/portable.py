"""The portable engine: the same sums in torch operations, one coordinate of the vectors at a time.

For tensors on any device; on the CPU it is the test of the compiled engines, which are far faster.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sae_lens_qk.attention import AttentionSpec
from sae_lens_qk.scoring.entries import with_constant
from sae_lens_qk.scoring.pairs import Decoders, pair_kernel

_NUMBERS_AT_ONCE = 1 << 24  # gathered for the gradients of the weights


class PortableEngine:
    """Scores on any device, with or without rotary embeddings.

    Per head and coordinate d of the rotated vectors, with Q[a, i] = query_act[i, a] (R_i W_Q[a])_d
    and K alike, both dense over features: mixed = weight Q, then scores += mixed[:, i] K[:, j].
    Without rotary embeddings M is folded into the weights and the vectors are the activations.
    """

    def __init__(
        self,
        indices: Tensor,
        decoders: Decoders,
        spec: AttentionSpec,
    ):
        self.spec = spec
        self.indices = indices
        self.decoders = decoders
        self.rotary = spec.rotary_dim > 0
        if not self.rotary:
            self.M = pair_kernel(indices, decoders, spec, indices.new_zeros(1))[:, 0]

    def scores(
        self,
        weights: Tensor,
        query_acts: Tensor,
        key_acts: Tensor,
    ) -> Tensor:
        """What `PairScorer` returns, of tensors of the decoders' dtype."""
        batch, n_pos, _ = query_acts.shape
        query_vectors, query_place = self._vectors(query_acts, self.decoders.query, self.spec.scale)
        key_vectors, key_place = self._vectors(key_acts, self.decoders.key, 1.0)
        if not self.rotary:
            weights = weights * self.M
        sums = _Sums(
            query_place=query_place,
            key_place=key_place,
            indices=self.indices,
            n_queries=len(self.decoders.query),
            n_keys=len(self.decoders.key),
            batch=batch,
            n_pos=n_pos,
            spec=self.spec,
        )
        return _PortableScores.apply(weights, query_vectors, key_vectors, sums)  # type: ignore[return-value]

    def _vectors(
        self,
        acts: Tensor,
        W: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Rotated vectors [entry, heads, d_head], or activations [entry, 1, 1]; their places."""
        flat = with_constant(acts).flatten(0, 1)
        place = flat.detach().nonzero().T  # [2, entry]: position in the flattened batch, feature
        position, feature = place
        values = flat[position, feature][:, None, None]
        if not self.rotary:
            return values, place
        rows = W[feature] * (scale * values)
        rotated = self.spec.rotate(rows[None], position % acts.shape[1])
        return rotated[0], place


class _Coordinate(NamedTuple):
    """One coordinate d of one head."""

    head: int
    rows: Tensor
    """The head's pairs."""
    pair_weights: Tensor
    """Sparse [d_key_1, d_query_1]."""
    Q: Tensor
    """[d_query_1, batch * pos]"""
    K: Tensor
    """[batch, d_key_1, pos]"""
    query_index: tuple
    """Where the coordinate stands in the query vectors [entry, heads, d_head]."""
    key_index: tuple


class _Sums(NamedTuple):
    """What the sums run over; places [2, entry] are position in the flattened batch and feature."""

    query_place: Tensor
    key_place: Tensor
    indices: Tensor
    n_queries: int
    n_keys: int
    batch: int
    n_pos: int
    spec: AttentionSpec

    def coordinates(
        self, weights: Tensor, query_vectors: Tensor, key_vectors: Tensor
    ) -> Iterator[_Coordinate]:
        """Both sides densely, one head and coordinate after the other."""
        n_heads = self.spec.n_heads
        for head in range(n_heads):
            rows = (self.indices[:, 2] == head).nonzero()[:, 0]
            query, key, _ = self.indices[rows].unbind(dim=1)
            pair_weights = torch.sparse_coo_tensor(
                torch.stack([key, query]),
                weights[rows],
                (self.n_keys, self.n_queries),
                check_invariants=False,
            ).coalesce()
            # the axis of heads is as long as there are heads, key heads, or 1
            query_head = head * query_vectors.shape[1] // n_heads
            key_head = head * key_vectors.shape[1] // n_heads
            for d in range(query_vectors.shape[2]):
                query_index = (slice(None), query_head, d)
                key_index = (slice(None), key_head, d)
                Q = self._dense(query_vectors[query_index], self.query_place, self.n_queries)
                K = self._dense(key_vectors[key_index], self.key_place, self.n_keys)
                K = K.unflatten(1, (self.batch, self.n_pos)).transpose(0, 1)
                yield _Coordinate(head, rows, pair_weights, Q, K, query_index, key_index)

    def mixed(self, coordinate: _Coordinate) -> Tensor:
        """Weights times the query side: [batch, pos_q, d_key_1]."""
        product = torch.sparse.mm(coordinate.pair_weights, coordinate.Q)
        return product.T.unflatten(0, (self.batch, self.n_pos))

    def _dense(
        self,
        values: Tensor,
        place: Tensor,
        n_features: int,
    ) -> Tensor:
        """Numbers by entry as [feature, batch * pos], zero elsewhere."""
        position, feature = place
        dense = values.new_zeros(n_features, self.batch * self.n_pos)
        dense[feature, position] = values
        return dense


class _PortableScores(torch.autograd.Function):
    """Scores and gradients; vectors [entry, heads or 1, width], times activation and scale."""

    @staticmethod
    def forward(ctx, weights, query_vectors, key_vectors, sums):  # type: ignore[override]
        ctx.save_for_backward(weights, query_vectors, key_vectors)
        ctx.sums = sums
        scores = weights.new_zeros(sums.batch, sums.spec.n_heads, sums.n_pos, sums.n_pos)
        for coordinate in sums.coordinates(weights, query_vectors, key_vectors):
            scores[:, coordinate.head] += sums.mixed(coordinate) @ coordinate.K
        allowed = sums.spec.allowed_mask(sums.n_pos, scores.device)
        return scores.masked_fill_(~allowed, 0.0)

    @staticmethod
    def backward(ctx, grad_scores):  # type: ignore[override]
        sums = ctx.sums
        allowed = sums.spec.allowed_mask(sums.n_pos, grad_scores.device)
        grad_scores = grad_scores.masked_fill(~allowed, 0.0)
        weights, query_vectors, key_vectors = ctx.saved_tensors
        grad_weights = torch.zeros_like(weights)
        grad_query_vectors = torch.zeros_like(query_vectors)
        grad_key_vectors = torch.zeros_like(key_vectors)
        query_position, query_feature = sums.query_place
        key_position, key_feature = sums.key_place
        for coordinate in sums.coordinates(weights, query_vectors, key_vectors):
            Q = coordinate.Q
            head_grad = grad_scores[:, coordinate.head]
            mixed_grad = (head_grad @ coordinate.K.mT).flatten(0, 1).T  # [d_key_1, batch * pos]
            for rows in coordinate.rows.split(max(1, _NUMBERS_AT_ONCE // Q.shape[1])):
                query, key, _ = sums.indices[rows].unbind(dim=1)
                grad_weights[rows] += (Q[query] * mixed_grad[key]).sum(dim=1)
            Q_grad = torch.sparse.mm(coordinate.pair_weights.T, mixed_grad)
            grad_query_vectors[coordinate.query_index] += Q_grad[query_feature, query_position]
            K_grad = (head_grad.mT @ sums.mixed(coordinate)).flatten(0, 1)  # [batch * pos, d_key_1]
            grad_key_vectors[coordinate.key_index] += K_grad[key_position, key_feature]
        return grad_weights, grad_query_vectors, grad_key_vectors, None
