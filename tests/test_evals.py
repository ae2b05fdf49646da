"""Every metric of `evaluate` against a loop over hooks and float64 sums written here."""

import io
import json
import math
import re

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny_dictionaries import (
    D_KEY,
    D_QUERY,
    LAYER,
    exact_dictionary,
    inputs_and_scores,
    observe,
    pair_weights,
    pattern_by_hand,
    scores_by_hand,
    tiny_dictionary,
)
from tiny_models import tiny_model, tiny_tokens
from torch import Tensor

import sae_lens_qk as qk
from sae_lens_qk.attention import AttentionSpec
from sae_lens_qk.evals import compare, rounding_loss
from sae_lens_qk.host.layer import AttentionLayer
from sae_lens_qk.host.proof import FingerprintError
from sae_lens_qk.metrics import bootstrap_interval, explained_sums, uniform_pattern
from sae_lens_qk.results import Evaluation

PATTERN = f"blocks.{LAYER}.attn.hook_pattern"
N_ROWS = 7
N_POS = 13
SOURCES = ("transcoders", "feature_map")
BASELINES = ("zero", "mean", "uniform", "shuffled")


@pytest.fixture(scope="module", params=["gpt2_bridge", "llama_bridge"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return tiny_tokens(N_ROWS, N_POS)


@pytest.fixture(scope="module")
def dictionary(model):
    return tiny_dictionary(model)


@pytest.fixture(scope="module")
def x(model, rows) -> Tensor:
    return inputs_and_scores(model, rows)[0]


@pytest.fixture(scope="module")
def result(dictionary, model, rows) -> Evaluation:
    return qk.evaluate(dictionary, model, rows, batch_size=N_ROWS)


@pytest.fixture(scope="module")
def patterns(dictionary, model, rows, x) -> dict[str, Tensor]:
    """The true pattern, and what each source puts in its place, in float64."""
    _, values = observe(model, rows, names=(PATTERN,))
    true = values[PATTERN].double()
    mean = torch.zeros_like(true)
    shuffled = torch.zeros_like(true)
    uniform = torch.zeros_like(true)
    for row in range(N_ROWS):
        mean += true[row] / N_ROWS
        shuffled[row] = true[row - 1]
    for i in range(N_POS):
        uniform[:, :, i, : i + 1] = 1 / (i + 1)
    return {
        "clean": true,
        "zero": torch.zeros_like(true),
        "mean": mean,
        "uniform": uniform,
        "shuffled": shuffled,
        "transcoders": pattern_by_hand(dictionary.scores(x, "transcoders").double()),
        "feature_map": pattern_by_hand(scores_by_hand(dictionary, x, pair_weights(dictionary))),
    }


@pytest.fixture(scope="module")
def losses(model, rows, patterns) -> dict[str, tuple[float, float]]:
    """Cross-entropy, and KL(clean || patched) of the logits: one run per source and row."""

    def log_probs(
        pattern: Tensor,
        row: int,
    ) -> Tensor:
        hooks = [(PATTERN, lambda value, hook: pattern[row : row + 1].float())]
        logits, _ = observe(model, rows[row : row + 1], hooks)
        return logits.double().log_softmax(dim=-1)[0]

    clean = [log_probs(patterns["clean"], row) for row in range(N_ROWS)]
    losses = {}
    for name, pattern in patterns.items():
        ce = 0.0
        kl = 0.0
        for row in range(N_ROWS):
            patched = log_probs(pattern, row)
            for i in range(N_POS - 1):
                ce -= float(patched[i, rows[row, i + 1]]) / (N_POS - 1) / N_ROWS
            difference = clean[row] - patched
            kl += float((clean[row].exp() * difference).sum()) / N_POS / N_ROWS
        losses[name] = (ce, kl)
    return losses


def kl_of_row(
    true: list[float],
    other: list[float],
) -> float:
    """sum over keys of P log(P / P')."""
    return sum(p * math.log(p / o) for p, o in zip(true, other, strict=True))


def kl_per_head(
    true: Tensor,
    other: Tensor,
) -> list[float]:
    """Mean over rows and the queries after the first, in plain loops."""
    n_rows, n_heads, n_pos, _ = true.shape
    means = []
    for head in range(n_heads):
        total = 0.0
        for row in range(n_rows):
            for i in range(1, n_pos):
                true_row = true[row, head, i, : i + 1].tolist()
                total += kl_of_row(true_row, other[row, head, i, : i + 1].tolist())
        means.append(total / (n_rows * (n_pos - 1)))
    return means


# Patterns and predictions


def test_sizes_and_clean_loss(result, losses):
    assert (result.n_rows, result.n_tokens) == (N_ROWS, N_ROWS * N_POS)
    assert list(result.sources) == [*SOURCES, *BASELINES]
    assert result.ce_clean == pytest.approx(losses["clean"][0], rel=1e-5)


@pytest.mark.parametrize("name", [*SOURCES, *BASELINES])
def test_loss_and_logits(result, losses, name):
    metrics = result.sources[name]
    ce, kl = losses[name]
    clean_ce, _ = losses["clean"]
    zero_ce, zero_kl = losses["zero"]
    ce_recovered = (zero_ce - ce) / (zero_ce - clean_ce)
    assert metrics.ce_loss == pytest.approx(ce, rel=1e-5)
    assert metrics.logit_kl == pytest.approx(kl, rel=1e-3, abs=1e-6)
    assert metrics.ce_recovered.value == pytest.approx(ce_recovered, abs=1e-3)
    assert metrics.logit_kl_recovered.value == pytest.approx(1 - kl / zero_kl, abs=1e-3)
    assert kl > 1e-3  # the source does something


@pytest.mark.parametrize("name", [*SOURCES, "mean", "uniform", "shuffled"])
def test_pattern_metrics_leave_position_0_out(result, patterns, name):
    metrics = result.sources[name]
    true = patterns["clean"]
    other = patterns[name]
    expected = kl_per_head(true, other)
    assert metrics.pattern_kl_per_head == pytest.approx(expected, rel=1e-3)
    assert metrics.pattern_kl.value == pytest.approx(sum(expected) / len(expected), rel=1e-3)
    assert metrics.pattern_kl.value > 0.01

    distance = 0.0
    n_agreements = 0
    n_cells = 0
    for row in range(N_ROWS):
        for head in range(true.shape[1]):
            for i in range(1, N_POS):
                P = true[row, head, i].tolist()
                Q = other[row, head, i].tolist()
                distance += sum(abs(p - q) for p, q in zip(P, Q, strict=True)) / 2
                n_agreements += P.index(max(P)) == Q.index(max(Q))
                n_cells += 1
    assert metrics.pattern_tv == pytest.approx(distance / n_cells, rel=1e-4)
    if name != "uniform":  # whose keys are all equal
        assert metrics.argmax_agreement == pytest.approx(n_agreements / n_cells, abs=1e-9)


def test_the_zero_pattern(result):
    zero = result.sources["zero"]
    assert (zero.pattern_kl, zero.pattern_kl_per_head, zero.argmax_agreement) == (None, None, None)
    assert zero.pattern_tv == pytest.approx(0.5, abs=1e-6)
    assert zero.ce_recovered == (0.0, 0.0, 0.0)
    assert zero.logit_kl_recovered == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ({}, [1 / 4, 1 / 4, 1 / 4, 1 / 4]),
        ({"window": 3}, [0, 1 / 3, 1 / 3, 1 / 3]),
        ({"sinks": (0.0,)}, [1 / 5, 1 / 5, 1 / 5, 1 / 5]),
    ],
)
def test_the_uniform_pattern_of_other_attention(variant, expected):
    spec = AttentionSpec(1, 1, d_head=2, d_model=3, scale=1.0, **variant)
    last_row = uniform_pattern(spec, 4, torch.device("cpu"))[-1]
    assert last_row.tolist() == pytest.approx(expected)


