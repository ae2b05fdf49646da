"""BilinearQKDictionary: two transcoders and a sparse feature map, as one SAELens SAE."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from sae_lens import register_sae_class
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAE, SAEMetadata
from sae_lens.saes.transcoder import (
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    Transcoder,
    TranscoderConfig,
)
from torch import Tensor
from typing_extensions import override

from sae_lens_qk.attention import AttentionSpec
from sae_lens_qk.compaction import Compactable
from sae_lens_qk.config import ARCHITECTURE, BilinearQKConfig
from sae_lens_qk.feature_map import STATISTICS, Features, Pairs, SparseFeatureMap, as_pairs
from sae_lens_qk.patching import Patchable, Source
from sae_lens_qk.pretrained.mixin import Pretrained
from sae_lens_qk.refusals import REFUSALS, OneDecoderRefusals
from sae_lens_qk.scoring.pairs import Decoders, pair_kernel
from sae_lens_qk.stored_form import from_stored_form, to_stored_form

_TRANSCODERS = {
    "transcoder": (Transcoder, TranscoderConfig),
    "jumprelu_transcoder": (JumpReLUTranscoder, JumpReLUTranscoderConfig),
}


class QueriesKeys(NamedTuple):
    queries: Float[Tensor, "batch pos_q head d_head"]
    keys: Float[Tensor, "batch pos_k kv_head d_head"]


class BilinearQKDictionary(
    OneDecoderRefusals, Patchable, Compactable, Pretrained, SAE[BilinearQKConfig]
):
    """Query and key transcoders of one attention layer, and the pairs that carry its pattern.

    With x the tensor that W_Q and W_K multiply,

        query_acts = act(x W_enc_q + b_enc_q),   q_hat = query_acts W_dec_q + b_dec_q
        key_acts   = act(x W_enc_k + b_enc_k),   k_hat = key_acts W_dec_k + b_dec_k
        scores[h,i,j] = scale <R_i q_hat[i,h], R_j k_hat[j,g(h)]>                      "transcoders"
                      = sum over kept pairs of m query_acts[i,a] key_acts[j,b] M[a,b,h](i-j)
                                                                                       "feature_map"

    Methods that take x also take `features(x)`: encode once, hand it on.

    Attributes:
        query, key: stock SAELens transcoders. Hooks on `query.hook_sae_acts_post` act everywhere.
        feature_map: `SparseFeatureMap`, empty until step 2 has run.
        spec: the layer's attention, `AttentionSpec`.
        metrics, runner_cfg: metrics and settings of the training run, saved next to the weights;
            None: not known.
    Source: Wynroe and Sharkey 2024, "Decomposing the QK circuit with Bilinear Sparse Dictionary
        Learning".
    """

    cfg: BilinearQKConfig
    query: Transcoder
    key: Transcoder
    feature_map: SparseFeatureMap
    spec: AttentionSpec

    def __init__(
        self,
        cfg: BilinearQKConfig,
        use_error_term: bool = False,
    ):
        if use_error_term:
            raise NotImplementedError(REFUSALS["use_error_term"])
        if not cfg.attention:
            raise ValueError("cfg.attention is empty: give the AttentionSpec of the layer.")
        super().__init__(cfg)
        self.cfg.metadata.model_name = cfg.model_name
        self.cfg.metadata.hook_name = cfg.hook_name
        self.runner_cfg: dict[str, Any] | None = None
        self.metrics = None

    @override
    def initialize_weights(self) -> None:
        cfg = self.cfg
        self.spec = cfg.spec
        self.query = self._new_half("q", cfg.d_query, self.spec.d_queries)
        self.key = self._new_half("k", cfg.d_key, self.spec.d_keys)
        # unset pairs, of the shapes that `load_state_dict` will ask for
        self.feature_map = SparseFeatureMap.empty(
            cfg.n_pairs,
            cfg.d_query,
            cfg.d_key,
            self.spec.n_heads,
            self.dtype,
            self.device,
        )

    def _new_half(
        self,
        side: Literal["q", "k"],
        d_features: int,
        d_out: int,
    ) -> Transcoder:
        transcoder_class, config_class = _TRANSCODERS[self.cfg.half_architecture]
        hook = f"blocks.{self.cfg.layer}.attn.{side}"
        metadata = SAEMetadata(
            model_name=self.cfg.model_name,
            model_mode=self.cfg.model_mode,
            hook_name=f"{hook}.hook_in",
            hook_name_out=f"{hook}.hook_out",
        )
        config = config_class(
            d_in=self.cfg.d_in,
            d_sae=d_features,
            d_out=d_out,
            dtype=self.cfg.dtype,
            device=self.cfg.device,
            apply_b_dec_to_input=False,
            metadata=metadata,
        )
        return transcoder_class(config)

    @property
    def has_feature_map(self) -> bool:
        return len(self.feature_map) > 0

    def require_feature_map(self) -> None:
        if not self.has_feature_map:
            raise ValueError(
                "This dictionary has no feature map: run step 2 (mask.training_tokens > 0) "
                "or use 'transcoders'."
            )

    @property
    def decoders(self) -> Decoders:
        """Decoder rows by head, the bias as last row (the constant feature)."""
        query_bias = self.query.b_dec[None]
        key_bias = self.key.b_dec[None]
        query_rows = torch.cat([self.query.W_dec, query_bias])  # [d_query + 1, d_queries]
        key_rows = torch.cat([self.key.W_dec, key_bias])  # [d_key + 1, d_keys]
        query_decoders = self.spec.split_queries(query_rows)  # [d_query + 1, head, d_head]
        key_decoders = self.spec.split_keys(key_rows)  # [d_key + 1, kv_head, d_head]
        return Decoders(query_decoders, key_decoders)

    # Features

    def encode_query(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_query"]:
        """Query features of the layer's input, >= 0."""
        self._check_width(x)
        return self.query.encode(x)

    def encode_key(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_key"]:
        """Key features of the layer's input, >= 0."""
        self._check_width(x)
        return self.key.encode(x)

    def features(self, x: Float[Tensor, "*batch d_model"]) -> Features:
        """Features of both sides, encoded once: what `scores`, `pattern` and `reconstruct` take."""
        return Features(self.encode_query(x), self.encode_key(x))

    @override
    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """Query features, then key features."""
        return torch.cat(self.features(x), dim=-1)

    @override
    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        """Flattened [q_hat | k_hat], d_out = (n_heads + n_kv_heads) * d_head."""
        sizes = [self.cfg.d_query, self.cfg.d_key]
        query_acts, key_acts = feature_acts.split(sizes, dim=-1)
        queries = self.query.decode(query_acts)
        keys = self.key.decode(key_acts)
        return torch.cat([queries, keys], dim=-1)

    @override
    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_out"]:
        return self.decode(self.encode(x))

    # Scores and patterns

    def reconstruct(self, x: Float[Tensor, "batch pos d_model"] | Features) -> QueriesKeys:
        """q_hat and k_hat by head, of the layer's input or its features."""
        features = self._as_features(x)
        queries = self.query.decode(features.query)  # [batch, pos, d_queries]
        keys = self.key.decode(features.key)  # [batch, pos, d_keys]
        q_hat = self.spec.split_queries(queries)
        k_hat = self.spec.split_keys(keys)
        return QueriesKeys(q_hat, k_hat)

    def scores(
        self, x: Float[Tensor, "batch pos d_model"] | Features, source: Source = "transcoders"
    ) -> Float[Tensor, "batch head pos_q pos_k"]:
        """Scaled, unmasked scores of full sequences from position 0; see the class for the sources.

        Args:
            x: the layer's input, or its `features(x)`.
        """
        if source == "transcoders":
            return self.spec.scores(*self.reconstruct(x))
        if source == "feature_map":
            self.require_feature_map()
            features = self._as_features(x)
            return self.feature_map.scores(features, self.decoders, self.spec)
        raise ValueError(f"source must be 'transcoders' or 'feature_map', got {source!r}.")

    def pattern(
        self, x: Float[Tensor, "batch pos d_model"] | Features, source: Source = "transcoders"
    ) -> Float[Tensor, "batch head pos_q pos_k"]:
        """Reconstructed attention pattern: the spec's softmax of `scores(x, source)`.

        Args:
            x: the layer's input for full, unpadded sequences from position 0, or its `features(x)`.
            source: "transcoders" or "feature_map".
        Raises:
            ValueError: x has the wrong width, or the dictionary has no feature map.
        """
        return self.spec.pattern(self.scores(x, source))

    def _as_features(self, x: Tensor | Features) -> Features:
        return x if isinstance(x, Features) else self.features(x)

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.cfg.d_in:
            raise ValueError(
                f"x must have width d_in = {self.cfg.d_in} in its last axis, "
                f"got shape {list(x.shape)}."
            )

    # Pairs

    def pair_kernel(
        self, pairs: Pairs, offsets: Sequence[int] | Int[Tensor, " offset"]
    ) -> Float[Tensor, "pair offset"]:
        """Score of a pair per unit of both activations: M[a,b,h](offset), offset = query - key.

        Args:
            pairs: triples (query feature, key feature, head), kept or not; d_query / d_key stand
                for the constants.
            offsets: relative positions >= 0; without rotary embeddings all give the same score.
        Raises:
            ValueError: pairs out of range, or a negative offset.
        """
        pairs = as_pairs(pairs, self.device)
        offsets = torch.as_tensor(offsets, device=self.device)
        d_query, d_key, n_heads = self.feature_map.sizes
        upper = pairs.new_tensor([d_query, d_key, n_heads - 1])
        foreign = (pairs < 0) | (pairs > upper)
        if foreign.any() or (offsets < 0).any():
            raise ValueError(
                f"Pairs must lie in [0, {d_query}] x [0, {d_key}] x [0, {n_heads - 1}] "
                "and offsets be at least 0."
            )
        kernel = pair_kernel(pairs, self.decoders, self.spec, offsets)  # [pair, offset or 1]
        # a view: without rotary embeddings all columns are one
        return kernel.expand(-1, len(offsets))

    @torch.no_grad()
    def pair_frame(self) -> pd.DataFrame:
        """Kept pairs, a row per pair.

        Returns:
            query_feature, key_feature, head (d_query / d_key stand for the constant feature),
            weight in [0, 1], score_at_0, the pair's score per unit of both activations at offset 0,
            and as measured on data (NaN where nothing was) importance, effect and co_occurrence;
            see `SparseFeatureMap`.
        """
        feature_map = self.feature_map
        statistics = feature_map.statistics.float().cpu().clone()
        # a pair that was measured has fired together somewhere
        statistics[statistics[:, 2] == 0] = torch.nan
        indices = feature_map.indices
        weights = feature_map.weights.float()
        kernel = self.pair_kernel(indices, [0]).float()
        columns = ["query_feature", "key_feature", "head"]
        frame = pd.DataFrame(indices.cpu().numpy(), columns=columns)
        frame["weight"] = weights.cpu().numpy()
        frame["score_at_0"] = kernel[:, 0].cpu().numpy()
        frame[list(STATISTICS)] = statistics.numpy()
        return frame

    def set_feature_map(self, feature_map: SparseFeatureMap) -> None:
        """Replace the map (checked against this dictionary's sizes); the old one's metrics go.

        Raises:
            ValueError: a map for another number of features or heads.
        """
        expected = self.feature_map.sizes
        if feature_map.sizes != expected:
            raise ValueError(
                f"The map must be for (d_query, d_key, n_heads) = {expected}, "
                f"got one for {feature_map.sizes}."
            )
        self.feature_map = SparseFeatureMap(
            feature_map.indices, feature_map.weights, *expected, feature_map.statistics
        )
        # the config must fit the weights when both are saved
        self.cfg.n_pairs = len(feature_map)
        self.metrics = None

    # The host's protocol

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        to_stored_form(state_dict)

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        from_stored_form(state_dict, self.state_dict(), self.feature_map.sizes)

    @override
    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> "BilinearQKDictionary":
        """Every cast and move ends here: config and halves stay in step with the weights."""
        super()._apply(fn, recurse)
        weight = self.query.W_dec
        for module in (self, self.query, self.key):
            module.dtype = weight.dtype
            module.device = weight.device
            module.cfg.dtype = str(weight.dtype).removeprefix("torch.")
            module.cfg.device = str(weight.device)
        return self

    @override
    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        keys = super().load_state_dict(state_dict, strict=strict, assign=assign)
        # with `assign` the weights may have come in another dtype or on another device
        self._apply(lambda tensor: tensor)
        return keys

    @override
    def fold_W_dec_norm(self) -> None:
        """Fold decoder norms into encoders, half by half; scores do not change."""
        self.query.fold_W_dec_norm()
        self.key.fold_W_dec_norm()

    @override
    def get_W_dec_norm(self) -> Float[Tensor, " d_sae"]:
        query_norms = self.query.get_W_dec_norm()
        key_norms = self.key.get_W_dec_norm()
        return torch.cat([query_norms, key_norms])


if ARCHITECTURE not in SAE_CLASS_REGISTRY:
    register_sae_class(ARCHITECTURE, BilinearQKDictionary, BilinearQKConfig)
