"""Smaller dictionaries: what compaction keeps and drops, and how many bytes are written."""

import json
from pathlib import Path

import pytest
import torch
from comparing import assert_near
from random_dictionaries import (
    D_KEY,
    D_QUERY,
    N_PAIRS,
    SOURCES,
    is_in_step,
    random_dictionary,
    random_x,
)
from sae_lens import SAE
from safetensors.torch import load_file
from tiny_dictionaries import N_DEAD, tiny_dictionary
from tiny_models import tiny_tokens
from torch import Tensor

import sae_lens_qk as qk
from sae_lens_qk.pretrained.registry import recipe_file

SILENT_QUERY = [0, 17, 18, D_QUERY - 1]
SILENT_KEY = [3, 100, D_KEY - 1]
LIVE_QUERY_NUMBERS = [a for a in range(D_QUERY) if a not in SILENT_QUERY]
LIVE_KEY_NUMBERS = [b for b in range(D_KEY) if b not in SILENT_KEY]


def all_but(
    d: int,
    features: list[int],
) -> Tensor:
    """Mask [d] of the features that stay."""
    mask = torch.ones(d, dtype=torch.bool)
    mask[features] = False
    return mask


LIVE_QUERY = all_but(D_QUERY, SILENT_QUERY)
LIVE_KEY = all_but(D_KEY, SILENT_KEY)


def dictionary_with_silent_features(
    half: str = "jumprelu_transcoder", **cfg
) -> qk.BilinearQKDictionary:
    d = random_dictionary(half, **cfg)
    d.query.b_enc[SILENT_QUERY] = -100.0
    d.key.b_enc[SILENT_KEY] = -100.0
    return d


def original_pairs(d: qk.BilinearQKDictionary) -> dict[tuple, list[float]]:
    """Weight and statistics by pair, with the features' first numbers; constants as None."""
    query_numbers = [*(d.cfg.query_numbers or range(D_QUERY)), None]
    key_numbers = [*(d.cfg.key_numbers or range(D_KEY)), None]
    weights = d.feature_map.weights.tolist()
    statistics = d.feature_map.statistics.tolist()
    pairs = {}
    for row, (a, b, head) in enumerate(d.feature_map.indices.tolist()):
        pairs[query_numbers[a], key_numbers[b], head] = [weights[row], *statistics[row]]
    return pairs


# Without dead features


@pytest.mark.parametrize("half", ["transcoder", "jumprelu_transcoder"])
def test_compacting_away_silent_features_changes_no_pattern(half, tmp_path):
    d = dictionary_with_silent_features(half)
    x = random_x()
    compact = d.compact(LIVE_QUERY, LIVE_KEY)
    assert (compact.cfg.d_query, compact.cfg.d_key) == (D_QUERY - 4, D_KEY - 3)
    assert compact.cfg.d_sae == D_QUERY + D_KEY - 7
    assert compact.cfg.original_sizes == (D_QUERY, D_KEY)
    assert compact.cfg.query_numbers == LIVE_QUERY_NUMBERS
    assert type(compact.query) is type(d.query)
    assert torch.equal(compact.encode_query(x), d.encode_query(x)[..., LIVE_QUERY_NUMBERS])
    assert torch.equal(compact.encode_key(x), d.encode_key(x)[..., LIVE_KEY_NUMBERS])
    for source in SOURCES:
        assert_near(compact.pattern(x, source), d.pattern(x, source), 1e-6)
    compact.save_model(tmp_path)
    loaded = qk.BilinearQKDictionary.load_from_disk(tmp_path)
    assert loaded.cfg.to_dict() == compact.cfg.to_dict()
    assert torch.equal(loaded.pattern(x, "feature_map"), compact.pattern(x, "feature_map"))


def test_compacting_leaves_the_original_alone():
    d = dictionary_with_silent_features()
    state_before = {name: tensor.clone() for name, tensor in d.state_dict().items()}
    d.compact(LIVE_QUERY, LIVE_KEY)
    for name, tensor in d.state_dict().items():
        assert torch.equal(tensor, state_before[name]), name
    assert d.cfg.original_sizes == (D_QUERY, D_KEY)
    assert d.cfg.query_numbers == []
    assert d.cfg.n_pairs == N_PAIRS


@pytest.mark.parametrize("source", SOURCES)
def test_compacting_away_live_features_is_silencing_them(source):
    d = random_dictionary()
    x = random_x()
    dropped_query = list(range(2, D_QUERY, 3))
    dropped_key = list(range(0, D_KEY, 2))
    compact = d.compact(all_but(D_QUERY, dropped_query), all_but(D_KEY, dropped_key))

    def silence_query(acts, hook):
        return acts.index_fill(-1, torch.tensor(dropped_query), 0.0)

    def silence_key(acts, hook):
        return acts.index_fill(-1, torch.tensor(dropped_key), 0.0)

    hooks = [
        ("query.hook_sae_acts_post", silence_query),
        ("key.hook_sae_acts_post", silence_key),
    ]
    with d.hooks(fwd_hooks=hooks):
        silenced = d.pattern(x, source)
    assert_near(compact.pattern(x, source), silenced, 1e-6)
    assert (silenced - d.pattern(x, source)).abs().max() > 0.01