# Scores


def explained_by_hand(
    s: Tensor,
    f: Tensor,
    P: Tensor,
) -> list[list[float]]:
    """Per head: 1 - sum P (s~ - f~)^2 / sum P s~^2, the same unweighted, and sum f^2 / sum s^2."""
    n_rows, n_heads, n_pos, _ = s.shape
    weighted, unweighted, norm_share = [], [], []
    for head in range(n_heads):
        error = [0.0, 0.0]  # weighted by P, and equally
        variance = [0.0, 0.0]
        f_square = 0.0
        s_square = 0.0
        for row in range(n_rows):
            for i in range(n_pos):
                s_row = s[row, head, i, : i + 1].double()
                f_row = f[row, head, i, : i + 1].double()
                f_square += float(f_row.square().sum())
                s_square += float(s_row.square().sum())
                equal_weights = torch.full((i + 1,), 1 / (i + 1), dtype=torch.float64)
                for kind, p in enumerate((P[row, head, i, : i + 1], equal_weights)):
                    s_centred = s_row - (p * s_row).sum()
                    f_centred = f_row - (p * f_row).sum()
                    error[kind] += float((p * (s_centred - f_centred) ** 2).sum())
                    variance[kind] += float((p * s_centred**2).sum())
        weighted.append(1 - error[0] / variance[0])
        unweighted.append(1 - error[1] / variance[1])
        norm_share.append(f_square / s_square)
    return [weighted, unweighted, norm_share]


