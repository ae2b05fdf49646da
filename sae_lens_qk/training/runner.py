"""BilinearQKTrainingRunner: both training steps in SAELens's trainer.

From a config to a saved dictionary.
"""

import copy
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from jaxtyping import Float
from sae_lens.saes.sae import SAEMetadata, TrainingSAE
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from sae_lens_qk.config import DictionaryFields, MaskTrainingConfig
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.host.layer import AttentionLayer, largest
from sae_lens_qk.host.models import load_model
from sae_lens_qk.host.proof import prove_once, proven_layer
from sae_lens_qk.host.support import Model
from sae_lens_qk.inputs import InputCache, fill_cache
from sae_lens_qk.run_config import BilinearQKRunnerConfig
from sae_lens_qk.text import load_text
from sae_lens_qk.training.candidates import PairTable, firing_rates, rank_pairs
from sae_lens_qk.training.mask import MaskTrainingSAE
from sae_lens_qk.training.transcoders import TranscodersTrainingSAE

logger = logging.getLogger("sae_lens_qk")

Texts = Dataset | IterableDataset

# Folders under the checkpoint path
_TRANSCODERS = "transcoders"
_MASK = "mask"
_STEP_1_DONE = "transcoders_final"

_START_ROWS = 64
_CALIBRATION_ROWS = 160


