"""Features of one score as nodes, under the field names of Neuronpedia's attribution graphs."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import pandas as pd

from sae_lens_qk.attention import Side
from sae_lens_qk.explain.prompt import RecordedPrompt, ScorePosition
from sae_lens_qk.explain.term_frames import Marginals

Node = dict[str, Any]


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
    queries = _Nodes(prompt, "query", position.query_pos)
    keys = _Nodes(prompt, "key", position.key_pos)
    # errors and what the mask takes away are no nodes
    query_marginals = marginals.query.dropna(subset="feature").head(n)
    key_marginals = marginals.key.dropna(subset="feature").head(n)
    pair_columns = pairs[["query_feature", "key_feature", "contribution"]]
    pair_contributors = [
        [queries.node_id(a), keys.node_id(b), contribution]
        for a, b, contribution in pair_columns.itertuples(index=False)
    ]
    # every feature that is named below is a node
    query_features = [*pairs["query_feature"], *query_marginals["feature"]]
    key_features = [*pairs["key_feature"], *key_marginals["feature"]]
    return {
        "nodes": [*queries.nodes(query_features), *keys.nodes(key_features)],
        # the names of Neuronpedia's format
        "qk_tracing_results": {
            "pair_wise_contributors": pair_contributors,
            "top_q_marginal_contributors": queries.contributors(query_marginals),
            "top_k_marginal_contributors": keys.contributors(key_marginals),
        },
    }


class _Nodes(NamedTuple):
    """The features of one side at one position."""

    prompt: RecordedPrompt
    side: Side
    pos: int

    def node_id(self, feature: Any) -> str:
        layer = self.prompt.dictionary.cfg.layer
        return f"{layer}{self.side[0]}_{feature}_{self.pos}"

    def contributors(self, marginals: pd.DataFrame) -> list[list[Any]]:
        columns = marginals[["feature", "contribution"]].itertuples(index=False)
        return [[self.node_id(feature), contribution] for feature, contribution in columns]

    def nodes(self, features: Iterable[Any]) -> list[Node]:
        """Each distinct feature once, by number."""
        is_query = self.side == "query"
        acts = self.prompt.query_acts if is_query else self.prompt.key_acts
        values = [*acts[self.pos].tolist(), 1.0]  # the constant is last
        nodes = []
        for feature in sorted(set(map(int, features))):
            is_constant = feature == len(values) - 1
            node = {
                "node_id": self.node_id(feature),
                "feature_type": f"{self.side} {'constant' if is_constant else 'feature'}",
                "layer": self.prompt.dictionary.cfg.layer,
                "feature": feature,
                "ctx_idx": self.pos,
                "token": self.prompt.words[self.pos],
                "activation": values[feature],
            }
            nodes.append(node)
        return nodes