def all_feature_pairs(d: qk.BilinearQKDictionary) -> dict[tuple[int, int, int], float]:
    heads = range(d.spec.n_heads)
    return {(a, b, h): 1.0 for a in range(D_QUERY) for b in range(D_KEY) for h in heads}


@pytest.mark.parametrize("source", SOURCES)
def test_score_explained(dictionary, model, rows, result, patterns, source):
    if source == "feature_map":
        n_rows = N_ROWS
        metrics = result.sources[source]
        pairs = pair_weights(dictionary)
        features = {pair: m for pair, m in pairs.items() if pair[0] < D_QUERY and pair[1] < D_KEY}
        assert len(features) < len(pairs)
    else:  # every pair, of fewer rows
        n_rows = 3
        metrics = qk.evaluate(dictionary, model, rows[:n_rows], baselines=()).sources[source]
        features = all_feature_pairs(dictionary)
    x, scores = inputs_and_scores(model, rows[:n_rows])
    f = scores_by_hand(dictionary, x, features, include_constant=False)
    expected = explained_by_hand(scores, f, patterns["clean"])
    assert metrics.score_explained == pytest.approx(expected[0], rel=1e-4, abs=1e-5)
    assert metrics.score_explained_unweighted == pytest.approx(expected[1], rel=1e-4, abs=1e-5)
    assert metrics.norm_share == pytest.approx(expected[2], rel=1e-4, abs=1e-5)
    assert result.sources["mean"].score_explained is None


def test_sums_over_allowed_keys_alone():
    """Of a window of two keys, with every other score absurd."""
    spec = AttentionSpec(
        1,
        1,
        d_head=2,
        d_model=3,
        scale=1.0,
        window=2,
    )
    scores = torch.full((1, 1, 3, 3), 1e6)
    scores[0, 0, [0, 1, 1, 2, 2], [0, 0, 1, 1, 2]] = torch.tensor([1.0, 2.0, 4.0, 3.0, 1.0])
    pattern = torch.zeros(1, 1, 3, 3)
    sums = explained_sums(scores, torch.zeros_like(scores), pattern, spec)
    centred = 2 * (1.0**2) / 2 + 2 * (1.0**2) / 2  # rows (2, 4) and (3, 1), each key half
    assert sums[:, 0].tolist() == pytest.approx([31.0, 0.0, 0.0, 0.0, centred, centred])


