"""The config of a whole run: read from a file, validated, written next to the dictionary.

`BilinearQKRunnerConfig` is SAELens's runner config with the defaults that sequence-ordered QK
training needs. A configured run is
`config file -> BilinearQKRunnerConfig -> BilinearQKTrainingRunner`.
"""

import json
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.saes.sae import SAEMetadata

from sae_lens_qk.config import (
    TRANSCODERS_ARCHITECTURE,
    MaskStepConfig,
    TranscodersTrainingConfig,
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

    Top-level fields and the `sae` block configure step 1, the `mask` block step 2. Sequence order
    is required, so token mixing, special-token exclusion, position slices and activation
    normalisation are refused. `dataset_path` may be a Hub name, a local .parquet file or folder;
    environment variables in it are expanded.
    """

    model_name: str = "smollm2-135m-instruct-q4_1"
    """`smollm2-135m-instruct-q4_1` (comes with a pip package), a local folder, or a name that
    transformer_lens knows."""
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
    """Shipped name or folder of a dictionary whose transcoders step 2 takes; step 1 is then
    skipped."""
    input_cache_path: str | None = None
    """Folder of the float16 cache of the layer's inputs, reused by both steps and across runs;
    None: no cache."""
    input_cache_tokens: int | None = None
    """Tokens to cache; None: as many as step 1 trains on."""

    def __post_init__(self):
        checkpoint_path = self.checkpoint_path
        super().__post_init__()
        # SAELens appends a random id, and a resumed run would not find itself
        self.checkpoint_path = checkpoint_path
        self._refuse_settings_that_break_sequences()
        self._check_step("", self.train_batch_size_tokens, self.training_tokens)
        mask_tokens = self.mask.training_tokens or self.mask_batch_size_tokens
        self._check_step("mask.", self.mask_batch_size_tokens, mask_tokens)
        if self.layer < 0:
            raise ValueError(f"layer must not be negative, got {self.layer}.")

    def _refuse_settings_that_break_sequences(self) -> None:
        if tuple(self.seqpos_slice) != (None,):
            raise ValueError(
                f"seqpos_slice must be (None,): both steps train on whole sequences, "
                f"got {tuple(self.seqpos_slice)!r}."
            )
        # each of them drops or mixes positions of a row
        required = {
            "activations_mixing_fraction": 0.0,
            "exclude_special_tokens": False,
            "hook_head_index": None,
            "use_cached_activations": False,
        }
        for name, value in required.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name} must be {value!r}: both steps train on whole sequences, "
                    f"got {getattr(self, name)!r}."
                )
        if self.logger.log_to_wandb:
            raise ValueError(
                "logger.log_to_wandb must be False: this runner does not open a wandb run."
            )
        if self.autocast:
            raise ValueError("autocast must be False: scores and KL are computed in float32.")

    def _check_step(
        self,
        prefix: str,
        batch_size: int,
        training_tokens: int,
    ) -> None:
        """One of the two steps: whole rows per batch, at least one batch."""
        if batch_size < 1 or batch_size % self.context_size:
            raise ValueError(
                f"{prefix}train_batch_size_tokens must be a multiple of context_size, "
                f"got {batch_size} and {self.context_size}."
            )
        if self.n_batches_in_buffer * self.context_size < batch_size:
            raise ValueError(
                f"n_batches_in_buffer * context_size must hold one batch of {batch_size} tokens, "
                f"got {self.n_batches_in_buffer} * {self.context_size}."
            )
        if training_tokens < batch_size:
            zero = "be 0 or " if prefix else ""
            raise ValueError(
                f"{prefix}training_tokens must {zero}cover one batch of {batch_size}, "
                f"got {training_tokens}."
            )

    @property
    def rows_per_batch(self) -> int:
        return self.train_batch_size_tokens // self.context_size

    @property
    def mask_batch_size_tokens(self) -> int:
        own = self.mask.train_batch_size_tokens
        return self.train_batch_size_tokens if own is None else own

    def to_dict(self) -> dict[str, Any]:
        # The host flattens its own blocks only; JSON knows no tuples.
        values = super().to_dict()
        values["mask"] = asdict(self.mask)
        values["card"] = asdict(self.card)
        values["seqpos_slice"] = list(self.seqpos_slice)
        return values

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
        block_classes = {"mask": MaskStepConfig, "card": CardConfig, "logger": LoggingConfig}
        for name, block_class in block_classes.items():
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
        if path.suffix == ".json":
            path.write_text(json.dumps(self.to_dict(), indent=2))
        else:
            path.write_text(yaml.safe_dump(self.to_dict()))

    def mask_step(self) -> "BilinearQKRunnerConfig":
        """This config with step 2's learning rate, batch, tokens and checkpoints at the top level.

        SAELens reads them there.
        """
        return replace(
            self,
            training_tokens=self.mask.training_tokens,
            train_batch_size_tokens=self.mask_batch_size_tokens,
            lr=self.mask.fine_tune_lr or self.mask.lr,
            lr_end=None,
            lr_warm_up_steps=0,
            n_checkpoints=self.mask.n_checkpoints,
        )


def _check_keys(
    values: dict[str, Any],
    config_class: type,
    prefix: str,
) -> None:
    config_fields = fields(config_class)
    valid_names = [config_field.name for config_field in config_fields if config_field.init]
    unknown = sorted(set(values) - set(valid_names))
    if unknown:
        # misspellings mostly begin right
        beginnings = {key[:4] for key in unknown}
        close = [name for name in valid_names if name[:4] in beginnings]
        hint = f" Close to it: {', '.join(close[:5])}." if close else ""
        raise ValueError(f"Unknown config key {prefix}{unknown[0]}.{hint}")
    for config_field in config_fields:
        name = config_field.name
        value = values.get(name)
        # YAML reads a number in an unusual notation as text; the host would fail much later
        if isinstance(config_field.default, int | float) and isinstance(value, str):
            expected = type(config_field.default).__name__
            raise ValueError(f"{prefix}{name} must be {expected}, got the text {value!r}.")


class _Loader(yaml.SafeLoader):
    """Reads 1e-6 as a number, as JSON and YAML 1.2 do; PyYAML takes it for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
