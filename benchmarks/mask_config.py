"""Step 2's config for a dictionary that was not made by the runner."""

from dataclasses import fields

import sae_lens_qk as qk
from sae_lens_qk.config import DictionaryFields


def mask_config(
    dictionary: qk.BilinearQKDictionary,
    settings: qk.MaskStepConfig,
    n_candidates: int,
    n_steps: int,
    k_query: float,
    k_key: float,
) -> qk.MaskTrainingConfig:
    """As the runner makes it.

    Args:
        n_candidates: pairs that enter training.
        n_steps: of step 2.
        k_query, k_key: mean active features per token that tuning holds.
    """
    cfg = dictionary.cfg
    shared = {field.name: getattr(cfg, field.name) for field in fields(DictionaryFields)}
    shared["n_pairs"] = n_candidates
    return qk.MaskTrainingConfig(
        **shared,
        d_in=cfg.d_in,
        half_architecture=cfg.half_architecture,
        mask=settings,
        prune_steps=int(n_steps * settings.prune_until),
        k_query=k_query,
        k_key=k_key,
    )