def test_a_dictionary_of_the_true_queries_and_keys_is_perfect(model, rows):
    d = exact_dictionary(model)
    result = qk.evaluate(d, model, rows)
    metrics = result.sources["transcoders"]
    assert list(result.sources) == ["transcoders", *BASELINES]
    assert result.feature_map is None
    assert abs(metrics.pattern_kl.value) < 1e-8
    assert metrics.pattern_tv < 1e-5
    assert metrics.argmax_agreement == 1.0
    assert metrics.ce_loss == pytest.approx(result.ce_clean, abs=1e-6)
    assert abs(metrics.logit_kl) < 1e-6
    assert metrics.ce_recovered == pytest.approx((1.0, 1.0, 1.0), abs=1e-4)
    assert metrics.logit_kl_recovered == pytest.approx((1.0, 1.0, 1.0), abs=1e-4)

    x, scores = inputs_and_scores(model, rows)
    weights = AttentionLayer(model, LAYER).qk_weights
    queries = weights.queries(x) - weights.b_Q
    keys = weights.keys(x) - weights.b_K
    _, values = observe(model, rows, names=(PATTERN,))
    expected = explained_by_hand(scores, d.spec.scores(queries, keys), values[PATTERN].double())
    assert metrics.score_explained == pytest.approx(expected[0], abs=1e-5)
    assert metrics.score_explained_unweighted == pytest.approx(expected[1], abs=1e-5)
    assert metrics.norm_share == pytest.approx(expected[2], rel=1e-5)
    has_biases = bool(weights.b_Q.any() or weights.b_K.any())
    assert (max(metrics.score_explained) > 0.99999) == (not has_biases)
    assert result.features.l0_query == pytest.approx(d.cfg.d_in)
    assert result.features.l0_key == pytest.approx(d.cfg.d_in)


# Intervals


def test_intervals_hold_their_values(result):
    for name, metrics in result.sources.items():
        if name == "zero":
            continue
        for interval in (metrics.pattern_kl, metrics.ce_recovered, metrics.logit_kl_recovered):
            assert interval.low < interval.value < interval.high, name


def test_intervals_are_those_of_resampled_rows(dictionary, model, rows):
    equal_rows = rows[:1].expand(6, -1)  # resampling changes nothing
    metrics = qk.evaluate(dictionary, model, equal_rows, baselines=()).sources["transcoders"]
    for interval in (metrics.pattern_kl, metrics.ce_recovered, metrics.logit_kl_recovered):
        assert interval.high - interval.low < 1e-5


def test_intervals_depend_on_the_seed_alone(dictionary, model, rows):
    def transcoders(seed):
        result = qk.evaluate(dictionary, model, rows, baselines=(), seed=seed)
        return result.sources["transcoders"]

    assert transcoders(seed=0) == transcoders(seed=0)
    one = transcoders(seed=0).pattern_kl
    other = transcoders(seed=1).pattern_kl
    assert one != other
    assert one.value == other.value


@pytest.mark.parametrize("is_ratio", [False, True], ids=["mean", "ratio"])
def test_bootstrap_by_hand(is_ratio):
    generator = np.random.default_rng(3)
    values = generator.normal(size=11)
    weights = generator.integers(1, 5, 11) if is_ratio else None
    interval = bootstrap_interval(values, weights, n_draws=500, seed=7)
    counts = weights if is_ratio else np.ones(11)
    ratios = []
    for draw in np.random.default_rng(7).integers(0, 11, (500, 11)):
        total = sum(values[row] for row in draw)
        ratios.append(total / sum(counts[row] for row in draw))
    assert interval.value == pytest.approx(sum(values) / sum(counts))
    assert interval.low == pytest.approx(np.quantile(ratios, 0.025))
    assert interval.high == pytest.approx(np.quantile(ratios, 0.975))


# Features and pairs


