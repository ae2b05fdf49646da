"""Indirect objects, end to end: scan, pairs, ablations, removals and twins on the same prompts."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

import sae_lens_qk as qk
from examples.ioi.interventions import feature_removals, pair_ablations, removal_summary
from examples.ioi.pairs import name_pairs, role_features
from examples.ioi.prompts import IOIPrompts, Name, ioi_prompts
from examples.ioi.scan import HeadScan, scan_heads
from examples.ioi.twins import twin_patterns, twin_summary
from sae_lens_qk.explain.removals import Directions
from sae_lens_qk.host.proof import proven_layer
from sae_lens_qk.host.support import Model


class IOIResult(NamedTuple):
    """What `study_ioi` measures."""

    n_prompts: int
    targets: dict[int, Name]
    """Heads, and the name attention to which is explained."""
    scan: HeadScan
    features: pd.DataFrame
    """Of `role_features`."""
    pairs: pd.DataFrame
    """Of `name_pairs`, on other prompts than all the rest."""
    ablations: pd.DataFrame
    """Of `pair_ablations`."""
    removals: pd.DataFrame
    """Of `feature_removals`."""
    twins: pd.DataFrame
    """Of `twin_patterns`."""

    def to_dict(self, n_pairs: int = 20) -> dict[str, Any]:
        """Plain JSON values: means over prompts.

        Of features those that fire in half of the prompts somewhere; of the pairs the n kept ones
        with the largest effects by head and name.
        """
        kept_pairs = self.pairs[self.pairs["weight"] > 0]
        tables = {
            "heads": self.scan.heads,
            "parts": self.scan.parts,
            "features": self.features[self.features["active"] >= 0.5],
            "pairs": kept_pairs.groupby(["head", "name"]).head(n_pairs),
            "ablations": self.ablations,
            "removals": removal_summary(self.removals),
            "twins": twin_summary(self.twins),
        }
        records = {}
        for name, table in tables.items():
            records[name] = json.loads(str(table.to_json(orient="records")))
        return {
            "n_prompts": self.n_prompts,
            "targets": {str(head): name for head, name in self.targets.items()},
            "logit_difference": self.scan.logit_difference,
            "accuracy": self.scan.accuracy,
            "first": self.scan.first,
            **records,
        }


def study_ioi(
    dictionary: qk.BilinearQKDictionary,
    model: Model,
    targets: Mapping[int, Name],
    n_prompts: int = 48,
    directions: Directions | None = None,
    ks: Sequence[int] = (1, 2, 5, 10, 20, 50),
    seed: int = 0,
    **prompts: Any,
) -> IOIResult:
    """Indirect objects end to end, on heads of a dictionary's layer.

    Args:
        targets: heads, and the name attention to which is explained.
        n_prompts: to measure on; pairs are chosen on as many others.
        directions: default: fitted on the text that comes with the package.
        ks: numbers of pairs and of features; those of which there are fewer are left out.
        **prompts: of `ioi_prompts`, such as templates and names.
    """
    proven_layer(dictionary.cfg, model)

    def batches(prompt_seed: int) -> list[IOIPrompts]:
        all_prompts = ioi_prompts(model.tokenizer, n_prompts, prompt_seed, **prompts)
        return [batch.to(dictionary.device) for batch in all_prompts]

    measured_prompts = batches(seed)
    if directions is None:
        directions = Directions.from_own_text(dictionary, model)
    pairs = name_pairs(dictionary, model, batches(seed + 1), list(targets))
    return IOIResult(
        n_prompts=n_prompts,
        targets=dict(targets),
        scan=scan_heads(model, measured_prompts),
        features=role_features(dictionary, model, measured_prompts),
        pairs=pairs,
        ablations=pair_ablations(
            dictionary, model, measured_prompts, pairs, targets, ks, seed=seed
        ),
        removals=feature_removals(
            dictionary, model, measured_prompts, targets, directions, ks, seed
        ),
        twins=twin_patterns(dictionary, model, measured_prompts, list(targets)),
    )
