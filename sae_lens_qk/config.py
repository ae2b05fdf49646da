"""Configs of a dictionary and of the two steps that train it, with their validation.

`BilinearQKConfig` is what a published dictionary carries; `TranscodersTrainingConfig` (step 1) and
`MaskTrainingConfig` (step 2, around the run's `MaskStepConfig`) configure the two training SAEs. A
whole run is configured in `run_config.py`.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sae_lens.saes.sae import SAEConfig, TrainingSAEConfig
from typing_extensions import override

from sae_lens_qk.attention import AttentionSpec

ARCHITECTURE = "bilinear_qk"
TRANSCODERS_ARCHITECTURE = "bilinear_qk_transcoders"
MASK_ARCHITECTURE = "bilinear_qk_mask"

Activation = Literal["batchtopk", "topk", "relu"]
TranscoderArchitecture = Literal["transcoder", "jumprelu_transcoder"]


@dataclass(kw_only=True)
class DictionaryFields:
    """What a dictionary and both training steps that make it share.

    The runner fills in what belongs to the model.
    """

    d_sae: int = 0
    """Derived: d_query + d_key."""
    apply_b_dec_to_input: bool = False
    d_query: int = 2400
    """Number of query features."""
    d_key: int = 2400
    """Number of key features."""
    decoder_bias: bool = True
    """False: the decoders have none, so that every part of a score belongs to a pair of features;
    the mean query and key start in one feature per side that is always on."""
    n_pairs: int = 0
    """Pairs in the feature map; 0: no map has been trained."""
    attention: dict[str, Any] = field(default_factory=dict)
    """`AttentionSpec` as a flat dict."""
    model_name: str = ""
    model_mode: str = "bridge"
    """How the model was loaded: bridge, bridge_compatibility, hooked or hooked_processed."""
    layer: int = 0
    hook_name: str = ""
    """Hook of the tensor that W_Q and W_K multiply."""
    fingerprint: list[float] = field(default_factory=list)
    """W_Q r and W_K r for a fixed r: tells the weights this dictionary belongs to."""
    query_numbers: list[int] = field(default_factory=list)
    """After compaction, the number each query feature had before; empty: never compacted."""
    key_numbers: list[int] = field(default_factory=list)
    d_query_before: int = 0
    """Number of query features before compaction; 0: never compacted."""
    d_key_before: int = 0

    def __post_init__(self):
        if not isinstance(self.n_pairs, int) or self.n_pairs < 0:
            raise ValueError(
                f"n_pairs of cfg.json must be a number of at least 0, got {self.n_pairs!r}."
            )
        # the host's width: query features, then key features
        self.d_sae = self.d_query + self.d_key
        if self.d_query < 1 or self.d_key < 1:
            raise ValueError(
                f"d_query and d_key must be positive, got {self.d_query} and {self.d_key}."
            )
        super().__post_init__()  # type: ignore[misc]  # the host's config stands next in line

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec.from_dict(self.attention)

    @property
    def original_sizes(self) -> tuple[int, int]:
        """d_query and d_key before compaction."""
        return self.d_query_before or self.d_query, self.d_key_before or self.d_key


@dataclass
class BilinearQKConfig(DictionaryFields, SAEConfig):
    """A trained dictionary: sizes, attention, and the model it belongs to.

    Every field is a flat JSON value.
    """

    half_architecture: TranscoderArchitecture = "jumprelu_transcoder"
    """SAELens architecture of the two halves."""

    def __post_init__(self):
        super().__post_init__()
        if self.apply_b_dec_to_input:
            raise ValueError(
                "apply_b_dec_to_input must be False: the decoders' outputs are queries and keys, "
                "not inputs."
            )
        # a norm of the inputs would have to go into the scores, which do not know it
        if self.normalize_activations != "none":
            raise ValueError(
                f"normalize_activations must be 'none', got {self.normalize_activations!r}."
            )
        if self.attention and self.spec.d_model != self.d_in:
            raise ValueError(
                f"d_in must be the attention's d_model {self.spec.d_model}, got {self.d_in}."
            )

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE


@dataclass(kw_only=True)
class _ForTraining(DictionaryFields, TrainingSAEConfig):
    decoder_init_norm: float | None = None

    @property
    def half_architecture(self) -> TranscoderArchitecture:
        raise NotImplementedError

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return BilinearQKConfig


@dataclass(kw_only=True)
class TranscodersTrainingConfig(_ForTraining):
    """Step 1: two transcoders trained on the attention pattern."""

    activation: Activation = "batchtopk"
    """batchtopk (the published form), topk (exported with a calibrated threshold) or relu with the
    sqrt penalty."""
    k: float = 16.0
    """Mean active features per token and side (batchtopk, topk)."""
    threshold_lr: float = 0.01
    """Step of the moving average of the batchtopk threshold."""
    kl_full_coefficient: float = 3.0
    """Weight of KL(P || P[q_hat, k_hat])."""
    kl_query_coefficient: float = 1.0
    """Weight of KL(P || P[q_hat, k])."""
    kl_key_coefficient: float = 1.0
    """Weight of KL(P || P[q, k_hat])."""
    mse_coefficient: float = 0.0
    """Weight of the squared errors of q and k relative to their variance."""
    sparsity_coefficient: float = 3.1e-3
    """Weight of mean over tokens of sum over features of sqrt(act * ||decoder row|| + 1e-7) (relu
    only). The authors' 1.5e-6 on the sum over 2048 tokens is 3.1e-3 here."""
    sparsity_warm_up_steps: int = 0
    dead_coefficient: float = 1 / 32
    """Weight of the auxiliary loss: dead features reconstruct what is left of q and k."""
    dead_k: int = 32
    """Dead features per token and side that the auxiliary loss wakes."""
    bfloat16_selection: bool = False
    """Decide on bfloat16 products which features fire; activations stay float32. Faster where the
    processor multiplies bfloat16."""
    initialization: Literal["scores", "data", "kaiming"] = "data"
    """data: encoders are centred unit-norm data points, decoders those points through W_Q and W_K.
    scores: the same, but the points differ and the encoders read only what scores depend on
    (`training.initialization`)."""

    def __post_init__(self):
        if self.activation not in ("batchtopk", "topk", "relu"):
            raise ValueError(
                f"activation must be batchtopk, topk or relu, got {self.activation!r}."
            )
        if self.initialization not in ("scores", "data", "kaiming"):
            raise ValueError(
                f"initialization must be scores, data or kaiming, got {self.initialization!r}."
            )
        if not 0 < self.k <= min(self.d_query, self.d_key):
            raise ValueError(f"k must lie in (0, min(d_query, d_key)], got {self.k}.")
        if self.activation == "topk" and self.k != int(self.k):
            raise ValueError(f"topk needs a whole number k, got {self.k}.")
        super().__post_init__()

    @property
    def half_architecture(self) -> TranscoderArchitecture:
        return "transcoder" if self.activation == "relu" else "jumprelu_transcoder"

    @override
    @classmethod
    def architecture(cls) -> str:
        return TRANSCODERS_ARCHITECTURE