class BilinearQKTrainingRunner:
    """Train a dictionary as configured: transcoders (step 1), then the mask over pairs (step 2).

    Checkpoints go to `<checkpoint_path>/transcoders/<tokens>` and
    `<checkpoint_path>/mask/<tokens>`; the finished dictionary to `output_path`. With
    `resume_from_checkpoint=<checkpoint_path>` a run goes on from its newest checkpoint.

    Args:
        cfg: not changed by training.
        override_dataset: instead of `cfg.dataset_path`; column `cfg.text_column`, or `tokens` /
            `input_ids`.
        override_model: a bridge or HookedTransformer instead of `cfg.model_name`.
    Attributes:
        cfg: the config, with what belongs to the model filled in.
        layer: the layer whose attention is decomposed.
    Raises:
        ValueError: a config that cannot run on this model or dataset, before anything is written.
    """

    def __init__(
        self,
        cfg: BilinearQKRunnerConfig,
        override_dataset: Texts | Model | None = None,
        override_model: Model | Texts | None = None,
    ):
        model, dataset = _in_order(override_model, override_dataset)
        if model is None:
            model = load_model(cfg.model_name, cfg.llm_device or cfg.device)
        self.layer = AttentionLayer(model, cfg.layer)
        spec = self.layer.spec  # raises for an unsupported model
        if self.layer.mode == "hooked":
            raise ValueError(
                "An unprocessed HookedTransformer has no hook at the input of W_Q and W_K: train "
                "on a bridge (qk.load_model) or on HookedTransformer.from_pretrained."
            )
        prove_once(self.layer)
        sae_cfg = replace(
            cfg.sae,
            d_in=spec.d_model,
            attention=spec.to_dict(),
            model_name=cfg.model_name,
            model_mode=self.layer.mode,
            layer=self.layer.index,
            hook_name=self.layer.names.input,
            fingerprint=list(self.layer.qk_weights.fingerprint()),
            device=cfg.device,
            dtype=cfg.dtype,
        )
        self.cfg = replace(cfg, hook_name=sae_cfg.hook_name, sae=sae_cfg)
        if dataset is None:
            dataset = load_text(cfg.dataset_path, cfg.text_column, cfg.streaming)
        self.dataset = dataset
        self._start = self._given_transcoders()
        if cfg.mask.training_tokens:
            self._check_mask_step()
        self._check_data()

    @property
    def model(self) -> Model:
        return self.layer.model

    def run(self) -> BilinearQKDictionary:
        """Train both steps and save.

        Returns:
            The dictionary in its published form, as saved under `output_path`.
        Raises:
            NonFiniteLossError: NaN or infinite loss; the last checkpoint is good.
        """
        torch.manual_seed(self.cfg.seed)
        cache = self.fill_input_cache() if self.cfg.input_cache_path else None
        dictionary = self._start or self._finished_step_1() or self._run_transcoders(cache)
        if self.cfg.mask.training_tokens:
            dictionary = self._run_mask(dictionary, cache)
            if not dictionary.has_feature_map:
                logger.warning("step 2 dropped every pair: lower mask.sparsity_coefficient")
        dictionary.runner_cfg = self.cfg.to_dict()
        if self.cfg.output_path is not None:
            dictionary.save_model(self.cfg.output_path)
        return dictionary

    # The two steps

    def _run_transcoders(self, cache: InputCache | None) -> BilinearQKDictionary:
        sae_cfg = replace(self.cfg.sae, metadata=self._metadata())
        sae = TranscodersTrainingSAE(sae_cfg)
        checkpoint = self._newest_checkpoint(_TRANSCODERS)
        first_batch = None
        if checkpoint is None:
            start_rows = list(self.first_rows(_START_ROWS, cache))
            first_batch = torch.cat(start_rows).flatten(0, 1)  # [tokens, d_model]
        sae.attach(self.layer.qk_weights, self.cfg.context_size, first_batch)
        seed = self.cfg.seed
        self._fit(sae, self.cfg, _TRANSCODERS, cache, checkpoint, seed)
        if self.cfg.sae.activation != "relu":
            # L0 and KL before and after, published in cfg.json
            calibration = sae.calibrate(self._calibration_batches(cache))
            sae.cfg.metadata.calibration = calibration
            logger.info("thresholds calibrated to mean L0 = k: %s", calibration)
        dictionary = sae.to_dictionary()
        if self.cfg.checkpoint_path is not None:
            dictionary.save_model(Path(self.cfg.checkpoint_path) / _STEP_1_DONE)
        return dictionary

    def _run_mask(
        self, dictionary: BilinearQKDictionary, cache: InputCache | None
    ) -> BilinearQKDictionary:
        settings = self.cfg.mask
        weights = self.layer.qk_weights
        checkpoint = self._newest_checkpoint(_MASK)
        # ranking is deterministic, so a resumed run finds the same candidates
        n_rows = max(2, settings.ranking_tokens // self.cfg.context_size)
        if settings.compact:
            rates = firing_rates(dictionary, self.first_rows(n_rows, cache))
            dictionary = dictionary.compact(rates.query > 0, rates.key > 0)
        candidates = rank_pairs(
            dictionary, weights, self.first_rows(n_rows, cache), settings.n_candidates
        )
        sae = MaskTrainingSAE(self._mask_config(dictionary, len(candidates), cache))
        ov_weights = self.layer.ov_weights
        sae.attach(weights, self.cfg.context_size, dictionary, candidates, ov_weights)
        mask_cfg = self.cfg.mask_step()
        seed = self.cfg.seed + 1  # another order of the rows than in step 1
        self._fit(sae, mask_cfg, _MASK, cache, checkpoint, seed)
        if not settings.fine_tune:
            return sae.to_dictionary()
        sae.calibrate(self._calibration_batches(cache))
        tuned = sae.to_dictionary()
        # the candidates' statistics are those of the untuned transcoders
        rows = self.first_rows(n_rows, cache)
        ranked = rank_pairs(tuned, weights, rows, settings.n_candidates)
        tuned.set_feature_map(tuned.feature_map.measured_as(ranked))
        return tuned

    def _mask_config(
        self, dictionary: BilinearQKDictionary, n_candidates: int, cache: InputCache | None
    ) -> MaskTrainingConfig:
        """The run's settings of step 2, for this dictionary."""
        cfg = dictionary.cfg
        settings = self.cfg.mask
        names = [field.name for field in fields(DictionaryFields)]
        shared = {name: getattr(cfg, name) for name in names}
        shared["n_pairs"] = n_candidates
        if settings.fine_tune:  # tuning holds the L0 that the dictionary has
            rates = firing_rates(dictionary, self.first_rows(_CALIBRATION_ROWS, cache))
            shared["k_query"] = float(rates.query.sum())
            shared["k_key"] = float(rates.key.sum())
        n_steps = settings.training_tokens // self.cfg.mask_batch_size_tokens
        return MaskTrainingConfig(
            **shared,
            d_in=cfg.d_in,
            dtype=self.cfg.dtype,
            device=self.cfg.device,
            half_architecture=cfg.half_architecture,
            metadata=self._metadata(cfg.metadata),
            mask=settings,
            prune_steps=int(n_steps * settings.prune_until),
        )

    def _metadata(self, metadata: SAEMetadata | None = None) -> SAEMetadata:
        """What SAELens's tools read: which model, which hook, which texts."""
        metadata = SAEMetadata() if metadata is None else copy.deepcopy(metadata)
        metadata.model_name = self.cfg.model_name
        metadata.hook_name = self.cfg.hook_name
        metadata.context_size = self.cfg.context_size
        metadata.prepend_bos = self.cfg.prepend_bos
        return metadata

    def _fit(
        self,
        sae: TrainingSAE[Any],
        cfg: BilinearQKRunnerConfig,
        step: str,
        cache: InputCache | None,
        checkpoint: Path | None,
        seed: int,
    ) -> None:
        """One SAETrainer run, from the start or from a checkpoint."""
        trainer_cfg = cfg.to_sae_trainer_config()
        if self.cfg.checkpoint_path is not None:
            trainer_cfg.checkpoint_path = str(Path(self.cfg.checkpoint_path) / step)
        data: Any
        if cache is None:
            data = self.store(cfg)
        else:
            data = cache.batches(cfg.rows_per_batch, seed=seed)
        trainer = ProgressTrainer(trainer_cfg, sae, data)
        if checkpoint is not None:
            logger.info("resuming %s from %s", step, checkpoint)
            self._resume(trainer, data, checkpoint)
        try:
            trainer.fit()
        except KeyboardInterrupt:
            logger.warning(
                "interrupted after %d tokens of %s; go on with resume_from_checkpoint=%s",
                trainer.n_training_samples,
                step,
                self.cfg.checkpoint_path,
            )
            raise

    # Resuming

    def _resume(
        self,
        trainer: "ProgressTrainer",
        data: Any,
        checkpoint: Path,
    ) -> None:
        """Weights, optimizer and data as they were at the checkpoint."""
        trainer.load_trainer_state(checkpoint)
        trainer.n_training_steps += 1  # the host saves it before counting the step
        trainer.checkpoint_thresholds = [
            threshold
            for threshold in trainer.checkpoint_thresholds
            if threshold > trainer.n_training_samples
        ]
        trainer.sae.load_weights_from_checkpoint(checkpoint)
        if isinstance(data, ActivationsStore):
            self._skip_rows(data, trainer.n_training_samples // self.cfg.context_size)
        else:
            data.step = trainer.n_training_steps

    def _skip_rows(
        self,
        store: ActivationsStore,
        n_rows: int,
    ) -> None:
        """Draw the rows a resumed run has seen, without forward passes and as the store would have.

        At the end of an epoch it drops a partly filled batch. (The store's own state counts
        documents, which are not whole rows.)
        """
        batch_size = self.cfg.store_batch_size_prompts
        n_full, n_last = divmod(n_rows, batch_size)
        sizes = [batch_size] * n_full
        if n_last:
            sizes.append(n_last)
        for size in sizes:
            try:
                store.get_batch_tokens(batch_size=size, raise_at_epoch_end=True)
            except StopIteration:
                store.get_batch_tokens(batch_size=size)

    def _newest_checkpoint(self, step: str) -> Path | None:
        if self.cfg.resume_from_checkpoint is None:
            return None
        folder = Path(self.cfg.resume_from_checkpoint) / step
        # the host writes its state last: a folder without it is half a checkpoint
        complete = [path.parent for path in folder.glob("*/trainer_state.pt")]
        numbered = [path for path in complete if path.name.isdigit()]
        # as numbers: 900 comes before 1000
        return max(numbered, key=lambda path: int(path.name), default=None)

    def _finished_step_1(self) -> BilinearQKDictionary | None:
        if self.cfg.resume_from_checkpoint is None:
            return None
        folder = Path(self.cfg.resume_from_checkpoint)
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no run to resume at {folder}.")
        finished = folder / _STEP_1_DONE
        if not finished.is_dir():
            return None
        return BilinearQKDictionary.load_from_disk(finished, self.cfg.device)

    def _given_transcoders(self) -> BilinearQKDictionary | None:
        """The dictionary that `from_pretrained_path` names, if it is of this layer."""
        path = self.cfg.from_pretrained_path
        if path is None:
            return None
        dictionary = BilinearQKDictionary.from_pretrained(path, device=self.cfg.device)
        proven_layer(dictionary.cfg, self.model)
        if dictionary.cfg.layer != self.cfg.layer:
            raise ValueError(
                f"{path} is of layer {dictionary.cfg.layer}, the run of {self.cfg.layer}."
            )
        return dictionary

    # Data

    def store(self, cfg: BilinearQKRunnerConfig | None = None) -> ActivationsStore:
        """SAELens's store of layer inputs, at the start of the data; default: for step 1."""
        model: Any = self.model
        store_cfg: Any = cfg or self.cfg
        return ActivationsStore.from_config(model, store_cfg, override_dataset=self.dataset)

    def fill_input_cache(self) -> InputCache:
        """The cache that `cfg.input_cache_path` names, filled as far as the config asks."""
        cfg = self.cfg
        assert cfg.input_cache_path is not None
        identity = {
            "model_name": cfg.model_name,
            "hook_name": cfg.hook_name,
            "context_size": cfg.context_size,
            "d_in": cfg.sae.d_in,
            "dataset": cfg.dataset_path or getattr(self.dataset, "_fingerprint", ""),
            "fingerprint": cfg.sae.fingerprint[:8],
        }
        # only where it is on: caches of versions that did not have it stay valid
        if cfg.autocast_lm:
            identity["autocast_lm"] = True
        n_rows = (cfg.input_cache_tokens or cfg.training_tokens) // cfg.context_size
        folder = os.path.expandvars(cfg.input_cache_path)
        return fill_cache(self.store(), folder, n_rows, identity)

    def first_rows(
        self, n_rows: int, cache: InputCache | None = None
    ) -> Iterator[Float[Tensor, "batch pos d_model"]]:
        """The first rows of the data, batch by batch: for start, calibration and ranking.

        Args:
            n_rows: without a cache rounded up to whole batches of step 1.
            cache: where to read them; None: the model computes them.
        """
        batch_size = self.cfg.rows_per_batch
        if cache is not None:
            for start in range(0, min(n_rows, cache.n_rows), batch_size):
                yield cache.rows(slice(start, min(start + batch_size, n_rows)))
            return
        store = self.store()
        for _ in range(0, n_rows, batch_size):
            yield next(store).unflatten(0, (batch_size, self.cfg.context_size))

    def _calibration_batches(
        self, cache: InputCache | None
    ) -> Iterator[Float[Tensor, "tokens d_model"]]:
        for x in self.first_rows(_CALIBRATION_ROWS, cache):
            yield x.flatten(0, 1)

    def _check_mask_step(self) -> None:
        """Step 2 can run on the transcoders it will get."""
        settings = self.cfg.mask
        start = self._start.cfg if self._start else self.cfg.sae
        PairTable.check_memory(settings.n_candidates, start.d_key + 1)
        if settings.fine_tune and start.half_architecture != "jumprelu_transcoder":
            raise ValueError(
                "mask.fine_tune_lr needs batchtopk or topk transcoders: "
                "nothing would hold the L0 of relu."
            )

    def _check_data(self) -> None:
        """One batch from the store against a direct forward pass: whole sequences, in order.

        Raises:
            ValueError: the dataset is shorter than one batch.
            RuntimeError: the store's order is not the dataset's.
        """
        store = self.store()
        n_rows = self.cfg.rows_per_batch
        context_size = self.cfg.context_size
        try:
            tokens = store.get_batch_tokens(batch_size=n_rows, raise_at_epoch_end=True)
        except (StopIteration, RuntimeError) as end:
            raise ValueError(
                f"The dataset is shorter than one batch of {n_rows} rows of {context_size} tokens: "
                "give a longer dataset or a smaller train_batch_size_tokens."
            ) from end
        device_type = tokens.device.type
        # in the precision of the store's own forward passes, or the two differ by rounding
        with torch.autocast(device_type, torch.bfloat16, enabled=self.cfg.autocast_lm):
            expected = self.layer.inputs(tokens)  # [n_rows, context_size, d_model]
        # a second store, from the start: the first has moved on by one batch
        first_batch = next(self.store())
        batch = first_batch.unflatten(0, (n_rows, context_size))
        difference = largest(batch - expected.to(batch))
        if difference > 1e-4 * max(1.0, largest(batch)):
            raise RuntimeError(
                "SAELens's store does not serve the dataset's sequences in order (difference "
                f"{difference:.2g}): the installed sae-lens version is not one this package was "
                "tested with."
            )


def _in_order(
    model: Any,
    dataset: Any,
) -> tuple[Any, Any]:
    """The model and the dataset, wherever they were given: 0.1 took the model first."""
    if not isinstance(dataset, Model):
        return model, dataset
    warnings.warn(
        "BilinearQKTrainingRunner takes (cfg, override_dataset, override_model), as SAELens's "
        "runner does: give override_model by name.",
        DeprecationWarning,
        stacklevel=3,
    )
    return dataset, model


class ProgressTrainer(SAETrainer[Any, Any]):
    """SAETrainer whose progress bar moves every 10 steps instead of every 100."""

    def _update_pbar(
        self,
        step_output: Any,
        pbar: Any,
        update_interval: int = 10,
    ) -> None:
        super()._update_pbar(step_output, pbar, update_interval)
