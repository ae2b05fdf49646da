"""What both training SAEs share: batches of whole sequences, and the layer they learn from."""

from abc import ABC
from typing import Any

from jaxtyping import Float
from sae_lens.saes.sae import T_TRAINING_SAE_CONFIG, TrainingSAE
from torch import Tensor
from typing_extensions import override

from sae_lens_qk.weights import QKWeights


class SequenceTrainingSAE(TrainingSAE[T_TRAINING_SAE_CONFIG], ABC):
    """A training SAE whose batches are whole sequences [n_rows * context_size, d_model] in order.

    The true queries and keys come from the model's weights, which are not saved with checkpoints.
    """

    _weights: QKWeights | None = None
    _context_size: int = 0

    def _attach_layer(
        self,
        weights: QKWeights,
        context_size: int,
    ) -> None:
        self._weights = weights.to(self.device)
        self._context_size = context_size

    @property
    def weights(self) -> QKWeights:
        """W_Q and W_K of the layer.

        Raises:
            RuntimeError: no layer is attached.
        """
        if self._weights is None:
            raise RuntimeError(
                "This training SAE does not know its model: call sae.attach(layer.qk_weights, "
                "context_size, ...) with layer = qk.AttentionLayer(model, index) before training."
            )
        return self._weights

    def sequences(self, tokens: Float[Tensor, "tokens *axes"]) -> Float[Tensor, "batch pos *axes"]:
        """A batch of tokens, as sequences.

        Raises:
            ValueError: part of a sequence is missing.
        """
        n_tokens = len(tokens)
        if n_tokens % self._context_size:
            raise ValueError(
                f"A batch must be whole sequences of {self._context_size} tokens, "
                f"got {n_tokens} tokens."
            )
        return tokens.unflatten(0, (-1, self._context_size))

    @override
    def calculate_aux_loss(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("All losses are computed in training_forward_pass.")