@pytest.mark.parametrize("side", ["query", "key"])
def test_features(dictionary, x, result, side):
    acts = getattr(dictionary.features(x), side)
    counts = []
    for feature in range(acts.shape[2]):
        counts.append(sum(value > 0 for value in acts[..., feature].flatten().tolist()))
    n_tokens = N_ROWS * N_POS
    n_live = sum(count > 0 for count in counts)
    metrics = result.features._asdict()
    assert metrics[f"l0_{side}"] == pytest.approx(sum(counts) / n_tokens, rel=1e-6)
    assert metrics[f"live_{side}"] == n_live
    assert metrics[f"max_density_{side}"] == pytest.approx(max(counts) / n_tokens, rel=1e-6)
    assert 0 < n_live < len(counts)
    assert getattr(result.by_row, f"fired_{side}").tolist() == counts


def test_feature_map(dictionary, x, result):
    always = torch.ones(N_ROWS, N_POS, 1, dtype=torch.bool)  # the constant
    query_fires = torch.cat([dictionary.encode_query(x) > 0, always], dim=2)
    key_fires = torch.cat([dictionary.encode_key(x) > 0, always], dim=2)
    live_query = {a for a in range(D_QUERY) if query_fires[..., a].any()}
    live_key = {b for b in range(D_KEY) if key_fires[..., b].any()}
    n_heads = dictionary.spec.n_heads
    pairs = list(pair_weights(dictionary))
    feature_pairs = [pair for pair in pairs if pair[0] != D_QUERY and pair[1] != D_KEY]
    live_pairs = [pair for pair in feature_pairs if pair[0] in live_query and pair[1] in live_key]
    n_active = 0
    for a, b, _ in pairs:
        for i in range(N_POS):
            both_fire = query_fires[:, i, a, None] & key_fires[:, : i + 1, b]
            n_active += int(both_fire.sum())
    n_positions = N_ROWS * N_POS * (N_POS + 1) / 2
    n_live_entries = len(live_query) * len(live_key) * n_heads
    metrics = result.feature_map
    assert metrics.n_pairs == len(pairs)
    assert metrics.n_pairs_without_constants == len(feature_pairs)
    assert 0 < len(live_pairs) < len(feature_pairs) < len(pairs)
    density = len(feature_pairs) / (D_QUERY * D_KEY * n_heads)
    assert metrics.sparsity_of_all == pytest.approx(1 - density)
    assert metrics.sparsity_of_live == pytest.approx(1 - len(live_pairs) / n_live_entries)
    assert metrics.pairs_per_head == [
        sum(h == head for _, _, h in pairs) for head in range(n_heads)
    ]
    assert metrics.active_pairs == pytest.approx(n_active / n_positions)


# Rows, batches, hosts


def test_metrics_by_row(dictionary, model, rows, patterns, result):
    tables = result.by_row.sources
    few_rows = qk.evaluate(dictionary, model, rows[2:5], baselines=("uniform",))
    for source in (*SOURCES, "zero", "uniform"):
        names = {"pattern_tv", "ce_loss", "logit_kl"}
        if source != "zero":
            names |= {"pattern_kl", "argmax_agreement"}
        assert set(tables[source]) == names
        for name, values in tables[source].items():
            has_heads = name == "pattern_kl"
            assert values.shape == ((N_ROWS, dictionary.spec.n_heads) if has_heads else (N_ROWS,))
            few = few_rows.by_row.sources[source][name]
            assert few == pytest.approx(values[2:5], rel=1e-3, abs=1e-6)
    expected = kl_per_head(patterns["clean"][3:4], patterns["transcoders"][3:4])
    assert tables["transcoders"]["pattern_kl"][3] == pytest.approx(expected, rel=1e-3)


def flat(value, path: str = "") -> dict[str, float]:
    """Numbers of nested JSON by path."""
    if value is None:
        return {}
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {path: value}
    leaves: dict[str, float] = {}
    for key, item in items:
        leaves |= flat(item, f"{path}/{key}")
    return leaves


