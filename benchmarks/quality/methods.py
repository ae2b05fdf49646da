"""Ways to find the pairs of an attention layer, from its inputs and weights, on the same budget.

    ours              transcoders trained on the pattern (BatchTopK), then a mask with the
                      transcoders tuned along
    frozen mask       the same transcoders, the mask trained alone
    importance        the same transcoders, pairs by centred importance, nothing trained
    decoder product   the same transcoders, pairs by |M[a,b,h]| (root mean square over offsets)
    diagonal          query feature i meets only key feature i
    authors           ReLU, sqrt penalty, Kaiming start, a mask over every pair (Wynroe and Sharkey
                      2024, bugs corrected)
    residual SAE      a sparse autoencoder on the residual stream, its decoder pushed through W_Q
                      and W_K
    L2 transcoders    transcoders to queries and keys trained on squared error

The last two rank their pairs by centred importance. Every dictionary has the same number of
features per side.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from sae_lens import SAETrainer
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from torch import Tensor

import sae_lens_qk as qk
from benchmarks.mask_config import mask_config
from benchmarks.quality.penalty import sweep_penalty
from benchmarks.quality.planted import Circuit, sample
from benchmarks.quality.scores import RankedPairs
from sae_lens_qk.attention import AttentionSpec
from sae_lens_qk.feature_map import SparseFeatureMap
from sae_lens_qk.training.candidates import rank_pairs
from sae_lens_qk.training.mask import MaskTrainingSAE
from sae_lens_qk.training.transcoders import TranscodersTrainingSAE
from sae_lens_qk.weights import QKWeights

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

_AUTHORS_PENALTY = 3.1e-3
_AUTHORS_MASK_PENALTY = 1e-5
_LONGEST_RANKING = 40
"""Of the ranking by decoder products, in multiples of the planted number."""

# Seeds of fresh sequences, apart from those of training
_MASK_SEED = 500
_RANKING_SEED = 7_000_000
_L0_SEED = 7_500_000


@dataclass(frozen=True)
class Budget:
    """Data and hyper-parameters, the same for all methods; chosen on seeds that no report has."""

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

    def __init__(
        self,
        circuit: Circuit,
        budget: Budget,
        seed: int,
    ):
        self.circuit = circuit
        self.budget = budget
        self.seed = 1_000_000 * (1 + seed)

    def __next__(self) -> Tensor:
        self.seed += 1
        rows = sample(self.circuit, self.budget.n_rows, self.budget.n_pos, self.seed)
        return rows.x.flatten(0, 1)


class MethodResult(NamedTuple):
    """What a method gives."""

    best: RankedPairs
    trained_sizes: dict[int, RankedPairs] | None = None
    """Where a mask was trained for a number of pairs: what it gave."""
    notes: str = ""


Method = Callable[[Circuit, Budget, int], Iterator[tuple[str, MethodResult]]]
"""Of a circuit, a budget and a seed: names and results."""


# Methods


def on_pattern(
    circuit: Circuit,
    budget: Budget,
    seed: int,
) -> Iterator[tuple[str, MethodResult]]:
    """Transcoders trained on the pattern, and four ways to choose their pairs."""
    dictionary = transcoders(circuit, budget, seed)
    yield "ours", staged(dictionary, circuit, budget, seed)
    yield "frozen mask", staged(dictionary, circuit, budget, seed, fine_tune=False)
    yield "importance", MethodResult(rank_by_importance(dictionary, None, circuit, budget, seed))
    yield "decoder product", MethodResult(rank_by_decoders(dictionary, circuit, budget))


def diagonal(
    circuit: Circuit,
    budget: Budget,
    seed: int,
) -> Iterator[tuple[str, MethodResult]]:
    """Query feature f meets key feature f alone, in every head.

    Trained on the pattern for as many steps as the others.
    """
    dictionary = transcoders(circuit, replace(budget, steps=2), seed)
    features = torch.arange(budget.d)
    heads = torch.arange(circuit.spec.n_heads)
    head, feature = torch.cartesian_prod(heads, features).unbind(dim=1)
    pairs = torch.stack([feature, feature, head], dim=1)
    sizes = (budget.d, budget.d, circuit.spec.n_heads)
    feature_map = SparseFeatureMap(pairs, torch.ones(len(pairs)), *sizes)
    settings = qk.MaskStepConfig(
        lr=budget.lr,
        fine_tune_lr=budget.lr,
        n_pairs=len(pairs),
        sparsity_coefficient=0.0,
        unmasked_coefficient=0.0,
        prune_until=0.0,
    )
    n_steps = budget.steps + budget.mask_steps
    l0 = (budget.k, budget.k)
    ranked = with_mask(dictionary, feature_map, circuit, budget, seed, settings, n_steps, l0)
    yield "diagonal", MethodResult(ranked)


def authors(
    circuit: Circuit,
    budget: Budget,
    seed: int,
) -> Iterator[tuple[str, MethodResult]]:
    """Wynroe and Sharkey 2024: a sparsity penalty, then a mask over every pair.

    The penalty is swept until L0 is ours within 10 %.
    """

    def train(strength: float) -> tuple[qk.BilinearQKDictionary, float]:
        dictionary = transcoders(
            circuit, budget, seed, **AUTHORS_RECIPE, sparsity_coefficient=strength
        )
        return dictionary, mean_l0(dictionary, circuit, budget, seed) / budget.k

    dictionary, ratio, n_trials = sweep_penalty(train, _AUTHORS_PENALTY)
    every_pair = all_pairs(dictionary, circuit, budget, seed)
    settings = qk.MaskStepConfig(
        lr=budget.mask_lr,
        n_pairs=len(every_pair),
        n_candidates=len(every_pair),
        sparsity_coefficient=_AUTHORS_MASK_PENALTY,
        prune_until=0.0,
        polish=False,
    )
    ranked = with_mask(dictionary, every_pair, circuit, budget, seed, settings)
    notes = f"L0 {ratio:.2f} of ours after {n_trials} strengths"
    yield "authors", MethodResult(ranked, notes=notes)


def residual_sae(
    circuit: Circuit,
    budget: Budget,
    seed: int,
) -> Iterator[tuple[str, MethodResult]]:
    """SAELens's BatchTopK SAE on the residual stream; its decoder goes through W_Q and W_K."""
    data = Sequences(circuit, budget, seed)
    torch.manual_seed(seed)
    cfg = BatchTopKTrainingSAEConfig(
        d_in=circuit.spec.d_model,
        d_sae=budget.d,
        k=budget.k,
    )
    sae = BatchTopKTrainingSAE(cfg)
    fit(sae, data, budget, budget.steps, budget.lr)
    dictionary = through_weights(sae, circuit.weights, circuit.spec)
    ranked = rank_by_importance(dictionary, None, circuit, budget, seed)
    yield "residual SAE", MethodResult(ranked)


