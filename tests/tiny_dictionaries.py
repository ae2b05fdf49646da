"""Random dictionaries for the tiny models, and scores of pairs written out by hand in float64."""

import numpy as np
import torch
from torch import Tensor

import sae_lens_qk as qk
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.host.layer import AttentionLayer, run_recording
from sae_lens_qk.host.support import Model

LAYER = 1
D_QUERY = 29
D_KEY = 31
N_PAIRS = 200
N_DEAD = 5
"""The last features of each side never fire."""

Triple = tuple[int, int, int]


def empty_dictionary(
    model: Model, d_query: int, d_key: int, half_architecture: str, layer: int = LAYER, **changes
) -> BilinearQKDictionary:
    """Weights as SAELens initialises them, config read off the model, no feature map."""
    attention = AttentionLayer(model, layer)
    values = {
        "d_in": attention.spec.d_model,
        "d_query": d_query,
        "d_key": d_key,
        "half_architecture": half_architecture,
        "attention": attention.spec.to_dict(),
        "model_name": "tiny",
        "model_mode": attention.mode,
        "layer": layer,
        "hook_name": attention.names.input,
        "fingerprint": list(attention.qk_weights.fingerprint()),
    }
    dictionary = BilinearQKDictionary(qk.BilinearQKConfig(**{**values, **changes}))
    return dictionary.requires_grad_(False).eval()


def tiny_dictionary(
    model: Model, n_pairs: int = N_PAIRS, seed: int = 0, **changes
) -> BilinearQKDictionary:
    """Random transcoders of which a third of the features fire, and a random map of `n_pairs`."""
    d = empty_dictionary(model, D_QUERY, D_KEY, "jumprelu_transcoder", **changes)
    generator = torch.Generator().manual_seed(seed)
    for half in (d.query, d.key):
        half.W_enc.copy_(torch.randn(half.W_enc.shape, generator=generator) * d.cfg.d_in**-0.5)
        half.b_enc.copy_(0.2 * torch.randn(half.b_enc.shape, generator=generator))
        half.b_enc[-N_DEAD:] = -100.0
        half.threshold.copy_(0.5 * torch.rand(half.threshold.shape, generator=generator))
        half.W_dec.copy_(0.5 * torch.randn(half.W_dec.shape, generator=generator))
        half.b_dec.copy_(0.5 * torch.randn(half.b_dec.shape, generator=generator))
    if n_pairs:
        d.set_feature_map(_random_map(d, n_pairs, generator))
    return d


def _random_map(
    d: BilinearQKDictionary, n_pairs: int, generator: torch.Generator
) -> qk.SparseFeatureMap:
    """Pairs of every kind, a tenth each with the query and with the key constant."""
    n_constant = n_pairs // 10
    pairs = torch.cartesian_prod(
        torch.arange(D_QUERY + 1), torch.arange(D_KEY + 1), torch.arange(d.spec.n_heads)
    )
    pairs = pairs[torch.randperm(len(pairs), generator=generator)]
    constant_query = pairs[:, 0] == D_QUERY
    constant_key = pairs[:, 1] == D_KEY
    feature_pairs = pairs[~constant_query & ~constant_key][: n_pairs - 2 * n_constant]
    query_constant_pairs = pairs[constant_query & ~constant_key][:n_constant]
    key_constant_pairs = pairs[~constant_query & constant_key][:n_constant]
    indices = torch.cat([feature_pairs, query_constant_pairs, key_constant_pairs])
    indices = indices[torch.randperm(n_pairs, generator=generator)]
    weights = torch.rand(n_pairs, generator=generator)
    return qk.SparseFeatureMap(indices, weights, D_QUERY, D_KEY, d.spec.n_heads)


def pair_weights(d: BilinearQKDictionary) -> dict[Triple, float]:
    """Weights by pair, in random order: the first few are of every kind."""
    order = torch.randperm(len(d.feature_map), generator=torch.Generator().manual_seed(0))
    triples = [tuple(row) for row in d.feature_map.indices[order].tolist()]
    weights = d.feature_map.weights[order].double().tolist()
    return dict(zip(triples, weights, strict=True))


def exact_dictionary(
    model: Model,
    layer: int = LAYER,
) -> BilinearQKDictionary:
    """Transcoders that reproduce the true queries and keys.

    Their features are the positive and the negative part of each coordinate of x.
    """
    attention = AttentionLayer(model, layer)
    weights = attention.qk_weights
    d_model = attention.spec.d_model
    d = empty_dictionary(model, 2 * d_model, 2 * d_model, "transcoder", layer)
    both_signs = torch.cat([torch.eye(d_model), -torch.eye(d_model)], dim=1)
    for half, W, b in ((d.query, weights.W_Q, weights.b_Q), (d.key, weights.W_K, weights.b_K)):
        half.W_enc.copy_(both_signs)
        half.b_enc.zero_()
        half.W_dec.copy_(both_signs.T @ torch.cat(list(W), dim=1))
        half.b_dec.copy_(b.flatten())
    return d


