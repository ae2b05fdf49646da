"""Everything a report shows, as plain JSON values: dicts of columns, numbers of 4 digits.

    overview   model, sizes, metrics, histograms of density, heads, what was left out, tables
    texts      words: every token string that is needed, once;
               rows: row -> [[first position, [word, ...]], ...];
               labels: side -> for each feature the words it fires on most
    features   side -> columns; one entry per feature with a page, most important first
    pairs      columns; one entry per pair with a page, most important first
    prompts    one entry per prompt: words; first_keys, the first allowed key of each query; true
               and rebuilt patterns per head, the allowed keys of each query in turn; cells,
               "head/query/key" -> pairs; explanations, "head/query/key" -> `Attribution.to_dict`

Contexts point into the rows: [row, position, value, activations of the tokens around] and
[row, query, key, value]. Importance is m^2 times the importance of the map: what dropping the pair
costs, to leading order, in nats per query.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from sae_lens_qk.attention import SIDES, Side
from sae_lens_qk.dashboard.columns import feature_columns, pair_columns
from sae_lens_qk.dashboard.overview import overview_fields
from sae_lens_qk.dashboard.pages import PAIR, Material, ReportLimits, choose_pages, pair_table
from sae_lens_qk.dashboard.prompts import (
    Explanation,
    Prompt,
    check_prompts,
    prompt_section,
    strongest_cells,
)
from sae_lens_qk.dashboard.texts import Contexts, Inputs, Words, add_activations
from sae_lens_qk.dashboard.values import table_values
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.statistics.activations import ActivationStatistics


@torch.no_grad()
def report_data(
    d: BilinearQKDictionary,
    statistics: ActivationStatistics,
    prompts: Sequence[Prompt] = (),
    explanations: Sequence[Explanation] = (),
    *,
    words: Words,
    title: str | None,
    limits: ReportLimits,
    inputs: Inputs | None = None,
    tables: Mapping[str, pd.DataFrame] | None = None,
) -> dict[str, Any]:
    """The sections of a report; see the module.

    Args:
        statistics: of the texts that contexts are taken from, collected with this dictionary.
        prompts: of at most 128 tokens each.
        explanations: of attention weights of these prompts, shown in full.
        inputs: contexts then show the activations of all their tokens; without it only that of the
            strongest.
        title: default: model and layer.
        tables: for the first page, by title.
    Raises:
        ValueError: no feature map, or statistics or prompts of another dictionary.
    """
    d.require_feature_map()
    _check_statistics(d, statistics)
    check_prompts(d, prompts)
    pairs = pair_table(d, statistics)
    cells = [strongest_cells(prompt, limits) for prompt in prompts]
    pages = choose_pages(d, statistics, pairs, cells, limits)
    material = Material(d, statistics, pairs, pages, limits)
    contexts = Contexts(statistics, limits)
    features: dict[Side, dict[str, Any]] = {
        side: feature_columns(material, side, contexts) for side in SIDES
    }
    if inputs is not None:
        add_activations(d, features, contexts, inputs)
    overview = overview_fields(material, title or f"{d.cfg.model_name}, layer {d.cfg.layer}")
    # an old report may come without tables
    named_tables = (tables or {}).items()
    overview["tables"] = [table_values(name, table) for name, table in named_tables]
    return {
        "overview": overview,
        "features": features,
        "pairs": pair_columns(material, contexts),
        "texts": contexts.texts(words),  # last: the others say which tokens they need
        "prompts": [
            prompt_section(d, prompt, cell_pairs, explanations, limits)
            for prompt, cell_pairs in zip(prompts, cells, strict=True)
        ],
    }


def _check_statistics(
    d: BilinearQKDictionary,
    statistics: ActivationStatistics,
) -> None:
    pairs = statistics.pairs[PAIR].to_numpy()  # [pair, 3]
    # contexts and means are looked up by row: the order has to be the same as well
    indices = d.feature_map.indices.cpu().numpy()
    if not np.array_equal(pairs, indices):
        raise ValueError(
            f"The statistics list {len(pairs)} pairs that are not the {len(d.feature_map)} of this "
            "dictionary's map: collect them with this dictionary."
        )
