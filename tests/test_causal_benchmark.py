"""The causal part of the quality benchmark: its statistics by hand, its cases, a small run."""

import json

import numpy as np
import pytest
import torch
from tiny_dictionaries import (
    D_KEY,
    D_QUERY,
    LAYER,
    exact_dictionary,
    inputs_and_scores,
    observe,
    pair_term,
    pattern_by_hand,
    tiny_dictionary,
)
from tiny_models import tiny_tokens

import sae_lens_qk as qk
from benchmarks.quality import causal, explained
from benchmarks.quality.cases import CORPUS, FIRST_QUERY, LEAST_WEIGHT, SMOKE, LayerCases, prepare
from benchmarks.quality.causal_logits import logit_metrics, next_token_kl
from benchmarks.quality.causal_metrics import Outcomes, Removal, correlations, mean_interval
from benchmarks.quality.twins import Twins
from sae_lens_qk.attention import SIDES
from sae_lens_qk.explain.terms import Change
from sae_lens_qk.host.layer import AttentionLayer
from sae_lens_qk.statistics.activations import ALWAYS_ON

SOURCES = ("transcoders", "feature_map")
N_HEADS = 4


@pytest.fixture(scope="module")
def cases(llama_bridge) -> LayerCases:
    """Cases of one layer, for a dictionary with a map and one without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(CORPUS, raising=False)
        mapped = tiny_dictionary(llama_bridge)
        plain = tiny_dictionary(llama_bridge, n_pairs=0, seed=1)
        dictionaries = {LAYER: {"mapped": mapped, "plain": plain}}
        (layer_cases,) = prepare(llama_bridge, dictionaries, SMOKE)
    return layer_cases


def only(cases: LayerCases, d) -> LayerCases:
    return cases._replace(dictionaries={"d": d})


# Statistics by hand


@pytest.mark.parametrize("bridge", ["gpt2_bridge", "llama_bridge"])
def test_next_token_kl_equals_full_passes(bridge, request):
    model = request.getfixturevalue(bridge)
    tokens = tiny_tokens(1, 7)
    head = 1
    layer = AttentionLayer(model, LAYER)
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(19, 7, generator=generator).softmax(dim=-1)
    clean = observe(model, tokens)[0][0, -1].double().log_softmax(-1)
    kls = next_token_kl(layer, head, tokens[0], rows)
    for kl, row in zip(kls.tolist(), rows, strict=True):

        def overwrite(pattern, hook, row=row):
            edited = pattern.clone()
            edited[0, head, -1] = row
            return edited

        hooks = [(layer.names.pattern, overwrite)]
        patched = observe(model, tokens, hooks)[0][0, -1].double().log_softmax(-1)
        expected = float((clean.exp() * (clean - patched)).sum())
        assert kl == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert kls.max() > 1e-4


@pytest.fixture
def summary():
    """Three cases of two texts: the second without `other`, the third without anything at k = 2."""
    changes = {  # (case, k) -> (tv, weight drop, score drop) of each removal
        (0, 1): {"top": (0.5, 0.2, 1.0), "other": (0.1, 0.3, 0.5), "rescaled": (0.2, 0.1, 0.5)},
        (1, 1): {"top": (0.3, 0.1, 0.5), "rescaled": (0.4, 0.0, 0.1)},
        (2, 1): {"top": (0.1, 0.0, 0.3), "other": (0.3, 0.1, 0.2), "rescaled": (0.1, 0.1, 0.1)},
        (0, 2): {"top": (0.7, 0.2, 1.0), "rescaled": (0.2, 0.1, 0.5)},
        (1, 2): {"top": (0.5, 0.2, 1.0), "rescaled": (0.4, 0.1, 0.5)},
    }
    outcomes = Outcomes((1, 2), [0, 0, 5])
    for (case, k), by_condition in changes.items():
        values = torch.tensor(list(by_condition.values())).T
        sign = 1 if case else -1  # of the first case everything is predicted wrongly
        outcomes.add(
            case,
            [Removal(k, condition) for condition in by_condition],
            actual=Change(*values),
            predicted=Change(*(sign * values)),
            sizes=torch.full((len(by_condition),), 2.0),
            counts=torch.full((len(by_condition),), float(k)),
        )
    return outcomes.summary(200, seed=0)


def test_means_and_wins_by_hand(summary):
    at_1 = summary["by_k"]["1"]
    other = at_1["controls"]["other"]
    rescaled = at_1["controls"]["rescaled"]
    assert (at_1["n"], other["n"], rescaled["n"]) == (3, 2, 3)
    assert at_1["features"] == 1.0
    assert at_1["top"]["tv"] == pytest.approx(0.3)
    assert other["size"] == 1.0
    assert other["top"]["tv"] == pytest.approx(0.3)
    assert other["control"]["tv"] == pytest.approx(0.2)
    assert other["wins"]["tv"][0] == 0.5
    assert other["wins"]["score_drop"] == [1.0, 1.0, 1.0]
    assert rescaled["wins"]["tv"][0] == pytest.approx(1 / 3)  # an equal change is no win
    assert at_1["controls"]["matched"]["wins"]["tv"] is None
    json.dumps(summary, allow_nan=False)


def test_predictions_by_hand(summary):
    at_1 = summary["by_k"]["1"]
    at_2 = summary["by_k"]["2"]
    other = at_1["controls"]["other"]
    assert other["predicted_wins"]["tv"] == 0.0
    assert other["agree"]["tv"] == pytest.approx(0.5)
    assert at_1["controls"]["rescaled"]["agree"]["tv"] == pytest.approx(2 / 3)
    expected = {
        "pearson": np.corrcoef([-0.5, 0.3, 0.1], [0.5, 0.3, 0.1])[0, 1],
        "spearman": -0.5,
        "slope": -15 / 35,
    }
    assert at_1["prediction"]["tv"] == pytest.approx(expected, rel=1e-5)
    assert at_2["n"] == 2
    assert at_2["prediction"]["tv"]["pearson"] is None


def test_areas_by_hand(summary):
    area = summary["tv_area"]["rescaled"]
    assert area["ks"] == [1, 2]
    assert area["top"] == pytest.approx((0.3 + 0.6) / 2, rel=1e-5)
    assert area["control"] == pytest.approx((0.7 / 3 + 0.3) / 2, rel=1e-5)
    assert summary["tv_area"]["other"]["ks"] == [1]


def test_intervals_resample_whole_texts():
    """A hundred cases of two texts, all won in one and none in the other, know as much as two."""
    values = np.repeat([1.0, 0.0], 50)
    texts = np.repeat([3, 8], 50)
    assert mean_interval(values, texts, 400, seed=0) == [0.5, 0.0, 1.0]
    mean, low, high = mean_interval(values, np.arange(100), 400, seed=0)
    assert mean == 0.5
    assert 0.38 < low < mean < high < 0.62


def test_correlations():
    result = correlations([1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 80.0])
    assert result["spearman"] == pytest.approx(1.0)
    assert result["pearson"] == pytest.approx(np.corrcoef([1, 2, 3, 4], [2, 4, 6, 80])[0, 1])
    assert result["slope"] == pytest.approx((2 + 8 + 18 + 320) / 30)
    assert correlations([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])["pearson"] is None


def test_logit_metrics():
    kls = [
        {Removal(1, "top"): 0.3, Removal(1, "predicted"): 0.2, Removal(1, "other"): 0.1},
        {Removal(1, "top"): 0.1, Removal(1, "predicted"): 0.1},
    ]
    result = logit_metrics(kls, [0, 1], (1, 2), 50, seed=0)
    assert result["1"]["n"] == 2
    assert result["1"]["top"][0] == pytest.approx(0.2)
    other = {"n": 1, "top": 0.3, "control": 0.1, "wins": [1.0, 1.0, 1.0]}
    assert result["1"]["controls"]["other"] == other
    assert result["2"]["n"] == 0
    assert result["2"]["top"] is None


# Cases


def test_cases_are_what_they_should_be(cases, llama_bridge):
    _, scores = inputs_and_scores(llama_bridge, cases.tokens)
    pattern = pattern_by_hand(scores)
    assert len(set(cases.cases)) == len(cases.cases) == SMOKE.cases
    for case in cases.cases:
        assert pattern[tuple(case)] >= LEAST_WEIGHT - 1e-5
        assert FIRST_QUERY <= case.query_pos < SMOKE.context
        assert 1 <= case.key_pos < case.query_pos
        assert cases.tokens[case.row, case.key_pos] != cases.tokens[case.row, 0]
    heads = [case.head for case in cases.cases]
    assert [heads.count(head) for head in range(N_HEADS)] == [3] * N_HEADS
    assert cases.cases == sorted(cases.cases)


def test_directions_are_fitted_on_other_text(cases):
    assert len(cases.fit_x) == SMOKE.fit_rows
    same = (cases.fit_x[:, None, 5] == cases.x[None, :, 5]).all(dim=-1)
    assert not same.any()


def test_layers_share_text_and_one_pass(llama_bridge, monkeypatch):
    monkeypatch.delenv(CORPUS, raising=False)
    dictionaries = {
        0: {"d": tiny_dictionary(llama_bridge, layer=0)},
        LAYER: {"d": tiny_dictionary(llama_bridge)},
    }
    for cases in prepare(llama_bridge, dictionaries, SMOKE):
        x, _ = inputs_and_scores(llama_bridge, cases.tokens, cases.layer.index)
        torch.testing.assert_close(cases.x, x, rtol=0, atol=1e-5)
        assert cases.dictionaries is dictionaries[cases.layer.index]


# A small run


@pytest.fixture(scope="module")
def results(cases):
    return causal.run([cases], SMOKE)


@pytest.mark.parametrize("name", ["mapped", "plain"])
def test_every_ranking_is_measured(results, name):
    json.dumps(results, allow_nan=False)
    result = results[str(LAYER)][name]
    rankings = {"effect", "contribution", "decoder", "importance", "random", "marginal"}
    if name == "mapped":
        rankings.add("effect_kept")
    assert set(result["rankings"]) == rankings
    assert result["in_score_check"] < 1e-4
    top = result["rankings"]["effect"]["query"]["by_k"]["1"]
    assert 0 < top["n"] <= SMOKE.cases
    assert top["features"] == 1.0
    assert result["twins"]["n"] == SMOKE.twins
    assert set(result["logits"]) == {"1", "2"}


def test_results_do_not_depend_on_the_other_dictionaries(results, cases):
    plain = cases._replace(dictionaries={"plain": cases.dictionaries["plain"]})
    again = causal.run([plain], SMOKE)[str(LAYER)]["plain"]
    before = results[str(LAYER)]["plain"]
    assert again["rankings"] == before["rankings"]
    assert again["twins"] == before["twins"]
    expected = before["logits"]["1"]["top"]
    assert again["logits"]["1"]["top"] == pytest.approx(expected, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("side", SIDES)
def test_where_nothing_fires_there_is_nothing_to_remove(cases, side):
    d = tiny_dictionary(cases.layer.model)
    getattr(d, side).b_enc.fill_(-100.0)
    silent = only(cases, d)
    result = causal.run([silent], SMOKE)[str(LAYER)]["d"]
    json.dumps(result, allow_nan=False)
    for by_side in result["rankings"].values():
        assert [at_k["n"] for at_k in by_side[side]["by_k"].values()] == [0, 0, 0]
    shares = explained.run([silent])[str(LAYER)]["d"]["transcoders"]["all"]
    assert shares["n"] == 0
    assert shares["active_pairs"] == 0
    assert shares["score_explained"]["mean"] == 0


def test_twins_of_an_exact_dictionary_are_predicted(cases, llama_bridge):
    twins = Twins.make(cases, SMOKE, seed=0)
    result = twins.summary(exact_dictionary(llama_bridge), cases)
    assert result["transcoders"]["pearson"] == pytest.approx(1.0, abs=1e-5)
    assert result["transcoders"]["slope"] == pytest.approx(1.0, abs=1e-4)
    assert "feature_map" not in result


# What scores are made of


@pytest.mark.parametrize("name", ["mapped", "plain"])
def test_scores_are_explained_as_evaluate_says(cases, llama_bridge, name):
    d = cases.dictionaries[name]
    result = explained.run([only(cases, d)])[str(LAYER)]["d"]
    evaluation = qk.evaluate(d, llama_bridge, cases.tokens, baselines=())
    json.dumps(result, allow_nan=False)
    for source in SOURCES if d.has_feature_map else SOURCES[:1]:
        for metric in explained.METRICS:
            shares = result[source]["all"][metric]
            per_head = getattr(evaluation.sources[source], metric)
            mean = sum(per_head) / len(per_head)
            assert shares["per_head"] == pytest.approx(per_head, rel=1e-4, abs=1e-5)
            assert shares["mean"] == pytest.approx(mean, rel=1e-4, abs=1e-5)


def with_always_on_features(d):
    """The first feature of each side fires everywhere."""
    for half in (d.query, d.key):
        half.b_enc[0] = 50.0
        half.threshold[0] = 0.0
    return d


def is_always_on(half, cases) -> torch.Tensor:
    """[d], by the text of the fit."""
    return (half.encode(cases.fit_x) > 0).float().mean(dim=(0, 1)) > ALWAYS_ON


@pytest.mark.parametrize("source", SOURCES)
def test_always_on_features_are_left_out(cases, source):
    """As if their decoder rows were zero; the first features always fire, others may."""
    d = with_always_on_features(tiny_dictionary(cases.layer.model))
    silent = with_always_on_features(tiny_dictionary(cases.layer.model))
    for half in (silent.query, silent.key):
        half.W_dec[is_always_on(half, cases)] = 0.0
    result = explained.run([only(cases, d)])[str(LAYER)]["d"]
    silent_result = explained.run([only(cases, silent)])[str(LAYER)]["d"]
    assert min(result["always_on"].values()) >= 1
    actual = result[source]["without_always_on"]
    expected = silent_result[source]["all"]
    for metric in explained.METRICS:
        mean = expected[metric]["mean"]
        assert actual[metric]["mean"] == pytest.approx(mean, rel=1e-4, abs=1e-5)
    assert actual["pairs_for"] == expected["pairs_for"]
    all_pairs, one_varies, without = (
        result[source][name]["norm_share"]["mean"] for name in explained.PAIR_SETS
    )
    assert all_pairs >= one_varies > 1.1 * without
    # the map has no pair of two such features
    assert (all_pairs > 1.1 * one_varies) == (source == "transcoders")


@pytest.mark.parametrize("measure", [explained.explained, explained.pair_counts])
def test_pairs_of_two_always_on_features_are_left_out(cases, measure):
    """The same from all pairs as a map: both paths share no score function."""
    d = with_always_on_features(tiny_dictionary(cases.layer.model, n_pairs=0))
    varies = explained.Varies(~is_always_on(d.query, cases), ~is_always_on(d.key, cases))
    every_pair = qk.SparseFeatureMap.all_pairs(D_QUERY, D_KEY, d.spec.n_heads)
    by_scores = measure(d, cases, varies, None)
    by_pairs = measure(d, cases, varies, every_pair)
    for name in explained.PAIR_SETS:
        expected = list(numbers(by_scores[name]))
        assert list(numbers(by_pairs[name])) == pytest.approx(expected, rel=1e-4)


def numbers(result):
    """The numbers of nested results, in order."""
    if isinstance(result, dict):
        result = list(result.values())
    if not isinstance(result, list):
        yield result
        return
    for part in result:
        yield from numbers(part)


def supporting_terms(d, case, x, pattern):
    """Terms [key] of the pairs with positive effects, the strongest first, written out by hand."""
    query_acts = d.encode_query(x).double().numpy()
    key_acts = d.encode_key(x).double().numpy()
    effects = []
    for a in np.flatnonzero(query_acts[0, case.query_pos]).tolist():
        for b in np.flatnonzero(key_acts[0, case.key_pos]).tolist():
            terms = pair_term(d, query_acts, key_acts, (a, b, case.head))
            term = torch.from_numpy(terms[0, case.query_pos])
            effect = float(term[case.key_pos] - (pattern * term).sum())
            if effect > 0:
                effects.append((effect, term))
    return [term for _, term in sorted(effects, key=lambda pair: -pair[0])]


def test_pair_counts_by_plain_loops(cases):
    d = cases.dictionaries["plain"]
    few = cases._replace(cases=cases.cases[:3])
    every_query = torch.ones(D_QUERY, dtype=torch.bool)
    every_key = torch.ones(D_KEY, dtype=torch.bool)
    result = explained.pair_counts(d, few, explained.Varies(every_query, every_key), None)["all"]
    shares_of_weight = []
    pairs_for = {0.5: [], 0.9: []}
    for case in few.cases:
        x = cases.x[case.row : case.row + 1]
        tokens = cases.tokens[case.row : case.row + 1]
        _, all_scores = inputs_and_scores(cases.layer.model, tokens)
        scores = all_scores[0, case.head, case.query_pos].double()
        pattern = scores.softmax(-1)
        weight = float(pattern[case.key_pos])
        drops = []
        total = torch.zeros_like(scores)
        for term in supporting_terms(d, case, x, pattern):
            total = total + term
            remaining = (scores - total).softmax(-1)[case.key_pos]
            drops.append(weight - float(remaining))
        shares_of_weight.append(drops[-1] / weight)
        for share, counts in pairs_for.items():
            enough = [n for n, drop in enumerate(drops, start=1) if drop >= share * drops[-1]]
            counts.append(enough[0])
    assert result["n"] == 3
    median = sorted(shares_of_weight)[1]
    assert result["weight_held"]["median"] == pytest.approx(median, rel=1e-4)
    for share, counts in pairs_for.items():
        assert result["pairs_for"][str(share)]["median"] == sorted(counts)[1]
