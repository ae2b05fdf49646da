"""Random dictionaries for the tiny models, and scores of feature pairs written out by hand in float64."""

import numpy as np
import torch
from torch import Tensor

import sae_lens_qk as qk
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.host.support import Model, model_mode
from sae_lens_qk.host.layer import attention_spec, hook_names, input_completion, qk_weights, run_recording

LAYER = 1
D_QUERY, D_KEY, N_PAIRS = 29, 31, 200
N_DEAD = 5
"""The last features of each side never fire."""

Triple = tuple[int, int, int]


def empty_dictionary(
    model: Model, d_query: int, d_key: int, half_architecture: str, layer: int = LAYER, **changes
) -> BilinearQKDictionary:
    """Weights as SAELens initialises them; spec, fingerprint and hook read off the model; no feature map."""
    spec = attention_spec(model, layer)
    values = {
        "d_in": spec.d_model,
        "d_query": d_query,
        "d_key": d_key,
        "half_architecture": half_architecture,
        "attention": spec.to_dict(),
        "model_name": "tiny",
        "model_mode": model_mode(model),
        "layer": layer,
        "hook_name": hook_names(model, layer).input,
        "fingerprint": list(qk_weights(model, layer).fingerprint()),
    }
    return (
        BilinearQKDictionary(qk.BilinearQKConfig(**{**values, **changes}))
        .requires_grad_(False)
        .eval()
    )


def tiny_dictionary(
    model: Model, n_pairs: int = N_PAIRS, seed: int = 0, **changes
) -> BilinearQKDictionary:
    """Random transcoders of which a third of the features fire, and a random map with pairs of every kind."""
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
    """A tenth of the pairs each with the query and with the key constant."""
    n_heads, n_constant = d.spec.n_heads, n_pairs // 10
    pairs = torch.cartesian_prod(
        torch.arange(D_QUERY + 1), torch.arange(D_KEY + 1), torch.arange(n_heads)
    )
    pairs = pairs[torch.randperm(len(pairs), generator=generator)]
    constant_query, constant_key = pairs[:, 0] == D_QUERY, pairs[:, 1] == D_KEY
    chosen = torch.cat(
        [
            pairs[~constant_query & ~constant_key][: n_pairs - 2 * n_constant],
            pairs[constant_query & ~constant_key][:n_constant],
            pairs[~constant_query & constant_key][:n_constant],
        ]
    )
    chosen = chosen[torch.randperm(n_pairs, generator=generator)]
    return qk.SparseFeatureMap(
        chosen, torch.rand(n_pairs, generator=generator), D_QUERY, D_KEY, n_heads
    )


def kept_pairs(d: BilinearQKDictionary) -> dict[Triple, float]:
    """Weights by pair, in random order: the first few are of every kind."""
    order = torch.randperm(len(d.feature_map), generator=torch.Generator().manual_seed(0))
    triples = [tuple(row) for row in d.feature_map.indices[order].tolist()]
    return dict(zip(triples, d.feature_map.weights[order].double().tolist(), strict=True))


def exact_dictionary(model: Model, layer: int = LAYER) -> BilinearQKDictionary:
    """Transcoders that reproduce the true queries and keys: features are the positive and negative parts of x."""
    weights = qk_weights(model, layer)
    d_model = attention_spec(model, layer).d_model
    d = empty_dictionary(model, 2 * d_model, 2 * d_model, "transcoder", layer)
    both_signs = torch.cat([torch.eye(d_model), -torch.eye(d_model)], dim=1)
    for half, W, b in ((d.query, weights.W_Q, weights.b_Q), (d.key, weights.W_K, weights.b_K)):
        half.W_enc.copy_(both_signs)
        half.b_enc.zero_()
        half.W_dec.copy_(both_signs.T @ torch.cat(list(W), dim=1))
        half.b_dec.copy_(b.flatten())
    return d


def pair_term(
    d: BilinearQKDictionary, acts: tuple[np.ndarray, np.ndarray], pair: Triple
) -> np.ndarray:
    """c[row, i, j] = query_act[i] key_act[j] M(i - j) of one pair at allowed keys, else 0, float64 [batch, pos, pos].

    Rotations are complex multiplications here: <R_i q, R_j k> = Re sum_f z_q conj(z_k) e^(i theta (i - j)) + the rest.
    """
    spec, (a, b, head) = d.spec, pair
    kv_head = head // (spec.n_heads // spec.n_kv_heads)
    q = _decoder_row(d.query, a).reshape(spec.n_heads, spec.d_head)[head]
    k = _decoder_row(d.key, b).reshape(spec.n_kv_heads, spec.d_head)[kv_head]
    query_acts, key_acts = _acts_of(acts[0], a), _acts_of(acts[1], b)
    theta = np.array(spec.rotary_inv_freq)
    n, n_pos = len(theta), query_acts.shape[1]
    z = (q[:n] + 1j * q[n : 2 * n]) * (k[:n] - 1j * k[n : 2 * n])
    rest = float(q[2 * n :] @ k[2 * n :])
    term = np.zeros((len(query_acts), n_pos, n_pos))
    for offset in range(n_pos):
        M = spec.scale * (float((z * np.exp(1j * theta * offset)).sum().real) + rest)
        for j in range(n_pos - offset):
            term[:, j + offset, j] = query_acts[:, j + offset] * key_acts[:, j] * M
    return term


def _acts_of(acts: np.ndarray, feature: int) -> np.ndarray:
    return np.ones(acts.shape[:2]) if feature == acts.shape[2] else acts[..., feature]


def _decoder_row(half, feature: int) -> np.ndarray:
    return (half.b_dec if feature == len(half.W_dec) else half.W_dec[feature]).double().numpy()


def scores_by_hand(
    d: BilinearQKDictionary, x: Tensor, weights: dict[Triple, float], include_constant: bool = True
) -> Tensor:
    """Sum of weight * term over pairs, and constant x constant, float64 [batch, head, pos_q, pos_k]; 0 at future keys."""
    scores = np.zeros((len(x), d.spec.n_heads, x.shape[1], x.shape[1]))
    acts = d.encode_query(x).double().numpy(), d.encode_key(x).double().numpy()
    if include_constant:
        weights = {
            **weights,
            **{(d.cfg.d_query, d.cfg.d_key, head): 1.0 for head in range(d.spec.n_heads)},
        }
    for pair, weight in weights.items():
        scores[:, pair[2]] += weight * pair_term(d, acts, pair)
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


def inputs_and_scores(model: Model, tokens: Tensor, layer: int = LAYER) -> tuple[Tensor, Tensor]:
    """The tensor that W_Q and W_K multiply, and the model's own (masked) scores, at its own hooks."""
    names = hook_names(model, layer)
    _, seen = observe(model, tokens, names=(names.input, names.scores))
    return input_completion(model, layer)(seen[names.input]), seen[names.scores]
