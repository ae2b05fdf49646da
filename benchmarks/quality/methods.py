"""Ways to find the pairs of an attention layer, each from the layer's inputs and weights alone, on the same budget.

    ours              transcoders trained on the pattern (BatchTopK), then a mask with the transcoders tuned along
    frozen mask       the same transcoders, the mask trained alone
    importance        the same transcoders, pairs by centred importance, nothing trained
    decoder product   the same transcoders, pairs by |M[a,b,h]| (root mean square over offsets)
    diagonal          query feature i meets only key feature i
    authors           ReLU, sqrt penalty, Kaiming start, a mask over every pair (Wynroe and Sharkey 2024, bugs corrected)
    residual SAE      a sparse autoencoder on the residual stream, its decoder pushed through W_Q and W_K
    L2 transcoders    transcoders to queries and keys trained on squared error

The last two rank their pairs by centred importance. Every dictionary has the same number of features a side.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from sae_lens import SAETrainer
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from torch import Tensor

import sae_lens_qk as qk
from sae_lens_qk.attention import AttentionSpec
from sae_lens_qk.config import BilinearQKConfig, MaskTrainingConfig, QKFields
from sae_lens_qk.feature_map import SparseFeatureMap
from sae_lens_qk.weights import QKWeights
from sae_lens_qk.training.candidates import rank_pairs
from sae_lens_qk.training.mask import MaskTrainingSAE
from sae_lens_qk.training.transcoders import TranscodersTrainingSAE

from .planted import Circuit, sample
from .scores import Ranked


@dataclass(frozen=True)
class Budget:
    """Data and hyper-parameters, the same for all methods; chosen on other seeds than those reported."""

    steps: int = 1000
    mask_steps: int = 150
    n_rows: int = 24
    n_pos: int = 48
    lr: float = 5e-3
    mask_lr: float = 1e-2
    tune_lr: float = 1e-3
    d: int = 160
    k: float = 3.6
    n_candidates: float = 8.0
    """Pairs that enter step 2, in multiples of the planted number (which every method is told)."""
    stages: tuple[float, ...] = (4.0, 2.0, 1.4, 1.0, 0.5)
    """Numbers of pairs for which step 2 is run, one after the other."""
    ranking_rows: int = 128


class Sequences(Iterator[Tensor]):
    """Endless batches of fresh sequences of a planted layer, for SAETrainer."""

    def __init__(self, circuit: Circuit, budget: Budget, seed: int):
        self.circuit, self.budget, self.seed = circuit, budget, 1_000_000 * (1 + seed)

    def __next__(self) -> Tensor:
        self.seed += 1
        return sample(self.circuit, self.budget.n_rows, self.budget.n_pos, self.seed).x.flatten(
            0, 1
        )


class Found(NamedTuple):
    """What a method found."""

    best: Ranked
    by_size: dict[int, Ranked] | None = None
    """Where a mask was trained for a number of pairs: what it gave."""
    notes: str = ""


Method = Callable[[Circuit, Budget, int], Iterator[tuple[str, Found]]]

_LONGEST = 40
_AUTHORS_PENALTY, _AUTHORS_MASK_PENALTY = 3.1e-3, 1e-5
_LEAST_STRENGTHS, _MOST_STRENGTHS, _NEAR = 3, 6, 0.1

AUTHORS_RECIPE: dict[str, Any] = {
    "activation": "relu",
    "initialization": "kaiming",
    "decoder_bias": True,
}
SQUARED_ERROR: dict[str, Any] = {
    "kl_full_coefficient": 0.0,
    "kl_query_coefficient": 0.0,
    "kl_key_coefficient": 0.0,
    "mse_coefficient": 1.0,
}
"""Changes of step 1's config that make it another method."""


def transcoders(
    circuit: Circuit, budget: Budget, seed: int, **options: Any
) -> qk.BilinearQKDictionary:
    """Step 1 of our method; `options` change the config (the authors' recipe, squared error)."""
    cfg = qk.TranscodersTrainingConfig(
        d_in=circuit.spec.d_model,
        d_query=budget.d,
        d_key=budget.d,
        attention=circuit.spec.to_dict(),
        model_name="planted",
        **{"k": budget.k, "decoder_bias": False, "initialization": "scores", **options},
    )
    data = Sequences(circuit, budget, seed)
    torch.manual_seed(seed)
    sae = TranscodersTrainingSAE(cfg)
    sae.attach(circuit.weights, budget.n_pos, torch.cat([next(data) for _ in range(4)]))
    fit(sae, data, budget, budget.steps, budget.lr)
    if cfg.activation != "relu":
        sae.calibrate([next(data) for _ in range(8)])
    return sae.to_dictionary().requires_grad_(False)


