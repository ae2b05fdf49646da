"""Inference, training and runner configs, and all their validation.

`BilinearQKConfig` is what a published dictionary carries; `TranscodersTrainingConfig` (step 1) and `MaskTrainingConfig`
(step 2) configure the two training SAEs; `BilinearQKRunnerConfig` is SAELens's runner config with the defaults that
sequence-ordered QK training needs. A configured run is `config file -> BilinearQKRunnerConfig -> BilinearQKTrainingRunner`.
"""

import json
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.saes.sae import SAEConfig, SAEMetadata, TrainingSAEConfig
from typing_extensions import override

from sae_lens_qk.attention import AttentionSpec

ARCHITECTURE = "bilinear_qk"
TRANSCODERS_ARCHITECTURE = "bilinear_qk_transcoders"
MASK_ARCHITECTURE = "bilinear_qk_mask"

Activation = Literal["batchtopk", "topk", "relu"]
Half = Literal["transcoder", "jumprelu_transcoder"]


@dataclass(kw_only=True)
class QKFields:
    """What a dictionary and both training steps that make it share; the runner fills in what is the model's."""

    d_sae: int = 0
    """Derived: d_query + d_key."""
    apply_b_dec_to_input: bool = False
    d_query: int = 2400
    """Number of query features."""
    d_key: int = 2400
    """Number of key features."""
    decoder_bias: bool = True
    """False: the decoders have none, so that every part of a score belongs to a pair of features; the mean query and key
    start in one feature a side that is always on."""
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
class BilinearQKConfig(QKFields, SAEConfig):
    """A trained dictionary: sizes, attention, and the model it belongs to. Every field is a flat JSON value."""

    half_architecture: Half = "jumprelu_transcoder"
    """SAELens architecture of the two halves."""

    def __post_init__(self):
        super().__post_init__()
        if self.apply_b_dec_to_input:
            raise ValueError(
                "apply_b_dec_to_input must be False: the decoders' outputs are queries and keys, not inputs."
            )
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
class _ForTraining(QKFields, TrainingSAEConfig):
    decoder_init_norm: float | None = None

    @property
    def half_architecture(self) -> Half:
        raise NotImplementedError

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return BilinearQKConfig


@dataclass(kw_only=True)
class TranscodersTrainingConfig(_ForTraining):
    """Step 1: two transcoders trained on the attention pattern."""

    activation: Activation = "batchtopk"
    """batchtopk (the published form), topk (exported with a calibrated threshold) or relu with the sqrt penalty."""
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
    """Weight of mean over tokens of sum over features of sqrt(act * ||decoder row|| + 1e-7) (relu only). The authors'
    1.5e-6 on the sum over 2048 tokens is 3.1e-3 here."""
    sparsity_warm_up_steps: int = 0
    dead_coefficient: float = 1 / 32
    """Weight of the auxiliary loss: dead features reconstruct what is left of q and k."""
    dead_k: int = 32
    """Dead features per token and side that the auxiliary loss wakes."""
    bfloat16_selection: bool = False
    """Decide on bfloat16 products which features fire; activations stay float32. Faster where the processor multiplies
    bfloat16."""
    initialization: Literal["scores", "data", "kaiming"] = "data"
    """data: encoders are centred unit-norm data points, decoders those points through W_Q and W_K. scores: the same, but
    the points differ and the encoders read only what scores depend on (`training.initialization`)."""

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
    def half_architecture(self) -> Half:
        return "transcoder" if self.activation == "relu" else "jumprelu_transcoder"

    @override
    @classmethod
    def architecture(cls) -> str:
        return TRANSCODERS_ARCHITECTURE


