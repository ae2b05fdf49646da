"""A measured dictionary, hostile words and sections of a report, for the tests of the page."""

import torch
from tiny_dictionaries import LAYER, N_PAIRS, tiny_dictionary
from tiny_models import tiny_tokens

import sae_lens_qk as qk
from sae_lens_qk.dashboard.data import report_data
from sae_lens_qk.dashboard.pages import ReportLimits
from sae_lens_qk.inputs import model_batches
from sae_lens_qk.statistics.activations import ActivationStatistics, collect_activations

N_ROWS = 7
N_POS = 41
N_PROMPT = 11

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><!--",
    "&lt;b&gt;",
    "\u2028",
    '" onload="alert(2)',
    "\n",
    "\x00",
    "é",
    "",
]


def hostile_words(token_ids) -> list[str]:
    """Every third token is hostile."""
    words = []
    for token_id in token_ids:
        number = int(token_id)
        is_hostile = number % 3 == 0
        words.append(HOSTILE[number // 3 % len(HOSTILE)] if is_hostile else f"w{number}")
    return words


def ranked_dictionary(model) -> qk.BilinearQKDictionary:
    """A tiny dictionary whose pairs have measured importance."""
    d = tiny_dictionary(model)
    generator = torch.Generator().manual_seed(3)
    statistics = torch.rand(N_PAIRS, 3, generator=generator)
    feature_map = qk.SparseFeatureMap(
        d.feature_map.indices,
        d.feature_map.weights,
        d.cfg.d_query,
        d.cfg.d_key,
        d.spec.n_heads,
        statistics,
    )
    d.set_feature_map(feature_map)
    return d


def tiny_statistics(d, model) -> ActivationStatistics:
    tokens = tiny_tokens(N_ROWS, N_POS)
    return collect_activations(d, model_batches(model, LAYER, tokens), progress=False)


def page_data(d, statistics, prompts=(), explanations=(), limits=None, **options):
    """The sections of a report with hostile words."""
    return report_data(
        d,
        statistics,
        prompts,
        explanations,
        words=options.pop("words", hostile_words),
        title=options.pop("title", "a title"),
        limits=limits or ReportLimits(),
        **options,
    )
