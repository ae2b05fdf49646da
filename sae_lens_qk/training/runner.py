"""BilinearQKTrainingRunner: both training steps in SAELens's trainer, from a config to a saved dictionary."""

import copy
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from jaxtyping import Float
from sae_lens.saes.sae import SAEMetadata, TrainingSAE
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from sae_lens_qk.config import BilinearQKRunnerConfig, MaskTrainingConfig, QKFields
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.host.support import Model, model_mode
from sae_lens_qk.host.layer import attention_spec, hook_names, layer_inputs, ov_weights, qk_weights
from sae_lens_qk.host.proof import prove_once
from sae_lens_qk.host.models import load_model
from sae_lens_qk.host.proof import check_model
from sae_lens_qk.text import load_text
from sae_lens_qk.inputs import InputCache, fill_cache
from sae_lens_qk.training.candidates import PairTable, firing_rates, rank_pairs
from sae_lens_qk.training.mask import MaskTrainingSAE
from sae_lens_qk.training.transcoders import TranscodersTrainingSAE

logger = logging.getLogger("sae_lens_qk")

_TRANSCODERS, _MASK, _STEP_1_DONE = "transcoders", "mask", "transcoders_final"
_CALIBRATION_ROWS = 160


class BilinearQKTrainingRunner:
    """Train a dictionary as configured: transcoders (step 1), then the mask over feature pairs (step 2).

    Checkpoints go to `<checkpoint_path>/transcoders/<tokens>` and `<checkpoint_path>/mask/<tokens>`; the finished
    dictionary to `output_path`. With `resume_from_checkpoint=<checkpoint_path>` a run goes on from its newest checkpoint.

    Args:
        cfg: not changed by training.
        override_model: a bridge or HookedTransformer instead of `cfg.model_name`.
        override_dataset: instead of `cfg.dataset_path`; column `cfg.text_column`, or `tokens` / `input_ids`.
    Raises:
        ValueError: a config that cannot run on this model or dataset, before anything is written.
    """

    def __init__(
        self,
        cfg: BilinearQKRunnerConfig,
        override_model: Model | None = None,
        override_dataset: Dataset | IterableDataset | None = None,
    ):
        self.model: Model = override_model or load_model(
            cfg.model_name, cfg.llm_device or cfg.device
        )
        spec = attention_spec(
            self.model, cfg.layer
        )  # raises for a layer out of range or an unsupported model
        mode = model_mode(self.model)
        if mode == "hooked":
            raise ValueError(
                "An unprocessed HookedTransformer has no hook at the input of W_Q and W_K: train on a bridge "
                "(qk.load_model) or on HookedTransformer.from_pretrained."
            )
        prove_once(self.model, cfg.layer)
        self.weights = qk_weights(self.model, cfg.layer)
        shared: dict[str, Any] = dict(
            d_in=spec.d_model,
            attention=spec.to_dict(),
            model_name=cfg.model_name,
            model_mode=mode,
            layer=cfg.layer,
            hook_name=hook_names(self.model, cfg.layer).input,
            fingerprint=list(self.weights.fingerprint()),
            device=cfg.device,
            dtype=cfg.dtype,
        )
        self.cfg = replace(cfg, hook_name=shared["hook_name"], sae=replace(cfg.sae, **shared))
        self.dataset = (
            override_dataset
            if override_dataset is not None
            else load_text(cfg.dataset_path, cfg.text_column, cfg.streaming)
        )
        self._start = self._given_transcoders()
        if cfg.mask.training_tokens:
            start = self._start.cfg if self._start else cfg.sae
            PairTable.check_memory(cfg.mask.n_candidates, start.d_key + 1)
            if cfg.mask.fine_tune_lr and start.half_architecture != "jumprelu_transcoder":
                raise ValueError(
                    "mask.fine_tune_lr needs batchtopk or topk transcoders: nothing would hold the L0 of relu."
                )
        self._check_data()

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

    def _run_transcoders(self, cache: InputCache | None) -> BilinearQKDictionary:
        sae = TranscodersTrainingSAE(replace(self.cfg.sae, metadata=SAEMetadata()))
        checkpoint = self._newest_checkpoint(_TRANSCODERS)
        first = None if checkpoint else torch.cat(list(self._some_rows(cache, 64))).flatten(0, 1)
        sae.attach(self.weights, self.cfg.context_size, first)
        self._fit(sae, self.cfg, _TRANSCODERS, cache, checkpoint, seed=self.cfg.seed)
        if self.cfg.sae.activation != "relu":
            rows = (batch.flatten(0, 1) for batch in self._some_rows(cache, _CALIBRATION_ROWS))
            sae.cfg.metadata.calibration = sae.calibrate(
                rows
            )  # L0 and KL before and after, published in cfg.json
            logger.info("thresholds calibrated to mean L0 = k: %s", sae.cfg.metadata.calibration)
        dictionary = sae.to_dictionary()
        if self.cfg.checkpoint_path is not None:
            dictionary.save_model(Path(self.cfg.checkpoint_path) / _STEP_1_DONE)
        return dictionary

    def _run_mask(
        self, dictionary: BilinearQKDictionary, cache: InputCache | None
    ) -> BilinearQKDictionary:
        settings, checkpoint = self.cfg.mask, self._newest_checkpoint(_MASK)
        # ranking is deterministic, so a resumed run finds the same candidates
        n_rows = max(2, settings.ranking_tokens // self.cfg.context_size)
        if settings.compact:
            rates = firing_rates(dictionary, self._some_rows(cache, n_rows))
            dictionary = dictionary.compact(rates.query > 0, rates.key > 0)
        candidates = rank_pairs(
            dictionary, self.weights, self._some_rows(cache, n_rows), settings.n_candidates
        )
        steps = settings.training_tokens // self.cfg.mask_batch_size_tokens
        shared = {
            name: value
            for name, value in vars(dictionary.cfg).items()
            if name in QKFields.__dataclass_fields__
        }
        fine_tune = settings.fine_tune_lr > 0
        # tuning holds the L0 that the dictionary has
        rates = (
            firing_rates(dictionary, self._some_rows(cache, _CALIBRATION_ROWS))
            if fine_tune
            else None
        )
        mask_cfg = MaskTrainingConfig(
            **{**shared, "n_pairs": len(candidates)},
            d_in=dictionary.cfg.d_in,
            dtype=self.cfg.dtype,
            device=self.cfg.device,
            half_architecture=dictionary.cfg.half_architecture,
            metadata=copy.deepcopy(dictionary.cfg.metadata),
            sparsity_coefficient=settings.sparsity_coefficient,
            max_pairs=settings.n_pairs,
            prune_steps=int(steps * settings.prune_until),
            polish=settings.polish,
            fine_tune=fine_tune,
            mask_speed=settings.lr / settings.fine_tune_lr if fine_tune else 1.0,
            k_query=float(rates.query.sum()) if rates else 0.0,
            k_key=float(rates.key.sum()) if rates else 0.0,
            unmasked_coefficient=settings.unmasked_coefficient,
            output_coefficient=settings.output_coefficient,
        )
        sae = MaskTrainingSAE(mask_cfg)
        sae.attach(
            self.weights,
            self.cfg.context_size,
            dictionary,
            candidates,
            ov_weights(self.model, self.cfg.layer),
        )
        self._fit(sae, self.cfg.mask_step(), _MASK, cache, checkpoint, seed=self.cfg.seed + 1)
        if not fine_tune:
            return sae.to_dictionary()
        sae.calibrate(batch.flatten(0, 1) for batch in self._some_rows(cache, _CALIBRATION_ROWS))
        tuned = sae.to_dictionary()
        measured = rank_pairs(
            tuned, self.weights, self._some_rows(cache, n_rows), settings.n_candidates
        )
        tuned.set_feature_map(tuned.feature_map.measured_as(measured))
        return tuned

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
        store = self._store(cfg) if cache is None else None
        data: Iterator[Tensor] = (
            store if store is not None else cache.batches(cfg.rows_per_batch, seed=seed)
        )  # type: ignore[union-attr]
        trainer = ProgressTrainer(trainer_cfg, sae, data)  # type: ignore[arg-type]
        if checkpoint is not None:
            logger.info("resuming %s from %s", step, checkpoint)
            trainer.load_trainer_state(checkpoint)
            trainer.n_training_steps += 1  # the host saves it before counting the step
            trainer.checkpoint_thresholds = [
                t for t in trainer.checkpoint_thresholds if t > trainer.n_training_samples
            ]
            sae.load_weights_from_checkpoint(checkpoint)
            if store is not None:
                self._skip_rows(store, trainer.n_training_samples // self.cfg.context_size)
            else:
                data.step = trainer.n_training_steps  # type: ignore[union-attr]
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

    def _skip_rows(self, store: ActivationsStore, n_rows: int) -> None:
        """Draw the rows a resumed run has seen, without forward passes and as the store would have: at the end of an epoch
        it drops a partly filled batch. (The store's own state counts documents, which are not whole rows.)"""
        full, rest = divmod(n_rows, self.cfg.store_batch_size_prompts)
        for size in [self.cfg.store_batch_size_prompts] * full + [rest] * (rest > 0):
            try:
                store.get_batch_tokens(batch_size=size, raise_at_epoch_end=True)
            except StopIteration:
                store.get_batch_tokens(batch_size=size)

    def _check_data(self) -> None:
        """One batch from the store against a direct forward pass: whole sequences, in order.

        Raises:
            ValueError: the dataset is shorter than one batch.
            RuntimeError: the store's order is not the dataset's.
        """
        store, n_rows = self._store(), self.cfg.rows_per_batch
        try:
            tokens = store.get_batch_tokens(batch_size=n_rows, raise_at_epoch_end=True)
        except (StopIteration, RuntimeError) as end:
            raise ValueError(
                f"The dataset is shorter than one batch of {n_rows} rows of {self.cfg.context_size} tokens: "
                "give a longer dataset or a smaller train_batch_size_tokens."
            ) from end
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.cfg.autocast_lm):
            expected = layer_inputs(self.model, self.cfg.layer, tokens)
        batch = next(self._store()).unflatten(0, (n_rows, self.cfg.context_size))
        difference = float((batch - expected.to(batch)).abs().max())
        if difference > 1e-4 * max(1.0, float(batch.abs().max())):
            raise RuntimeError(
                f"SAELens's store does not serve the dataset's sequences in order (difference {difference:.2g}): the "
                "installed sae-lens version is not one this package was tested with."
            )

    def _store(self, cfg: BilinearQKRunnerConfig | None = None) -> ActivationsStore:
        return ActivationsStore.from_config(
            self.model, cfg or self.cfg, override_dataset=self.dataset
        )  # type: ignore[arg-type]

    def fill_input_cache(self) -> InputCache:
        """The cache of layer inputs that `cfg.input_cache_path` names, filled as far as the config asks."""
        cfg = self.cfg
        assert cfg.input_cache_path is not None
        identity = dict(
            model_name=cfg.model_name,
            hook_name=cfg.hook_name,
            context_size=cfg.context_size,
            d_in=cfg.sae.d_in,
            dataset=cfg.dataset_path or getattr(self.dataset, "_fingerprint", ""),
            fingerprint=cfg.sae.fingerprint[:8],
            **({"autocast_lm": True} if cfg.autocast_lm else {}),
        )
        n_rows = (cfg.input_cache_tokens or cfg.training_tokens) // cfg.context_size
        return fill_cache(self._store(), os.path.expandvars(cfg.input_cache_path), n_rows, identity)

    def _some_rows(
        self, cache: InputCache | None, n_rows: int
    ) -> Iterator[Float[Tensor, "batch pos d_model"]]:
        """The first rows of the data, in small batches: for initialisation, calibration and ranking."""
        size = self.cfg.rows_per_batch
        if cache is not None:
            for row in range(0, min(n_rows, cache.n_rows), size):
                yield cache.rows(slice(row, min(row + size, n_rows)))
            return
        store = self._store()
        for _ in range(0, n_rows, size):
            yield next(store).unflatten(0, (size, self.cfg.context_size))

    def _newest_checkpoint(self, step: str) -> Path | None:
        if self.cfg.resume_from_checkpoint is None:
            return None
        folder = Path(self.cfg.resume_from_checkpoint) / step
        complete = [
            path.parent for path in folder.glob("*/trainer_state.pt") if path.parent.name.isdigit()
        ]
        return max(complete, key=lambda path: int(path.name), default=None)

    def _given_transcoders(self) -> BilinearQKDictionary | None:
        if self.cfg.from_pretrained_path is None:
            return None
        given = BilinearQKDictionary.from_pretrained(
            self.cfg.from_pretrained_path, device=self.cfg.device
        )
        check_model(given, self.model)
        if given.cfg.layer != self.cfg.layer:
            raise ValueError(
                f"{self.cfg.from_pretrained_path} is of layer {given.cfg.layer}, the run of {self.cfg.layer}."
            )
        return given

    def _finished_step_1(self) -> BilinearQKDictionary | None:
        if self.cfg.resume_from_checkpoint is None:
            return None
        folder = Path(self.cfg.resume_from_checkpoint)
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no run to resume at {folder}.")
        done = folder / _STEP_1_DONE
        return BilinearQKDictionary.load_from_disk(done, self.cfg.device) if done.is_dir() else None


class ProgressTrainer(SAETrainer[Any, Any]):
    """SAETrainer whose progress bar moves every 10 steps instead of every 100."""

    def _update_pbar(self, step_output: Any, pbar: Any, update_interval: int = 10) -> None:
        super()._update_pbar(step_output, pbar, update_interval)
