"""Step 2's config for a dictionary that was not made by the runner."""

from dataclasses import fields
from typing import Any

import sae_lens_qk as qk
from sae_lens_qk.config import DictionaryFields


def mask_config(dictionary: qk.BilinearQKDictionary, **options: Any) -> qk.MaskTrainingConfig:
    """What the dictionary and step 2 share, and the given options."""
    cfg = dictionary.cfg
    shared = {field.name: getattr(cfg, field.name) for field in fields(DictionaryFields)}
    values = {
        **shared,
        "d_in": cfg.d_in,
        "half_architecture": cfg.half_architecture,
        **options,
    }
    return qk.MaskTrainingConfig(**values)