def pair_term(
    d: BilinearQKDictionary, query_acts: np.ndarray, key_acts: np.ndarray, pair: Triple
) -> np.ndarray:
    """c[row, i, j] = query_act[i] key_act[j] M(i - j) of one pair, float64 [batch, pos, pos].

    Zero at future keys. Rotations are complex multiplications here:
    <R_i q, R_j k> = Re sum_f z_q conj(z_k) e^(i theta (i - j)) + the rest.

    Args:
        query_acts, key_acts: [batch, pos, d].
    """
    spec = d.spec
    query_feature, key_feature, head = pair
    kv_head = head // (spec.n_heads // spec.n_kv_heads)
    q = _decoder_row(d.query, query_feature).reshape(spec.n_heads, spec.d_head)[head]
    k = _decoder_row(d.key, key_feature).reshape(spec.n_kv_heads, spec.d_head)[kv_head]
    query_act = _activation(query_acts, query_feature)  # [batch, pos]
    key_act = _activation(key_acts, key_feature)
    theta = np.array(spec.rotary_inv_freq)
    n_freq = len(theta)
    z_q = q[:n_freq] + 1j * q[n_freq : 2 * n_freq]
    z_k = k[:n_freq] + 1j * k[n_freq : 2 * n_freq]
    unrotated = float(q[2 * n_freq :] @ k[2 * n_freq :])
    n_rows, n_pos = query_act.shape
    term = np.zeros((n_rows, n_pos, n_pos))
    for offset in range(n_pos):
        rotated = float((z_q * z_k.conj() * np.exp(1j * theta * offset)).sum().real)
        M = spec.scale * (rotated + unrotated)
        for j in range(n_pos - offset):
            term[:, j + offset, j] = query_act[:, j + offset] * key_act[:, j] * M
    return term


def _activation(
    acts: np.ndarray,
    feature: int,
) -> np.ndarray:
    """[batch, pos]; the constant feature has activation 1."""
    d_features = acts.shape[2]
    if feature == d_features:
        return np.ones(acts.shape[:2])
    return acts[..., feature]


def _decoder_row(half, feature: int) -> np.ndarray:
    row = half.b_dec if feature == len(half.W_dec) else half.W_dec[feature]
    return row.double().numpy()


def scores_by_hand(
    d: BilinearQKDictionary, x: Tensor, weights: dict[Triple, float], include_constant: bool = True
) -> Tensor:
    """Sum of weight * term over pairs, and constant x constant; 0 at future keys.

    Returns:
        float64 [batch, head, pos_q, pos_k].
    """
    n_rows, n_pos = x.shape[:2]
    n_heads = d.spec.n_heads
    query_acts = d.encode_query(x).double().numpy()
    key_acts = d.encode_key(x).double().numpy()
    weights = dict(weights)
    if include_constant:
        for head in range(n_heads):
            weights[d.cfg.d_query, d.cfg.d_key, head] = 1.0
    scores = np.zeros((n_rows, n_heads, n_pos, n_pos))
    for pair, weight in weights.items():
        head = pair[2]
        scores[:, head] += weight * pair_term(d, query_acts, key_acts, pair)
    return torch.from_numpy(scores)


def pattern_by_hand(scores: Tensor) -> Tensor:
    """softmax over keys up to the query, row by row."""
    pattern = torch.zeros_like(scores)
    for i in range(scores.shape[-1]):
        pattern[..., i, : i + 1] = scores[..., i, : i + 1].softmax(dim=-1)
    return pattern


def observe(
    model: Model, tokens: Tensor, hooks=(), names: tuple[str, ...] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits under hooks, and what then passes the named hook points."""
    return run_recording(model, tokens, names, hooks)


def inputs_and_scores(
    model: Model,
    tokens: Tensor,
    layer: int = LAYER,
) -> tuple[Tensor, Tensor]:
    """The tensor that W_Q and W_K multiply, and the model's own (masked) scores, at its hooks."""
    attention = AttentionLayer(model, layer)
    names = attention.names
    _, values = observe(model, tokens, names=(names.input, names.scores))
    return attention.complete(values[names.input]), values[names.scores]
