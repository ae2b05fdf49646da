"""Running a model with a reconstructed, thinned or edited pattern, through its own hooks."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, SupportsIndex, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_qk.attention import AttentionSpec
from sae_lens_qk.config import BilinearQKConfig
from sae_lens_qk.feature_map import Features, Pairs, SparseFeatureMap, as_pairs
from sae_lens_qk.host.proof import proven_layer
from sae_lens_qk.host.support import Hooks, Model
from sae_lens_qk.scoring.pairs import Decoders

Source = Literal["transcoders", "feature_map"]
PatchSource = Literal[Source, "model"]

ScoreFn = Callable[
    [Float[Tensor, "batch pos d_model"], Float[Tensor, "batch head pos_q pos_k"]], Tensor
]
"""(layer input x, the model's own scores) -> scores."""


class Patchable:
    """Mixin of a dictionary: hooks and contexts in which its model attends as reconstructed."""

    cfg: BilinearQKConfig
    spec: AttentionSpec
    feature_map: SparseFeatureMap
    decoders: Decoders
    features: Callable[[Tensor], Features]
    scores: Callable[..., Tensor]
    require_feature_map: Callable[[], None]

    def fwd_hooks(
        self,
        model: Model,
        source: PatchSource = "feature_map",
        heads: Iterable[SupportsIndex] | None = None,
        ablate_pairs: Pairs | None = None,
        scale_pairs: Mapping[tuple[int, int, int], float] | None = None,
        keep_pairs: Pairs | None = None,
    ) -> Hooks:
        """Hooks for `model.run_with_hooks(tokens, fwd_hooks=...)` that replace the layer's pattern.

        The pattern becomes that of the scores (softmax, with the spec's mask)

            "transcoders"   s<R_i q_hat, R_j k_hat>, plus (factor - 1) times edited pairs' terms c
            "feature_map"   the kept pairs' terms m c, edited pairs with factor * m
            "model"         the model's own scores, plus (factor - 1) times edited pairs' terms c

        with c = query_acts[i,a] key_acts[j,b] M[a,b,h](i-j). Ablating is factor 0. Common uses:

            d.fwd_hooks(model)                                       attend by the kept pairs alone
            d.fwd_hooks(model, source="model", ablate_pairs=pairs)   surgery on the true scores
            d.fwd_hooks(model, keep_pairs=pairs)                     these kept pairs and no other

        Args:
            heads: query heads whose pattern is replaced; None: all.
            ablate_pairs: triples (query feature, key feature, head) whose terms are removed.
            scale_pairs: triple -> factor.
            keep_pairs: only these triples (and constant x constant) remain; not with an edit, and
                not with the source "model".
        Returns:
            [(canonical hook name, hook)], verified to exist. Each call of the model must use full,
            unpadded sequences.
        Raises:
            ValueError: unknown source, contradictory or foreign pairs, heads out of range.
            FingerprintError, UnsupportedModelError: the model is not the dictionary's, or is called
                in an unsupported way.
        """
        layer = proven_layer(self.cfg, model)
        score_fn = self._score_function(source, ablate_pairs, scale_pairs, keep_pairs)

        def pattern(
            x: Tensor,
            scores: Tensor,
        ) -> Tensor:
            return self.spec.pattern(score_fn(x, scores))

        return layer.pattern_hooks(pattern, heads)

    @contextmanager
    def patched(
        self, model: Model, source: PatchSource = "feature_map", **edits: Any
    ) -> Iterator[Model]:
        """Context in which `model` attends as `fwd_hooks(model, source, **edits)` says.

        The model is restored on leaving, whatever happens inside.
        """
        hooks = self.fwd_hooks(model, source, **edits)
        with model.hooks(fwd_hooks=hooks):
            yield model

    def _score_function(
        self,
        source: PatchSource,
        ablate_pairs: Pairs | None,
        scale_pairs: Mapping[tuple[int, int, int], float] | None,
        keep_pairs: Pairs | None,
    ) -> ScoreFn:
        """The scores that `fwd_hooks` documents, after all its arguments are checked."""
        if source not in get_args(PatchSource):
            expected = "'transcoders', 'feature_map' or 'model'"
            raise ValueError(f"source must be {expected}, got {source!r}.")
        edited_pairs, factors = _edits(ablate_pairs, scale_pairs)  # [pair, 3], [pair]
        has_edits = len(edited_pairs) > 0
        if keep_pairs is not None and (source == "model" or has_edits):
            raise ValueError(
                "keep_pairs keeps nothing else: it takes no other edit, and source 'transcoders' "
                "or 'feature_map'."
            )
        if source == "model" and not has_edits:
            raise ValueError(
                "source 'model' edits the true scores: give ablate_pairs or scale_pairs."
            )
        # An edited term counts `factor` times instead of once: factor - 1 is what is added.
        # Built here because maps refuse foreign pairs, whatever the source.
        sizes = self.feature_map.sizes
        changes = _FactorMap(edited_pairs, factors - 1.0, *sizes)
        if source == "feature_map":
            return self._map_score_function(keep_pairs, edited_pairs, factors)
        if keep_pairs is not None:
            pairs = as_pairs(keep_pairs)
            unit_weights = torch.ones(len(pairs))  # whole terms: these pairs need not be in the map
            return self._pair_score_function(SparseFeatureMap(pairs, unit_weights, *sizes))

        def edited_scores(
            x: Tensor,
            scores: Tensor,
        ) -> Tensor:
            features = self.features(x)
            base = scores if source == "model" else self.scores(features, "transcoders")
            if not has_edits:
                return base
            terms = changes.scores(features, self.decoders, self.spec, include_constant=False)
            return base + terms

        return edited_scores

    def _map_score_function(
        self, keep_pairs: Pairs | None, edited_pairs: Int[Tensor, "pair 3"], factors: Tensor
    ) -> ScoreFn:
        """Scores of the feature map, thinned to `keep_pairs` or with edited weights."""
        self.require_feature_map()
        feature_map = self.feature_map
        if keep_pairs is not None:
            rows = _rows_of(feature_map, as_pairs(keep_pairs))
            return self._pair_score_function(feature_map.select(rows))
        if not len(edited_pairs):
            return self._pair_score_function(feature_map)
        # cloned: the dictionary's own map stays as it is
        weights = feature_map.weights.clone()
        rows = _rows_of(feature_map, edited_pairs)
        weights[rows] = weights[rows] * factors.to(weights.dtype)
        edited_map = _FactorMap(feature_map.indices, weights, *feature_map.sizes)
        return self._pair_score_function(edited_map)

    def _pair_score_function(self, pairs: SparseFeatureMap) -> ScoreFn:
        """Scores of a list of pairs and of constant x constant."""

        def pair_scores(
            x: Tensor,
            scores: Tensor,
        ) -> Tensor:
            features = self.features(x)
            return pairs.scores(features, self.decoders, self.spec)

        return pair_scores


class _FactorMap(SparseFeatureMap):
    """Pairs with factors that an intervention chose, in any range."""

    def _check_weights(self, weights: Tensor) -> None:
        if not weights.isfinite().all():
            raise ValueError("scale_pairs must be finite factors.")


def _edits(
    ablate_pairs: Pairs | None, scale_pairs: Mapping[tuple[int, int, int], float] | None
) -> tuple[Int[Tensor, "pair 3"], Float[Tensor, " pair"]]:
    """Edited pairs and the factor of each: 0 for ablated ones.

    Raises:
        ValueError: a pair is named twice.
    """
    ablated = as_pairs([] if ablate_pairs is None else ablate_pairs)
    scale_pairs = scale_pairs or {}
    scaled = as_pairs(list(scale_pairs))
    zeros = torch.zeros(len(ablated))
    factors = list(scale_pairs.values())
    scale_factors = torch.tensor(factors, dtype=torch.float32)
    pairs = torch.cat([ablated, scaled])
    # a pair named twice has no single factor
    if len(pairs.unique(dim=0)) < len(pairs):
        raise ValueError("ablate_pairs and scale_pairs together must name each pair once.")
    return pairs, torch.cat([zeros, scale_factors])


def _rows_of(
    feature_map: SparseFeatureMap,
    pairs: Int[Tensor, "pair 3"],
) -> Int[Tensor, " pair"]:
    """Rows of the pairs in the map.

    Raises:
        ValueError: the map does not list one of them.
    """
    rows = feature_map.find(pairs)
    if (rows < 0).any():
        foreign = tuple(pairs[rows < 0][0].tolist())
        raise ValueError(f"The feature map does not keep the pair {foreign}; see d.pair_frame().")
    return rows
