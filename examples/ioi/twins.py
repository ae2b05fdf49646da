"""Corrupted twins of the prompts: the model itself computes another x, without fits or decoders."""

from collections.abc import Sequence
from typing import get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

import sae_lens_qk as qk
from examples.ioi.interventions import MEASURES, Replay
from examples.ioi.pairs import TWINS
from examples.ioi.prompts import IOIPrompts, Order
from sae_lens_qk.host.proof import proven_layer
from sae_lens_qk.host.support import Model
from sae_lens_qk.patching import PatchSource


@torch.no_grad()
def twin_patterns(
    dictionary: qk.BilinearQKDictionary,
    model: Model,
    batches: Sequence[IOIPrompts],
    heads: Sequence[int],
) -> pd.DataFrame:
    """Prompts and their twins: what heads attend to by themselves and as rebuilt.

    Returns:
        prompt (a number), order (of the names: ABBA or BABA), prompts ("clean" or the kind of
        twin), head, source (model, transcoders, feature_map), `MEASURES` with this one head
        attending as the source says, and preference: s[END, IO] - s[END, S1].
    """
    proven_layer(dictionary.cfg, model)
    frames = []
    n_earlier = 0
    for clean in batches:
        orders = np.where(clean.is_abba.cpu(), *get_args(Order))
        for kind in ("clean", *TWINS):
            batch = clean if kind == "clean" else clean.twin(kind)
            replay = Replay(model, dictionary.cfg.layer, batch)
            for source, preferences in _preferences(dictionary, replay).items():
                for head in heads:
                    hooks = []
                    if source != "model":
                        hooks = dictionary.fwd_hooks(model, source=source, heads=[head])
                    frame = pd.DataFrame({"prompt": n_earlier + np.arange(len(batch.tokens))})
                    frame["order"] = orders
                    frame["prompts"] = kind
                    frame["head"] = head
                    frame["source"] = source
                    frame[list(MEASURES)] = replay.measures(head, hooks).numpy()
                    frame["preference"] = preferences[:, head].float().cpu().numpy()
                    frames.append(frame)
        n_earlier += len(clean.tokens)
    return pd.concat(frames, ignore_index=True)


def _preferences(
    dictionary: qk.BilinearQKDictionary, replay: Replay
) -> dict[PatchSource, Float[Tensor, "prompt head"]]:
    """s[END, IO] - s[END, S1] of every head, the model's own and as rebuilt."""
    features = dictionary.features(replay.x)
    scores: dict[PatchSource, Tensor] = {
        "model": replay.scores,
        "transcoders": dictionary.scores(features),
    }
    if dictionary.has_feature_map:
        scores["feature_map"] = dictionary.scores(features, "feature_map")
    io_pos = replay.batch.io_pos[:, None, None]
    s1_pos = replay.batch.s1_pos[:, None, None]
    preferences = {}
    for source, source_scores in scores.items():
        rows = source_scores[:, :, -1]  # [prompt, head, key]
        difference = rows.take_along_dim(io_pos, dim=2) - rows.take_along_dim(s1_pos, dim=2)
        preferences[source] = difference[..., 0]
    return preferences


def twin_summary(twins: pd.DataFrame) -> pd.DataFrame:
    """Means of `twin_patterns` by head, prompts and source, and how preference changes.

    Returns:
        head, prompts, source, `MEASURES`, preference, change (clean preference minus this one), and
        pearson: over prompts, of the change as rebuilt with the model's own (missing where it is
        all zero).
    """
    identity = ["prompt", "head", "source"]
    clean = twins.loc[twins["prompts"] == "clean", [*identity, "preference"]]
    rows = twins.merge(clean, on=identity, suffixes=("", "_clean"))
    rows["change"] = rows["preference_clean"] - rows["preference"]
    identity = ["prompt", "head", "prompts"]
    own = rows.loc[rows["source"] == "model", [*identity, "change"]]
    rows = rows.merge(own, on=identity, suffixes=("", "_own"))
    groups = rows.groupby(["head", "prompts", "source"], sort=False)
    summary = groups[[*MEASURES, "preference", "change"]].mean()
    summary["pearson"] = [_correlation(group) for _, group in groups]
    return summary.reset_index()


def _correlation(rows: pd.DataFrame) -> float:
    return float(rows[["change", "change_own"]].corr().to_numpy()[0, 1])