def test_batches_do_not_matter(dictionary, model, rows, result):
    batched = qk.evaluate(dictionary, model, rows, batch_size=3).to_dict()  # of 4 and 3 rows
    whole = result.to_dict()
    del batched["sources"]["shuffled"]
    del whole["sources"]["shuffled"]
    assert flat(batched) == pytest.approx(flat(whole), rel=1e-3, abs=1e-5)


def test_the_same_metrics_on_the_other_host(rows):
    d = tiny_dictionary(tiny_model("llama"))
    bridge = qk.evaluate(d, tiny_model("llama", "bridge"), rows).to_dict()
    hooked = qk.evaluate(d, tiny_model("llama", "hooked"), rows).to_dict()
    assert flat(bridge) == pytest.approx(flat(hooked), rel=1e-2, abs=1e-4)


def test_result_is_json(result):
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert set(values) == {"n_tokens", "n_rows", "ce_clean", "sources", "features", "feature_map"}
    transcoders = values["sources"]["transcoders"]
    assert transcoders["pattern_kl"] == result.sources["transcoders"].pattern_kl._asdict()
    assert values["sources"]["zero"]["pattern_kl"] is None
    assert values["feature_map"]["pairs_per_head"] == result.feature_map.pairs_per_head
    assert len(flat(values)) > 80


def printed(value) -> str:
    console = Console(file=io.StringIO(), width=132)
    console.print(value)
    return console.file.getvalue()


def test_result_prints_as_a_table(result):
    text = printed(result)
    n_tokens = N_ROWS * N_POS
    assert f"{n_tokens} tokens in {N_ROWS} rows, clean loss {result.ce_clean:.4f} nats" in text
    lines = {line.split()[1]: line for line in text.splitlines() if line.startswith("│")}
    assert list(lines) == list(result.sources)
    for name, metrics in result.sources.items():
        value, low, high = metrics.ce_recovered
        kl = f"{metrics.pattern_kl.value:.4f}" if metrics.pattern_kl else " - "
        assert kl in lines[name]
        assert f"{metrics.pattern_tv:.4f}" in lines[name]
        assert f"{metrics.ce_loss:.4f}" in lines[name]
        assert f"{metrics.logit_kl:.4f}" in lines[name]
        assert f"{value:.1%} ({low:.1%}, {high:.1%})" in lines[name]
    features = result.features
    assert f"live {features.live_query} / {features.live_key} in {n_tokens} tokens" in text
    assert f"feature map: {result.feature_map.n_pairs} pairs" in text
    assert "feature map:" not in printed(result._replace(feature_map=None))


def test_baselines_as_asked_and_no_trace(dictionary, model, rows):
    clean, _ = observe(model, rows)
    dictionary.train()
    try:
        result = qk.evaluate(dictionary, model, rows, baselines=["uniform"])
        assert dictionary.training
    finally:
        dictionary.eval()
    assert list(result.sources) == [*SOURCES, "zero", "uniform"]
    assert torch.equal(observe(model, rows)[0], clean)


@pytest.mark.parametrize(
    ("options", "n_rows", "message"),
    [
        ({"baselines": ("random",)}, 3, "random"),
        ({"batch_size": 1}, 3, r", 1 and"),
        ({}, 1, r"\[1, 13\]"),
    ],
)
def test_wrong_arguments_are_refused(dictionary, model, rows, options, n_rows, message):
    with pytest.raises(ValueError, match=rf"evaluate needs.*got .*{message}"):
        qk.evaluate(dictionary, model, rows[:n_rows], **options)


def test_another_model_is_refused(dictionary, rows):
    with pytest.raises(FingerprintError, match="other weights"):
        qk.evaluate(dictionary, tiny_model("gpt2", seed=3), rows)