def test_compacting_drops_the_pairs_of_dropped_features_and_keeps_the_others():
    d = dictionary_with_silent_features()
    pairs_before = original_pairs(d)
    nothing_dropped = d.compact(all_but(D_QUERY, []), all_but(D_KEY, []))
    assert original_pairs(nothing_dropped) == pairs_before
    compact = d.compact(LIVE_QUERY, LIVE_KEY)
    expected = {
        (a, b, head): row
        for (a, b, head), row in pairs_before.items()
        if a not in SILENT_QUERY and b not in SILENT_KEY
    }
    assert original_pairs(compact) == expected
    assert compact.cfg.n_pairs == len(compact.feature_map) == len(expected) < N_PAIRS
    assert any(a is None for a, _, _ in expected), "pairs with the constants stay"
    assert any(b is None for _, b, _ in expected)


def test_compacting_twice_composes():
    d = dictionary_with_silent_features()
    first = d.compact(all_but(D_QUERY, SILENT_QUERY[:2]), all_but(D_KEY, []))
    others = [first.cfg.query_numbers.index(a) for a in SILENT_QUERY[2:]]
    second = first.compact(all_but(D_QUERY - 2, others), LIVE_KEY)
    once = d.compact(LIVE_QUERY, LIVE_KEY)
    assert second.cfg.to_dict() == once.cfg.to_dict()
    assert second.cfg.original_sizes == (D_QUERY, D_KEY)
    for name, tensor in once.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name


def test_compacting_forgets_the_metrics_and_keeps_the_settings(gpt2_bridge, tmp_path):
    d = tiny_dictionary(gpt2_bridge)
    d.metrics = qk.evaluate(d, gpt2_bridge, tiny_tokens(3, 17), baselines=())
    d.runner_cfg = qk.BilinearQKRunnerConfig().to_dict()
    d_query = d.cfg.d_query
    d_key = d.cfg.d_key
    dead_query = list(range(d_query - N_DEAD, d_query))
    dead_key = list(range(d_key - N_DEAD, d_key))
    compact = d.compact(all_but(d_query, dead_query), all_but(d_key, dead_key))
    assert compact.metrics is None
    assert compact.runner_cfg == d.runner_cfg
    assert d.metrics["n_tokens"] == 3 * 17
    d.save_model(tmp_path)
    assert (tmp_path / "metrics.json").is_file()
    compact.save_model(tmp_path)
    assert not (tmp_path / "metrics.json").exists(), "those of the dictionary saved here before"
    loaded = qk.BilinearQKDictionary.from_pretrained(str(tmp_path), verify="strict")
    assert loaded.metrics is None
    assert loaded.runner_cfg == json.loads(json.dumps(d.runner_cfg))
    again = loaded.compact(all_but(d_query - N_DEAD, [3]), all_but(d_key - N_DEAD, [3]))
    assert again.cfg.query_numbers == [a for a in range(d_query - N_DEAD) if a != 3]
    assert again.cfg.original_sizes == (d_query, d_key)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_compacting_keeps_the_dtype_and_needs_no_map(dtype):
    d = dictionary_with_silent_features(n_pairs=0).to(dtype)
    compact = d.compact(LIVE_QUERY, LIVE_KEY)
    assert is_in_step(compact, dtype)
    assert not compact.has_feature_map


NO_QUERY = torch.zeros(D_QUERY, dtype=torch.bool)
NO_KEY = torch.zeros(D_KEY, dtype=torch.bool)


@pytest.mark.parametrize(
    ("live_query", "live_key"),
    [
        pytest.param(LIVE_QUERY[:-1], LIVE_KEY, id="short"),
        pytest.param(LIVE_KEY, LIVE_QUERY, id="swapped"),
        pytest.param(NO_QUERY, LIVE_KEY, id="no query feature"),
        pytest.param(LIVE_QUERY, NO_KEY, id="no key feature"),
    ],
)
def test_bad_masks_are_refused(live_query, live_key, monkeypatch):
    d = random_dictionary()
    # what users meet outside pytest
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"masks of lengths 307 and 311"):
        d.compact(live_query, live_key)


# How large a dictionary of GPT-2 small is

GPT2_SMALL = qk.AttentionSpec(
    12,
    12,
    d_head=64,
    d_model=768,
    scale=0.125,
)
N_FEATURES = 2400
N_LIVE_QUERY = 270
N_LIVE_KEY = 466
"""Features that fire at all after training at the settings of Wynroe and Sharkey 2024."""
N_SMALL_PAIRS = 30_000
DTYPES = ("float32", "bfloat16", "float16")
WEIGHTS = "sae_weights.safetensors"