@dataclass(kw_only=True)
class MaskTrainingConfig(_ForTraining):
    """Step 2: a mask over feature pairs."""

    sparsity_coefficient: float = 1e-6
    """Weight of the sum over pairs of sqrt(m + 1e-7)."""
    max_pairs: int = 50_000
    """Pairs left at the end, at most."""
    prune_steps: int = 300
    """Steps over which the number of pairs falls (geometrically) from the candidates to max_pairs."""
    prune_every: int = 10
    """Steps between two prunings."""
    polish: bool = True
    """No sparsity penalty once pruning is over."""
    fine_tune: bool = False
    """Tune the transcoders along with the mask."""
    mask_speed: float = 1.0
    """Learning rate of the mask over that of the trainer."""
    k_query: float = 0.0
    """Mean active query features a token that tuning holds."""
    k_key: float = 0.0
    unmasked_coefficient: float = 1.0
    """Weight of KL(P || P[q_hat, k_hat]) while tuning, so that the transcoders stay good without a map."""
    output_coefficient: float = 0.0
    """Weight of the squared error of what the heads write with the rebuilt pattern, relative to its variance."""
    half_architecture: Half = "jumprelu_transcoder"

    def __post_init__(self):
        if self.max_pairs < 1:
            raise ValueError(f"max_pairs must be at least 1, got {self.max_pairs}.")
        if self.fine_tune and self.half_architecture != "jumprelu_transcoder":
            raise ValueError(
                "Only JumpReLU transcoders can be tuned with the mask: nothing would hold the L0 of ReLU ones."
            )
        super().__post_init__()

    @override
    @classmethod
    def architecture(cls) -> str:
        return MASK_ARCHITECTURE


@dataclass
class MaskStepConfig:
    """Settings of step 2 in a run; step 1 takes the top-level fields and the `sae` block."""

    training_tokens: int = 1_000_000
    """Tokens seen by step 2; 0 leaves the dictionary without a feature map."""
    train_batch_size_tokens: int | None = None
    """Tokens of one step, whole rows; None: as many as in step 1."""
    lr: float = 1e-2
    """Of the mask."""
    fine_tune_lr: float = 0.0
    """Of the transcoders while the mask is trained; 0: they stay frozen."""
    unmasked_coefficient: float = 1.0
    """When tuning, the weight of the KL without the map."""
    output_coefficient: float = 0.0
    """Weight of the squared error of what the heads write with the rebuilt pattern, relative to its variance, beside each
    KL: errors of the pattern then count by what they do. 0: the pattern alone counts, as in the post."""
    sparsity_coefficient: float = 1e-6
    """Weight of the sum over pairs of sqrt(m + 1e-7)."""
    n_pairs: int = 50_000
    """Pairs kept, at most."""
    n_candidates: int = 200_000
    """Pairs that enter training, chosen by centred importance."""
    ranking_tokens: int = 20_480
    """Tokens on which importance is measured."""
    compact: bool = False
    """Drop features that never fire on the ranking tokens first; `cfg.query_numbers` keeps their old numbers."""
    prune_until: float = 0.6
    """Share of the steps over which the number of pairs falls to n_pairs."""
    polish: bool = True
    """No sparsity penalty on the steps after that."""
    n_checkpoints: int = 0

    def __post_init__(self):
        if self.n_pairs < 1:
            raise ValueError(f"mask.n_pairs must be at least 1, got {self.n_pairs}.")
        if self.n_candidates < self.n_pairs:
            raise ValueError(
                f"mask.n_candidates must be at least mask.n_pairs, got {self.n_candidates} and {self.n_pairs}."
            )
        if not 0 <= self.prune_until <= 1:
            raise ValueError(f"mask.prune_until must lie in [0, 1], got {self.prune_until}.")
        if self.fine_tune_lr < 0:
            raise ValueError(f"mask.fine_tune_lr must not be negative, got {self.fine_tune_lr}.")
        if self.fine_tune_lr and self.lr <= 0:
            raise ValueError(
                f"mask.lr must be positive when the transcoders are tuned, got {self.lr}."
            )


@dataclass
class CardConfig:
    """What the model card says and no measurement can tell."""

    license: str = ""
    """Licence of the dictionary, as the Hub names it (apache-2.0, mit, ...)."""
    datasets: list[str] = field(default_factory=list)
    """Hub names of the training data. Default: `dataset_path`, where it is one."""
    description: str = ""
    """Markdown under the card's heading: training data, purpose, caveats."""


