"""Every figure of `evaluate` against a loop over hooks and float64 sums written here."""

import json
import math
import re
from io import StringIO

import pytest
import torch
from rich.console import Console
from tiny_dictionaries import (
    D_KEY,
    D_QUERY,
    LAYER,
    exact_dictionary,
    inputs_and_scores,
    kept_pairs,
    observe,
    pattern_by_hand,
    scores_by_hand,
    tiny_dictionary,
)
from tiny_models import tiny_model, tiny_tokens

import sae_lens_qk as qk
from sae_lens_qk.attention import attention_scores
from sae_lens_qk.host.proof import FingerprintError
from sae_lens_qk.host.layer import qk_weights

PATTERN = f"blocks.{LAYER}.attn.hook_pattern"
N_ROWS, N_POS = 7, 13
SOURCES, BASELINES = ("transcoders", "feature_map"), ("zero", "mean", "uniform", "shuffled")


@pytest.fixture(scope="module", params=["gpt2_bridge", "llama_bridge"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def rows():
    return tiny_tokens(N_ROWS, N_POS)


@pytest.fixture(scope="module")
def dictionary(model):
    return tiny_dictionary(model)


@pytest.fixture(scope="module")
def result(dictionary, model, rows) -> qk.evals.Evaluation:
    return qk.evaluate(dictionary, model, rows, batch_size=N_ROWS)


@pytest.fixture(scope="module")
def patterns(dictionary, model, rows) -> dict[str, torch.Tensor]:
    """The true pattern, and what each source puts in its place, in float64."""
    _, seen = observe(model, rows, names=(PATTERN,))
    true = seen[PATTERN].double()
    x, _ = inputs_and_scores(model, rows)
    made = {"clean": true, "zero": torch.zeros_like(true), "mean": torch.zeros_like(true)}
    made["uniform"], made["shuffled"] = torch.zeros_like(true), torch.zeros_like(true)
    for row in range(N_ROWS):
        made["mean"] += true[row] / N_ROWS
        made["shuffled"][row] = true[row - 1]
    for i in range(N_POS):
        made["uniform"][:, :, i, : i + 1] = 1 / (i + 1)
    made["transcoders"] = pattern_by_hand(
        attention_scores(*dictionary.queries_keys(x), dictionary.spec).double()
    )
    made["feature_map"] = pattern_by_hand(scores_by_hand(dictionary, x, kept_pairs(dictionary)))
    return made


@pytest.fixture(scope="module")
def losses(model, rows, patterns) -> dict[str, tuple[float, float]]:
    """Cross-entropy, and KL(clean || patched) of the logits, by running the model once per source and row."""

    def log_probs(pattern, row):
        hooks = [(PATTERN, lambda value, hook: pattern[row : row + 1].float())]
        return observe(model, rows[row : row + 1], hooks)[0].double().log_softmax(dim=-1)[0]

    clean = [log_probs(patterns["clean"], row) for row in range(N_ROWS)]
    figures = {}
    for name, pattern in patterns.items():
        ce, kl = 0.0, 0.0
        for row in range(N_ROWS):
            patched = log_probs(pattern, row)
            ce -= (
                sum(float(patched[i, rows[row, i + 1]]) for i in range(N_POS - 1))
                / (N_POS - 1)
                / N_ROWS
            )
            kl += float((clean[row].exp() * (clean[row] - patched)).sum()) / N_POS / N_ROWS
        figures[name] = ce, kl
    return figures


def kl_by_head(true, other) -> list[float]:
    """sum over keys of P log(P / P'), mean over rows and the queries after the first, in plain loops."""
    figures = []
    for head in range(true.shape[1]):
        total = 0.0
        for row in range(len(true)):
            for i in range(1, N_POS):
                total += sum(
                    p * math.log(p / o)
                    for p, o in zip(
                        true[row, head, i, : i + 1].tolist(),
                        other[row, head, i, : i + 1].tolist(),
                        strict=True,
                    )
                )
        figures.append(total / (len(true) * (N_POS - 1)))
    return figures


def test_sizes_and_clean_loss(result, losses):
    assert (result.n_rows, result.n_tokens) == (N_ROWS, N_ROWS * N_POS)
    assert list(result.sources) == [*SOURCES, *BASELINES]
    assert result.ce_clean == pytest.approx(losses["clean"][0], rel=1e-5)


@pytest.mark.parametrize("name", [*SOURCES, *BASELINES])
def test_loss_and_logits(result, losses, name):
    figures = result.sources[name]
    ce, kl = losses[name]
    assert figures.ce_loss == pytest.approx(ce, rel=1e-5)
    assert figures.logit_kl == pytest.approx(kl, rel=1e-3, abs=1e-6)
    zero_ce, zero_kl = losses["zero"]
    assert figures.ce_recovered.value == pytest.approx(
        (zero_ce - ce) / (zero_ce - losses["clean"][0]), abs=1e-3
    )
    assert figures.logit_kl_recovered.value == pytest.approx(1 - kl / zero_kl, abs=1e-3)
    assert kl > 1e-3  # the source does something


@pytest.mark.parametrize("name", [*SOURCES, "mean", "uniform", "shuffled"])
def test_pattern_figures_leave_position_0_out(result, patterns, name):
    figures, true, made = result.sources[name], patterns["clean"], patterns[name]
    expected = kl_by_head(true, made)
    assert figures.pattern_kl_per_head == pytest.approx(expected, rel=1e-3)
    assert figures.pattern_kl is not None
    assert figures.pattern_kl.value == pytest.approx(sum(expected) / len(expected), rel=1e-3)
    assert figures.pattern_kl.value > 0.01

    distance, same = 0.0, 0
    for row in range(N_ROWS):
        for head in range(true.shape[1]):
            for i in range(1, N_POS):
                P, other = true[row, head, i].tolist(), made[row, head, i].tolist()
                distance += sum(abs(p - o) for p, o in zip(P, other, strict=True)) / 2
                same += P.index(max(P)) == other.index(max(other))
    n = N_ROWS * true.shape[1] * (N_POS - 1)
    assert figures.pattern_tv == pytest.approx(distance / n, rel=1e-4)
    if name != "uniform":  # whose keys are all equal
        assert figures.argmax_agreement == pytest.approx(same / n, abs=1e-9)


def test_the_zero_pattern(result):
    zero = result.sources["zero"]
    assert (zero.pattern_kl, zero.pattern_kl_per_head, zero.argmax_agreement) == (None, None, None)
    assert zero.pattern_tv == pytest.approx(0.5, abs=1e-6)
    assert zero.ce_recovered == (0.0, 0.0, 0.0)
    assert zero.logit_kl_recovered == (0.0, 0.0, 0.0)


def explained_by_hand(s, f, P) -> list[list[float]]:
    """Per head: 1 - sum P (s~ - f~)^2 / sum P s~^2, the same unweighted, and sum f^2 / sum s^2."""
    weighted, unweighted, share = [], [], []
    for head in range(s.shape[1]):
        sums = torch.zeros(6, dtype=torch.float64)
        for row in range(len(s)):
            for i in range(s.shape[2]):
                true, made = s[row, head, i, : i + 1].double(), f[row, head, i, : i + 1].double()
                for k, p in enumerate(
                    (
                        P[row, head, i, : i + 1],
                        torch.full((i + 1,), 1 / (i + 1), dtype=torch.float64),
                    )
                ):
                    s_centred, f_centred = true - (p * true).sum(), made - (p * made).sum()
                    sums[2 * k] += (p * (s_centred - f_centred) ** 2).sum()
                    sums[2 * k + 1] += (p * s_centred**2).sum()
                sums[4] += (made**2).sum()
                sums[5] += (true**2).sum()
        weighted.append(float(1 - sums[0] / sums[1]))
        unweighted.append(float(1 - sums[2] / sums[3]))
        share.append(float(sums[4] / sums[5]))
    return [weighted, unweighted, share]


@pytest.mark.parametrize("source", SOURCES)
def test_score_explained(dictionary, model, rows, result, patterns, source):
    n_rows, figures = N_ROWS, result.sources[source]
    features = {
        pair: m
        for pair, m in kept_pairs(dictionary).items()
        if pair[0] < D_QUERY and pair[1] < D_KEY
    }
    assert len(features) < len(kept_pairs(dictionary))
    if source == "transcoders":  # every pair, of fewer rows
        heads = range(dictionary.spec.n_heads)
        features = {(a, b, h): 1.0 for a in range(D_QUERY) for b in range(D_KEY) for h in heads}
        n_rows = 3
        figures = qk.evaluate(dictionary, model, rows[:n_rows], baselines=()).sources[source]
    x, scores = inputs_and_scores(model, rows[:n_rows])
    f = scores_by_hand(dictionary, x, features, include_constant=False)
    expected = explained_by_hand(scores, f, patterns["clean"])
    found = (figures.score_explained, figures.score_explained_unweighted, figures.norm_share)
    for made, by_hand in zip(found, expected, strict=True):
        assert made == pytest.approx(by_hand, rel=1e-4, abs=1e-5)
    assert result.sources["mean"].score_explained is None


def test_a_dictionary_of_the_true_queries_and_keys_is_perfect(model, rows):
    d = exact_dictionary(model)
    result = qk.evaluate(d, model, rows)
    figures = result.sources["transcoders"]
    assert list(result.sources) == ["transcoders", *BASELINES]
    assert result.feature_map is None
    assert figures.pattern_kl is not None
    assert abs(figures.pattern_kl.value) < 1e-8
    assert figures.pattern_tv < 1e-5
    assert figures.argmax_agreement == 1.0
    assert figures.ce_loss == pytest.approx(result.ce_clean, abs=1e-6)
    assert abs(figures.logit_kl) < 1e-6
    assert figures.ce_recovered == pytest.approx((1.0, 1.0, 1.0), abs=1e-4)
    assert figures.logit_kl_recovered == pytest.approx((1.0, 1.0, 1.0), abs=1e-4)

    x, scores = inputs_and_scores(model, rows)
    weights = qk_weights(model, LAYER)
    queries, keys = weights.queries(x) - weights.b_Q, weights.keys(x) - weights.b_K
    features = attention_scores(queries, keys, d.spec)
    _, seen = observe(model, rows, names=(PATTERN,))
    expected = explained_by_hand(scores, features, seen[PATTERN].double())
    assert figures.score_explained == pytest.approx(expected[0], abs=1e-5)
    assert figures.score_explained_unweighted == pytest.approx(expected[1], abs=1e-5)
    assert figures.norm_share == pytest.approx(expected[2], rel=1e-5)
    without_biases = not (weights.b_Q.any() or weights.b_K.any())
    assert (max(figures.score_explained) > 0.99999) == without_biases
    assert (result.features.l0_query, result.features.l0_key) == pytest.approx(
        (d.cfg.d_in, d.cfg.d_in)
    )


def test_intervals_hold_their_values(result):
    for name, figures in result.sources.items():
        for field in ("pattern_kl", "ce_recovered", "logit_kl_recovered"):
            interval = getattr(figures, field)
            if name == "zero":
                continue
            assert interval.low < interval.value < interval.high, (name, field)


def test_intervals_are_those_of_resampled_rows(dictionary, model, rows):
    equal = rows[:1].expand(6, -1)  # resampling changes nothing
    figures = qk.evaluate(dictionary, model, equal, baselines=()).sources["transcoders"]
    for interval in (figures.pattern_kl, figures.ce_recovered, figures.logit_kl_recovered):
        assert interval.high - interval.low < 1e-5
    a, b = (
        qk.evaluate(dictionary, model, rows, baselines=(), seed=seed).sources["transcoders"]
        for seed in (0, 0)
    )
    other = qk.evaluate(dictionary, model, rows, baselines=(), seed=1).sources["transcoders"]
    assert a == b
    assert a.pattern_kl != other.pattern_kl
    assert a.pattern_kl.value == other.pattern_kl.value


def test_features(dictionary, model, rows, result):
    x, _ = inputs_and_scores(model, rows)
    for side, acts in (("query", dictionary.encode_query(x)), ("key", dictionary.encode_key(x))):
        counts = [
            sum(value > 0 for value in acts[..., feature].flatten().tolist())
            for feature in range(acts.shape[2])
        ]
        found = {
            name.removesuffix(f"_{side}"): value
            for name, value in result.features._asdict().items()
        }
        assert found["l0"] == pytest.approx(sum(counts) / (N_ROWS * N_POS), rel=1e-6)
        assert found["live"] == sum(count > 0 for count in counts)
        assert found["max_density"] == pytest.approx(max(counts) / (N_ROWS * N_POS), rel=1e-6)
        assert 0 < found["live"] < len(counts)


def test_feature_map(dictionary, model, rows, result):
    x, _ = inputs_and_scores(model, rows)
    fires = {
        "query": torch.cat(
            [dictionary.encode_query(x) > 0, torch.ones(N_ROWS, N_POS, 1, dtype=torch.bool)], dim=2
        ),
        "key": torch.cat(
            [dictionary.encode_key(x) > 0, torch.ones(N_ROWS, N_POS, 1, dtype=torch.bool)], dim=2
        ),
    }
    live_query, live_key = (
        {f for f in range(acts.shape[2] - 1) if acts[..., f].any()}
        for acts in (fires["query"], fires["key"])
    )
    pairs, n_heads = list(kept_pairs(dictionary)), dictionary.spec.n_heads
    between = [(a, b, h) for a, b, h in pairs if a != D_QUERY and b != D_KEY]
    both_live = [(a, b, h) for a, b, h in between if a in live_query and b in live_key]
    active = 0
    for a, b, _ in pairs:
        for i in range(N_POS):
            active += int((fires["query"][:, i, a, None] & fires["key"][:, : i + 1, b]).sum())
    found = result.feature_map
    assert found is not None
    assert (found.n_pairs, found.n_pairs_without_constants) == (len(pairs), len(between))
    assert 0 < len(both_live) < len(between) < len(pairs)
    assert found.sparsity_of_all == pytest.approx(1 - len(between) / (D_QUERY * D_KEY * n_heads))
    assert found.sparsity_of_live == pytest.approx(
        1 - len(both_live) / (len(live_query) * len(live_key) * n_heads)
    )
    assert found.pairs_per_head == [sum(h == head for _, _, h in pairs) for head in range(n_heads)]
    assert found.active_pairs == pytest.approx(active / (N_ROWS * N_POS * (N_POS + 1) / 2))


def test_figures_by_row(dictionary, model, rows, patterns, result):
    made, alone = (
        result.by_row,
        qk.evaluate(dictionary, model, rows[2:5], baselines=("uniform",)).by_row,
    )
    for name in (*SOURCES, "zero", "uniform"):
        figures = ("pattern_tv", "ce_loss", "logit_kl") + ("pattern_kl", "argmax_agreement") * (
            name != "zero"
        )
        assert set(made.sources[name]) == set(figures)
        for figure in figures:
            found = made.sources[name][figure]
            assert found.shape == (N_ROWS, *[dictionary.spec.n_heads] * (figure == "pattern_kl"))
            assert alone.sources[name][figure] == pytest.approx(found[2:5], rel=1e-3, abs=1e-6)
    true, other = patterns["clean"][3:4], patterns["transcoders"][3:4]
    assert made.sources["transcoders"]["pattern_kl"][3] == pytest.approx(
        kl_by_head(true, other), rel=1e-3
    )
    x, _ = inputs_and_scores(model, rows)
    for fired, acts in (
        (made.fired_query, dictionary.encode_query(x)),
        (made.fired_key, dictionary.encode_key(x)),
    ):
        assert fired.tolist() == (acts > 0).sum(dim=(0, 1)).tolist()


def test_batches_do_not_matter(dictionary, model, rows, result):
    in_batches = qk.evaluate(dictionary, model, rows, batch_size=3).to_dict()  # of 4 and 3 rows
    at_once = result.to_dict()
    for figures in (in_batches, at_once):
        figures["sources"].pop("shuffled")
    assert _flat(in_batches) == pytest.approx(_flat(at_once), rel=1e-3, abs=1e-5)


def _flat(value, path="") -> dict[str, float]:
    if isinstance(value, dict):
        return {
            name: leaf
            for key, item in value.items()
            for name, leaf in _flat(item, f"{path}/{key}").items()
        }
    if isinstance(value, list | tuple):
        return {
            name: leaf
            for i, item in enumerate(value)
            for name, leaf in _flat(item, f"{path}/{i}").items()
        }
    return {} if value is None else {path: value}


def test_the_same_figures_on_the_other_host(rows):
    d = tiny_dictionary(tiny_model("llama"))
    one, other = (
        qk.evaluate(d, tiny_model("llama", mode), rows).to_dict() for mode in ("bridge", "hooked")
    )
    assert _flat(one) == pytest.approx(_flat(other), rel=1e-2, abs=1e-4)


def test_result_is_json(result):
    text = json.dumps(result.to_dict(), allow_nan=False)
    read = json.loads(text)
    assert set(read) == {"n_tokens", "n_rows", "ce_clean", "sources", "features", "feature_map"}
    assert (
        read["sources"]["transcoders"]["pattern_kl"]
        == result.sources["transcoders"].pattern_kl._asdict()
    )
    assert read["sources"]["zero"]["pattern_kl"] is None
    assert read["feature_map"]["pairs_per_head"] == result.feature_map.pairs_per_head
    assert len(_flat(read)) > 80


def test_result_prints_as_a_table(result):
    def printed(shown) -> str:
        console = Console(file=StringIO(), width=132)
        console.print(shown)
        return console.file.getvalue()

    text = printed(result)
    assert (
        f"{N_ROWS * N_POS} tokens in {N_ROWS} rows, clean loss {result.ce_clean:.4f} nats" in text
    )
    lines = {line.split()[1]: line for line in text.splitlines() if line.startswith("│")}
    assert list(lines) == list(result.sources)
    for name, figures in result.sources.items():
        interval = figures.ce_recovered
        recovered = f"{interval.value:.1%} ({interval.low:.1%}, {interval.high:.1%})"
        for piece in (
            f"{figures.pattern_tv:.4f}",
            f"{figures.ce_loss:.4f}",
            f"{figures.logit_kl:.4f}",
            recovered,
        ):
            assert piece in lines[name]
        assert (f"{figures.pattern_kl.value:.4f}" if figures.pattern_kl else " - ") in lines[name]
    assert (
        f"live {result.features.live_query} / {result.features.live_key} in {N_ROWS * N_POS} tokens"
        in text
    )
    assert f"feature map: {result.feature_map.n_pairs} pairs" in text
    assert "feature map:" not in printed(result._replace(feature_map=None))


def test_chosen_baselines_and_state(dictionary, model, rows):
    clean = observe(model, rows)[0]
    dictionary.train()
    try:
        result = qk.evaluate(dictionary, model, rows, baselines=("uniform",))
        assert dictionary.training
    finally:
        dictionary.eval()
    assert list(result.sources) == [*SOURCES, "zero", "uniform"]
    assert torch.equal(observe(model, rows)[0], clean)


@pytest.mark.parametrize(
    ("options", "n_rows", "got"),
    [
        ({"baselines": ("random",)}, 3, "random"),
        ({"batch_size": 1}, 3, "1 and"),
        ({}, 1, r"\[1, 13\]"),
    ],
)
def test_wrong_arguments_are_refused(dictionary, model, rows, options, n_rows, got):
    with pytest.raises(ValueError, match=rf"evaluate needs tokens \[row >= 2, pos\].*got .*{got}"):
        qk.evaluate(dictionary, model, rows[:n_rows], **options)


def test_another_model_is_refused(dictionary, rows):
    with pytest.raises(FingerprintError, match="other weights"):
        qk.evaluate(dictionary, tiny_model("gpt2", seed=3), rows)


def test_compared_dictionaries_are_of_one_layer(dictionary, model, rows, result):
    alike = qk.evals.compare({"a": dictionary, "b": dictionary}, model, rows, batch_size=N_ROWS)
    assert [found.to_dict() for found in alike.values()] == [result.to_dict()] * 2
    other = tiny_dictionary(model)
    other.cfg.layer = LAYER - 1
    for chosen, said in (({"a": dictionary, "b": other}, [LAYER - 1, LAYER]), ({}, [])):
        with pytest.raises(
            ValueError, match=rf"dictionaries of one layer, got those of {re.escape(str(said))}"
        ):
            qk.evals.compare(chosen, model, rows)
