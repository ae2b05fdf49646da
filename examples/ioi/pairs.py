"""The feature pairs behind a head's attention from END to the names, and the features at each role.

With s the scores of one head and P its pattern, IO is preferred to S1 by
P[IO] / P[S1] = exp(preference),

    preference = s[END, IO] - s[END, S1]

to which a pair adds the difference of its two contributions.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

import sae_lens_qk as qk
from examples.ioi.prompts import IOIPrompts, Name, Order, Twin
from sae_lens_qk.explain.terms import HeadTerms
from sae_lens_qk.host.layer import AttentionLayer
from sae_lens_qk.host.support import Model

NAMES: tuple[Name, ...] = get_args(Name)
TWINS: tuple[Twin, ...] = get_args(Twin)

_PAIR = ["query_feature", "key_feature", "head"]


@torch.no_grad()
def role_features(
    dictionary: qk.BilinearQKDictionary, model: Model, batches: Sequence[IOIPrompts]
) -> pd.DataFrame:
    """How often features fire at END (query) and at the names (key).

    What prompts, orders and twins tell apart.

    Returns:
        prompts ("clean" or the kind of twin), order (of the names: ABBA or BABA), side, role
        ("end", "io", "s1", "s2"), feature, active (share of prompts), mean (activation, zeros
        included); features that never fire there are left out.
    """
    layer = AttentionLayer(model, dictionary.cfg.layer)
    acts: dict[tuple[str, str, str], list[Tensor]] = {}  # by prompts, order and role
    for clean, kind in product(batches, ("clean", *TWINS)):
        batch = clean if kind == "clean" else clean.twin(kind)
        features = dictionary.features(layer.inputs(batch.tokens))
        name_acts = features.key.take_along_dim(batch.positions[..., None], dim=1)
        roles = {"end": features.query[:, -1]}
        roles |= {name: name_acts[:, n] for n, name in enumerate(NAMES)}
        for order in get_args(Order):
            has_order = clean.is_abba == (order == "ABBA")
            for role, role_acts in roles.items():
                acts.setdefault((kind, order, role), []).append(role_acts[has_order])
    frames = []
    for (kind, order, role), parts in acts.items():
        values = torch.cat(parts).float().cpu()  # [prompt, feature]
        features = (values > 0).any(dim=0).nonzero()[:, 0]
        frame = pd.DataFrame(
            {
                "prompts": kind,
                "order": order,
                "side": "query" if role == "end" else "key",
                "role": role,
                "feature": features.numpy(),
                "active": (values > 0).float().mean(dim=0)[features].numpy(),
                "mean": values.mean(dim=0)[features].numpy(),
            }
        )
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


@torch.no_grad()
def name_pairs(
    dictionary: qk.BilinearQKDictionary,
    model: Model,
    batches: Sequence[IOIPrompts],
    heads: Sequence[int],
    names: Sequence[Name] = NAMES,
) -> pd.DataFrame:
    """The feature pairs that carry attention from END to the names, kept by the map or not.

    Returns:
        head, name, query_feature, key_feature (d_query / d_key: the constant), weight (0: not
        kept), active (share of prompts), contribution and pattern_effect (of the unmasked term;
        means over all prompts, zero where it is not active). By head and name, the largest pattern
        effect first.
    """
    frames = []
    n_prompts = 0
    for prompt, positions in recorded_prompts(dictionary, model, batches):
        n_prompts += 1
        for head in heads:
            terms = HeadTerms(dictionary, prompt.features, head).row(len(prompt.tokens) - 1)
            row = prompt.row(head, len(prompt.tokens) - 1)
            for name in names:
                key_pos = positions[name]
                a = terms.query_features
                b = terms.key_features[terms.key_positions == key_pos]
                contributions = terms.pairs(a, b)  # [a, b, pos]
                pairs = torch.cartesian_prod(a, b).cpu()
                frame = pd.DataFrame(
                    {
                        "head": head,
                        "name": name,
                        "query_feature": pairs[:, 0].numpy(),
                        "key_feature": pairs[:, 1].numpy(),
                        "active": 1.0,
                        "contribution": contributions[..., key_pos].flatten().cpu().numpy(),
                        "pattern_effect": row.effect(contributions, key_pos)
                        .flatten()
                        .cpu()
                        .numpy(),
                    }
                )
                frames.append(frame)
    identity = ["head", "name", "query_feature", "key_feature"]
    sums = pd.concat(frames).groupby(identity, sort=False).sum()
    pairs = (sums / n_prompts).reset_index()
    pairs.insert(4, "weight", _map_weights(dictionary, pairs))
    return pairs.sort_values(
        ["head", "name", "pattern_effect"], ascending=[True, True, False], ignore_index=True
    )


def _map_weights(
    dictionary: qk.BilinearQKDictionary,
    pairs: pd.DataFrame,
) -> np.ndarray:
    """The map's weight of each pair, 0 where it is not kept."""
    rows = dictionary.feature_map.find(pairs[_PAIR].to_numpy()).cpu().numpy()
    weights = dictionary.feature_map.weights.float().cpu().numpy()
    return np.append(weights, 0.0)[rows]  # the row is -1 where a pair is not kept


def top_pairs(
    pairs: pd.DataFrame, head: int, name: Name, active: float = 0.0
) -> Int[Tensor, "pair 3"]:
    """The kept pairs that support a head's attention to a name on the mean.

    The largest pattern effect first.

    Args:
        pairs: of `name_pairs`.
        active: on this share of prompts at least.
    """
    is_kept = (pairs["head"] == head) & (pairs["name"] == name) & (pairs["weight"] > 0)
    supports = (pairs["active"] >= active) & (pairs["pattern_effect"] > 0)
    supporters = pairs[is_kept & supports]
    supporters = supporters.sort_values("pattern_effect", ascending=False, kind="stable")
    return torch.from_numpy(supporters[_PAIR].to_numpy(dtype=np.int64))


def recorded_prompts(
    dictionary: qk.BilinearQKDictionary, model: Model, batches: Sequence[IOIPrompts]
) -> Iterator[tuple[qk.RecordedPrompt, dict[Name, int]]]:
    """Each prompt through the model, and where the names stand."""
    for batch in batches:
        for tokens, positions in zip(batch.tokens, batch.positions.tolist(), strict=True):
            prompt = qk.RecordedPrompt.record(dictionary, model, tokens)
            yield prompt, dict(zip(NAMES, positions, strict=True))
