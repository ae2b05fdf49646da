"""What an evaluation gives: the tuples behind metrics.json and the tables of a card.

`evals` defines the metrics and fills these in.
"""

from typing import Any, NamedTuple

import numpy as np
from rich.console import Group

from sae_lens_qk.metrics import Interval
from sae_lens_qk.tables import cell_table, fixed, interval, percent

RowTables = dict[str, dict[str, np.ndarray]]
"""By source, then metric: [row], or [row, head]."""


class PatternResult(NamedTuple):
    """What replacing the pattern by one source does; metrics that make no sense for it are None."""

    pattern_kl: Interval | None
    pattern_kl_per_head: list[float] | None
    pattern_tv: float
    argmax_agreement: float | None
    ce_loss: float
    logit_kl: float
    ce_recovered: Interval
    logit_kl_recovered: Interval
    score_explained: list[float] | None
    """Per head; dictionary sources only, as the two below."""
    score_explained_unweighted: list[float] | None
    norm_share: list[float] | None


class FeatureResult(NamedTuple):
    """Firing of the features of both sides over all positions."""

    l0_query: float
    l0_key: float
    live_query: int
    live_key: int
    """Features that fired at least once in the evaluated tokens."""
    max_density_query: float
    max_density_key: float
    """Share of tokens on which the most frequent feature fires."""


class MapResult(NamedTuple):
    """Size of the feature map, with both sparsity denominators."""

    n_pairs: int
    n_pairs_without_constants: int
    sparsity_of_all: float
    sparsity_of_live: float
    """Among entries whose two features fired in the evaluated tokens."""
    pairs_per_head: list[int]
    active_pairs: float
    """Mean number of kept pairs active at a (query, key) position, all heads together."""


class RowMetrics(NamedTuple):
    """What the means of an evaluation are made of."""

    sources: RowTables
    """With the names of `PatternResult`: pattern_kl [row, head]; pattern_tv, argmax_agreement,
    ce_loss and logit_kl [row]. The zero pattern has neither pattern_kl nor argmax_agreement."""
    fired_query: np.ndarray
    """Tokens on which each feature fires, [d_query]."""
    fired_key: np.ndarray


class Evaluation(NamedTuple):
    """Result of `evaluate`."""

    n_tokens: int
    n_rows: int
    ce_clean: float
    sources: dict[str, PatternResult]
    """By name: the dictionary's sources, then the baselines."""
    features: FeatureResult
    feature_map: MapResult | None
    by_row: RowMetrics | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without `by_row`."""
        values = _plain(self._replace(by_row=None))
        del values["by_row"]
        return values

    def __rich__(self) -> Group:
        """Readable tables, for `rich.print`."""
        header = ["pattern from", "pattern KL", "TV", "argmax", "loss", "logit KL"]
        header += ["loss recovered", "logit KL recovered"]
        rows = []
        for name, result in self.sources.items():
            cells = [
                name,
                # the zero pattern has none
                fixed(result.pattern_kl.value if result.pattern_kl else None),
                fixed(result.pattern_tv),
                fixed(result.argmax_agreement, digits=3),
                fixed(result.ce_loss),
                fixed(result.logit_kl),
                interval(result.ce_recovered, percent),
                interval(result.logit_kl_recovered, percent),
            ]
            rows.append(cells)
        title = (
            f"{self.n_tokens:,} tokens in {self.n_rows} rows, clean loss {self.ce_clean:.4f} nats"
        )
        names = header[:1]
        table = cell_table(header, rows, names, unbroken=names, title=title)
        # after the table, one line per subject
        f = self.features
        lines = [
            f"L0 {f.l0_query:.1f} query / {f.l0_key:.1f} key features per token; "
            f"live {f.live_query} / {f.live_key} in {self.n_tokens:,} tokens"
        ]
        if self.feature_map is not None:
            m = self.feature_map
            lines.append(
                f"feature map: {m.n_pairs:,} pairs ({m.n_pairs_without_constants:,} between "
                f"features), sparsity {m.sparsity_of_all:.3%} of all, {m.sparsity_of_live:.3%} of "
                f"live; {m.active_pairs:.1f} active at a position"
            )
        return Group(table, *lines)


def _plain(value: Any) -> Any:
    """Named tuples as dicts, all the way down."""
    # named tuples are tuples too: lists stay as they are
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value
