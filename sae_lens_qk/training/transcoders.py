"""Step 1: two transcoders trained on the attention pattern, as a SAELens TrainingSAE."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from sae_lens import register_sae_training_class
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainCoefficientConfig, TrainingSAE, TrainStepInput, TrainStepOutput
from sae_lens.saes.transcoder import Transcoder, TranscoderConfig
from torch import Tensor
from typing_extensions import override

from sae_lens_qk.attention import AttentionSpec
from sae_lens_qk.config import TRANSCODERS_ARCHITECTURE, BilinearQKConfig, TranscodersTrainingConfig
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.feature_map import pack_indices
from sae_lens_qk.weights import QKWeights
from sae_lens_qk.training.initialization import Side, from_data, from_scores
from sae_lens_qk.training.losses import dead_feature_loss, pattern_losses, relative_mse, sqrt_penalty
from sae_lens_qk.training.transcode import Transcoded, strengths, transcode

_SILENCE = 1e-3  # weight of the loss that keeps query features silent at position 0: any small one does under Adam
_STRIDE = 61  # of the sample that tells about where the cutoff of a batch lies; prime, so that it meets every feature


class NonFiniteLossError(FloatingPointError):
    """The loss is NaN or infinite; training stops before the weights are touched, the last checkpoint is good."""


class Encoded(NamedTuple):
    hidden_pre: Float[Tensor, "*batch d"]
    acts: Float[Tensor, "*batch d"]


class TranscodersTrainingSAE(TrainingSAE[TranscodersTrainingConfig]):
    """Query and key transcoder of one layer, trained together.

        loss = 3 KL(P || P[q_hat,k_hat]) + KL(P || P[q_hat,k]) + KL(P || P[q,k_hat])
               + sparsity (relu) + auxiliary loss for dead features + MSE (off by default)

    Batches are whole sequences `[n_rows * context_size, d_model]` in order. The true q and k come from the model's
    weights, given once with `attach`. Features compete by activation times decoder norm (batchtopk, topk). Query features
    take no part in that at position 0, whose pattern is trivial, and learn to be silent there.
    """

    cfg: TranscodersTrainingConfig
    query: Transcoder
    key: Transcoder
    query_threshold: Tensor
    key_threshold: Tensor

    def __init__(self, cfg: TranscodersTrainingConfig, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self._context_size: int | None = None

    @override
    def initialize_weights(self) -> None:
        d_queries, d_keys = (
            (self.spec.d_queries, self.spec.d_keys) if self.cfg.attention else (1, 1)
        )
        self.query, self.key = (
            Transcoder(
                TranscoderConfig(
                    d_in=self.cfg.d_in,
                    d_sae=d_features,
                    d_out=d_out,
                    dtype=self.cfg.dtype,
                    device=self.cfg.device,
                    apply_b_dec_to_input=False,
                )
            )
            for d_features, d_out in ((self.cfg.d_query, d_queries), (self.cfg.d_key, d_keys))
        )
        for half in (self.query, self.key):
            half.b_dec.requires_grad_(self.cfg.decoder_bias)
        for name in ("query_threshold", "key_threshold"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64, device=self.device))

    @property
    def spec(self) -> AttentionSpec:
        return self.cfg.spec

    def attach(
        self, weights: QKWeights, context_size: int, first_batch: Tensor | None = None
    ) -> None:
        """Give the layer's W_Q and W_K, without which there is no pattern to train on.

        Args:
            weights: from `sae_lens_qk.host.qk_weights`; not saved with the checkpoints.
            context_size: length of the sequences that batches are made of.
            first_batch: [tokens, d_model] layer inputs; with them the weights are initialised (config
                `initialization`), without them they stay as they are (a resumed run).
        """
        expected = (self.cfg.d_in, self.query.cfg.d_out, self.key.cfg.d_out)
        found = (weights.W_Q.shape[1], weights.W_Q[:, 0].numel(), weights.W_K[:, 0].numel())
        if expected != found:
            raise ValueError(
                f"This training SAE expects (d_in, d_queries, d_keys) = {expected}, the model has {found}."
            )
        self._weights = [weights.to(self.device)]  # in a list: neither saved nor optimised
        self._context_size = context_size
        if first_batch is not None:
            self._initialize_from(first_batch.to(self.device))

    @torch.no_grad()
    def _initialize_from(self, x: Float[Tensor, "tokens d_model"]) -> None:
        """Decoder biases at the mean; encoders and decoders from data points (see `initialization`) or left as they are.

        The points overlap, so together they overshoot: one factor a side scales the decoder to the least-squares fit.
        """
        mean, weights, seed = x.mean(dim=0), self._weights[0], int(self.cfg.d_sae)
        sides: tuple[tuple[Side, Transcoder, Any], ...] = (
            ("query", self.query, weights.queries),
            ("key", self.key, weights.keys),
        )
        for side, half, true in sides:
            half.b_dec.copy_(true(mean[None]).flatten())
            if self.cfg.initialization == "kaiming":
                continue
            if self.cfg.initialization == "data":
                start = from_data(x, half.cfg.d_sae, side, weights, seed)
            else:
                assert self._context_size is not None
                start = from_scores(
                    x, half.cfg.d_sae, side, weights, self.spec, self._context_size, seed
                )
            half.W_enc.copy_(start.encoders.T)
            half.b_enc.copy_(-start.encoders @ mean)
            half.W_dec.copy_(start.decoders)
        if self.cfg.initialization != "kaiming":
            self._scale_decoders(x)
        self._move_bias_to_feature(self.query)
        self._move_bias_to_feature(self.key)

    def _move_bias_to_feature(self, half: Transcoder) -> None:
        if not self.cfg.decoder_bias:
            half.W_enc[:, 0], half.b_enc[0], half.W_dec[0] = 0.0, 1.0, half.b_dec
            half.b_dec.zero_()

    def _scale_decoders(self, x: Float[Tensor, "tokens d_model"]) -> None:
        some = x[: 8 * (self._context_size or 1)]
        halves = (self.query, self._weights[0].queries), (self.key, self._weights[0].keys)
        for (half, true), encoded in zip(halves, self.encode_halves(some), strict=True):
            centred, target = encoded.acts @ half.W_dec, true(some).flatten(1) - half.b_dec
            half.W_dec.mul_((centred * target).sum() / centred.pow(2).sum())
        self.query_threshold.zero_()
        self.key_threshold.zero_()

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        if self.cfg.activation != "relu":
            return {}
        return {
            "sparsity": TrainCoefficientConfig(
                self.cfg.sparsity_coefficient, self.cfg.sparsity_warm_up_steps
            )
        }

    def _encode_half(self, half: Transcoder, threshold: Tensor, x: Tensor) -> Encoded:
        hidden_pre = half.process_sae_in(x) @ half.W_enc + half.b_enc
        return Encoded(
            hidden_pre,
            hidden_pre.relu() * self._kept(hidden_pre * half.W_dec.norm(dim=1), threshold),
        )

    @torch.no_grad()
    def _kept(
        self, strength: Float[Tensor, "*batch d"], threshold: Tensor
    ) -> Bool[Tensor, "*batch d"]:
        """Which positive entries fire; during training `threshold` follows the weakest of them."""
        if self.cfg.activation == "relu":
            return strength > 0
        if not self.training:
            return strength > threshold
        if self.cfg.activation == "topk":
            strongest = strength.topk(int(self.cfg.k))
            return torch.zeros_like(strength, dtype=torch.bool).scatter(
                1, strongest.indices, strongest.values > 0
            )
        cutoff = batch_cutoff(strength, self.cfg.k).clamp(min=0)
        threshold.lerp_(cutoff.to(threshold.dtype), self.cfg.threshold_lr if threshold > 0 else 1.0)
        return (strength >= cutoff) & (strength > 0)

    def encode_halves(self, x: Float[Tensor, "*batch d_model"]) -> tuple[Encoded, Encoded]:
        return (
            self._encode_half(self.query, self.query_threshold, x),
            self._encode_half(self.key, self.key_threshold, x),
        )

    def _transcode(
        self, half: Transcoder, threshold: Tensor, x: Float[Tensor, "tokens d_model"]
    ) -> Transcoded:
        strength = strengths(half, x, torch.bfloat16 if self.cfg.bfloat16_selection else None)
        if half is self.query and self.cfg.activation != "relu":
            strength[:: self._context_size] = -torch.inf
        return transcode(half, x, strength, self._kept(strength, threshold))

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query, key = self.encode_halves(x)
        return torch.cat([query.acts, key.acts], dim=-1), torch.cat(
            [query.hidden_pre, key.hidden_pre], dim=-1
        )

    @override
    def decode(self, feature_acts: Tensor) -> Tensor:
        query_acts, key_acts = feature_acts.split([self.cfg.d_query, self.cfg.d_key], dim=-1)
        return torch.cat([self.query.decode(query_acts), self.key.decode(key_acts)], dim=-1)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        weights, rows = self._attached(step_input.sae_in)
        x, spec = step_input.sae_in, self.spec
        query, key = (
            self._transcode(self.query, self.query_threshold, x),
            self._transcode(self.key, self.key_threshold, x),
        )
        with torch.no_grad():
            q, k = weights.queries(x).flatten(1), weights.keys(x).flatten(1)
        losses = pattern_losses(
            queries=spec.split_queries(q).unflatten(0, rows),
            keys=spec.split_keys(k).unflatten(0, rows),
            q_hat=spec.split_queries(query.output).unflatten(0, rows),
            k_hat=spec.split_keys(key.output).unflatten(0, rows),
            spec=spec,
        )
        losses = {
            name: getattr(self.cfg, f"{name}_coefficient") * value for name, value in losses.items()
        }
        losses |= self._auxiliary_losses(step_input, (query, key), (q, k))
        loss = torch.stack(list(losses.values())).sum()
        if not loss.isfinite():
            raise NonFiniteLossError(
                f"The loss is {loss.item()} at step {step_input.n_training_steps} ("
                + ", ".join(f"{name} {value.item():.3g}" for name, value in losses.items())
                + "): training stopped before the update. Check the inputs, or resume with a lower lr."
            )
        acts = _joined(query.acts, key.acts).detach()
        return TrainStepOutput(
            sae_in=torch.cat([q, k], dim=1),
            sae_out=torch.cat([query.output, key.output], dim=1),
            feature_acts=acts,
            hidden_pre=acts,
            loss=loss,
            losses=losses,
            metrics={"l0_query": _l0(query.acts), "l0_key": _l0(key.acts)},
        )

    def _auxiliary_losses(
        self,
        step_input: TrainStepInput,
        sides: tuple[Transcoded, Transcoded],
        true: tuple[Tensor, Tensor],
    ) -> dict[str, Tensor]:
        cfg, losses, halves = self.cfg, {}, (self.query, self.key)
        if cfg.mse_coefficient:
            losses["mse"] = cfg.mse_coefficient * sum(
                relative_mse(t, s.output) for t, s in zip(true, sides, strict=True)
            )
        if cfg.activation == "relu":
            penalties = [
                sqrt_penalty(s.acts, half.W_dec) for s, half in zip(sides, halves, strict=True)
            ]
            losses["sparsity"] = step_input.coefficients["sparsity"] * sum(penalties)
            return losses
        losses["first_position"] = _SILENCE * self._first_position(step_input.sae_in)
        dead = step_input.dead_neuron_mask
        if cfg.dead_coefficient and dead is not None and dead.any():
            dead_masks = dead.split([cfg.d_query, cfg.d_key])
            losses["dead"] = (
                cfg.dead_coefficient
                * torch.stack(
                    [
                        dead_feature_loss(
                            target - side.output,
                            step_input.sae_in,
                            side.strength,
                            half,
                            dead,
                            cfg.dead_k,
                        )
                        for target, side, half, dead in zip(
                            true, sides, halves, dead_masks, strict=True
                        )
                    ]
                ).sum()
            )
        return losses

    def _first_position(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, ""]:
        """How strongly query features would fire at position 0: mean over rows of the sum over features."""
        first = self.query.process_sae_in(x[:: self._context_size])
        strength = (first @ self.query.W_enc + self.query.b_enc) * self.query.W_dec.detach().norm(
            dim=1
        )
        return strength.relu().sum(dim=1).mean()

    def _attached(self, x: Tensor) -> tuple[QKWeights, tuple[int, int]]:
        if self._context_size is None:
            raise RuntimeError(
                "This training SAE does not know its model: call sae.attach(qk.host.qk_weights(model, layer), "
                "context_size, first_batch) before training."
            )
        if x.shape[0] % self._context_size:
            raise ValueError(
                f"A batch must be whole sequences of {self._context_size} tokens, got {x.shape[0]} tokens."
            )
        return self._weights[0], (-1, self._context_size)

    @override
    def calculate_aux_loss(self, *args: Any, **kwargs: Any) -> Tensor | dict[str, Tensor]:
        raise NotImplementedError(
            "Losses of the two sides are computed together, in training_forward_pass."
        )

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Float[Tensor, "tokens d_model"]]) -> dict[str, float]:
        """Set both thresholds so that the mean L0 over the batches is k: what the published JumpReLU form uses.

        Returns:
            l0_query, l0_key and pattern_kl (nats, all positions) over the batches, each also with `_before`: as training
            ran (topk), or with the threshold that training left (batchtopk).
        Raises:
            ValueError: relu transcoders have no threshold.
        """
        if self.cfg.activation == "relu":
            raise ValueError("relu transcoders have no threshold to calibrate.")
        was_training, batches = self.training, [x.to(self.device) for x in batches]
        self.train(self.cfg.activation == "topk")
        before = self._measure(batches)
        for half, threshold in ((self.query, self.query_threshold), (self.key, self.key_threshold)):
            threshold.copy_(strength_threshold(half, batches, self.cfg.k))
        self.eval()
        after = self._measure(batches)
        self.train(was_training)
        return {**{f"{name}_before": value for name, value in before.items()}, **after}

    def _measure(self, batches: list[Tensor]) -> dict[str, float]:
        """Mean L0 of both sides and pattern KL, in the current mode."""
        weights, rows = self._attached(batches[0])
        totals = torch.zeros(3)
        for x in batches:
            (query, key), spec = self.encode_halves(x), self.spec
            q_hat = spec.split_queries(self.query.decode(query.acts)).unflatten(0, rows)
            k_hat = spec.split_keys(self.key.decode(key.acts)).unflatten(0, rows)
            queries, keys = (
                weights.queries(x).unflatten(0, rows),
                weights.keys(x).unflatten(0, rows),
            )
            kl = pattern_losses(queries, keys, q_hat, k_hat, spec)["kl_full"]
            totals += torch.tensor([_l0(query.acts), _l0(key.acts), float(kl)])
        return dict(
            zip(("l0_query", "l0_key", "pattern_kl"), (totals / len(batches)).tolist(), strict=True)
        )

    @torch.no_grad()
    def to_dictionary(self) -> BilinearQKDictionary:
        """The published form, without a feature map: batchtopk and topk become an exact JumpReLU."""
        state_dict = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        self.process_state_dict_for_saving_inference(state_dict)
        dictionary = BilinearQKDictionary(
            BilinearQKConfig.from_dict(self.cfg.get_inference_sae_cfg_dict())
        )
        dictionary.process_state_dict_for_loading(state_dict)
        dictionary.load_state_dict(state_dict)
        return dictionary

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """The dictionary's names; batchtopk and topk become a JumpReLU with threshold / ||decoder row||."""
        for side, half in (("query", self.query), ("key", self.key)):
            threshold = state_dict.pop(f"{side}_threshold")
            if self.cfg.half_architecture == "jumprelu_transcoder":
                norms = half.get_W_dec_norm()
                state_dict[f"{side}.threshold"] = (threshold / norms).to(norms.dtype)
        state_dict["feature_map.digits"] = pack_indices(torch.zeros(0, 3, dtype=torch.int64))
        state_dict["feature_map.weights"] = torch.zeros(0, dtype=self.dtype)

    @override
    def log_histograms(self) -> dict[str, NDArray[Any]]:
        return {
            f"weights/W_dec_norms_{side}": np.asarray(half.get_W_dec_norm().cpu())
            for side, half in (("query", self.query), ("key", self.key))
        }

    @override
    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> "TranscodersTrainingSAE":
        super()._apply(fn, recurse)
        for half in (self.query, self.key):
            half.dtype, half.device = half.W_dec.dtype, half.W_dec.device
        return self