def l2_transcoders(
    circuit: Circuit, budget: Budget, seed: int
) -> Iterator[tuple[str, MethodResult]]:
    """Transcoders to queries and to keys, trained on their squared errors."""
    dictionary = transcoders(circuit, budget, seed, initialization="data", **SQUARED_ERROR)
    ranked = rank_by_importance(dictionary, None, circuit, budget, seed)
    yield "L2 transcoders", MethodResult(ranked)


METHODS: dict[str, Method] = {
    "ours": on_pattern,
    "diagonal": diagonal,
    "authors": authors,
    "residual SAE": residual_sae,
    "L2 transcoders": l2_transcoders,
}
"""What is trained; the first gives the results of four methods."""


# Step 1


def transcoders(
    circuit: Circuit, budget: Budget, seed: int, **options: Any
) -> qk.BilinearQKDictionary:
    """Step 1 of our method; `options` change the config (the authors' recipe, squared error)."""
    settings = {"k": budget.k, "decoder_bias": False, "initialization": "scores", **options}
    cfg = qk.TranscodersTrainingConfig(
        d_in=circuit.spec.d_model,
        d_query=budget.d,
        d_key=budget.d,
        attention=circuit.spec.to_dict(),
        model_name="planted",
        **settings,
    )
    data = Sequences(circuit, budget, seed)
    torch.manual_seed(seed)
    sae = TranscodersTrainingSAE(cfg)
    first_inputs = torch.cat([next(data) for _ in range(4)])
    sae.attach(circuit.weights, budget.n_pos, first_inputs)
    fit(sae, data, budget, budget.steps, budget.lr)
    if cfg.activation != "relu":
        sae.calibrate([next(data) for _ in range(8)])
    return sae.to_dictionary().requires_grad_(False)


