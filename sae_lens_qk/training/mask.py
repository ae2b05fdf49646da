"""Step 2: rank feature pairs, then train a mask over the best of them, as a SAELens TrainingSAE."""

import logging
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
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_qk.attention import AttentionSpec, attention_scores, log_pattern, pattern_from_scores, pattern_kl, rotate
from sae_lens_qk.config import MASK_ARCHITECTURE, BilinearQKConfig, MaskTrainingConfig
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.feature_map import SparseFeatureMap, active_entries, with_constant
from sae_lens_qk.host import QKWeights
from sae_lens_qk.kernels import add_importance
from sae_lens_qk.training.transcoders import NonFiniteLossError

logger = logging.getLogger("sae_lens_qk")


@torch.no_grad()
def pair_importance(
    dictionary: BilinearQKDictionary, weights: QKWeights, rows: Iterable[Float[Tensor, "batch pos d_model"]]
) -> Float[Tensor, "head d_query_1 d_key_1"]:
    """What dropping a pair costs, to leading order: half the variance of its contribution under the true pattern.

        importance[a,b,h] = 1/2 sum_i [ sum_j P[i,j] c[i,j]^2 - (sum_j P[i,j] c[i,j])^2 ],
        c[i,j] = query_acts[i,a] key_acts[j,b] M[a,b,h](i-j)

    The second term matters: contributions constant over keys cancel in the softmax. Summed over rows; in nats.

    Args:
        rows: layer inputs, whole sequences.
    Returns:
        A dense table over (head, query feature, key feature), constants last; constant x constant is zero.
    """
    spec, (query_rows, key_rows) = dictionary.spec, dictionary.decoders
    table = torch.zeros(spec.n_heads, len(query_rows), len(key_rows))
    for batch in rows:
        pattern = pattern_from_scores(attention_scores(weights.queries(batch), weights.keys(batch), spec))
        query_acts = with_constant(dictionary.encode_query(batch)).float()
        key_acts = with_constant(dictionary.encode_key(batch)).float()
        for row in range(len(batch)):
            q_start, q_pos, q_val = active_entries(query_acts[row : row + 1])
            k_start, k_pos, k_val = active_entries(key_acts[row : row + 1])
            q_vectors = _rotated_entries(query_rows, q_start[0], q_pos, torch.from_numpy(q_val) * spec.scale, spec)
            k_vectors = _rotated_entries(key_rows, k_start[0], k_pos, torch.from_numpy(k_val), spec)
            where = (q_start[0], q_pos, q_vectors, k_start[0], k_pos, k_vectors)
            add_importance(table.numpy(), pattern[row].numpy(), *where)
    table[:, -1, -1] = 0.0
    return table


def _rotated_entries(
    decoder_rows: Float[Tensor, "d_1 heads d_head"],
    start: np.ndarray,
    positions: np.ndarray,
    values: Tensor,
    spec: AttentionSpec,
) -> np.ndarray:
    """Each active entry's decoder row, times its activation, rotated to its position: [entry, heads, d_head]."""
    feature = np.repeat(np.arange(len(start) - 1), np.diff(start))
    vectors = decoder_rows[torch.from_numpy(feature)].float() * values[:, None, None]
    return rotate(vectors[None], spec, torch.from_numpy(positions))[0].contiguous().numpy()


def choose_candidates(importance: Float[Tensor, "head d_query_1 d_key_1"], n: int) -> SparseFeatureMap:
    """The n most important pairs that ever co-occurred, with weight 1.

    Raises:
        ValueError: no pair ever co-occurred.
    """
    flat = importance.permute(1, 2, 0).flatten()
    strongest = flat.topk(min(n, flat.numel()))
    chosen = strongest.indices[strongest.values > 0]
    if not len(chosen):
        raise ValueError("No pair of features ever fired together: train step 1 longer, or rank on more tokens.")
    n_heads, d_query, d_key = importance.shape
    indices = torch.stack(torch.unravel_index(chosen, (d_query, d_key, n_heads)), dim=1)
    return SparseFeatureMap(indices, torch.ones(len(indices)), d_query - 1, d_key - 1, n_heads)