def staged(
    dictionary: qk.BilinearQKDictionary, circuit: Circuit, budget: Budget, seed: int, **options: Any
) -> Found:
    """Step 2 at falling numbers of pairs, each from the last; pairs rank by when they left, then by importance."""
    listed = all_pairs(dictionary, circuit, budget, seed)
    n_candidates = min(len(listed), round(budget.n_candidates * len(circuit.pairs)))
    listed = listed.select(listed.statistics[:, 0].topk(n_candidates).indices)
    left, before, by_size = listed.indices[:0], listed.indices, {}
    for factor in budget.stages:
        size = round(factor * len(circuit.pairs))
        found = with_mask(dictionary, listed, circuit, budget, seed, max_pairs=size, **options)
        dictionary, listed = found.dictionary, found.dictionary.feature_map
        gone = before[listed.find(before) < 0]
        left, before = torch.cat([gone, left]), found.pairs
        weights = torch.cat([found.weights, torch.ones(len(left))])
        by_size[size] = Ranked(dictionary, torch.cat([found.pairs, left]), weights)
    return Found(by_size[size], by_size)


def with_mask(
    dictionary: qk.BilinearQKDictionary,
    candidates: SparseFeatureMap,
    circuit: Circuit,
    budget: Budget,
    seed: int,
    steps: int | None = None,
    **options: Any,
) -> Ranked:
    """Step 2 of our method on the given candidates; `options` change its config."""
    data = Sequences(circuit, budget, seed + 500)
    steps, tune = steps or budget.mask_steps, options.get("fine_tune", True)
    acts = dictionary.encode(next(data)) > 0
    k_query, k_key = (
        float(side.sum(dim=1).float().mean()) for side in acts.split([budget.d, budget.d], dim=1)
    )
    shared = {
        name: value
        for name, value in vars(dictionary.cfg).items()
        if name in QKFields.__dataclass_fields__
    }
    values: dict[str, Any] = {
        **shared,
        "n_pairs": len(candidates),
        "d_in": dictionary.cfg.d_in,
        "half_architecture": dictionary.cfg.half_architecture,
        "prune_steps": steps // 2,
        "sparsity_coefficient": 1e-6,
        "fine_tune": tune,
        "k_query": k_query,
        "k_key": k_key,
        "mask_speed": budget.mask_lr / budget.tune_lr if tune else 1.0,
        **options,
    }
    sae = MaskTrainingSAE(MaskTrainingConfig(**values))
    sae.attach(circuit.weights, budget.n_pos, dictionary, candidates)
    fit(sae, data, budget, steps, budget.tune_lr if tune else budget.mask_lr)
    if tune:
        sae.calibrate([next(data) for _ in range(8)])
    found = sae.to_dictionary().requires_grad_(False)
    return by_importance(found, found.feature_map, circuit, budget, seed)


def by_importance(
    dictionary: qk.BilinearQKDictionary,
    kept: SparseFeatureMap | None,
    circuit: Circuit,
    budget: Budget,
    seed: int,
) -> Ranked:
    """Pairs by weight^2 times centred importance, measured on the dictionary as it is; `kept`: those alone."""
    everything = all_pairs(dictionary, circuit, budget, seed)
    listed = everything if kept is None else kept.measured_as(everything)
    order = (listed.weights.square() * listed.statistics[:, 0]).argsort(descending=True)
    return Ranked(dictionary, listed.indices[order], listed.weights[order])


def all_pairs(
    dictionary: qk.BilinearQKDictionary, circuit: Circuit, budget: Budget, seed: int
) -> SparseFeatureMap:
    """Every pair that ever fires together on the ranking rows, with its statistics."""
    x = sample(circuit, budget.ranking_rows, budget.n_pos, 7_000_000 + seed).x
    entries = (dictionary.cfg.d_query + 1) * (dictionary.cfg.d_key + 1) * circuit.spec.n_heads
    return rank_pairs(dictionary, circuit.weights, x.split(8), entries)