def test_compared_dictionaries_are_of_one_layer(dictionary, model, rows, result):
    same = compare({"a": dictionary, "b": dictionary}, model, rows, batch_size=N_ROWS)
    assert [one.to_dict() for one in same.values()] == [result.to_dict()] * 2
    other = tiny_dictionary(model)
    other.cfg.layer = LAYER - 1
    for dictionaries, layers in (({"a": dictionary, "b": other}, [0, 1]), ({}, [])):
        with pytest.raises(ValueError, match=rf"one layer, got.*{re.escape(str(layers))}"):
            compare(dictionaries, model, rows)


# In fewer bits

DTYPES = ("float32", "bfloat16", "float16")


def n_header_bytes(file) -> int:
    """Of a safetensors file: eight bytes that say how long the JSON after them is."""
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def test_rounding_loss_is_what_saving_and_loading_costs(dictionary, x, tmp_path):
    table = rounding_loss(dictionary, x)
    assert table.index.names == ["dtype", "source"]
    assert list(table.index) == [(dtype, source) for dtype in DTYPES for source in SOURCES]
    assert list(table.columns) == ["megabytes", "pattern_error", "pattern_kl"]
    for dtype in DTYPES:
        folder = tmp_path / dtype
        dictionary.save_model(folder / "whole")
        load = qk.BilinearQKDictionary.load_from_disk
        load(folder / "whole", dtype=dtype).save_model(folder)
        weights = folder / "sae_weights.safetensors"
        n_bytes = weights.stat().st_size - n_header_bytes(weights)
        loaded = load(folder, dtype="float32")
        for source in SOURCES:
            row = table.loc[(dtype, source)]
            true = pattern_by_hand(dictionary.scores(x, source).double())
            rounded = pattern_by_hand(loaded.scores(x, source).detach().double())
            per_head = kl_per_head(true, rounded)
            error = float((true - rounded).abs().max())
            assert row["pattern_error"] == pytest.approx(error, abs=2e-7)
            expected = sum(per_head) / len(per_head)
            assert row["pattern_kl"] == pytest.approx(expected, abs=1e-11, rel=1e-3)
            assert round(row["megabytes"] * 1e6) == n_bytes


def test_fewer_bits_cost_more_and_none_cost_nothing(dictionary, x):
    table = rounding_loss(dictionary, x)
    costs = table[["pattern_error", "pattern_kl"]]
    assert (costs.loc["float32"] == 0).all(axis=None)
    assert (costs.loc["float16"] > 0).all(axis=None)
    # bfloat16 has three bits of the mantissa fewer
    assert (costs.loc["bfloat16"] > 5 * costs.loc["float16"]).all(axis=None)
    sizes = table["megabytes"].unstack()
    assert (sizes["transcoders"] == sizes["feature_map"]).all(), "one file, both sources"
    megabytes = sizes["transcoders"]
    indices = len(dictionary.feature_map) * 12 / 1e6  # four bytes per number in every dtype
    expected = (megabytes["float32"] - indices) / 2
    assert megabytes["float16"] - indices == pytest.approx(expected, abs=1e-12)


def test_rounding_loss_without_a_map_knows_one_source(model, x):
    table = rounding_loss(tiny_dictionary(model, n_pairs=0), x)
    assert list(table.index) == [(dtype, "transcoders") for dtype in DTYPES]


def test_rounding_loss_leaves_the_dictionary_alone(model, x):
    d = tiny_dictionary(model)
    d.metrics = {"n_tokens": 7}
    state_before = {name: tensor.clone() for name, tensor in d.state_dict().items()}
    cfg_before = d.cfg.to_dict()
    rounding_loss(d, x)
    assert set(d.state_dict()) == set(state_before)
    for name, tensor in d.state_dict().items():
        assert torch.equal(tensor, state_before[name]), name
    assert d.cfg.to_dict() == cfg_before
    assert d.dtype == torch.float32
    assert d.metrics == {"n_tokens": 7}
