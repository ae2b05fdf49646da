"""Step 1: two transcoders trained on the attention pattern, as a SAELens TrainingSAE."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from sae_lens import register_sae_training_class
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from sae_lens.saes.transcoder import Transcoder, TranscoderConfig
from torch import Tensor
from typing_extensions import override

from sae_lens_qk.attention import SIDES, AttentionSpec, Side
from sae_lens_qk.config import TRANSCODERS_ARCHITECTURE, BilinearQKConfig, TranscodersTrainingConfig
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.stored_form import pack_indices
from sae_lens_qk.training.initialization import data_start, scores_start
from sae_lens_qk.training.losses import (
    dead_feature_loss,
    pattern_losses,
    relative_mse,
    sqrt_penalty,
    total_loss,
)
from sae_lens_qk.training.selection import Selection, calibrated_threshold, strengths
from sae_lens_qk.training.sequences import SequenceTrainingSAE
from sae_lens_qk.training.transcode import transcode
from sae_lens_qk.weights import QKWeights

# Weight of the loss that keeps query features silent at position 0: any small one does under Adam
_SILENCE = 1e-3


class Encoded(NamedTuple):
    hidden_pre: Float[Tensor, "*batch d"]
    acts: Float[Tensor, "*batch d"]


class Reconstruction(NamedTuple):
    """One side of a training step."""

    half: Transcoder
    target: Float[Tensor, "tokens d_out"]
    """True queries or keys."""
    strength: Float[Tensor, "tokens d"]
    acts: Float[Tensor, "tokens d"]
    output: Float[Tensor, "tokens d_out"]


class TranscodersTrainingSAE(SequenceTrainingSAE[TranscodersTrainingConfig]):
    """Query and key transcoder of one layer, trained together.

        loss = 3 KL(P || P[q_hat,k_hat]) + KL(P || P[q_hat,k]) + KL(P || P[q,k_hat])
               + sparsity (relu) + auxiliary loss for dead features + MSE (off by default)

    Batches are whole sequences `[n_rows * context_size, d_model]` in order. The true q and k come
    from the model's weights, given once with `attach`. Which features fire is said in
    `training.selection`. Query features take no part in that at position 0, whose pattern is
    trivial, and learn to be silent there.
    """

    cfg: TranscodersTrainingConfig
    query: Transcoder
    key: Transcoder
    query_threshold: Tensor
    key_threshold: Tensor

    @override
    def initialize_weights(self) -> None:
        # SAELens's command line builds the SAE before it knows the model
        spec = self.spec if self.cfg.attention else None
        d_queries = spec.d_queries if spec else 1
        d_keys = spec.d_keys if spec else 1
        self.query = self._new_half(self.cfg.d_query, d_queries)
        self.key = self._new_half(self.cfg.d_key, d_keys)
        for side in SIDES:
            # float64: a moving average of small steps, which float32 would round away
            threshold = torch.zeros((), dtype=torch.float64, device=self.device)
            self.register_buffer(f"{side}_threshold", threshold)

    def _new_half(
        self,
        d_features: int,
        d_out: int,
    ) -> Transcoder:
        config = TranscoderConfig(
            d_in=self.cfg.d_in,
            d_sae=d_features,
            d_out=d_out,
            dtype=self.cfg.dtype,
            device=self.cfg.device,
            apply_b_dec_to_input=False,
        )
        half = Transcoder(config)
        half.b_dec.requires_grad_(self.cfg.decoder_bias)
        return half

    @property
    def spec(self) -> AttentionSpec:
        return self.cfg.spec

    def _half(self, side: Side) -> Transcoder:
        return self.query if side == "query" else self.key

    def _threshold(self, side: Side) -> Tensor:
        return self.query_threshold if side == "query" else self.key_threshold

    def _selection(self, side: Side) -> Selection:
        """Which features of a side fire on the whole sequences of a training step."""
        is_silent_at_0 = side == "query" and self.cfg.activation != "relu"
        context_size = self._context_size if is_silent_at_0 else None
        return Selection(self.cfg.activation, self.cfg.k, context_size)

    # Start

    def attach(
        self, weights: QKWeights, context_size: int, first_batch: Tensor | None = None
    ) -> None:
        """Give the layer's W_Q and W_K, without which there is no pattern to train on.

        Args:
            weights: `AttentionLayer.qk_weights`; not saved with the checkpoints.
            context_size: length of the sequences that batches are made of.
            first_batch: [tokens, d_model] layer inputs; with them the weights are initialised
                (config `initialization`), without them they stay as they are (a resumed run).
        """
        d_queries = self.query.cfg.d_out
        d_keys = self.key.cfg.d_out
        expected = (self.cfg.d_in, d_queries, d_keys)
        d_model = weights.W_Q.shape[1]
        # [head, d_head] flattened, as the halves put them out
        actual = (d_model, weights.b_Q.numel(), weights.b_K.numel())
        if expected != actual:
            raise ValueError(
                f"This training SAE expects (d_in, d_queries, d_keys) = {expected}, "
                f"the model has {actual}."
            )
        self._attach_layer(weights, context_size)
        if first_batch is not None:
            self._initialize_from(first_batch.to(self.device))

    @torch.no_grad()
    def _initialize_from(self, x: Float[Tensor, "tokens d_model"]) -> None:
        """Decoder biases at the mean; encoders and decoders from data points, or left alone."""
        mean = x.mean(dim=0)
        for side in SIDES:
            half = self._half(side)
            mean_target = self._target(side, mean[None])[0]  # [d_out]
            half.b_dec.copy_(mean_target)
            if self.cfg.initialization != "kaiming":
                self._start_from_data_points(side, x)
                self._scale_decoder(side, x[: 8 * self._context_size])
            if not self.cfg.decoder_bias:
                _move_bias_to_feature(half)

    def _start_from_data_points(
        self,
        side: Side,
        x: Float[Tensor, "tokens d_model"],
    ) -> None:
        """See `initialization`."""
        half = self._half(side)
        d_features = half.cfg.d_sae
        seed = int(self.cfg.d_sae)
        if self.cfg.initialization == "data":
            start = data_start(x, d_features, side, self.weights, seed)
        else:
            start = scores_start(
                x, d_features, side, self.weights, self.spec, self._context_size, seed
            )
        # The encoder bias centres the input: features start as readings of x - mean.
        half.W_enc.copy_(start.encoders.T)
        half.b_enc.copy_(-start.encoders @ x.mean(dim=0))
        half.W_dec.copy_(start.decoders)

    def _scale_decoder(
        self,
        side: Side,
        x: Float[Tensor, "tokens d_model"],
    ) -> None:
        """The data points overlap, so together they overshoot: one factor for the best fit."""
        half = self._half(side)
        output = self._encode_half(side, x).acts @ half.W_dec
        target = self._target(side, x) - half.b_dec
        # least squares: <output, target> / <output, output>
        overlap = (output * target).sum()
        best_factor = overlap / output.pow(2).sum()
        half.W_dec.mul_(best_factor)

    def _target(
        self, side: Side, x: Float[Tensor, "tokens d_model"]
    ) -> Float[Tensor, "tokens d_out"]:
        """True queries or keys, flattened."""
        project = self.weights.queries if side == "query" else self.weights.keys
        return project(x).flatten(1)

    # Features of any tokens

    def _encode_half(
        self,
        side: Side,
        x: Float[Tensor, "*batch d_model"],
    ) -> Encoded:
        """In training by rank in the batch, position 0 included; else by the threshold."""
        half = self._half(side)
        hidden_pre = half.process_sae_in(x) @ half.W_enc + half.b_enc  # [*batch, d]
        if self.cfg.activation == "relu":
            return Encoded(hidden_pre, hidden_pre.relu())
        if self.training:
            strength = strengths(half, x.flatten(0, -2))
            selection = Selection(self.cfg.activation, self.cfg.k)
            fires = selection.fires(strength).fires.view_as(hidden_pre)
        else:
            fires = hidden_pre > self._jumprelu_threshold(side)
        return Encoded(hidden_pre, hidden_pre.relu() * fires)

    def _jumprelu_threshold(self, side: Side) -> Float[Tensor, " d"]:
        """The threshold on strengths, as one on pre-activations: what is published."""
        norms = self._half(side).get_W_dec_norm()
        return (self._threshold(side) / norms).to(norms.dtype)

    def encode_halves(self, x: Float[Tensor, "*batch d_model"]) -> tuple[Encoded, Encoded]:
        return self._encode_half("query", x), self._encode_half("key", x)

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query, key = self.encode_halves(x)
        acts = torch.cat([query.acts, key.acts], dim=-1)  # [*batch, d_query + d_key]
        hidden_pre = torch.cat([query.hidden_pre, key.hidden_pre], dim=-1)
        return acts, hidden_pre

    @override
    def decode(self, feature_acts: Tensor) -> Tensor:
        sizes = [self.cfg.d_query, self.cfg.d_key]
        query_acts, key_acts = feature_acts.split(sizes, dim=-1)
        queries = self.query.decode(query_acts)  # [*batch, d_queries]
        keys = self.key.decode(key_acts)  # [*batch, d_keys]
        return torch.cat([queries, keys], dim=-1)

    # Training

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        if self.cfg.activation != "relu":
            return {}
        sparsity = TrainCoefficientConfig(
            self.cfg.sparsity_coefficient, self.cfg.sparsity_warm_up_steps
        )
        return {"sparsity": sparsity}

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        x = step_input.sae_in
        query = self._reconstruct("query", x)
        key = self._reconstruct("key", x)
        kl = pattern_losses(
            queries=self.sequences(self.spec.split_queries(query.target)),
            keys=self.sequences(self.spec.split_keys(key.target)),
            q_hat=self.sequences(self.spec.split_queries(query.output)),
            k_hat=self.sequences(self.spec.split_keys(key.output)),
            spec=self.spec,
        )
        losses = {
            "kl_full": self.cfg.kl_full_coefficient * kl["kl_full"],
            "kl_query": self.cfg.kl_query_coefficient * kl["kl_query"],
            "kl_key": self.cfg.kl_key_coefficient * kl["kl_key"],
            **self._auxiliary_losses(step_input, query, key),
        }
        acts = _concatenate(query.acts, key.acts).detach()
        # Both sides next to each other, as the host's metrics want one SAE: [tokens, d_out].
        targets = torch.cat([query.target, key.target], dim=1)
        outputs = torch.cat([query.output, key.output], dim=1)
        l0: dict[str, Any] = {"l0_query": _l0(query.acts), "l0_key": _l0(key.acts)}
        return TrainStepOutput(
            sae_in=targets,
            sae_out=outputs,
            feature_acts=acts,
            hidden_pre=acts,
            loss=total_loss(losses, step_input.n_training_steps, "loss"),
            losses=losses,
            metrics=l0,
        )

    def _reconstruct(
        self,
        side: Side,
        x: Float[Tensor, "tokens d_model"],
    ) -> Reconstruction:
        """One side of a step; the batchtopk threshold follows the weakest feature that fires."""
        with torch.no_grad():
            target = self._target(side, x)
        half = self._half(side)
        selection = self._selection(side)
        # Strengths decide and no more: the activations are computed again in full precision.
        dtype = torch.bfloat16 if self.cfg.bfloat16_selection else None
        strength = selection.strengths(half, x, dtype)
        fires, cutoff = selection.fires(strength)
        if self.cfg.activation == "batchtopk":
            self._move_threshold(side, cutoff)
        acts, output = transcode(half, x, fires)
        return Reconstruction(half, target, strength, acts, output)

    @torch.no_grad()
    def _move_threshold(
        self,
        side: Side,
        cutoff: Float[Tensor, ""],
    ) -> None:
        """Moving average of the cutoff, from the first one on."""
        threshold = self._threshold(side)
        speed = self.cfg.threshold_lr if threshold > 0 else 1.0
        threshold.lerp_(cutoff.to(threshold.dtype), speed)

    def _auxiliary_losses(
        self, step_input: TrainStepInput, query: Reconstruction, key: Reconstruction
    ) -> dict[str, Float[Tensor, ""]]:
        cfg = self.cfg
        x = step_input.sae_in
        losses: dict[str, Tensor] = {}
        if cfg.mse_coefficient:
            query_mse = relative_mse(query.target, query.output)
            key_mse = relative_mse(key.target, key.output)
            losses["mse"] = cfg.mse_coefficient * (query_mse + key_mse)
        if cfg.activation == "relu":
            penalty = sqrt_penalty(query.acts, self.query.W_dec)
            penalty = penalty + sqrt_penalty(key.acts, self.key.W_dec)
            losses["sparsity"] = step_input.coefficients["sparsity"] * penalty
            # no ranks: nothing to be silent about at position 0, and the penalty decides who dies
            return losses
        losses["first_position"] = _SILENCE * self._first_position(x)
        dead = step_input.dead_neuron_mask
        if cfg.dead_coefficient and dead is not None and dead.any():
            dead_query, dead_key = dead.split([cfg.d_query, cfg.d_key])
            query_loss = self._dead_feature_loss(query, x, dead_query)
            key_loss = self._dead_feature_loss(key, x, dead_key)
            losses["dead"] = cfg.dead_coefficient * (query_loss + key_loss)
        return losses

    def _first_position(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, ""]:
        """How strongly query features would fire at position 0: mean over rows of the sum."""
        first = x[:: self._context_size]  # [batch, d_model]
        strength = strengths(self.query, first)  # [batch, d_query]
        return strength.relu().sum(dim=1).mean()

    def _dead_feature_loss(
        self, side: Reconstruction, x: Float[Tensor, "tokens d_model"], dead: Bool[Tensor, " d"]
    ) -> Float[Tensor, ""]:
        residual = side.target - side.output  # [tokens, d_out]
        k = self.cfg.dead_k
        return dead_feature_loss(residual, x, side.strength, side.half, dead, k)

    # Calibration and export

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Float[Tensor, "tokens d_model"]]) -> dict[str, float]:
        """Set both thresholds so that the mean L0 over the batches is k, as published.

        Returns:
            l0_query, l0_key and pattern_kl (nats, all positions) over the batches, each also with
            `_before`: as training ran (topk), or with the threshold that training left (batchtopk).
        Raises:
            ValueError: relu transcoders have no threshold.
        """
        if self.cfg.activation == "relu":
            raise ValueError("relu transcoders have no threshold to calibrate.")
        was_training = self.training
        batches = [x.to(self.device) for x in batches]
        # topk keeps no threshold in training: its state before is the rule by rank
        self.train(self.cfg.activation == "topk")
        before = self._measure(batches)
        for side in SIDES:
            threshold = calibrated_threshold(self._half(side), batches, self.cfg.k)
            self._threshold(side).copy_(threshold)
        self.eval()
        after = self._measure(batches)
        self.train(was_training)
        metrics = {f"{name}_before": value for name, value in before.items()}
        return metrics | after

    def _measure(self, batches: list[Float[Tensor, "tokens d_model"]]) -> dict[str, float]:
        """Mean L0 of both sides and pattern KL, in the current mode."""
        totals = torch.zeros(3)
        for tokens in batches:
            x = self.sequences(tokens)
            query, key = self.encode_halves(tokens)
            q_hat = self.query.decode(query.acts)  # [tokens, d_queries]
            k_hat = self.key.decode(key.acts)  # [tokens, d_keys]
            losses = pattern_losses(
                queries=self.weights.queries(x),
                keys=self.weights.keys(x),
                q_hat=self.sequences(self.spec.split_queries(q_hat)),
                k_hat=self.sequences(self.spec.split_keys(k_hat)),
                spec=self.spec,
            )
            l0_query = _l0(query.acts)
            l0_key = _l0(key.acts)
            totals += torch.tensor([l0_query, l0_key, float(losses["kl_full"])])
        names = ("l0_query", "l0_key", "pattern_kl")
        means = (totals / len(batches)).tolist()
        return dict(zip(names, means, strict=True))

    @torch.no_grad()
    def to_dictionary(self) -> BilinearQKDictionary:
        """The published form, without a feature map.

        batchtopk and topk become an exact JumpReLU.
        """
        # cloned: the dictionary must not change when training goes on
        tensors = self.state_dict()
        state_dict = {name: tensor.clone() for name, tensor in tensors.items()}
        self.process_state_dict_for_saving_inference(state_dict)
        config = BilinearQKConfig.from_dict(self.cfg.get_inference_sae_cfg_dict())
        dictionary = BilinearQKDictionary(config)
        dictionary.process_state_dict_for_loading(state_dict)
        dictionary.load_state_dict(state_dict)
        return dictionary

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """The dictionary's names; batchtopk and topk become a JumpReLU."""
        for side in SIDES:
            del state_dict[f"{side}_threshold"]
            if self.cfg.half_architecture == "jumprelu_transcoder":
                state_dict[f"{side}.threshold"] = self._jumprelu_threshold(side)
        # an empty feature map, which step 2 fills
        no_pairs = torch.zeros(0, 3, dtype=torch.int64)
        state_dict["feature_map.digits"] = pack_indices(no_pairs)
        state_dict["feature_map.weights"] = torch.zeros(0, dtype=self.dtype)

    @override
    def log_histograms(self) -> dict[str, NDArray[Any]]:
        histograms = {}
        for side in SIDES:
            norms = self._half(side).get_W_dec_norm().cpu()
            histograms[f"weights/W_dec_norms_{side}"] = np.asarray(norms)
        return histograms

    @override
    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> "TranscodersTrainingSAE":
        super()._apply(fn, recurse)
        # SAELens encodes in the dtype and on the device that a half remembers
        for half in (self.query, self.key):
            half.dtype = half.W_dec.dtype
            half.device = half.W_dec.device
        return self