@dataclass
class BilinearQKRunnerConfig(LanguageModelSAERunnerConfig[TranscodersTrainingConfig]):
    """SAELens's runner config for both training steps.

    Top-level fields and the `sae` block configure step 1, the `mask` block step 2. Sequence order is required, so token
    mixing, special-token exclusion, position slices and activation normalisation are refused. `dataset_path` may be a
    Hub name, a local .parquet file or folder; environment variables in it are expanded.
    """

    model_name: str = "smollm2-135m-instruct-q4_1"
    """`smollm2-135m-instruct-q4_1` (comes with a pip package), a local folder, or a name that transformer_lens knows."""
    model_class_name: str = "TransformerBridge"
    hook_name: str = ""
    """Derived from the model and `layer`."""
    layer: int = 23
    """Layer whose attention is decomposed."""
    sae: TranscodersTrainingConfig = field(
        default_factory=lambda: TranscodersTrainingConfig(d_in=1)
    )
    mask: MaskStepConfig = field(default_factory=MaskStepConfig)
    card: CardConfig = field(default_factory=CardConfig)
    text_column: str = "text"
    is_dataset_tokenized: bool = False
    streaming: bool = False
    context_size: int = 256
    train_batch_size_tokens: int = 2048
    store_batch_size_prompts: int = 8
    n_batches_in_buffer: int = 8
    activations_mixing_fraction: float = 0.0
    training_tokens: int = 5_000_000
    lr: float = 4e-3
    """Of step 1. ReLU transcoders want less: the authors' 1e-3."""
    lr_scheduler_name: str = "cosineannealing"
    lr_warm_up_steps: int = 100
    dead_feature_window: int = 200
    prepend_bos: bool = True
    logger: LoggingConfig = field(default_factory=lambda: LoggingConfig(log_to_wandb=False))
    checkpoint_path: str | None = "checkpoints"
    n_checkpoints: int = 4
    output_path: str | None = "output"
    verbose: bool = False
    from_pretrained_path: str | None = None
    """Shipped name or folder of a dictionary whose transcoders step 2 takes; step 1 is then skipped."""
    input_cache_path: str | None = None
    """Folder of the float16 cache of the layer's inputs, reused by both steps and across runs; None: no cache."""
    input_cache_tokens: int | None = None
    """Tokens to cache; None: as many as step 1 trains on."""

    def __post_init__(self):
        checkpoint_path = self.checkpoint_path
        super().__post_init__()
        self.checkpoint_path = (
            checkpoint_path  # SAELens appends a random id, and a resumed run would not find itself
        )
        for name, required in (
            ("activations_mixing_fraction", 0.0),
            ("exclude_special_tokens", False),
            ("seqpos_slice", (None,)),
            ("hook_head_index", None),
            ("use_cached_activations", False),
        ):
            value = tuple(self.seqpos_slice) if name == "seqpos_slice" else getattr(self, name)
            if value != required:
                raise ValueError(
                    f"{name} must be {required!r}: both steps train on whole sequences, got {value!r}."
                )
        if self.logger.log_to_wandb:
            raise ValueError(
                "logger.log_to_wandb must be False: this runner does not open a wandb run."
            )
        if self.autocast:
            raise ValueError("autocast must be False: scores and KL are computed in float32.")
        for step, size, tokens in (
            ("", self.train_batch_size_tokens, self.training_tokens),
            (
                "mask.",
                self.mask_batch_size_tokens,
                self.mask.training_tokens or self.mask_batch_size_tokens,
            ),
        ):
            if size < 1 or size % self.context_size:
                raise ValueError(
                    f"{step}train_batch_size_tokens must be a multiple of context_size, got {size} and {self.context_size}."
                )
            if self.n_batches_in_buffer * self.context_size < size:
                raise ValueError(
                    f"n_batches_in_buffer * context_size must hold one batch of {size} tokens, "
                    f"got {self.n_batches_in_buffer} * {self.context_size}."
                )
            if tokens < size:
                zero = "be 0 or " if step else ""
                raise ValueError(
                    f"{step}training_tokens must {zero}cover one batch of {size}, got {tokens}."
                )
        if self.layer < 0:
            raise ValueError(f"layer must not be negative, got {self.layer}.")

    @property
    def rows_per_batch(self) -> int:
        return self.train_batch_size_tokens // self.context_size

    @property
    def mask_batch_size_tokens(self) -> int:
        own = self.mask.train_batch_size_tokens
        return self.train_batch_size_tokens if own is None else own

    def to_dict(self) -> dict[str, Any]:
        blocks = {"mask": asdict(self.mask), "card": asdict(self.card)}
        return {**super().to_dict(), **blocks, "seqpos_slice": list(self.seqpos_slice)}

    @classmethod
    def from_dict(cls, cfg_dict: dict[str, Any]) -> "BilinearQKRunnerConfig":
        """Build a config; unlike the host's, it refuses keys it does not know.

        Raises:
            ValueError: an unknown key, at the top or in a block; text where a number belongs.
        """
        values = dict(cfg_dict)
        for name in ("sae", "mask", "card", "logger"):
            if not isinstance(values.get(name, {}), dict):
                raise ValueError(
                    f"{name} must be a mapping of config fields, got {values[name]!r}."
                )
        sae = dict(values.pop("sae", {}))
        architecture = sae.pop("architecture", TRANSCODERS_ARCHITECTURE)
        if architecture != TRANSCODERS_ARCHITECTURE:
            raise ValueError(
                f"sae.architecture must be {TRANSCODERS_ARCHITECTURE!r}, got {architecture!r}."
            )
        metadata = SAEMetadata(**sae.pop("metadata", {}))
        _check_keys(sae, TranscodersTrainingConfig, "sae.")
        blocks: dict[str, Any] = {
            "sae": TranscodersTrainingConfig(**{"d_in": 1, **sae}, metadata=metadata)
        }
        for name, block_class in (
            ("mask", MaskStepConfig),
            ("card", CardConfig),
            ("logger", LoggingConfig),
        ):
            if name in values:
                block = values.pop(name)
                _check_keys(block, block_class, f"{name}.")
                blocks[name] = block_class(**block)
        _check_keys(values, cls, "")
        if "seqpos_slice" in values:
            values["seqpos_slice"] = tuple(values["seqpos_slice"])
        return cls(**values, **blocks)

    @classmethod
    def from_file(cls, path: str | Path) -> "BilinearQKRunnerConfig":
        """Read a YAML or JSON config (JSON is YAML).

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a mapping, or not a config; see `from_dict`.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no config file {path}.")
        try:
            content = yaml.load(path.read_text(), _Loader)
        except yaml.YAMLError as error:
            raise ValueError(
                f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}."
            ) from error
        if not isinstance(content, dict):
            raise ValueError(
                f"{path} must hold a mapping of config fields, got {type(content).__name__}."
            )
        return cls.from_dict(content)

    def save(self, path: str | Path) -> None:
        """Write the config as YAML or JSON, by the file's ending."""
        path = Path(path)
        text = (
            json.dumps(self.to_dict(), indent=2)
            if path.suffix == ".json"
            else yaml.safe_dump(self.to_dict())
        )
        path.write_text(text)

    def mask_step(self) -> "BilinearQKRunnerConfig":
        """This config with step 2's learning rate, batch, tokens and checkpoints in the top-level fields SAELens reads."""
        return replace(
            self,
            training_tokens=self.mask.training_tokens,
            train_batch_size_tokens=self.mask_batch_size_tokens,
            lr=self.mask.fine_tune_lr or self.mask.lr,
            lr_end=None,
            lr_warm_up_steps=0,
            n_checkpoints=self.mask.n_checkpoints,
        )


def _check_keys(values: dict[str, Any], config_class: type, prefix: str) -> None:
    known = [f.name for f in fields(config_class) if f.init]
    unknown = sorted(set(values) - set(known))
    if unknown:
        close = [name for name in known if any(name[:4] == key[:4] for key in unknown)][:5]
        hint = f" Close to it: {', '.join(close)}." if close else ""
        raise ValueError(f"Unknown config key {prefix}{unknown[0]}.{hint}")
    for f in fields(config_class):
        if isinstance(f.default, int | float) and isinstance(values.get(f.name), str):
            raise ValueError(
                f"{prefix}{f.name} must be {type(f.default).__name__}, got the text {values[f.name]!r}."
            )


class _Loader(yaml.SafeLoader):
    """Reads 1e-6 as a number, as JSON and YAML 1.2 do; PyYAML takes it for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
