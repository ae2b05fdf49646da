"""Removals against the model's own hooks, predictions against dictionaries known to be exact, statistics by hand."""

import json
import math
import sys
from pathlib import Path

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
from sae_lens_qk.statistics.activations import ALWAYS_ON
from sae_lens_qk.attention import SIDES
from sae_lens_qk.explain.removals import Change, FeatureDirections, Place, ScoreRow, best_first, best_pairs, control_removals, top_features
from sae_lens_qk.explain.terms import ScoreTerms, pattern_effect
from sae_lens_qk.host.layer import attention_spec, hook_names, qk_weights

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.quality import causal, explained
from benchmarks.quality.cases import CORPUS, FIRST_QUERY, LEAST_WEIGHT, SMOKE, LayerCases, prepare
from benchmarks.quality.causal_figures import Table, correlations, mean_interval
from benchmarks.quality.causal_logits import logit_figures, next_token_kl

N_POS, QUERY, KEY = 13, 10, 4


@pytest.fixture(scope="module", params=["gpt2_bridge", "neox_bridge", "llama_bridge"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def rows():
    return tiny_tokens(2, N_POS)


@pytest.fixture(scope="module")
def x(model, rows) -> torch.Tensor:
    return inputs_and_scores(model, rows)[0]


@pytest.fixture(scope="module")
def dictionary(model):
    return tiny_dictionary(model)


def score_row(model, x, head) -> ScoreRow:
    return ScoreRow(qk_weights(model, LAYER), attention_spec(model, LAYER), x[0, : QUERY + 1], head)


def score_terms(d, x, head, kept=None) -> ScoreTerms:
    return ScoreTerms.of(
        d, d.encode_query(x[0, QUERY]), d.encode_key(x[0, : QUERY + 1]), head, kept
    )


class TestFeatureDirections:
    """On acts [row, pos, 7]: feature 0 never fires, feature 1 always, the others on a third of the tokens."""

    @pytest.fixture
    def acts(self):
        generator = torch.Generator().manual_seed(0)
        acts = torch.rand(5, 41, 7, generator=generator) + 0.5
        acts = acts * (torch.rand(acts.shape, generator=generator) < 1 / 3)
        acts[..., 0], acts[..., 1] = 0.0, 1 + torch.rand(5, 41, generator=generator)
        return acts

    @staticmethod
    def fit(acts, x, ridge):
        """Activations travel behind x."""
        both = torch.cat([x, acts], dim=-1)
        d = acts.shape[-1]
        made = FeatureDirections.fit(lambda some: some[:, -d:], both, ridge)
        width = x.shape[-1]
        return made._replace(mean=made.mean[:width], directions=made.directions[:, :width])

    def test_planted_directions_are_found(self, acts):
        generator = torch.Generator().manual_seed(1)
        planted, mean = (
            torch.randn(7, 11, generator=generator),
            torch.randn(11, generator=generator),
        )
        fitted = self.fit(acts, mean + acts @ planted, ridge=1e-9)
        torch.testing.assert_close(fitted.directions[1:], planted[1:], rtol=0, atol=1e-4)
        torch.testing.assert_close(fitted.mean, mean, rtol=0, atol=1e-4)
        assert not fitted.directions[0].any()
        assert fitted.rates[1] == 1.0 > ALWAYS_ON
        assert fitted.usable.tolist() == [False, False, *[True] * 5]
        components = fitted.components(acts[0, 0], torch.tensor([2, 5]))
        torch.testing.assert_close(
            components, acts[0, 0, [2, 5], None] * planted[[2, 5]], rtol=0, atol=1e-4
        )
        assert fitted.residual(mean + acts[0] @ planted, acts[0]).abs().max() < 1e-3

    def test_ridge_equals_least_squares_with_penalty_rows(self, acts):
        x = torch.randn(5, 41, 3, generator=torch.Generator().manual_seed(2))
        fitted = self.fit(acts, x, ridge=2.5)
        flat, fired = acts.flatten(0, 1).double(), (acts > 0).flatten(0, 1).sum(dim=0)
        penalty = (2.5 * flat.square().sum(dim=0) / fired.clamp(min=1)).sqrt()
        left = torch.cat(
            [
                torch.cat([flat, torch.ones(len(flat), 1)], dim=1),
                torch.diag(penalty).double().new_zeros(7, 8),
            ]
        )
        left[len(flat) :, :7] = torch.diag(penalty)
        right = torch.cat([x.flatten(0, 1).double(), torch.zeros(7, 3)])
        solved = torch.linalg.lstsq(
            left[:, 1:], right
        ).solution  # without the feature that never fires
        torch.testing.assert_close(fitted.directions[1:].double(), solved[:6], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fitted.mean.double(), solved[6], rtol=1e-4, atol=1e-5)

    def test_components_do_not_depend_on_the_scale_of_features(self, acts):
        x = torch.randn(5, 41, 3, generator=torch.Generator().manual_seed(2))
        factors = torch.tensor([1.0, 2.0, 0.1, 30.0, 1.0, 5.0, 0.01])
        plain, scaled = self.fit(acts, x, ridge=1.0), self.fit(acts * factors, x, ridge=1.0)
        features = torch.arange(7)
        torch.testing.assert_close(
            plain.components(acts[0, 0], features),
            scaled.components(acts[0, 0] * factors, features),
            rtol=1e-4,
            atol=1e-6,
        )

    def test_no_rows_are_refused(self):
        with pytest.raises(ValueError, match="at least one row of layer inputs, got none"):
            FeatureDirections.fit(lambda x: x, [])


def test_score_row_is_the_models_own(model, rows, x):
    _, scores = inputs_and_scores(model, rows)
    for head in range(scores.shape[1]):
        row, own = score_row(model, x, head), scores[0, head, QUERY, : QUERY + 1]
        torch.testing.assert_close(row.scores, own, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            row.pattern.double(), pattern_by_hand(scores)[0, head, QUERY, : QUERY + 1].double()
        )


@pytest.mark.parametrize("side", SIDES)
def test_edits_are_those_of_the_model(model, rows, x, side):
    """Against the scores the model computes when a hook adds to its own x: at the query, all but the query's own key."""
    position = QUERY if side == "query" else KEY
    change = torch.randn(3, x.shape[2], generator=torch.Generator().manual_seed(0))
    names = hook_names(model, LAYER)
    for n, added in enumerate(change):

        def edit(value, hook, added=added):
            edited = value.clone()
            edited[0, position] += added
            return edited

        _, seen = observe(model, rows, [(names.input, edit)], (names.scores,))
        for head in range(attention_spec(model, LAYER).n_heads):
            made = score_row(model, x, head).edited(side, KEY, x[0, position] + change)[n]
            own = seen[names.scores][0, head, QUERY, : QUERY + 1]
            torch.testing.assert_close(made[:-1], own[:-1], rtol=0, atol=1e-4)
            clean = score_row(model, x, head).scores
            assert made[-1] != clean[-1] if side == "query" else torch.equal(made[-1], clean[-1])


def test_terms_are_the_pairs_terms(dictionary, x):
    acts = tuple(
        encode(x[:1]).double().numpy()
        for encode in (dictionary.encode_query, dictionary.encode_key)
    )
    for head in range(dictionary.spec.n_heads):
        terms = score_terms(dictionary, x, head)
        torch.testing.assert_close(
            terms.scores, dictionary.scores(x)[0, head, QUERY, : QUERY + 1], rtol=0, atol=1e-4
        )
        a, b = terms.query_features, terms.key_features[terms.key_positions == KEY]
        assert (int(a[-1]), int(b[-1])) == (D_QUERY, D_KEY)
        pairs = terms.pairs(a, b)
        for n, m in ((0, 0), (2, 1), (len(a) - 1, 2), (1, len(b) - 1), (len(a) - 1, len(b) - 1)):
            expected = pair_term(dictionary, acts, (int(a[n]), int(b[m]), head))[
                0, QUERY, : QUERY + 1
            ]
            assert np.abs(pairs[n, m].numpy() - expected).max() < 1e-4
            assert np.abs(expected).max() > 1e-3


def test_kept_terms_are_those_of_the_map(dictionary, x):
    kept = dictionary.feature_map
    own = dictionary.scores(x, "feature_map")[0, :, QUERY, : QUERY + 1]
    for head in range(dictionary.spec.n_heads):
        terms = score_terms(dictionary, x, head, kept)
        torch.testing.assert_close(terms.scores, own[head], rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", SIDES)
def test_rows_are_what_a_feature_adds_at_its_place(dictionary, x, side):
    usable = torch.ones(D_QUERY if side == "query" else D_KEY, dtype=torch.bool)
    usable[::5] = False
    for head in range(dictionary.spec.n_heads):
        terms = score_terms(dictionary, x, head)
        features = terms.active(side, KEY, usable)
        assert not (features % 5 == 0).any()
        assert len(features) > 3
        rows = terms.rows(side, KEY, features)
        query_acts, key_acts = (
            dictionary.encode_query(x[0, QUERY]),
            dictionary.encode_key(x[0, : QUERY + 1]),
        )
        for n, feature in enumerate(features):
            changed = query_acts.clone(), key_acts.clone()
            if side == "query":
                changed[0][feature] = 0
            else:
                changed[1][KEY, feature] = 0
            without = ScoreTerms.of(dictionary, *changed, head).scores
            torch.testing.assert_close(rows[n], terms.scores - without, rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", SIDES)
def test_an_exact_dictionary_predicts_what_is_measured(model, x, side):
    """Its features are the positive and negative parts of x, so that directions are known and no error remains."""
    d, d_model = exact_dictionary(model), x.shape[2]
    directions = torch.cat([torch.eye(d_model), -torch.eye(d_model)])
    position = QUERY if side == "query" else KEY
    for head in range(d.spec.n_heads):
        row, terms = score_row(model, x, head), score_terms(d, x, head)
        features = terms.active(side, KEY, torch.ones(2 * d_model, dtype=torch.bool))
        assert len(features) == d_model
        acts = d.encode_query(x[0, position]) if side == "query" else d.encode_key(x[0, position])
        place = Place(acts[features, None] * directions[features], terms.rows(side, KEY, features))
        factors = (
            torch.rand(5, d_model, generator=torch.Generator().manual_seed(head)) < 0.3
        ).float()
        measured, predicted = place.remove(row, x[0, position], side, KEY, factors)
        torch.testing.assert_close(predicted, measured, rtol=0, atol=1e-4)
        assert (measured - row.scores).abs().max() > 0.1


def test_change_of_three_keys_by_hand():
    scores = torch.tensor([0.0, math.log(2), 0.0], dtype=torch.float64)  # P = 1/4, 1/2, 1/4
    edited = torch.stack([torch.zeros(3, dtype=torch.float64), scores + 7])
    change = Change.of(scores, edited, key_pos=1)
    assert change.tv.tolist() == pytest.approx([(1 / 12 + 1 / 6 + 1 / 12) / 2, 0])
    assert change.weight_drop.tolist() == pytest.approx([1 / 2 - 1 / 3, 0])
    assert change.score_drop.tolist() == pytest.approx([math.log(2) * (1 - 1 / 2), 0])


def test_pattern_effect_is_the_derivative_of_the_log_pattern():
    generator = torch.Generator().manual_seed(0)
    scores, row = torch.randn(2, 5, dtype=torch.float64, generator=generator)
    strength = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad((scores + strength * row).log_softmax(-1)[3], strength)
    assert float(pattern_effect(row, scores.softmax(-1), 3)) == pytest.approx(float(slope))


def test_best_pairs_and_their_features():
    values = torch.tensor([[0.1, 3.0, -2.0], [5.0, 0.0, 2.0]])
    listed = best_pairs(values, positive=True)
    assert listed.tolist() == [[1, 0], [0, 1], [1, 2], [0, 0]]
    assert best_pairs(values).tolist()[4:] == [[1, 1], [0, 2]]
    assert best_first(values[0], positive=True).tolist() == [1, 0]
    assert top_features(listed[:, 1], 2, n=3).tolist() == [True, True, False]
    assert top_features(listed[:, 0], 1, n=2).tolist() == [False, True]
    assert top_features(listed[:, 1], 50, n=3).all()


class TestControls:
    """Five features with orthogonal components of sizes 1 to 5."""

    place = Place(torch.diag(torch.arange(1.0, 6.0)), torch.zeros(5, 1))

    def controls(self, top: list[int], seed: int = 0):
        chosen = torch.zeros(5, dtype=torch.bool)
        chosen[top] = True
        return control_removals(self.place, chosen, torch.Generator().manual_seed(seed))

    def test_equal_in_number_and_outside(self):
        drawn = {
            tuple(self.controls([4, 2], seed)["other"].nonzero()[:, 0].tolist())
            for seed in range(30)
        }
        assert drawn == {(0, 1), (0, 3), (1, 3)}

    def test_matched_on_size_largest_first(self):
        assert self.controls([4, 2])["matched"].tolist() == [0, 1, 0, 1, 0]
        assert self.controls([0])["matched"].tolist() == [0, 1, 0, 0, 0]

    def test_rescaled_to_the_size_of_the_top(self):
        made = self.controls([4, 3, 2])
        assert list(made) == ["rescaled"]  # two remain, of three
        factors = made["rescaled"]
        assert factors[0] == factors[1] > 0 == factors[2:].abs().sum()
        assert float((factors @ self.place.components).norm()) == pytest.approx(
            math.sqrt(25 + 16 + 9)
        )

    def test_none_remain(self):
        assert self.controls([0, 1, 2, 3, 4]) == {}
        assert self.controls([]) == {}


@pytest.mark.parametrize("bridge", ["gpt2_bridge", "llama_bridge"])
def test_next_token_kl_equals_full_passes(bridge, request):
    model, tokens, head = request.getfixturevalue(bridge), tiny_tokens(1, 7), 1
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(19, 7, generator=generator).softmax(dim=-1)
    name = hook_names(model, LAYER).pattern
    made = next_token_kl(model, LAYER, head, tokens[0], patterns)
    clean = observe(model, tokens)[0][0, -1].double().log_softmax(-1)
    for kl, row in zip(made.tolist(), patterns, strict=True):

        def overwrite(pattern, hook, row=row):
            edited = pattern.clone()
            edited[0, head, -1] = row
            return edited

        other = observe(model, tokens, [(name, overwrite)])[0][0, -1].double().log_softmax(-1)
        assert kl == pytest.approx(float((clean.exp() * (clean - other)).sum()), rel=1e-3, abs=1e-7)
    assert made.max() > 1e-4


def test_table_by_hand():
    """Three cases of two texts; the second has no equal-number control, the third nothing at k = 2."""
    table = Table((1, 2), [0, 0, 5])
    figures = {  # tv, weight drop, score drop of each removal
        (0, 1): {"top": (0.5, 0.2, 1.0), "other": (0.1, 0.3, 0.5), "rescaled": (0.2, 0.1, 0.5)},
        (1, 1): {"top": (0.3, 0.1, 0.5), "rescaled": (0.4, 0.0, 0.1)},
        (2, 1): {"top": (0.1, 0.0, 0.3), "other": (0.3, 0.1, 0.2), "rescaled": (0.1, 0.1, 0.1)},
        (0, 2): {"top": (0.7, 0.2, 1.0), "rescaled": (0.2, 0.1, 0.5)},
        (1, 2): {"top": (0.5, 0.2, 1.0), "rescaled": (0.4, 0.1, 0.5)},
    }
    for (case, k), by_condition in figures.items():
        at, values = [(k, name) for name in by_condition], torch.tensor(list(by_condition.values()))
        table.add(case, at, "measured", list(values.T))
        table.add(case, at, "predicted", list(values.T if case else -values.T))
        table.add(case, at, "size", [torch.full((len(at),), 2.0)])
        table.add(case, at, "count", [torch.full((len(at),), k)])
    made = table.summary(200, seed=0)
    at_1, at_2 = made["by_k"]["1"], made["by_k"]["2"]
    assert (at_1["n"], at_2["n"]) == (3, 2)
    assert at_1["top"]["tv"] == pytest.approx(0.3)
    other, rescaled = at_1["controls"]["other"], at_1["controls"]["rescaled"]
    assert (other["n"], rescaled["n"]) == (2, 3)
    assert (other["top"]["tv"], other["control"]["tv"]) == pytest.approx((0.3, 0.2))
    assert other["wins"]["tv"][0] == 0.5
    assert other["wins"]["score_drop"] == [1.0, 1.0, 1.0]
    assert rescaled["wins"]["tv"][0] == pytest.approx(1 / 3)  # an equal change is no win
    assert at_1["controls"]["matched"]["wins"]["tv"] is None
    assert other["predicted_wins"]["tv"] == 0.0  # of a table that predicts the first case wrongly
    assert (other["agree"]["tv"], rescaled["agree"]["tv"]) == pytest.approx((0.5, 2 / 3))
    expected = {
        "pearson": np.corrcoef([-0.5, 0.3, 0.1], [0.5, 0.3, 0.1])[0, 1],
        "spearman": -0.5,
        "slope": -15 / 35,
    }
    assert at_1["prediction"]["tv"] == pytest.approx(expected, rel=1e-5)
    assert at_2["prediction"]["tv"]["pearson"] is None
    area = made["tv_area"]["rescaled"]
    assert area["ks"] == [1, 2]
    assert area["top"] == pytest.approx((0.3 + 0.6) / 2, rel=1e-5)
    assert area["control"] == pytest.approx((0.7 / 3 + 0.3) / 2, rel=1e-5)
    assert made["tv_area"]["other"]["ks"] == [1]
    json.dumps(made, allow_nan=False)


def test_intervals_resample_whole_texts():
    """A hundred cases of two texts, all won in one and none in the other, know as little as two."""
    values, texts = np.repeat([1.0, 0.0], 50), np.repeat([3, 8], 50)
    assert mean_interval(values, texts, 400, seed=0) == [0.5, 0.0, 1.0]
    mean, low, high = mean_interval(values, np.arange(100), 400, seed=0)
    assert 0.38 < low < mean == 0.5 < high < 0.62


def test_correlations():
    made = correlations([1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 80.0])
    assert made["spearman"] == pytest.approx(1.0)
    assert made["pearson"] == pytest.approx(np.corrcoef([1, 2, 3, 4], [2, 4, 6, 80])[0, 1])
    assert made["slope"] == pytest.approx((2 + 8 + 18 + 320) / 30)
    assert correlations([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])["pearson"] is None


def test_logit_figures():
    kls = [
        {(1, "top"): 0.3, (1, "predicted"): 0.2, (1, "other"): 0.1},
        {(1, "top"): 0.1, (1, "predicted"): 0.1},
    ]
    made = logit_figures(kls, [0, 1], (1, 2), 50, seed=0)
    assert made["1"]["top"][0] == pytest.approx(0.2)
    assert made["1"]["controls"]["other"] == {
        "n": 1,
        "top": 0.3,
        "control": 0.1,
        "wins": [1.0, 1.0, 1.0],
    }
    assert (made["1"]["n"], made["2"]["n"], made["2"]["top"]) == (2, 0, None)


@pytest.fixture(scope="module")
def layer_cases(llama_bridge) -> list[LayerCases]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(CORPUS, raising=False)
        plain = tiny_dictionary(llama_bridge, n_pairs=0, seed=1)
        return prepare(
            llama_bridge, {LAYER: {"mapped": tiny_dictionary(llama_bridge), "plain": plain}}, SMOKE
        )


def test_cases_are_what_they_should_be(layer_cases, llama_bridge):
    (cases,) = layer_cases
    _, scores = inputs_and_scores(llama_bridge, cases.tokens)
    pattern = pattern_by_hand(scores)
    assert len(set(cases.cases)) == len(cases.cases) == SMOKE.cases
    for row, head, i, j in cases.cases:
        assert pattern[row, head, i, j] >= LEAST_WEIGHT - 1e-5
        assert FIRST_QUERY <= i < SMOKE.context
        assert 1 <= j < i
        assert cases.tokens[row, j] != cases.tokens[row, 0]
    heads = [case.head for case in cases.cases]
    assert {heads.count(head) for head in range(4)} == {3}
    assert cases.cases == sorted(cases.cases)
    assert len(cases.fit_x) == SMOKE.fit_rows
    assert not (cases.fit_x[:, None, 5] == cases.x[None, :, 5]).all(dim=-1).any()


def test_layers_share_text_and_one_pass(llama_bridge, monkeypatch):
    monkeypatch.delenv(CORPUS, raising=False)
    dictionaries = {
        layer: {"d": tiny_dictionary(llama_bridge, layer=layer)} for layer in (0, LAYER)
    }
    for cases in prepare(llama_bridge, dictionaries, SMOKE):
        x, _ = inputs_and_scores(llama_bridge, cases.tokens, cases.layer)
        torch.testing.assert_close(cases.x, x, rtol=0, atol=1e-5)
        assert cases.dictionaries is dictionaries[cases.layer]


@pytest.fixture(scope="module")
def results(layer_cases):
    return causal.run(layer_cases, SMOKE)


def test_smoke(results):
    json.dumps(results, allow_nan=False)
    assert set(results) == {str(LAYER)}
    for name, result in results[str(LAYER)].items():
        rankings = {"effect", "contribution", "decoder", "importance", "random", "marginal"}
        assert set(result["rankings"]) == rankings | (
            {"effect_kept"} if name == "mapped" else set()
        )
        assert result["in_score_check"] < 1e-4
        top = result["rankings"]["effect"]["query"]["by_k"]["1"]
        assert 0 < top["n"] <= SMOKE.cases
        assert top["features"] == 1.0
        assert result["twins"]["n"] == SMOKE.twins
        assert set(result["logits"]) == {"1", "2"}


def test_results_repeat(results, layer_cases):
    """And do not depend on which other dictionaries are compared."""
    (cases,) = layer_cases
    alone = causal.run([cases._replace(dictionaries={"plain": cases.dictionaries["plain"]})], SMOKE)
    again, before = alone[str(LAYER)]["plain"], results[str(LAYER)]["plain"]
    assert again["rankings"] == before["rankings"]
    assert again["twins"] == before["twins"]
    assert again["logits"]["1"]["top"] == pytest.approx(
        before["logits"]["1"]["top"], rel=1e-3, abs=1e-9
    )


@pytest.mark.parametrize("side", SIDES)
def test_where_nothing_fires_there_is_nothing_to_remove(layer_cases, side):
    (cases,) = layer_cases
    d = tiny_dictionary(cases.model)
    getattr(d, side).b_enc.fill_(-100.0)
    of_silent = [cases._replace(dictionaries={"silent": d})]
    made = causal.run(of_silent, SMOKE)[str(LAYER)]["silent"]
    json.dumps(made, allow_nan=False)
    assert {
        by_k["n"]
        for by_side in made["rankings"].values()
        for by_k in by_side[side]["by_k"].values()
    } == {0}
    shares = explained.run(of_silent)[str(LAYER)]["silent"]["transcoders"]["all"]
    assert (shares["n"], shares["active_pairs"]) == (0, 0)
    assert shares["score_explained"]["mean"] == 0


def test_twins_of_an_exact_dictionary_are_predicted(layer_cases, llama_bridge):
    (cases,) = layer_cases
    made = causal.Twins.make(cases, SMOKE, seed=0).summary(exact_dictionary(llama_bridge), cases)
    assert made["transcoders"]["pearson"] == pytest.approx(1.0, abs=1e-5)
    assert made["transcoders"]["slope"] == pytest.approx(1.0, abs=1e-4)
    assert "feature_map" not in made


def test_explained_as_evaluate_says(layer_cases, llama_bridge):
    (cases,) = layer_cases
    made = explained.run(layer_cases)
    json.dumps(made, allow_nan=False)
    for name, d in cases.dictionaries.items():
        evaluated = qk.evaluate(d, llama_bridge, cases.tokens, baselines=())
        for source in ("transcoders", *["feature_map"] * d.has_feature_map):
            figures = made[str(LAYER)][name][source]["all"]
            for figure in explained.FIGURES:
                per_head = getattr(evaluated.sources[source], figure)
                assert figures[figure]["per_head"] == pytest.approx(per_head, rel=1e-4, abs=1e-5)
                assert figures[figure]["mean"] == pytest.approx(
                    sum(per_head) / len(per_head), rel=1e-4, abs=1e-5
                )


def set_always_on(d):
    for half in (d.query, d.key):
        half.b_enc[0], half.threshold[0] = 50.0, 0.0
    return d


def always_on(half, cases) -> torch.Tensor:
    return (half.encode(cases.fit_x) > 0).float().mean(dim=(0, 1)) > ALWAYS_ON


def test_always_on_features_are_left_out(layer_cases):
    """As if their decoder rows were zero; the first features always fire, others may."""
    (cases,) = layer_cases
    d, silent = (set_always_on(tiny_dictionary(cases.model)) for _ in range(2))
    for half in (silent.query, silent.key):
        half.W_dec[always_on(half, cases)] = 0.0
    made, expected = (
        explained.run([cases._replace(dictionaries={"d": one})])[str(LAYER)]["d"]
        for one in (d, silent)
    )
    assert min(made["always_on"].values()) >= 1
    for source in ("transcoders", "feature_map"):
        without, all_of_silent = made[source]["without_always_on"], expected[source]["all"]
        for figure in explained.FIGURES:
            assert without[figure]["mean"] == pytest.approx(
                all_of_silent[figure]["mean"], rel=1e-4, abs=1e-5
            )
        assert without["pairs_for"] == all_of_silent["pairs_for"]
        shares = [made[source][name]["norm_share"]["mean"] for name in explained.COUNTED]
        assert shares[0] >= shares[1] > 1.1 * shares[2]
        assert (shares[0] > 1.1 * shares[1]) == (
            source == "transcoders"
        )  # the map has no pair of two such features


def test_pairs_of_two_always_on_features_are_left_out(layer_cases):
    """The same from all pairs as a map: both paths share no score function."""
    (cases,) = layer_cases
    d = tiny_dictionary(cases.model, n_pairs=0)
    set_always_on(d)
    varies = explained.Varies(~always_on(d.query, cases), ~always_on(d.key, cases))
    everything = qk.SparseFeatureMap.all_pairs(D_QUERY, D_KEY, d.spec.n_heads)
    for measure in (explained.explained, explained.pair_counts):
        by_scores, by_pairs = (measure(d, cases, varies, kept) for kept in (None, everything))
        for name in explained.COUNTED:
            assert list(leaves(by_scores[name])) == pytest.approx(
                list(leaves(by_pairs[name])), rel=1e-4
            ), name


def leaves(figures):
    if isinstance(figures, dict | list):
        for value in figures.values() if isinstance(figures, dict) else figures:
            yield from leaves(value)
    else:
        yield figures


def test_pair_counts_by_plain_loops(layer_cases):
    (cases,) = layer_cases
    d = cases.dictionaries["plain"]
    some = cases._replace(cases=cases.cases[:3])
    varies = explained.Varies(
        torch.ones(D_QUERY, dtype=torch.bool), torch.ones(D_KEY, dtype=torch.bool)
    )
    made = explained.pair_counts(d, some, varies, None)["all"]
    counts: dict[str, list[int]] = {"0.5": [], "0.9": []}
    held = []
    for case in some.cases:
        x = cases.x[case.row : case.row + 1]
        scores = inputs_and_scores(cases.model, cases.tokens[case.row : case.row + 1])[1][
            0, case.head, case.query_pos
        ].double()
        pattern = scores.softmax(-1)
        acts = d.encode_query(x).double().numpy(), d.encode_key(x).double().numpy()
        listed = []
        for a in np.flatnonzero(acts[0][0, case.query_pos]):
            for b in np.flatnonzero(acts[1][0, case.key_pos]):
                term = torch.from_numpy(
                    pair_term(d, acts, (int(a), int(b), case.head))[0, case.query_pos]
                )
                listed.append((float(term[case.key_pos] - (pattern * term).sum()), term))
        listed = sorted((pair for pair in listed if pair[0] > 0), key=lambda pair: -pair[0])
        drops, total = [], torch.zeros_like(scores)
        for _, term in listed:
            total = total + term
            drops.append(float(pattern[case.key_pos] - (scores - total).softmax(-1)[case.key_pos]))
        held.append(drops[-1] / float(pattern[case.key_pos]))
        for share, needed in counts.items():
            needed.append(
                next(n for n, drop in enumerate(drops, 1) if drop >= float(share) * drops[-1])
            )
    assert made["n"] == 3
    assert made["weight_held"]["median"] == pytest.approx(sorted(held)[1], rel=1e-4)
    for share, needed in counts.items():
        assert made["pairs_for"][share]["median"] == sorted(needed)[1]