def mean_l0(
    dictionary: qk.BilinearQKDictionary, circuit: Circuit, budget: Budget, seed: int
) -> float:
    """Active features a token, mean of the two sides."""
    x = sample(circuit, budget.n_rows, budget.n_pos, 7_500_000 + seed).x
    return float((dictionary.encode(x) > 0).sum(dim=-1).float().mean()) / 2


@torch.no_grad()
def through_weights(
    sae: BatchTopKTrainingSAE, weights: QKWeights, spec: AttentionSpec
) -> qk.BilinearQKDictionary:
    """The dictionary of an SAE on the layer's input: its encoder on both sides, decoder rows d_f W_Q and d_f W_K.

    Its decoder bias, the part of the residual that no feature holds, becomes both decoder biases.
    """
    state = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    sae.process_state_dict_for_saving_inference(state)
    cfg = BilinearQKConfig(
        d_in=spec.d_model,
        d_query=sae.cfg.d_sae,
        d_key=sae.cfg.d_sae,
        attention=spec.to_dict(),
        model_name="planted",
    )
    made = qk.BilinearQKDictionary(cfg)
    b_enc = state["b_enc"] - state["b_dec"] @ state["W_enc"] * sae.cfg.apply_b_dec_to_input
    for half, W, b in (
        (made.query, weights.W_Q, weights.b_Q),
        (made.key, weights.W_K, weights.b_K),
    ):
        half.W_enc.copy_(state["W_enc"])
        half.b_enc.copy_(b_enc)
        half.get_parameter("threshold").copy_(state["threshold"])
        half.W_dec.copy_(torch.einsum("fm,hmd->fhd", state["W_dec"], W).flatten(1))
        half.b_dec.copy_((torch.einsum("m,hmd->hd", state["b_dec"], W) + b).flatten())
    return made.requires_grad_(False)


