"""Step 2: a mask over candidate pairs, as a SAELens TrainingSAE.

The transcoders stay frozen or are tuned along.
"""

from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from sae_lens import register_sae_training_class
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from sae_lens.saes.transcoder import Transcoder
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_qk.attention import SIDES
from sae_lens_qk.config import MASK_ARCHITECTURE, BilinearQKConfig, MaskTrainingConfig
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.feature_map import Features, SparseFeatureMap
from sae_lens_qk.scoring.pairs import constant_scores
from sae_lens_qk.scoring.scorer import PairScorer
from sae_lens_qk.training.losses import AttentionOutput, TruePattern, total_loss
from sae_lens_qk.training.selection import Selection, calibrated_threshold
from sae_lens_qk.training.sequences import SequenceTrainingSAE
from sae_lens_qk.training.transcode import Transcoded, transcode
from sae_lens_qk.weights import OVWeights, QKWeights


class MaskTrainingSAE(SequenceTrainingSAE[MaskTrainingConfig]):
    """A mask m in [0, 1] over candidate pairs.

        loss = KL(P || P[m]) + lambda_m * sum over pairs of sqrt(m + 1e-7)
               (+ unmasked_coefficient * KL(P || P[q_hat, k_hat]) where the transcoders are tuned,
                + output_coefficient * squared error of the attention output, next to each of both)

    m starts at 1 and is clamped before each step and on saving (SAETrainer has no hook after the
    optimizer step). During the first `prune_steps` steps the number of pairs falls geometrically to
    `mask.n_pairs`; those with the smallest m^2 * importance (`rank_pairs`) leave for good.

    SAETrainer has one learning rate, that of the transcoders when they are tuned; the parameter is
    m / mask_speed.
    """

    cfg: MaskTrainingConfig
    dictionary: BilinearQKDictionary
    alive: Tensor

    def __init__(
        self,
        cfg: MaskTrainingConfig,
        use_error_term: bool = False,
    ):
        super().__init__(cfg, use_error_term)
        self._ov_weights: OVWeights | None = None
        self._scorer: PairScorer | None = None

    @override
    def initialize_weights(self) -> None:
        fine_tune = self.cfg.mask.fine_tune
        names = {field.name for field in fields(BilinearQKConfig)} - {"d_sae"}
        shared = {name: getattr(self.cfg, name) for name in names}
        self.dictionary = BilinearQKDictionary(BilinearQKConfig(**shared))
        self.dictionary.requires_grad_(fine_tune)
        for half in (self.dictionary.query, self.dictionary.key):
            half.b_dec.requires_grad_(fine_tune and self.cfg.decoder_bias)
        ones = torch.ones(self.cfg.n_pairs, device=self.device)
        self.scaled_mask = nn.Parameter(ones / self.cfg.mask.mask_speed)
        self.register_buffer("alive", ones.bool())

    def attach(
        self,
        weights: QKWeights,
        context_size: int,
        dictionary: BilinearQKDictionary | None = None,
        candidates: SparseFeatureMap | None = None,
        ov: OVWeights | None = None,
    ) -> None:
        """Give the true W_Q and W_K, and for a new run the dictionary and its candidate pairs.

        Args:
            weights: `AttentionLayer.qk_weights`; not saved with the checkpoints.
            context_size: length of the sequences that batches are made of.
            dictionary: whose transcoders the mask is trained on; None: as loaded.
            candidates: pairs with their statistics.
            ov: `AttentionLayer.ov_weights`; what `output_coefficient` needs.
        Raises:
            ValueError: no `ov` where it is needed.
        """
        needs_output = self.cfg.mask.output_coefficient != 0
        if needs_output and ov is None:
            raise ValueError("output_coefficient needs W_V and W_O: pass ov=layer.ov_weights.")
        self._attach_layer(weights, context_size)
        self._ov_weights = ov.to(self.device) if ov and needs_output else None
        if dictionary is None:
            return
        assert candidates is not None and len(candidates) == self.cfg.n_pairs
        self.dictionary.query.load_state_dict(dictionary.query.state_dict())
        self.dictionary.key.load_state_dict(dictionary.key.state_dict())
        self.dictionary.set_feature_map(candidates)
        self.dictionary.to(self.device)

    @property
    def mask(self) -> Float[Tensor, " pair"]:
        """m in [0, 1], 0 where pruned."""
        # clamped here too: the optimizer may have left [0, 1] since the last step began
        mask = self.scaled_mask * self.cfg.mask.mask_speed
        return mask.clamp(0, 1) * self.alive

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {"mask_sparsity": self.cfg.mask.sparsity_coefficient}

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        acts = self.dictionary.encode(x)
        return acts, acts

    @override
    def decode(self, feature_acts: Tensor) -> Tensor:
        return self.dictionary.decode(feature_acts)

    # Training

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        step = step_input.n_training_steps
        settings = self.cfg.mask
        spec = self.dictionary.spec
        self._clamp_and_prune(step)
        with torch.no_grad():
            q = self.weights.queries(step_input.sae_in)  # [tokens, head, d_head]
            k = self.weights.keys(step_input.sae_in)  # [tokens, kv_head, d_head]
        x = self.sequences(step_input.sae_in)  # [batch, pos, d_model]
        queries = self.sequences(q)
        keys = self.sequences(k)
        true = TruePattern.of(queries, keys, spec)
        output = AttentionOutput.of(x, self._ov_weights) if self._ov_weights else None
        # Pairs that have left get no gradient; [alive pair].
        mask = self.scaled_mask[self.alive] * settings.mask_speed

        if settings.fine_tune:
            query = self._transcode(self.dictionary.query, step_input.sae_in)
            key = self._transcode(self.dictionary.key, step_input.sae_in)
            query_acts = self.sequences(query.acts.to_dense())
            key_acts = self.sequences(key.acts.to_dense())
            features = Features(query_acts, key_acts)
        else:
            query = key = None
            with torch.no_grad():
                features = self.dictionary.features(x)
        losses = self._divergence(true, self._scores(mask, features), output)
        if step < self.cfg.prune_steps or not settings.polish:
            # 1e-7 keeps the derivative of the root finite at m = 0
            penalty = (mask + 1e-7).sqrt().sum()
            losses["mask_sparsity"] = step_input.coefficients["mask_sparsity"] * penalty
        if query and key and settings.unmasked_coefficient:
            q_hat = self.sequences(spec.split_queries(query.output))
            k_hat = self.sequences(spec.split_keys(key.output))
            unmasked = self._divergence(true, spec.scores(q_hat, k_hat), output)
            for name, loss in unmasked.items():
                losses[f"{name}_unmasked"] = settings.unmasked_coefficient * loss

        acts = torch.cat(features, dim=-1)  # [batch, pos, d_query + d_key]
        acts = acts.flatten(0, 1).detach()
        # The host's metrics want inputs and outputs; a mask reconstructs patterns, not these.
        flat_queries = q.flatten(1)
        flat_keys = k.flatten(1)
        outputs = torch.cat([flat_queries, flat_keys], dim=1)
        return TrainStepOutput(
            sae_in=outputs,
            sae_out=outputs,
            feature_acts=acts,
            hidden_pre=acts,
            loss=total_loss(losses, step, "mask loss"),
            losses=losses,
            metrics={"n_pairs": int((mask > 0).sum())},
        )

    def _divergence(
        self,
        true: TruePattern,
        scores: Float[Tensor, "batch head pos_q pos_k"],
        output: AttentionOutput | None,
    ) -> dict[str, Float[Tensor, ""]]:
        kl, difference = true.compare(scores)
        losses = {"kl": kl.mean()}
        if output is not None:
            error = output.error(true.pattern, difference)
            losses["output"] = self.cfg.mask.output_coefficient * error
        return losses

    def _transcode(
        self,
        half: Transcoder,
        x: Float[Tensor, "tokens d_model"],
    ) -> Transcoded:
        """With the k strongest features per token: thresholds would let L0 drift."""
        if half is self.dictionary.query:
            selection = Selection("batchtopk", self.cfg.k_query, self._context_size)
        else:
            selection = Selection("batchtopk", self.cfg.k_key)
        strength = selection.strengths(half, x)  # [tokens, d]
        return transcode(half, x, selection.fires(strength).fires)

    def _scores(
        self, mask: Float[Tensor, " pair"], features: Features
    ) -> Float[Tensor, "batch head pos_q pos_k"]:
        spec = self.dictionary.spec
        decoders = self.dictionary.decoders
        if self._scorer is None or self.cfg.mask.fine_tune:  # decoders move when tuned
            indices = self.dictionary.feature_map.indices[self.alive]
            self._scorer = PairScorer(indices, decoders, spec)
        n_pos = features.query.shape[1]
        # what the two constants score together is never masked
        return self._scorer(mask, *features) + constant_scores(decoders, spec, n_pos)

    # Pruning

    @torch.no_grad()
    def _clamp_and_prune(self, step: int) -> None:
        self.scaled_mask.clamp_(0, 1 / self.cfg.mask.mask_speed)
        n_steps = self.cfg.prune_steps
        progress = min(1.0, step / n_steps) if n_steps else 1.0
        if step % self.cfg.prune_every and progress < 1.0:
            return
        n_start = len(self.alive)
        n_end = min(self.cfg.mask.n_pairs, n_start)
        # geometric: the same share of the pairs leaves at each pruning
        n_pairs = round(n_start * (n_end / n_start) ** progress)
        if int(self.alive.sum()) > n_pairs:
            strongest = self._masked_importance().topk(n_pairs).indices
            self.alive.fill_(False)
            self.alive[strongest] = True
            self._scorer = None  # it lists the pairs alive when it was built

    def _masked_importance(self) -> Float[Tensor, " pair"]:
        """m^2 importance: to leading order the rise of the loss if a pair left.

        -inf for pairs that have left.
        """
        importance = self.dictionary.feature_map.statistics[:, 0]
        masked_importance = self.mask.square() * importance  # [pair]
        return masked_importance.masked_fill(~self.alive, -torch.inf)

    # Calibration and export

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Float[Tensor, "tokens d_model"]]) -> None:
        """After tuning, set the published thresholds: mean L0 is then what training held."""
        batches = [x.to(self.device) for x in batches]
        for side in SIDES:
            half = self.dictionary.query if side == "query" else self.dictionary.key
            k = self.cfg.k_query if side == "query" else self.cfg.k_key
            # the published threshold is one on pre-activations, per feature
            norms = half.W_dec.norm(dim=1)  # [d]
            threshold = calibrated_threshold(half, batches, k)
            half.get_parameter("threshold").copy_(threshold / norms)

    @torch.no_grad()
    def to_dictionary(self) -> BilinearQKDictionary:
        """The dictionary with its trained map.

        Weights are clamped to [0, 1], zeros dropped; at most `mask.n_pairs` pairs.
        """
        n_pairs = min(self.cfg.mask.n_pairs, len(self.alive))
        rows = self._masked_importance().topk(n_pairs).indices
        rows = rows[self.mask[rows] > 0]
        trained = BilinearQKDictionary(replace(self.dictionary.cfg, n_pairs=0))
        trained.query.load_state_dict(self.dictionary.query.state_dict())
        trained.key.load_state_dict(self.dictionary.key.state_dict())
        # the weights of all candidates first: `rows` count among all, pruned ones included
        reweighted = self.dictionary.feature_map.reweighted(self.mask)
        trained.set_feature_map(reweighted.select(rows))
        return trained

    @override
    def load_weights_from_checkpoint(self, checkpoint_path: Path | str) -> None:
        super().load_weights_from_checkpoint(checkpoint_path)
        self._scorer = None  # built on other pairs and decoders

    @override
    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        return self.to_dictionary().save_model(path)

    @override
    def log_histograms(self) -> dict[str, NDArray[Any]]:
        mask = self.mask.detach().cpu()
        return {"weights/mask": np.asarray(mask)}


if MASK_ARCHITECTURE not in SAE_TRAINING_CLASS_REGISTRY:
    register_sae_training_class(MASK_ARCHITECTURE, MaskTrainingSAE, MaskTrainingConfig)