def batch_cutoff(strength: Float[Tensor, "tokens d"], k: float) -> Float[Tensor, ""]:
    """The smallest of the k * tokens strongest entries of the whole batch.

    Selecting it among millions is slow, so a sample says first above which value about twice as many lie.
    """
    n, strength = max(1, int(k * strength.shape[0])), strength.flatten()
    sample = strength[::_STRIDE]
    floor = sample.topk(min(len(sample), max(1, 2 * n * len(sample) // len(strength)))).values[-1]
    above = strength[strength >= floor]
    return (above if len(above) >= n else strength).topk(n, sorted=False).values.min()


@torch.no_grad()
def strength_threshold(
    half: Transcoder, batches: Sequence[Float[Tensor, "tokens d_model"]], k: float
) -> Float[Tensor, ""]:
    """The activation times decoder norm that k features a token exceed, on average over the batches."""
    strongest, keep = half.W_dec.new_empty(0), int(k * sum(len(x) for x in batches))
    for x in batches:
        strength = (half.process_sae_in(x) @ half.W_enc + half.b_enc).relu() * half.W_dec.norm(
            dim=1
        )
        strongest = torch.cat([strongest, strength[strength > 0]])
        strongest = strongest.topk(min(keep + 1, len(strongest))).values
    return strongest[-1] if len(strongest) > keep else torch.zeros(())


def _joined(query_acts: Tensor, key_acts: Tensor) -> Float[Tensor, "tokens both"]:
    """Sparse where both sides are."""
    if query_acts.is_sparse != key_acts.is_sparse:
        query_acts, key_acts = query_acts.to_dense(), key_acts.to_dense()
    return torch.cat([query_acts, key_acts], dim=1)


def _l0(acts: Tensor) -> float:
    n_active = len(acts.values()) if acts.is_sparse else acts.count_nonzero().item()
    return n_active / acts.shape[0]


if TRANSCODERS_ARCHITECTURE not in SAE_TRAINING_CLASS_REGISTRY:
    register_sae_training_class(
        TRANSCODERS_ARCHITECTURE, TranscodersTrainingSAE, TranscodersTrainingConfig
    )