def _move_bias_to_feature(half: Transcoder) -> None:
    """Feature 0 is always on, with the decoder bias as its row."""
    # before the relu 0 x + 1, at every token
    half.W_enc[:, 0] = 0.0
    half.b_enc[0] = 1.0
    half.W_dec[0] = half.b_dec
    half.b_dec.zero_()


def _concatenate(
    query_acts: Float[Tensor, "tokens d_query"], key_acts: Float[Tensor, "tokens d_key"]
) -> Float[Tensor, "tokens both"]:
    """Sparse where both sides are."""
    if query_acts.is_sparse and key_acts.is_sparse:
        return torch.cat([query_acts, key_acts], dim=1)
    # one side may have had too many active entries to be sparse
    dense_query_acts = query_acts.to_dense()
    dense_key_acts = key_acts.to_dense()
    return torch.cat([dense_query_acts, dense_key_acts], dim=1)


def _l0(acts: Float[Tensor, "tokens d"]) -> float:
    if acts.is_sparse:
        n_active = len(acts.values())
    else:
        n_active = int(acts.count_nonzero())
    return n_active / acts.shape[0]


if TRANSCODERS_ARCHITECTURE not in SAE_TRAINING_CLASS_REGISTRY:
    register_sae_training_class(
        TRANSCODERS_ARCHITECTURE, TranscodersTrainingSAE, TranscodersTrainingConfig
    )
