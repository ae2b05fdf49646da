"""Step 2: a mask over candidate pairs, as a SAELens TrainingSAE; the transcoders stay frozen or are tuned along."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from sae_lens import register_sae_training_class
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainCoefficientConfig, TrainingSAE, TrainStepInput, TrainStepOutput
from sae_lens.saes.transcoder import Transcoder
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_qk.attention import attention_scores
from sae_lens_qk.config import MASK_ARCHITECTURE, BilinearQKConfig, MaskTrainingConfig
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.feature_map import SparseFeatureMap
from sae_lens_qk.weights import OVWeights, QKWeights
from sae_lens_qk.scoring.scorer import PairScorer
from sae_lens_qk.scoring.pairs import constant_scores
from sae_lens_qk.training.losses import Moved, TruePattern
from sae_lens_qk.training.transcode import Transcoded, strengths, transcode
from sae_lens_qk.training.transcoders import NonFiniteLossError, batch_cutoff, strength_threshold


class MaskTrainingSAE(TrainingSAE[MaskTrainingConfig]):
    """A mask m in [0, 1] over candidate pairs.

        loss = KL(P || P[m]) + lambda_m * sum over pairs of sqrt(m + 1e-7)
               (+ coefficient * KL(P || P[q_hat, k_hat]) where the transcoders are tuned along,
                + output_coefficient * squared error of what the heads write, beside each of both)

    m starts at 1 and is clamped before each step and on saving (SAETrainer has no hook after the optimizer step).
    During the first `prune_steps` steps the number of pairs falls geometrically to `max_pairs`; those with the smallest
    m^2 * importance (`rank_pairs`) leave for good.

    SAETrainer has one learning rate, that of the transcoders when they are tuned; the parameter is m / mask_speed.
    """

    cfg: MaskTrainingConfig
    dictionary: BilinearQKDictionary
    alive: Tensor

    def __init__(self, cfg: MaskTrainingConfig, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self._context_size: int | None = None
        self._scorer: PairScorer | None = None

    @override
    def initialize_weights(self) -> None:
        names = set(BilinearQKConfig.__dataclass_fields__) - {"d_sae", "metadata"}
        values = {name: getattr(self.cfg, name) for name in names}
        self.dictionary = BilinearQKDictionary(
            BilinearQKConfig(**values, metadata=self.cfg.metadata)
        )
        self.dictionary.requires_grad_(self.cfg.fine_tune)
        for half in (self.dictionary.query, self.dictionary.key):
            half.b_dec.requires_grad_(self.cfg.fine_tune and self.cfg.decoder_bias)
        n_pairs = self.cfg.n_pairs
        self.scaled_mask = nn.Parameter(
            torch.ones(n_pairs, device=self.device) / self.cfg.mask_speed
        )
        self.register_buffer("alive", torch.ones(n_pairs, dtype=torch.bool, device=self.device))

    def attach(
        self,
        weights: QKWeights,
        context_size: int,
        dictionary: BilinearQKDictionary | None = None,
        candidates: SparseFeatureMap | None = None,
        ov: OVWeights | None = None,
    ) -> None:
        """Give the true W_Q and W_K, and for a new run the dictionary and its candidate pairs with their statistics.

        Args:
            weights: from `sae_lens_qk.host.qk_weights`; not saved with the checkpoints.
            context_size: length of the sequences that batches are made of.
            ov: from `sae_lens_qk.host.ov_weights`; what `output_coefficient` needs.
        Raises:
            ValueError: no `ov` where it is needed.
        """
        if self.cfg.output_coefficient and ov is None:
            raise ValueError(
                "output_coefficient needs what the heads move: pass ov=qk.host.ov_weights(model, layer)."
            )
        self._weights, self._context_size = [weights.to(self.device)], context_size
        self._ov = [ov.to(self.device)] if ov and self.cfg.output_coefficient else []
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
        return (self.scaled_mask * self.cfg.mask_speed).clamp(0, 1) * self.alive

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {"mask_sparsity": self.cfg.sparsity_coefficient}

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        acts = self.dictionary.encode(x)
        return acts, acts

    @override
    def decode(self, feature_acts: Tensor) -> Tensor:
        return self.dictionary.decode(feature_acts)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        if self._context_size is None:
            raise RuntimeError(
                "This training SAE does not know its model: call sae.attach(...) before training."
            )
        step, d = step_input.n_training_steps, self.dictionary
        x = step_input.sae_in.unflatten(0, (-1, self._context_size))
        with torch.no_grad():
            self.scaled_mask.clamp_(0, 1 / self.cfg.mask_speed)
            self._prune(step)
            q, k = self._weights[0].queries(x), self._weights[0].keys(x)
            true = TruePattern.of(q, k, d.spec)
        moved = Moved.of(x, self._ov[0]) if self._ov else None
        tuned = None
        if self.cfg.fine_tune:
            tuned = (
                self._transcode(d.query, x, self.cfg.k_query),
                self._transcode(d.key, x, self.cfg.k_key),
            )
            query_acts, key_acts = (
                side.acts.to_dense().unflatten(0, x.shape[:2]) for side in tuned
            )
        else:
            with torch.no_grad():
                query_acts, key_acts = d.encode_query(x), d.encode_key(x)
        mask = self.scaled_mask[self.alive] * self.cfg.mask_speed
        scores = self._scores(mask, query_acts, key_acts)
        losses = self._divergence(true, scores, moved)
        if not (self.cfg.polish and step >= self.cfg.prune_steps):
            losses["mask_sparsity"] = (
                step_input.coefficients["mask_sparsity"] * (mask + 1e-7).sqrt().sum()
            )
        if tuned and self.cfg.unmasked_coefficient:
            made = tuned[0].output.view_as(q), tuned[1].output.view_as(k)
            unmasked = self._divergence(true, attention_scores(*made, d.spec), moved)
            losses |= {
                f"{name}_unmasked": self.cfg.unmasked_coefficient * loss
                for name, loss in unmasked.items()
            }
        loss = torch.stack(list(losses.values())).sum()
        if not loss.isfinite():
            raise NonFiniteLossError(
                f"The mask loss is {loss.item()} at step {step}: training stopped before the update."
            )
        acts = torch.cat([query_acts, key_acts], dim=-1).flatten(0, 1).detach()
        outputs = torch.cat([q.flatten(0, 1).flatten(1), k.flatten(0, 1).flatten(1)], dim=1)
        return TrainStepOutput(
            sae_in=outputs,
            sae_out=outputs,
            feature_acts=acts,
            hidden_pre=acts,
            loss=loss,
            losses=losses,
            metrics={"n_pairs": int((mask > 0).sum())},
        )

    def _divergence(
        self, true: TruePattern, scores: Tensor, moved: Moved | None
    ) -> dict[str, Tensor]:
        kl, difference = true.compare(scores)
        if moved is None:
            return {"kl": kl.mean()}
        return {
            "kl": kl.mean(),
            "output": self.cfg.output_coefficient * moved.error(true.pattern, difference),
        }

    def _transcode(self, half: Transcoder, x: Tensor, k: float) -> Transcoded:
        """With the k strongest features a token: thresholds would let L0 drift. None of the query at position 0."""
        x = x.flatten(0, 1)
        strength = strengths(half, x)
        if half is self.dictionary.query:
            strength[:: self._context_size] = -torch.inf
        kept = (strength >= batch_cutoff(strength, k)) & (strength > 0)
        return transcode(half, x, strength, kept)

    def _scores(self, mask: Tensor, query_acts: Tensor, key_acts: Tensor) -> Tensor:
        decoders, spec = self.dictionary.decoders, self.dictionary.spec
        if self._scorer is None or self.cfg.fine_tune:
            self._scorer = PairScorer(
                self.dictionary.feature_map.indices[self.alive], decoders, spec
            )
        return self._scorer(mask, query_acts, key_acts) + constant_scores(
            decoders, spec, query_acts.shape[1]
        )

    def _prune(self, step: int) -> None:
        done = min(1.0, step / self.cfg.prune_steps) if self.cfg.prune_steps else 1.0
        if step % self.cfg.prune_every and done < 1.0:
            return
        n_all, n_end = len(self.alive), min(self.cfg.max_pairs, len(self.alive))
        n_keep = round(n_all * (n_end / n_all) ** done)
        if int(self.alive.sum()) > n_keep:
            self._keep(n_keep)

    def _keep(self, n: int) -> None:
        kept = self._cost().topk(n).indices
        self.alive.fill_(False)
        self.alive[kept] = True
        self._scorer = None

    def _cost(self) -> Float[Tensor, " pair"]:
        """m^2 importance: to leading order the rise of the loss if a pair left; -inf for those that have."""
        cost = self.mask.square() * self.dictionary.feature_map.statistics[:, 0]
        return cost.masked_fill(~self.alive, -torch.inf)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Float[Tensor, "tokens d_model"]]) -> None:
        """After tuning, set the published thresholds so that mean L0 over the batches is what training held."""
        batches = [x.to(self.device) for x in batches]
        for half, k in (
            (self.dictionary.query, self.cfg.k_query),
            (self.dictionary.key, self.cfg.k_key),
        ):
            half.get_parameter("threshold").copy_(
                strength_threshold(half, batches, k) / half.W_dec.norm(dim=1)
            )

    @override
    def calculate_aux_loss(self, *args: Any, **kwargs: Any) -> Tensor | dict[str, Tensor]:
        raise NotImplementedError("The mask loss is computed in training_forward_pass.")

    @torch.no_grad()
    def to_dictionary(self) -> BilinearQKDictionary:
        """The dictionary with its trained map: weights clamped to [0, 1], zeros dropped, at most `max_pairs`."""
        kept = self._cost().topk(min(self.cfg.max_pairs, len(self.alive))).indices
        kept = kept[self.mask[kept] > 0]
        finished = BilinearQKDictionary(replace(self.dictionary.cfg, n_pairs=0))
        finished.query.load_state_dict(self.dictionary.query.state_dict())
        finished.key.load_state_dict(self.dictionary.key.state_dict())
        finished.set_feature_map(self.dictionary.feature_map.reweighted(self.mask).select(kept))
        return finished

    @override
    def load_weights_from_checkpoint(self, checkpoint_path: Path | str) -> None:
        super().load_weights_from_checkpoint(checkpoint_path)
        self._scorer = None

    @override
    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        return self.to_dictionary().save_model(path)

    @override
    def log_histograms(self) -> dict[str, NDArray[Any]]:
        return {"weights/mask": np.asarray(self.mask.detach().cpu())}


if MASK_ARCHITECTURE not in SAE_TRAINING_CLASS_REGISTRY:
    register_sae_training_class(MASK_ARCHITECTURE, MaskTrainingSAE, MaskTrainingConfig)
