"""BilinearQKDictionary: two transcoders and a sparse feature map, as one SAELens SAE."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from sae_lens import register_sae_class
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAE, SAEMetadata
from sae_lens.saes.transcoder import (
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    Transcoder,
    TranscoderConfig,
)
from safetensors import SafetensorError
from torch import Tensor
from typing_extensions import override

from sae_lens_qk.attention import AttentionSpec, attention_scores, pattern_from_scores
from sae_lens_qk.config import ARCHITECTURE, BilinearQKConfig
from sae_lens_qk.feature_map import STATISTICS, Pairs, SparseFeatureMap, as_pairs
from sae_lens_qk.host.support import Hooks
from sae_lens_qk.scoring.pairs import Decoders, pair_kernel
from sae_lens_qk.refusals import REFUSALS, OneDecoderRefusals
from sae_lens_qk.stored_form import from_stored_form, to_stored_form

Source = Literal["transcoders", "feature_map"]
_NO_CONFIG = (
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
    NotImplementedError,
    UnicodeDecodeError,
    json.JSONDecodeError,
)
"""What SAELens and the config classes raise over a malformed cfg.json."""
_HALVES = {
    "transcoder": (Transcoder, TranscoderConfig),
    "jumprelu_transcoder": (JumpReLUTranscoder, JumpReLUTranscoderConfig),
}


class QueriesKeys(NamedTuple):
    queries: Float[Tensor, "batch pos_q head d_head"]
    keys: Float[Tensor, "batch pos_k kv_head d_head"]


class BilinearQKDictionary(OneDecoderRefusals, SAE[BilinearQKConfig]):
    """Query and key transcoders of one attention layer, and the feature pairs that carry its pattern.

    With x the tensor that W_Q and W_K multiply,

        query_acts = act(x W_enc_q + b_enc_q),   q_hat = query_acts W_dec_q + b_dec_q
        key_acts   = act(x W_enc_k + b_enc_k),   k_hat = key_acts W_dec_k + b_dec_k
        scores[h,i,j] = scale <R_i q_hat[i,h], R_j k_hat[j,g(h)]>                                   ("transcoders")
                      = sum over kept pairs of m query_acts[i,a] key_acts[j,b] M[a,b,h](i-j)        ("feature_map")

    Attributes:
        query, key: stock SAELens transcoders. Hooks on `query.hook_sae_acts_post` act on every path.
        feature_map: `SparseFeatureMap`, empty until step 2 has run.
        metrics, runner_cfg: figures and settings of the run that made it, saved beside the weights; None: not known.
    Source: Wynroe and Sharkey 2024, "Decomposing the QK circuit with Bilinear Sparse Dictionary Learning".
    """

    cfg: BilinearQKConfig
    query: Transcoder
    key: Transcoder
    feature_map: SparseFeatureMap

    def __init__(self, cfg: BilinearQKConfig, use_error_term: bool = False):
        if use_error_term:
            raise NotImplementedError(REFUSALS["use_error_term"])
        if not cfg.attention:
            raise ValueError(
                "cfg.attention is empty: a dictionary needs the AttentionSpec of its layer."
            )
        super().__init__(cfg)
        self.runner_cfg: dict[str, Any] | None = None
        self._metrics: dict[str, Any] | None = None

    @property
    def metrics(self) -> dict[str, Any] | None:
        """Figures that travel with the dictionary: what `evaluate` measured, as a dict. An `Evaluation` can be assigned."""
        return self._metrics

    @metrics.setter
    def metrics(self, measured: Any) -> None:
        self._metrics = measured.to_dict() if hasattr(measured, "to_dict") else measured

    @override
    def initialize_weights(self) -> None:
        cfg, spec = self.cfg, self.spec
        self.query = self._make_half("q", cfg.d_query, spec.d_queries)
        self.key = self._make_half("k", cfg.d_key, spec.d_keys)
        self.feature_map = SparseFeatureMap.empty(
            cfg.n_pairs, cfg.d_query, cfg.d_key, spec.n_heads, self.dtype, self.device
        )

    def _make_half(self, side: Literal["q", "k"], d_features: int, d_out: int) -> Transcoder:
        half_class, config_class = _HALVES[self.cfg.half_architecture]
        hook = f"blocks.{self.cfg.layer}.attn.{side}"
        return half_class(
            config_class(
                d_in=self.cfg.d_in,
                d_sae=d_features,
                d_out=d_out,
                dtype=self.cfg.dtype,
                device=self.cfg.device,
                apply_b_dec_to_input=False,
                metadata=SAEMetadata(
                    model_name=self.cfg.model_name,
                    model_mode=self.cfg.model_mode,
                    hook_name=f"{hook}.hook_in",
                    hook_name_out=f"{hook}.hook_out",
                ),
            )
        )

    @property
    def spec(self) -> AttentionSpec:
        return self.cfg.spec

    @property
    def has_feature_map(self) -> bool:
        return len(self.feature_map) > 0

    @property
    def decoders(self) -> Decoders:
        """Decoder rows by head, the bias as last row (the constant feature)."""
        return Decoders(
            query=self.spec.split_queries(torch.cat([self.query.W_dec, self.query.b_dec[None]])),
            key=self.spec.split_keys(torch.cat([self.key.W_dec, self.key.b_dec[None]])),
        )

    def encode_query(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_query"]:
        """Query features of the layer's input, >= 0."""
        return self.query.encode(self._checked(x))

    def encode_key(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_key"]:
        """Key features of the layer's input, >= 0."""
        return self.key.encode(self._checked(x))

    @override
    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """Query features, then key features."""
        return torch.cat([self.encode_query(x), self.encode_key(x)], dim=-1)

    @override
    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        """Flattened [q_hat | k_hat], d_out = (n_heads + n_kv_heads) * d_head."""
        query_acts, key_acts = feature_acts.split([self.cfg.d_query, self.cfg.d_key], dim=-1)
        return torch.cat([self.query.decode(query_acts), self.key.decode(key_acts)], dim=-1)

    @override
    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_out"]:
        return self.decode(self.encode(x))

    def queries_keys(self, x: Float[Tensor, "batch pos d_model"]) -> QueriesKeys:
        """Reconstructed queries and keys, by head."""
        return QueriesKeys(
            self.spec.split_queries(self.query.decode(self.encode_query(x))),
            self.spec.split_keys(self.key.decode(self.encode_key(x))),
        )

    def scores(
        self, x: Float[Tensor, "batch pos d_model"], source: Source = "transcoders"
    ) -> Float[Tensor, "batch head pos_q pos_k"]:
        """Scaled, unmasked scores of full sequences from position 0; see the class for the two sources."""
        if source == "transcoders":
            return attention_scores(*self.queries_keys(x), self.spec)
        if source == "feature_map":
            self.require_feature_map()
            return self.feature_map.scores(
                self.encode_query(x), self.encode_key(x), self.decoders, self.spec
            )
        raise ValueError(f"source must be 'transcoders' or 'feature_map', got {source!r}.")

    def pattern(
        self, x: Float[Tensor, "batch pos d_model"], source: Source = "transcoders"
    ) -> Float[Tensor, "batch head pos_q pos_k"]:
        """Reconstructed attention pattern, softmax over the allowed keys of `scores(x, source)`; rows sum to 1.

        Args:
            x: the layer's input for full, unpadded sequences from position 0.
            source: "transcoders" or "feature_map".
        Raises:
            ValueError: x has the wrong width, or the dictionary has no feature map.
        """
        return pattern_from_scores(self.scores(x, source))

    def pair_kernel(
        self, pairs: Pairs, offsets: Sequence[int] | Int[Tensor, " offset"]
    ) -> Float[Tensor, "pair offset"]:
        """Score of a pair per unit of both activations, by relative position: M[a,b,h](offset), offset = query - key.

        Args:
            pairs: triples (query feature, key feature, head), kept or not; d_query / d_key stand for the constants.
            offsets: relative positions >= 0; without rotary embeddings all give the same score.
        Raises:
            ValueError: pairs out of range, or a negative offset.
        """
        pairs, at = as_pairs(pairs, self.device), torch.as_tensor(offsets, device=self.device)
        upper = pairs.new_tensor([self.cfg.d_query, self.cfg.d_key, self.spec.n_heads - 1])
        if ((pairs < 0) | (pairs > upper)).any() or (at < 0).any():
            raise ValueError(
                f"Pairs must lie in [0, {upper[0]}] x [0, {upper[1]}] x [0, {upper[2]}] and offsets be at least 0."
            )
        return pair_kernel(pairs, self.decoders, self.spec, at).expand(-1, len(at))

    @torch.no_grad()
    def pair_frame(self) -> pd.DataFrame:
        """Kept pairs, one a row.

        Returns:
            query_feature, key_feature, head (d_query / d_key stand for the constant feature), weight in [0, 1],
            score_at_0, the pair's score per unit of both activations at offset 0, and as measured on data (NaN where
            nothing was) importance, effect and co_occurrence; see `SparseFeatureMap`.
        """
        kept = self.feature_map
        statistics = kept.statistics.float().cpu().clone()
        statistics[statistics[:, 2] == 0] = torch.nan
        frame = pd.DataFrame(
            kept.indices.cpu().numpy(), columns=["query_feature", "key_feature", "head"]
        )
        frame["weight"] = kept.weights.float().cpu().numpy()
        frame["score_at_0"] = self.pair_kernel(kept.indices, [0])[:, 0].float().cpu().numpy()
        frame[list(STATISTICS)] = statistics.numpy()
        return frame

    def set_feature_map(self, feature_map: SparseFeatureMap) -> None:
        """Replace the map (validated against this dictionary's sizes); figures of the old one are forgotten."""
        expected = (self.cfg.d_query, self.cfg.d_key, self.spec.n_heads)
        found = (feature_map.d_query, feature_map.d_key, feature_map.n_heads)
        if expected != found:
            raise ValueError(
                f"The map must be for (d_query, d_key, n_heads) = {expected}, got one for {found}."
            )
        self.feature_map = SparseFeatureMap(
            feature_map.indices, feature_map.weights, *expected, feature_map.statistics
        )
        self.cfg.n_pairs = len(feature_map)
        self.metrics = None

    def require_feature_map(self) -> None:
        if not self.has_feature_map:
            raise ValueError(
                "This dictionary has no feature map: run step 2 (mask.training_tokens > 0) or use 'transcoders'."
            )

    def _checked(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.cfg.d_in:
            raise ValueError(
                f"x must have width d_in = {self.cfg.d_in} in its last axis, got shape {list(x.shape)}."
            )
        return x

    # Patching, pretrained weights: one-line delegations, imported where they are used.

    def fwd_hooks(
        self,
        model: Any,
        source: Literal[Source, "model"] = "feature_map",
        heads: Sequence[int] | None = None,
        ablate_pairs: Pairs | None = None,
        scale_pairs: Mapping[tuple[int, int, int], float] | None = None,
        keep_pairs: Pairs | None = None,
    ) -> Hooks:
        """Hooks that replace the layer's pattern; see `sae_lens_qk.patching.fwd_hooks`."""
        from sae_lens_qk.patching import fwd_hooks

        return fwd_hooks(self, model, source, heads, ablate_pairs, scale_pairs, keep_pairs)

    def patched(self, model: Any, **kwargs: Any) -> AbstractContextManager[Any]:
        """Context in which the model attends as reconstructed; see `sae_lens_qk.patching.patched`."""
        from sae_lens_qk.patching import patched

        return patched(self, model, **kwargs)

    def compact(
        self, live_query: Bool[Tensor, " d_query"], live_key: Bool[Tensor, " d_key"]
    ) -> "BilinearQKDictionary":
        """A dictionary of the live features alone; see `sae_lens_qk.storage.compact`."""
        from sae_lens_qk.compaction import compact

        return compact(self, live_query, live_key)

    @classmethod
    @override
    def from_pretrained(  # type: ignore[override]
        cls,
        release: str,
        sae_id: str | None = None,
        device: str = "cpu",
        dtype: str | None = "float32",
        force_download: bool = False,
        converter: Any = None,
        fold_W_dec_norm: bool = False,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        verify: bool | Literal["strict"] = True,
    ) -> "BilinearQKDictionary":
        """Load a dictionary by name, from a folder or from the Hub, verified; see `sae_lens_qk.pretrained.loading`."""
        return cls.from_pretrained_with_cfg_and_sparsity(
            release,
            sae_id,
            device,
            dtype,
            force_download,
            converter,
            fold_W_dec_norm,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            verify=verify,
        )[0]

    @classmethod
    @override
    def from_pretrained_with_cfg_and_sparsity(  # type: ignore[override]
        cls, release: str, sae_id: str | None = None, *args: Any, **kwargs: Any
    ) -> tuple["BilinearQKDictionary", dict[str, Any], Tensor | None]:
        """`from_pretrained`, with the config as a dict, and None for the sparsity."""
        from sae_lens_qk.pretrained.loading import from_pretrained_with_cfg_and_sparsity

        return from_pretrained_with_cfg_and_sparsity(cls, release, sae_id, *args, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        folder: str,
        *,
        private: bool = False,
        revision: str = "main",
        token: str | bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> Any:
        """Publish as `<repo_id>/<folder>` in one commit; see `sae_lens_qk.pretrained.push.push_to_hub`."""
        from sae_lens_qk.pretrained.push import push_to_hub

        return push_to_hub(
            self,
            repo_id,
            folder,
            private=private,
            revision=revision,
            token=token,
            commit_message=commit_message,
            create_pr=create_pr,
        )

    def export_transcoders(self, path: str | Path) -> tuple[Path, Path]:
        """Both halves as stock SAELens folders, `<path>/query` and `<path>/key`; see `sae_lens_qk.pretrained.folder`."""
        from sae_lens_qk.pretrained.folder import export_transcoders

        return export_transcoders(self, path)

    # The host's protocol.

    @override
    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """Save weights, config, and beside them figures, run settings, model card and SHA256SUMS.

        Raises:
            ValueError: `metrics` or `runner_cfg` cannot be put into a card; nothing is written.
        """
        from sae_lens_qk.pretrained.folder import documents, write_documents

        beside = documents(self, Path(path).resolve().name)
        paths = super().save_model(path)
        write_documents(path, beside)
        return paths

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        to_stored_form(state_dict)

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        from_stored_form(
            state_dict, self.state_dict(), (self.cfg.d_query, self.cfg.d_key, self.spec.n_heads)
        )

    @override
    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> "BilinearQKDictionary":
        """Every cast and move ends here: keep the config and both halves in step with the weights."""
        super()._apply(fn, recurse)
        for module in (self, self.query, self.key):
            module.dtype, module.device = self.query.W_dec.dtype, self.query.W_dec.device
            module.cfg.dtype, module.cfg.device = (
                str(module.dtype).removeprefix("torch."),
                str(module.device),
            )
        return self

    @override
    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        keys = super().load_state_dict(state_dict, strict=strict, assign=assign)
        self._apply(lambda tensor: tensor)
        return keys

    @classmethod
    @override
    def load_from_disk(  # type: ignore[override]
        cls, path: str | Path, device: str = "cpu", dtype: str | None = None, **kwargs: Any
    ) -> "BilinearQKDictionary":
        """Load a folder written by `save_model`.

        Raises:
            FileNotFoundError: no cfg.json or sae_weights.safetensors there.
            ValueError: the file is truncated, corrupted or does not fit its config.
        """
        from sae_lens_qk.pretrained.folder import METRICS, RUNNER_CONFIG, read_document

        torch.device(device)  # a wrong name is not the file's fault
        for name in ("cfg.json", "sae_weights.safetensors"):
            if not (Path(path) / name).is_file():
                raise FileNotFoundError(f"{path} is not a dictionary folder: {name} is missing.")
        try:
            dictionary = super().load_from_disk(path, device=device, dtype=dtype, **kwargs)
        except _NO_CONFIG as error:
            raise ValueError(
                f"{path}/cfg.json is not the config of a dictionary ({error!r:.200})."
            ) from error
        except SafetensorError as error:
            raise ValueError(
                f"{path}/sae_weights.safetensors is truncated or corrupted ({error})."
            ) from error
        dictionary.metrics, dictionary.runner_cfg = (
            read_document(path, name) for name in (METRICS, RUNNER_CONFIG)
        )
        return dictionary

    @override
    def fold_W_dec_norm(self) -> None:
        """Fold decoder norms into encoders, half by half; scores do not change."""
        self.query.fold_W_dec_norm()
        self.key.fold_W_dec_norm()

    @override
    def get_W_dec_norm(self) -> Float[Tensor, " d_sae"]:
        return torch.cat([self.query.get_W_dec_norm(), self.key.get_W_dec_norm()])


if ARCHITECTURE not in SAE_CLASS_REGISTRY:
    register_sae_class(ARCHITECTURE, BilinearQKDictionary, BilinearQKConfig)