class MaskTrainingSAE(TrainingSAE[MaskTrainingConfig]):
    """A mask m in [0, 1] over candidate pairs of a frozen dictionary.

        loss = KL(P || P[m]) + lambda_m * sum over pairs of sqrt(m + 1e-7)

    m starts at 1 and is clamped before each step and on saving (SAETrainer has no hook after the optimizer step).
    During the first `prune_steps` steps the pairs that would cost least, by m^2 * importance, leave for good until
    `max_pairs` are left.
    """

    cfg: MaskTrainingConfig
    dictionary: BilinearQKDictionary
    alive: Tensor
    importance: Tensor

    def __init__(self, cfg: MaskTrainingConfig, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self._context_size: int | None = None
        self._running: list[SparseFeatureMap] = []  # at most one, the pairs still alive; a list is no submodule

    @override
    def initialize_weights(self) -> None:
        names = BilinearQKConfig.__dataclass_fields__
        values = {name: getattr(self.cfg, name) for name in names if name not in ("metadata", "d_sae")}
        self.dictionary = BilinearQKDictionary(BilinearQKConfig(**values, metadata=self.cfg.metadata))
        self.dictionary.requires_grad_(False)
        self.mask = nn.Parameter(torch.ones(self.cfg.n_pairs, device=self.device))
        self.register_buffer("alive", torch.ones(self.cfg.n_pairs, dtype=torch.bool, device=self.device))
        self.register_buffer("importance", torch.zeros(self.cfg.n_pairs, device=self.device))

    def attach(
        self,
        weights: QKWeights,
        context_size: int,
        dictionary: BilinearQKDictionary | None = None,
        candidates: SparseFeatureMap | None = None,
        importance: Tensor | None = None,
    ) -> None:
        """Give the true W_Q and W_K, and for a new run the frozen dictionary, its candidate pairs and their importance."""
        self._weights, self._context_size = [weights.to(self.device)], context_size
        if dictionary is None:
            return
        assert candidates is not None and importance is not None and len(candidates) == self.cfg.n_pairs
        self.dictionary.query.load_state_dict(dictionary.query.state_dict())
        self.dictionary.key.load_state_dict(dictionary.key.state_dict())
        self.dictionary.set_feature_map(candidates)
        self.importance.copy_(importance)

    @property
    def clamped_mask(self) -> Float[Tensor, " pair"]:
        return self.mask.clamp(0, 1) * self.alive

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
            raise RuntimeError("This training SAE does not know its model: call sae.attach(...) before training.")
        spec, d, x = self.dictionary.spec, self.dictionary, step_input.sae_in
        rows = x.unflatten(0, (-1, self._context_size))
        with torch.no_grad():
            self.mask.clamp_(0, 1)
            self._prune(step_input.n_training_steps)
            weights = self._weights[0]
            true = log_pattern(attention_scores(weights.queries(rows), weights.keys(rows), spec))
            query_acts, key_acts = d.encode_query(rows), d.encode_key(rows)
        scores = self._alive_map.scores(query_acts, key_acts, d.decoders, spec, weights=self.mask[self.alive])
        losses = {"kl": pattern_kl(true, log_pattern(scores)).mean()}
        alive_mask = self.mask[self.alive]
        losses["mask_sparsity"] = step_input.coefficients["mask_sparsity"] * (alive_mask + 1e-7).sqrt().sum()
        loss = losses["kl"] + losses["mask_sparsity"]
        if not loss.isfinite():
            raise NonFiniteLossError(
                f"The mask loss is {loss.item()} at step {step_input.n_training_steps}: training stopped before the update."
            )
        acts = torch.cat([query_acts, key_acts], dim=-1).flatten(0, 1)
        with torch.no_grad():
            outputs = torch.cat([weights.queries(x).flatten(1), weights.keys(x).flatten(1)], dim=1)
        return TrainStepOutput(
            sae_in=outputs, sae_out=outputs, feature_acts=acts, hidden_pre=acts, loss=loss, losses=losses,
            metrics={"n_pairs": int((self.clamped_mask > 0).sum())},
        )  # fmt: skip

    def _prune(self, step: int) -> None:
        done = min(1.0, step / self.cfg.prune_steps) if self.cfg.prune_steps else 1.0
        if step % self.cfg.prune_every and done < 1.0:
            return
        n_all, n_end = len(self.mask), min(self.cfg.max_pairs, len(self.mask))
        n_keep = round(n_all * (n_end / n_all) ** done)
        if int(self.alive.sum()) <= n_keep:
            return
        cost = torch.where(self.alive, self.mask.square() * self.importance, -1.0)
        self.alive.fill_(False)
        self.alive[cost.topk(n_keep).indices] = True
        self._running.clear()

    @property
    def _alive_map(self) -> SparseFeatureMap:
        """The pairs still in the running, rebuilt after each pruning."""
        if not self._running:
            self._running.append(self.dictionary.feature_map.select(self.alive))
        return self._running[0]

    @override
    def calculate_aux_loss(self, *args: Any, **kwargs: Any) -> Tensor | dict[str, Tensor]:
        raise NotImplementedError("The mask loss is computed in training_forward_pass.")

    @torch.no_grad()
    def to_dictionary(self) -> BilinearQKDictionary:
        """The dictionary with its trained map: weights clamped to [0, 1], zeros dropped, at most `max_pairs`."""
        weights = self.clamped_mask
        cost = weights.square() * self.importance
        kept = cost.topk(min(self.cfg.max_pairs, len(cost))).indices.sort().values
        kept = kept[weights[kept] > 0]
        finished = BilinearQKDictionary(replace(self.dictionary.cfg, n_pairs=0))
        finished.query.load_state_dict(self.dictionary.query.state_dict())
        finished.key.load_state_dict(self.dictionary.key.state_dict())
        finished.set_feature_map(self.dictionary.feature_map.reweighted(weights).select(kept))
        return finished

    @override
    def load_weights_from_checkpoint(self, checkpoint_path: Path | str) -> None:
        super().load_weights_from_checkpoint(checkpoint_path)
        self._running.clear()

    @override
    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        return self.to_dictionary().save_model(path)

    @override
    def log_histograms(self) -> dict[str, NDArray[Any]]:
        return {"weights/mask": np.asarray(self.clamped_mask.detach().cpu())}


if MASK_ARCHITECTURE not in SAE_TRAINING_CLASS_REGISTRY:
    register_sae_training_class(MASK_ARCHITECTURE, MaskTrainingSAE, MaskTrainingConfig)
