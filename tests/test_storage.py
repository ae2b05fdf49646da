"""Smaller dictionaries: what compaction keeps and drops, what fewer bits cost, how many bytes are written."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sae_lens import SAE
from safetensors.torch import load_file
from test_dictionary import (
    D_KEY,
    D_QUERY,
    SOURCES,
    SPEC,
    WEIGHTS,
    in_step,
    make_dictionary,
    random_x,
)
from tiny_dictionaries import N_DEAD, pattern_by_hand, tiny_dictionary
from tiny_models import tiny_tokens
from torch import Tensor

import sae_lens_qk as qk
from sae_lens_qk.attention import AttentionSpec
from sae_lens_qk.config import BilinearQKRunnerConfig
from sae_lens_qk.feature_map import SparseFeatureMap
from sae_lens_qk.pretrained.registry import recipe_file

SILENT = {"query": [0, 17, 18, D_QUERY - 1], "key": [3, 100, D_KEY - 1]}


def dictionary_with_silent_features(
    half: str = "jumprelu_transcoder", **cfg
) -> qk.BilinearQKDictionary:
    d = make_dictionary(half, **cfg)
    for side, features in SILENT.items():
        getattr(d, side).b_enc[features] = -100.0
    return d


def live(d: int, silent: list[int]) -> Tensor:
    mask = torch.ones(d, dtype=torch.bool)
    mask[silent] = False
    return mask


LIVE = live(D_QUERY, SILENT["query"]), live(D_KEY, SILENT["key"])


def copied_state(d: qk.BilinearQKDictionary) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in d.state_dict().items()}


# Without dead features


@pytest.mark.parametrize("half", ["transcoder", "jumprelu_transcoder"])
def test_compacting_away_silent_features_changes_no_pattern(half, tmp_path):
    d, x = dictionary_with_silent_features(half), random_x()
    before = copied_state(d)
    made = d.compact(*LIVE)
    assert (made.cfg.d_query, made.cfg.d_key, made.cfg.d_sae) == (
        D_QUERY - 4,
        D_KEY - 3,
        D_QUERY + D_KEY - 7,
    )
    assert type(made.query) is type(d.query)
    for source in SOURCES:
        torch.testing.assert_close(made.pattern(x, source), d.pattern(x, source), rtol=0, atol=1e-6)
    assert made.cfg.original_sizes == (D_QUERY, D_KEY)
    assert made.cfg.query_numbers == [a for a in range(D_QUERY) if a not in SILENT["query"]]
    assert torch.equal(made.encode_query(x), d.encode_query(x)[..., made.cfg.query_numbers])
    assert torch.equal(made.encode_key(x), d.encode_key(x)[..., made.cfg.key_numbers])
    assert all(torch.equal(tensor, before[name]) for name, tensor in d.state_dict().items()), (
        "the original is left alone"
    )
    assert d.cfg.original_sizes == (D_QUERY, D_KEY)
    assert (d.cfg.query_numbers, d.cfg.n_pairs) == ([], 1009)
    made.save_model(tmp_path)
    loaded = qk.BilinearQKDictionary.load_from_disk(tmp_path)
    assert loaded.cfg.to_dict() == made.cfg.to_dict()
    assert torch.equal(loaded.pattern(x, "feature_map"), made.pattern(x, "feature_map"))


@pytest.mark.parametrize("source", SOURCES)
def test_compacting_away_live_features_is_silencing_them(source):
    d, x = make_dictionary(), random_x()
    dropped = {"query": list(range(2, D_QUERY, 3)), "key": list(range(0, D_KEY, 2))}
    made = d.compact(live(D_QUERY, dropped["query"]), live(D_KEY, dropped["key"]))

    def silence(side):
        return f"{side}.hook_sae_acts_post", lambda acts, hook: acts.index_fill(
            -1, torch.tensor(dropped[side]), 0.0
        )

    with d.hooks(fwd_hooks=[silence("query"), silence("key")]):
        silenced = d.pattern(x, source)
    torch.testing.assert_close(made.pattern(x, source), silenced, rtol=0, atol=1e-6)
    assert (silenced - d.pattern(x, source)).abs().max() > 0.01


def original_pairs(d: qk.BilinearQKDictionary) -> dict[tuple, tuple]:
    """Weight and statistics by pair, in the numbers features had at first; constants as None."""
    numbers = (
        [*(d.cfg.query_numbers or range(D_QUERY)), None],
        [*(d.cfg.key_numbers or range(D_KEY)), None],
    )
    rows = torch.cat([d.feature_map.weights[:, None], d.feature_map.statistics], dim=1).tolist()
    indices = d.feature_map.indices.tolist()
    return {
        (numbers[0][a], numbers[1][b], h): tuple(row)
        for (a, b, h), row in zip(indices, rows, strict=True)
    }


def test_compacting_drops_the_pairs_of_dropped_features_and_keeps_the_others():
    d = dictionary_with_silent_features()
    before = original_pairs(d)
    assert original_pairs(d.compact(live(D_QUERY, []), live(D_KEY, []))) == before
    made = d.compact(*LIVE)
    expected = {
        (a, b, h): row
        for (a, b, h), row in before.items()
        if a not in SILENT["query"] and b not in SILENT["key"]
    }
    assert original_pairs(made) == expected
    assert made.cfg.n_pairs == len(made.feature_map) == len(expected) < 1009
    assert any(a is None for a, _, _ in expected), "pairs with the constants stay"
    assert any(b is None for _, b, _ in expected)


def test_compacting_twice_composes():
    d = dictionary_with_silent_features()
    first = d.compact(live(D_QUERY, SILENT["query"][:2]), live(D_KEY, []))
    rest = [first.cfg.query_numbers.index(a) for a in SILENT["query"][2:]]
    second = first.compact(live(D_QUERY - 2, rest), LIVE[1])
    once = d.compact(*LIVE)
    assert second.cfg.to_dict() == once.cfg.to_dict()
    assert second.cfg.original_sizes == (D_QUERY, D_KEY)
    for name, tensor in once.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name


def test_compacting_forgets_the_figures_and_keeps_the_settings(gpt2_bridge, tmp_path):
    d, settings = tiny_dictionary(gpt2_bridge), BilinearQKRunnerConfig().to_dict()
    d.metrics, d.runner_cfg = (
        qk.evaluate(d, gpt2_bridge, tiny_tokens(3, 17), baselines=()),
        settings,
    )
    sizes = d.cfg.d_query, d.cfg.d_key
    made = d.compact(*(live(n, list(range(n - N_DEAD, n))) for n in sizes))
    assert (made.metrics, made.runner_cfg) == (None, settings)
    assert d.metrics["n_tokens"] == 3 * 17
    d.save_model(tmp_path)
    assert (tmp_path / "metrics.json").is_file()
    made.save_model(tmp_path)
    assert not (tmp_path / "metrics.json").exists(), "figures of the dictionary saved here before"
    loaded = qk.BilinearQKDictionary.from_pretrained(str(tmp_path), verify="strict")
    assert (loaded.metrics, loaded.runner_cfg) == (None, json.loads(json.dumps(settings)))
    again = loaded.compact(*(live(n - N_DEAD, [3]) for n in sizes))
    assert again.cfg.query_numbers == [a for a in range(sizes[0] - N_DEAD) if a != 3]
    assert again.cfg.original_sizes == sizes


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_compacting_keeps_the_dtype_and_needs_no_map(dtype):
    made = dictionary_with_silent_features(n_pairs=0).to(dtype).compact(*LIVE)
    assert in_step(made, dtype)
    assert not made.has_feature_map


@pytest.mark.parametrize(
    "masks",
    [
        (LIVE[0][:-1], LIVE[1]),
        (LIVE[1], LIVE[0]),
        (torch.zeros(D_QUERY, dtype=torch.bool), LIVE[1]),
        (LIVE[0], torch.zeros(D_KEY, dtype=torch.bool)),
    ],
    ids=["short", "swapped", "no query feature", "no key feature"],
)
def test_bad_masks_are_refused(masks, monkeypatch):
    d = make_dictionary()
    monkeypatch.setattr(
        "jaxtyping.config.jaxtyping_disable", True
    )  # what users meet outside pytest
    with pytest.raises(
        ValueError, match=r"compact needs masks of lengths \(307, 311\) that keep a feature a side"
    ):
        d.compact(*masks)


# In fewer bits

DTYPES = ("float32", "bfloat16", "float16")
GROUPED_ROTARY = SPEC
LEARNED_POSITIONS = AttentionSpec(5, 5, d_head=7, d_model=17, scale=0.4)


def kl_by_hand(pattern: Tensor, other: Tensor) -> float:
    """Mean KL in nats over sequences, heads and all queries but the first, which attends to itself alone."""
    found = []
    for true, made in zip(pattern.flatten(0, 1).numpy(), other.flatten(0, 1).numpy(), strict=True):
        for i in range(1, len(true)):
            found.append((true[i, : i + 1] * np.log(true[i, : i + 1] / made[i, : i + 1])).sum())
    return float(np.mean(found))


def n_header_bytes(file: Path) -> int:
    """Of a safetensors file: eight bytes that say how long the JSON after them is."""
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


@pytest.mark.parametrize("half", ["transcoder", "jumprelu_transcoder"])
@pytest.mark.parametrize(
    "spec", [GROUPED_ROTARY, LEARNED_POSITIONS], ids=["grouped rotary", "learned positions"]
)
def test_rounding_loss_is_what_saving_and_loading_costs(spec, half, tmp_path):
    d, x = make_dictionary(half, spec), random_x(spec)
    table = qk.rounding_loss(d, x)
    assert table.index.names == ["dtype", "source"]
    assert list(table.index) == [(dtype, source) for dtype in DTYPES for source in SOURCES]
    assert list(table.columns) == ["megabytes", "pattern_error", "pattern_kl"]
    for dtype in DTYPES:
        make_dictionary(half, spec).to(getattr(torch, dtype)).save_model(tmp_path / dtype)
        loaded = qk.BilinearQKDictionary.load_from_disk(tmp_path / dtype, dtype="float32")
        weights = tmp_path / dtype / WEIGHTS
        for source in SOURCES:
            row = table.loc[(dtype, source)]
            true, stored = (
                pattern_by_hand(made.scores(x, source).detach().double()) for made in (d, loaded)
            )
            assert row["pattern_error"] == pytest.approx(
                float((true - stored).abs().max()), abs=2e-7
            )
            assert row["pattern_kl"] == pytest.approx(kl_by_hand(true, stored), abs=1e-11, rel=1e-3)
            assert round(row["megabytes"] * 1e6) == weights.stat().st_size - n_header_bytes(weights)


def test_fewer_bits_cost_more_and_none_cost_nothing():
    table = qk.rounding_loss(make_dictionary(), random_x())
    costs = table[["pattern_error", "pattern_kl"]]
    assert (costs.loc["float32"] == 0).all(axis=None)
    assert (costs.loc["float16"] > 0).all(axis=None)
    assert (costs.loc["bfloat16"] > 10 * costs.loc["float16"]).all(axis=None), (
        "three bits of the mantissa fewer"
    )
    sizes = table["megabytes"].unstack()
    assert (sizes["transcoders"] == sizes["feature_map"]).all(), "one file, both sources"
    whole, half, _ = sizes["transcoders"][list(DTYPES)]
    indices = 1009 * 12 / 1e6  # four bytes for each number of a pair, in every dtype
    assert half - indices == pytest.approx((whole - indices) / 2, abs=1e-12)


def test_rounding_loss_without_a_map_knows_one_source():
    table = qk.rounding_loss(make_dictionary(n_pairs=0), random_x())
    assert list(table.index) == [(dtype, "transcoders") for dtype in DTYPES]


def test_rounding_loss_leaves_the_dictionary_alone():
    d = make_dictionary()
    d.metrics = {"n_tokens": 7}
    before, cfg, halves = copied_state(d), d.cfg.to_dict(), (d.query, d.key)
    qk.rounding_loss(d, random_x())
    assert all(torch.equal(tensor, before[name]) for name, tensor in d.state_dict().items())
    assert set(d.state_dict()) == set(before)
    assert in_step(d, torch.float32)
    assert (d.cfg.to_dict(), d.query, d.key, d.metrics) == (cfg, *halves, {"n_tokens": 7})


# How large a dictionary of GPT-2 small is

GPT2_SMALL = AttentionSpec(12, 12, d_head=64, d_model=768, scale=0.125)
N_LIVE = {"query": 270, "key": 466}
"""Features that fire at all after training at the settings of Wynroe and Sharkey 2024."""
N_PAIRS = 30_000


@pytest.fixture(scope="module")
def gpt2_small() -> qk.BilinearQKDictionary:
    """2400 features a side at random, compacted to the live ones; a map of random pairs of those, none measured."""
    recipe = BilinearQKRunnerConfig.from_file(recipe_file("gpt2-small-L10"))
    assert (recipe.sae.d_query, recipe.sae.d_key, recipe.mask.n_pairs) == (2400, 2400, N_PAIRS)
    d = make_dictionary(
        "transcoder",
        GPT2_SMALL,
        2400,
        2400,
        n_pairs=0,
        layer=10,
        fingerprint=[
            float(f"{value:.7g}") for value in torch.randn(2 * 768, dtype=torch.float64).tolist()
        ],
    )
    generator = torch.Generator().manual_seed(0)
    kept = [torch.randperm(2400, generator=generator)[:n].sort()[0] for n in N_LIVE.values()]
    codes = torch.randperm(270 * 466 * 12, generator=generator)[:N_PAIRS]
    pairs = torch.stack(
        [kept[0][codes // 12 // 466], kept[1][codes // 12 % 466], codes % 12], dim=1
    )
    masks = [torch.isin(torch.arange(2400), features) for features in kept]
    dead = torch.tensor([(a, 7, 11) for a in (~masks[0]).nonzero()[:100, 0].tolist()])
    weights = torch.rand(N_PAIRS + 100, generator=generator)
    d.set_feature_map(SparseFeatureMap(torch.cat([pairs, dead]), weights, 2400, 2400, 12))
    return d.compact(*masks).requires_grad_(False)


def saved_in(dtype: str, d: qk.BilinearQKDictionary, folder: Path) -> qk.BilinearQKDictionary:
    """Save in a dtype; returns what was saved."""
    ones = [torch.ones(n, dtype=torch.bool) for n in (d.cfg.d_query, d.cfg.d_key)]
    cast = d.compact(*ones).to(getattr(torch, dtype))
    cast.save_model(folder)
    return cast


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_dictionary_of_gpt2_small_takes_less_than_three_megabytes(gpt2_small, dtype, tmp_path):
    cast = saved_in(dtype, gpt2_small, tmp_path)
    assert (cast.cfg.d_query, cast.cfg.d_key, cast.cfg.n_pairs) == (270, 466, N_PAIRS)
    assert cast.cfg.original_sizes == (2400, 2400)
    n_weights = 2 * 768 * (270 + 466) + 270 + 466 + 2 * 768  # encoders and decoders, their biases
    size = sum(path.stat().st_size for path in tmp_path.rglob("*"))
    assert 2 * n_weights + N_PAIRS * (12 + 2) < size < 3_000_000
    loaded = qk.BilinearQKDictionary.load_from_disk(tmp_path)
    assert loaded.cfg.to_dict() == cast.cfg.to_dict()
    assert in_step(loaded, getattr(torch, dtype))
    assert set(loaded.state_dict()) == set(cast.state_dict())
    for name, tensor in cast.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    x = random_x(GPT2_SMALL)
    for source in SOURCES:
        assert torch.equal(loaded.pattern(x, source), cast.pattern(x, source))


@pytest.mark.parametrize("loader", [qk.BilinearQKDictionary, SAE])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs_survive_in_every_dtype(gpt2_small, dtype, loader, tmp_path):
    saved_in(dtype, gpt2_small, tmp_path)
    expected = gpt2_small.feature_map.indices
    assert expected.amax(dim=0).tolist() == [269, 465, 11], "numbers beyond what bfloat16 counts to"
    assert load_file(tmp_path / WEIGHTS)["feature_map.weights"].dtype == getattr(torch, dtype)
    for loaded_in in (None, *DTYPES):
        loaded = loader.load_from_disk(tmp_path, dtype=loaded_in)
        assert isinstance(loaded, qk.BilinearQKDictionary)
        assert loaded.feature_map.weights.dtype == getattr(torch, loaded_in or dtype)
        assert loaded.feature_map.indices.dtype == torch.int64
        assert torch.equal(loaded.feature_map.indices, expected)
        assert (loaded.cfg.query_numbers, loaded.cfg.key_numbers) == (
            gpt2_small.cfg.query_numbers,
            gpt2_small.cfg.key_numbers,
        )
    assert json.loads((tmp_path / "cfg.json").read_text())["n_pairs"] == N_PAIRS