def fit(
    sae: Any,
    data: Sequences,
    budget: Budget,
    steps: int,
    lr: float,
) -> None:
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


@torch.no_grad()
def through_weights(
    sae: BatchTopKTrainingSAE, weights: QKWeights, spec: AttentionSpec
) -> qk.BilinearQKDictionary:
    """The dictionary of an SAE on the layer's input.

    Its encoder serves both sides, decoder rows are d_f W_Q and d_f W_K. Its decoder bias, the part
    of the residual that no feature holds, becomes both decoder biases.
    """
    state = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    sae.process_state_dict_for_saving_inference(state)
    cfg = qk.BilinearQKConfig(
        d_in=spec.d_model,
        d_query=sae.cfg.d_sae,
        d_key=sae.cfg.d_sae,
        attention=spec.to_dict(),
        model_name="planted",
    )
    dictionary = qk.BilinearQKDictionary(cfg)
    b_enc = state["b_enc"]
    if sae.cfg.apply_b_dec_to_input:
        b_enc = b_enc - state["b_dec"] @ state["W_enc"]
    sides = (
        (dictionary.query, weights.W_Q, weights.b_Q),
        (dictionary.key, weights.W_K, weights.b_K),
    )
    for half, W, b in sides:
        half.W_enc.copy_(state["W_enc"])
        half.b_enc.copy_(b_enc)
        half.get_parameter("threshold").copy_(state["threshold"])
        half.W_dec.copy_(torch.einsum("fm,hmd->fhd", state["W_dec"], W).flatten(1))
        half.b_dec.copy_((torch.einsum("m,hmd->hd", state["b_dec"], W) + b).flatten())
    return dictionary.requires_grad_(False)


def mean_l0(
    dictionary: qk.BilinearQKDictionary, circuit: Circuit, budget: Budget, seed: int
) -> float:
    """Active features per token, mean of the two sides."""
    x = sample(circuit, budget.n_rows, budget.n_pos, _L0_SEED + seed).x
    return float((dictionary.encode(x) > 0).sum(dim=-1).float().mean()) / 2


# Pairs


def staged(
    dictionary: qk.BilinearQKDictionary,
    circuit: Circuit,
    budget: Budget,
    seed: int,
    fine_tune: bool = True,
) -> MethodResult:
    """Step 2 at falling numbers of pairs, each from the last.

    Pairs rank by when they left, then by importance.
    """
    n_planted = len(circuit.pairs)
    candidates = all_pairs(dictionary, circuit, budget, seed)
    n_candidates = min(len(candidates), round(budget.n_candidates * n_planted))
    candidates = candidates.select(candidates.statistics[:, 0].topk(n_candidates).indices)
    earlier_pairs = candidates.indices
    dropped = candidates.indices[:0]
    trained_sizes: dict[int, RankedPairs] = {}
    for factor in budget.stages:
        size = round(factor * n_planted)
        settings = qk.MaskStepConfig(
            lr=budget.mask_lr,
            fine_tune_lr=budget.tune_lr if fine_tune else 0.0,
            n_pairs=size,
            prune_until=0.5,
        )
        ranked = with_mask(dictionary, candidates, circuit, budget, seed, settings)
        dictionary = ranked.dictionary
        candidates = dictionary.feature_map
        newly_dropped = earlier_pairs[candidates.find(earlier_pairs) < 0]
        dropped = torch.cat([newly_dropped, dropped])
        earlier_pairs = ranked.pairs
        trained_sizes[size] = RankedPairs(
            dictionary=dictionary,
            pairs=torch.cat([ranked.pairs, dropped]),
            weights=torch.cat([ranked.weights, torch.ones(len(dropped))]),
        )
    return MethodResult(trained_sizes[size], trained_sizes)