@dataclass
class MaskStepConfig:
    """Settings of step 2 in a run; step 1 takes the top-level fields and the `sae` block."""

    training_tokens: int = 1_000_000
    """Tokens of step 2; 0 leaves the dictionary without a feature map."""
    train_batch_size_tokens: int | None = None
    """Tokens of one step, whole rows; None: as many as in step 1."""
    lr: float = 1e-2
    """Of the mask."""
    fine_tune_lr: float = 0.0
    """Of the transcoders while the mask is trained; 0: they stay frozen."""
    unmasked_coefficient: float = 1.0
    """When tuning, the weight of KL(P || P[q_hat, k_hat]): the transcoders stay good without a
    map."""
    output_coefficient: float = 0.0
    """Weight of the squared error of the attention output under the rebuilt pattern, relative to
    its variance, next to each KL: errors of the pattern then count by what they do. 0: the pattern
    alone counts, as in the post."""
    sparsity_coefficient: float = 1e-6
    """Weight of the sum over pairs of sqrt(m + 1e-7)."""
    n_pairs: int = 50_000
    """Pairs left at the end, at most."""
    n_candidates: int = 200_000
    """Pairs that enter training, chosen by centred importance."""
    ranking_tokens: int = 20_480
    """Tokens on which importance is measured."""
    compact: bool = False
    """Drop features that never fire on the ranking tokens first; `cfg.query_numbers` keeps their
    old numbers."""
    prune_until: float = 0.6
    """Share of the steps over which the number of pairs falls (geometrically) to n_pairs."""
    polish: bool = True
    """No sparsity penalty on the steps after that."""
    n_checkpoints: int = 0

    def __post_init__(self):
        if self.n_pairs < 1:
            raise ValueError(f"mask.n_pairs must be at least 1, got {self.n_pairs}.")
        if self.n_candidates < self.n_pairs:
            raise ValueError(
                "mask.n_candidates must be at least mask.n_pairs, "
                f"got {self.n_candidates} and {self.n_pairs}."
            )
        if not 0 <= self.prune_until <= 1:
            raise ValueError(f"mask.prune_until must lie in [0, 1], got {self.prune_until}.")
        if self.fine_tune_lr < 0:
            raise ValueError(f"mask.fine_tune_lr must not be negative, got {self.fine_tune_lr}.")
        if self.fine_tune_lr and self.lr <= 0:
            raise ValueError(
                f"mask.lr must be positive when the transcoders are tuned, got {self.lr}."
            )

    @property
    def fine_tune(self) -> bool:
        """The transcoders are tuned along with the mask."""
        return self.fine_tune_lr > 0

    @property
    def mask_speed(self) -> float:
        """Learning rate of the mask over that of the trainer."""
        return self.lr / self.fine_tune_lr if self.fine_tune else 1.0


@dataclass(kw_only=True)
class MaskTrainingConfig(_ForTraining):
    """Step 2: a mask over feature pairs. The run's settings, and what the runner derives."""

    mask: MaskStepConfig = field(default_factory=MaskStepConfig)
    prune_steps: int = 300
    """Steps over which the number of pairs falls from the candidates to mask.n_pairs."""
    prune_every: int = 10
    """Steps between two prunings."""
    k_query: float = 0.0
    """Mean active query features per token that tuning holds."""
    k_key: float = 0.0
    half_architecture: TranscoderArchitecture = "jumprelu_transcoder"

    def __post_init__(self):
        if isinstance(self.mask, dict):  # as read from JSON
            self.mask = MaskStepConfig(**self.mask)
        if self.mask.fine_tune and self.half_architecture != "jumprelu_transcoder":
            raise ValueError(
                "Only JumpReLU transcoders can be tuned with the mask: "
                "nothing would hold the L0 of ReLU ones."
            )
        super().__post_init__()

    @override
    def get_training_architecture_details(self) -> dict[str, Any]:
        """Written to cfg.json, so the block is a dict there."""
        return {**super().get_training_architecture_details(), "mask": asdict(self.mask)}

    @override
    @classmethod
    def architecture(cls) -> str:
        return MASK_ARCHITECTURE
