"""Features of one score as nodes, under the field names of Neuronpedia's attribution graphs."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from sae_lens_qk.attention import Side
from sae_lens_qk.explain.prompt import RecordedPrompt, ScorePosition
from sae_lens_qk.explain.term_frames import Marginals


def graph_fields(
    prompt: RecordedPrompt,
    position: ScorePosition,
    pairs: pd.DataFrame,
    marginals: Marginals,
    n: int,
) -> dict[str, Any]:
    """`nodes` and `qk_tracing_results`.

    Args:
        pairs: terms of features and constants, in the order to list them.
        marginals: n features per side are listed; rows without a feature do not count.
    """
    cfg = prompt.dictionary.cfg
    _, i, j = position
    queries = _Nodes(cfg.layer, "query", i, prompt.words[i], cfg.d_query, prompt.query_acts[i])
    keys = _Nodes(cfg.layer, "key", j, prompt.words[j], cfg.d_key, prompt.key_acts[j])
    query_marginals = marginals.query.dropna(subset="feature").head(n)
    key_marginals = marginals.key.dropna(subset="feature").head(n)
    pair_columns = pairs[["query_feature", "key_feature", "contribution"]]
    pair_contributors = [
        [queries.node_id(a), keys.node_id(b), contribution]
        for a, b, contribution in pair_columns.itertuples(index=False)
    ]
    query_features = [*pairs["query_feature"], *query_marginals["feature"]]
    key_features = [*pairs["key_feature"], *key_marginals["feature"]]
    return {
        "nodes": [*queries.nodes(query_features), *keys.nodes(key_features)],
        "qk_tracing_results": {
            "pair_wise_contributors": pair_contributors,
            "top_q_marginal_contributors": queries.contributors(query_marginals),
            "top_k_marginal_contributors": keys.contributors(key_marginals),
        },
    }


class _Nodes(NamedTuple):
    """The features of one side at one position."""

    layer: int
    side: Side
    pos: int
    token: str
    constant: int
    acts: Float[Tensor, " d"]

    def node_id(self, feature: Any) -> str:
        return f"{self.layer}{self.side[0]}_{feature}_{self.pos}"

    def contributors(self, marginals: pd.DataFrame) -> list[list[Any]]:
        columns = marginals[["feature", "contribution"]].itertuples(index=False)
        return [[self.node_id(feature), contribution] for feature, contribution in columns]

    def nodes(self, features: Iterable[Any]) -> list[dict[str, Any]]:
        """Each distinct feature once, by number."""
        nodes = []
        for feature in sorted({int(feature) for feature in features}):
            is_constant = feature == self.constant
            nodes.append(
                {
                    "node_id": self.node_id(feature),
                    "feature_type": f"{self.side} {'constant' if is_constant else 'feature'}",
                    "layer": self.layer,
                    "feature": feature,
                    "ctx_idx": self.pos,
                    "token": self.token,
                    "activation": 1.0 if is_constant else float(self.acts[feature]),
                }
            )
        return nodes