def with_mask(
    dictionary: qk.BilinearQKDictionary,
    candidates: SparseFeatureMap,
    circuit: Circuit,
    budget: Budget,
    seed: int,
    settings: qk.MaskStepConfig,
    n_steps: int | None = None,
    l0: tuple[float, float] | None = None,
) -> RankedPairs:
    """Step 2 of our method on the given candidates.

    Args:
        n_steps: default: as the budget says.
        l0: mean active features of both sides that tuning holds; default: those of a batch.
    """
    data = Sequences(circuit, budget, seed + _MASK_SEED)
    n_steps = n_steps or budget.mask_steps
    is_active = dictionary.encode(next(data)) > 0  # [token, d_query + d_key]
    query_active, key_active = is_active.split([budget.d, budget.d], dim=1)
    if l0 is None:
        k_query = float(query_active.sum(dim=1).float().mean())
        k_key = float(key_active.sum(dim=1).float().mean())
    else:
        k_query, k_key = l0
    cfg = mask_config(dictionary, settings, len(candidates), n_steps, k_query, k_key)
    sae = MaskTrainingSAE(cfg)
    sae.attach(circuit.weights, budget.n_pos, dictionary, candidates)
    fit(sae, data, budget, n_steps, settings.fine_tune_lr or settings.lr)
    if settings.fine_tune:
        sae.calibrate([next(data) for _ in range(8)])
    trained = sae.to_dictionary().requires_grad_(False)
    return rank_by_importance(trained, trained.feature_map, circuit, budget, seed)


def rank_by_importance(
    dictionary: qk.BilinearQKDictionary,
    feature_map: SparseFeatureMap | None,
    circuit: Circuit,
    budget: Budget,
    seed: int,
) -> RankedPairs:
    """Pairs by masked importance, measured on the dictionary as it is.

    Args:
        feature_map: its pairs alone; None: all.
    """
    pairs = all_pairs(dictionary, circuit, budget, seed)
    if feature_map is not None:
        pairs = feature_map.measured_as(pairs)
    masked_importance = pairs.weights.square() * pairs.statistics[:, 0]
    order = masked_importance.argsort(descending=True)
    return RankedPairs(dictionary, pairs.indices[order], pairs.weights[order])


def rank_by_decoders(
    dictionary: qk.BilinearQKDictionary, circuit: Circuit, budget: Budget
) -> RankedPairs:
    """Every pair by |M[a,b,h]|, root mean square over the offsets of a row.

    What reading the weights alone gives.
    """
    n_heads = circuit.spec.n_heads
    pairs = SparseFeatureMap.all_pairs(dictionary.cfg.d_query, dictionary.cfg.d_key, n_heads)
    offsets = list(range(budget.n_pos)) if circuit.spec.rotary_dim else [0]
    mean_square = dictionary.pair_kernel(pairs.indices, offsets).square().mean(dim=1)
    order = mean_square.argsort(descending=True)[: _LONGEST_RANKING * len(circuit.pairs)]
    return RankedPairs(dictionary, pairs.indices[order], pairs.weights[order])


def all_pairs(
    dictionary: qk.BilinearQKDictionary, circuit: Circuit, budget: Budget, seed: int
) -> SparseFeatureMap:
    """Every pair that ever fires together on the ranking rows, with its statistics."""
    x = sample(circuit, budget.ranking_rows, budget.n_pos, _RANKING_SEED + seed).x
    n_entries = (dictionary.cfg.d_query + 1) * (dictionary.cfg.d_key + 1) * circuit.spec.n_heads
    return rank_pairs(dictionary, circuit.weights, x.split(8), n_entries)