def fit(sae: Any, data: Sequences, budget: Budget, steps: int, lr: float) -> None:
    tokens = budget.n_rows * budget.n_pos
    cfg = qk.BilinearQKRunnerConfig(
        context_size=budget.n_pos,
        train_batch_size_tokens=tokens,
        training_tokens=steps * tokens,
        lr=lr,
        lr_warm_up_steps=min(50, steps // 4),
        n_batches_in_buffer=budget.n_rows,
        checkpoint_path=None,
        n_checkpoints=0,
        device="cpu",
    )
    SAETrainer(cfg.to_sae_trainer_config(), sae, data).fit()
    sae.eval()


def on_pattern(circuit: Circuit, budget: Budget, seed: int) -> Iterator[tuple[str, Found]]:
    """Transcoders trained on the pattern, and four ways to choose their pairs."""
    dictionary = transcoders(circuit, budget, seed)
    yield "ours", staged(dictionary, circuit, budget, seed)
    yield "frozen mask", staged(dictionary, circuit, budget, seed, fine_tune=False)
    yield "importance", Found(by_importance(dictionary, None, circuit, budget, seed))
    yield "decoder product", Found(by_decoder_product(dictionary, circuit, budget))


def by_decoder_product(
    dictionary: qk.BilinearQKDictionary, circuit: Circuit, budget: Budget
) -> Ranked:
    """Every pair by |M[a,b,h]|, root mean square over the offsets of a row: what reading the weights alone gives."""
    listed = SparseFeatureMap.all_pairs(
        dictionary.cfg.d_query, dictionary.cfg.d_key, circuit.spec.n_heads
    )
    offsets = list(range(budget.n_pos)) if circuit.spec.rotary_dim else [0]
    order = (
        dictionary.pair_kernel(listed.indices, offsets)
        .square()
        .mean(dim=1)
        .argsort(descending=True)
    )
    longest = order[: _LONGEST * len(circuit.pairs)]
    return Ranked(dictionary, listed.indices[longest], listed.weights[longest])


def diagonal(circuit: Circuit, budget: Budget, seed: int) -> Iterator[tuple[str, Found]]:
    """Query feature f meets key feature f alone, in every head; trained on the pattern for as many steps as the others."""
    dictionary = transcoders(circuit, replace(budget, steps=2), seed)
    features = torch.arange(budget.d)
    listed = torch.cat(
        [
            torch.stack([features, features, features * 0 + h], dim=1)
            for h in range(circuit.spec.n_heads)
        ]
    )
    pairs = SparseFeatureMap(
        listed, torch.ones(len(listed)), budget.d, budget.d, circuit.spec.n_heads
    )
    slower = replace(budget, tune_lr=budget.lr, mask_lr=budget.lr)
    yield (
        "diagonal",
        Found(
            with_mask(
                dictionary,
                pairs,
                circuit,
                slower,
                seed,
                steps=budget.steps + budget.mask_steps,
                max_pairs=len(pairs),
                sparsity_coefficient=0.0,
                unmasked_coefficient=0.0,
                prune_steps=0,
                k_query=budget.k,
                k_key=budget.k,
            )
        ),
    )


def authors(circuit: Circuit, budget: Budget, seed: int) -> Iterator[tuple[str, Found]]:
    """Wynroe and Sharkey 2024: the penalty is swept until L0 is ours within 10 %, then a mask over every pair is trained."""

    def train(strength: float) -> tuple[qk.BilinearQKDictionary, float]:
        made = transcoders(circuit, budget, seed, **AUTHORS_RECIPE, sparsity_coefficient=strength)
        return made, mean_l0(made, circuit, budget, seed) / budget.k

    dictionary, ratio, n_tried = sweep_penalty(train, _AUTHORS_PENALTY)
    everything = all_pairs(dictionary, circuit, budget, seed)
    found = with_mask(
        dictionary,
        everything,
        circuit,
        budget,
        seed,
        max_pairs=len(everything),
        fine_tune=False,
        prune_steps=0,
        sparsity_coefficient=_AUTHORS_MASK_PENALTY,
        polish=False,
    )
    yield "authors", Found(found, notes=f"L0 {ratio:.2f} of ours after {n_tried} strengths")


class Swept(NamedTuple):
    """The dictionary whose L0 came nearest, its L0 over the wanted one, and how many strengths were tried."""

    dictionary: qk.BilinearQKDictionary
    ratio: float
    n_tried: int


def sweep_penalty(
    train: Callable[[float], tuple[qk.BilinearQKDictionary, float]], first: float
) -> Swept:
    """At least 3 strengths of a penalty, at most 6, until L0 is within 10 % of the wanted one.

    Args:
        train: strength -> dictionary and its L0 over the wanted one.
        first: strength to begin with.
    """
    strength, tried = first, {}
    for _ in range(_MOST_STRENGTHS):
        tried[strength] = train(strength)
        if (
            len(tried) >= _LEAST_STRENGTHS
            and min(abs(ratio - 1) for _, ratio in tried.values()) <= _NEAR
        ):
            break
        strength = next_strength({at: ratio for at, (_, ratio) in tried.items()})
    return Swept(*min(tried.values(), key=lambda made: abs(made[1] - 1)), len(tried))


def next_strength(ratios: dict[float, float]) -> float:
    """A stronger or weaker penalty, between the two that enclose a ratio of 1 where there are such.

    Args:
        ratios: L0 over the wanted one, by strength.
    """
    low = [strength for strength, ratio in ratios.items() if ratio > 1]
    high = [strength for strength, ratio in ratios.items() if ratio <= 1]
    if low and high:
        return math.sqrt(max(low) * min(high))
    return 3 * max(low) if low else min(high) / 3


def residual_sae(circuit: Circuit, budget: Budget, seed: int) -> Iterator[tuple[str, Found]]:
    """SAELens's BatchTopK SAE on the residual stream; its decoder through W_Q and W_K gives the dictionary."""
    data = Sequences(circuit, budget, seed)
    torch.manual_seed(seed)
    cfg = BatchTopKTrainingSAEConfig(d_in=circuit.spec.d_model, d_sae=budget.d, k=budget.k)
    sae = BatchTopKTrainingSAE(cfg)
    fit(sae, data, budget, budget.steps, budget.lr)
    dictionary = through_weights(sae, circuit.weights, circuit.spec)
    yield "residual SAE", Found(by_importance(dictionary, None, circuit, budget, seed))


def l2_transcoders(circuit: Circuit, budget: Budget, seed: int) -> Iterator[tuple[str, Found]]:
    """Transcoders to queries and to keys, trained on their squared errors."""
    dictionary = transcoders(circuit, budget, seed, initialization="data", **SQUARED_ERROR)
    yield "L2 transcoders", Found(by_importance(dictionary, None, circuit, budget, seed))


METHODS: dict[str, Method] = {
    "ours": on_pattern,
    "diagonal": diagonal,
    "authors": authors,
    "residual SAE": residual_sae,
    "L2 transcoders": l2_transcoders,
}
"""What is trained; the first gives the results of four methods."""