@pytest.fixture(scope="module")
def gpt2_small() -> qk.BilinearQKDictionary:
    """2400 random features per side, compacted to the live ones; a map of random pairs of those."""
    recipe = qk.BilinearQKRunnerConfig.from_file(recipe_file("gpt2-small-L10"))
    assert (recipe.sae.d_query, recipe.sae.d_key) == (N_FEATURES, N_FEATURES)
    assert recipe.mask.n_pairs == N_SMALL_PAIRS
    generator = torch.Generator().manual_seed(0)
    fingerprint = torch.randn(2 * 768, generator=generator, dtype=torch.float64)
    d = random_dictionary(
        "transcoder",
        GPT2_SMALL,
        N_FEATURES,
        N_FEATURES,
        n_pairs=0,
        layer=10,
        fingerprint=[float(f"{value:.7g}") for value in fingerprint.tolist()],
    )
    live_query = torch.randperm(N_FEATURES, generator=generator)[:N_LIVE_QUERY].sort()[0]
    live_key = torch.randperm(N_FEATURES, generator=generator)[:N_LIVE_KEY].sort()[0]
    n_entries = N_LIVE_QUERY * N_LIVE_KEY * 12
    codes = torch.randperm(n_entries, generator=generator)[:N_SMALL_PAIRS]
    features = codes // 12
    query = live_query[features // N_LIVE_KEY]
    key = live_key[features % N_LIVE_KEY]
    pairs = torch.stack([query, key, codes % 12], dim=1)
    is_live_query = torch.isin(torch.arange(N_FEATURES), live_query)
    is_live_key = torch.isin(torch.arange(N_FEATURES), live_key)
    # pairs that compaction has to drop
    dead_query = (~is_live_query).nonzero()[:100]
    dead_pairs = torch.nn.functional.pad(dead_query, (0, 2), value=7)
    all_pairs = torch.cat([pairs, dead_pairs])
    weights = torch.rand(len(all_pairs), generator=generator)
    d.set_feature_map(qk.SparseFeatureMap(all_pairs, weights, N_FEATURES, N_FEATURES, 12))
    return d.compact(is_live_query, is_live_key).requires_grad_(False)


def save_as(
    dtype: str,
    d: qk.BilinearQKDictionary,
    folder: Path,
) -> qk.BilinearQKDictionary:
    """Save a copy in a dtype; returns the copy."""
    copy = d.compact(all_but(d.cfg.d_query, []), all_but(d.cfg.d_key, []))
    copy.to(getattr(torch, dtype)).save_model(folder)
    return copy


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_dictionary_of_gpt2_small_takes_less_than_three_megabytes(gpt2_small, dtype, tmp_path):
    copy = save_as(dtype, gpt2_small, tmp_path)
    cfg = copy.cfg
    assert (cfg.d_query, cfg.d_key, cfg.n_pairs) == (N_LIVE_QUERY, N_LIVE_KEY, N_SMALL_PAIRS)
    assert cfg.original_sizes == (N_FEATURES, N_FEATURES)
    n_live = N_LIVE_QUERY + N_LIVE_KEY
    n_weights = 2 * 768 * n_live + n_live + 2 * 768  # encoders and decoders, their biases
    n_bytes = sum(path.stat().st_size for path in tmp_path.rglob("*"))
    assert 2 * n_weights + N_SMALL_PAIRS * (12 + 2) < n_bytes < 3_000_000
    loaded = qk.BilinearQKDictionary.load_from_disk(tmp_path)
    assert loaded.cfg.to_dict() == cfg.to_dict()
    assert is_in_step(loaded, getattr(torch, dtype))
    assert set(loaded.state_dict()) == set(copy.state_dict())
    for name, tensor in copy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    x = random_x(GPT2_SMALL)
    for source in SOURCES:
        assert torch.equal(loaded.pattern(x, source), copy.pattern(x, source))


@pytest.mark.parametrize("loader", [qk.BilinearQKDictionary, SAE])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs_survive_in_every_dtype(gpt2_small, dtype, loader, tmp_path):
    save_as(dtype, gpt2_small, tmp_path)
    indices = gpt2_small.feature_map.indices
    # numbers beyond what bfloat16 counts to
    assert indices.amax(dim=0).tolist() == [N_LIVE_QUERY - 1, N_LIVE_KEY - 1, 11]
    tensors = load_file(tmp_path / WEIGHTS)
    assert tensors["feature_map.weights"].dtype == getattr(torch, dtype)
    for load_dtype in (None, *DTYPES):
        loaded = loader.load_from_disk(tmp_path, dtype=load_dtype)
        assert isinstance(loaded, qk.BilinearQKDictionary)
        assert loaded.feature_map.weights.dtype == getattr(torch, load_dtype or dtype)
        assert loaded.feature_map.indices.dtype == torch.int64
        assert torch.equal(loaded.feature_map.indices, indices)
        assert loaded.cfg.query_numbers == gpt2_small.cfg.query_numbers
        assert loaded.cfg.key_numbers == gpt2_small.cfg.key_numbers
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert cfg["n_pairs"] == N_SMALL_PAIRS
