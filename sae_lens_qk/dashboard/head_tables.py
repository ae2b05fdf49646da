"""The first page's tables over heads: which pairs serve which, and what heads rest on when nothing matches."""

from collections.abc import Iterable

import pandas as pd

from sae_lens_qk.statistics.activations import ActivationStatistics, Batch
from sae_lens_qk.statistics.activations import ALWAYS_ON
from sae_lens_qk.statistics.heads import dense_features, first_token_features, first_token_use, pair_energies, participation, shared_reasons, superposition
from sae_lens_qk.dictionary import BilinearQKDictionary


def head_tables(
    d: BilinearQKDictionary, statistics: ActivationStatistics, batches: Iterable[Batch] = ()
) -> dict[str, pd.DataFrame]:
    """Tables by title, for `write_report(..., tables=...)`; pairs with features that are always on are left out.

    Args:
        batches: some (tokens, x) to find the features of the first token on; none: they are not looked for.
    Returns:
        What can be said: a map whose pairs were never measured gives nothing on shared pairs.
    """
    made: dict[str, pd.DataFrame] = {}
    if d.feature_map.statistics.any():
        pairs = pair_energies(d, without=dense_features(statistics, ALWAYS_ON))
        alike = (
            shared_reasons(d, pairs)
            .set_axis([f"head {head}" for head in range(d.spec.n_heads)], axis=1)
            .reset_index()
        )
        made["How many heads a pair of features serves"] = superposition(participation(d, pairs))
        made["How alike the heads' reasons are (cosine)"] = alike
    batches = list(batches)
    if batches:
        found = first_token_features(d, batches)
        made["Key features of the first token"] = found
        if len(found):
            made["What they do to attention to the first token"] = first_token_use(
                d, batches, found["key_feature"]
            ).heads
    return made
