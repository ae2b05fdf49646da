"""Removals against the model's own hooks; predictions against a dictionary that is exact."""

import math

import pytest
import torch
from comparing import assert_near
from tiny_dictionaries import (
    LAYER,
    exact_dictionary,
    inputs_and_scores,
    observe,
    pattern_by_hand,
    tiny_dictionary,
)
from tiny_models import tiny_tokens

from sae_lens_qk.attention import SIDES
from sae_lens_qk.explain.removals import (
    Directions,
    FeatureDirections,
    RemovalSite,
    ScoreRow,
    best_first,
    best_pairs,
    control_removals,
    top_features,
)
from sae_lens_qk.explain.terms import HeadTerms
from sae_lens_qk.host.layer import AttentionLayer
from sae_lens_qk.statistics.activations import ALWAYS_ON
from sae_lens_qk.text import token_rows

N_POS = 13
QUERY = 10
KEY = 4


@pytest.fixture(scope="module", params=["gpt2_bridge", "neox_bridge", "llama_bridge"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def layer(model):
    return AttentionLayer(model, LAYER)


@pytest.fixture(scope="module")
def rows():
    return tiny_tokens(2, N_POS)


@pytest.fixture(scope="module")
def x(model, rows) -> torch.Tensor:
    return inputs_and_scores(model, rows)[0]


def score_row(layer, x, head) -> ScoreRow:
    row_x = x[0, : QUERY + 1]
    return ScoreRow(layer.qk_weights, layer.spec, row_x, head)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestFeatureDirections:
    """Feature 0 never fires, feature 1 always, the others on a third of the tokens."""

    @pytest.fixture
    def acts(self):
        """[row, pos, 7]"""
        generator = seeded(0)
        acts = torch.rand(5, 41, 7, generator=generator) + 0.5
        fires = torch.rand(acts.shape, generator=generator) < 1 / 3
        always = torch.rand(5, 41, generator=generator) + 1
        acts = acts * fires
        acts[..., 0] = 0.0
        acts[..., 1] = always
        return acts

    @staticmethod
    def fit(acts, x, ridge):
        """The fit encodes x by looking the activations of its rows up."""
        remaining_acts = iter(acts)
        return FeatureDirections.fit(lambda row: next(remaining_acts), x, ridge)

    def test_planted_directions_are_found(self, acts):
        generator = seeded(1)
        planted = torch.randn(7, 11, generator=generator)
        mean = torch.randn(11, generator=generator)
        fit = self.fit(acts, mean + acts @ planted, ridge=1e-9)
        assert_near(fit.directions[1:], planted[1:], 1e-4)
        assert_near(fit.mean, mean, 1e-4)
        assert not fit.directions[0].any()
        assert fit.rates[1] == 1.0 > ALWAYS_ON
        assert fit.usable.tolist() == [False] * 2 + [True] * 5
        features = torch.tensor([2, 5])
        components = fit.components(acts[0, 0], features)
        expected = acts[0, 0, features, None] * planted[features]
        assert_near(components, expected, 1e-4)
        residual = fit.residual(mean + acts[0] @ planted, acts[0])
        assert residual.abs().max() < 1e-3

    def test_ridge_equals_least_squares_with_penalty_rows(self, acts):
        x = torch.randn(5, 41, 3, generator=seeded(2))
        fit = self.fit(acts, x, ridge=2.5)
        firing = acts[..., 1:].flatten(0, 1).double()  # lstsq needs full rank
        n_tokens = len(firing)
        ones = torch.ones(n_tokens, 1, dtype=torch.float64)
        n_fired = (firing > 0).sum(dim=0)
        mean_squares = firing.square().sum(dim=0) / n_fired
        penalty = (2.5 * mean_squares).sqrt()
        # a row per feature pulls it to zero, the intercept stays free
        left = torch.zeros(n_tokens + 6, 7, dtype=torch.float64)
        left[:n_tokens] = torch.cat([firing, ones], dim=1)
        left[n_tokens:, :6] = penalty.diag()
        right = torch.zeros(n_tokens + 6, 3, dtype=torch.float64)
        right[:n_tokens] = x.flatten(0, 1)
        solution = torch.linalg.lstsq(left, right).solution
        assert_near(fit.directions[1:].double(), solution[:6])
        assert_near(fit.mean.double(), solution[6])

    def test_components_do_not_depend_on_the_scale_of_features(self, acts):
        x = torch.randn(5, 41, 3, generator=seeded(2))
        factors = torch.logspace(-2, 1.5, 7)
        plain = self.fit(acts, x, ridge=1.0)
        scaled = self.fit(acts * factors, x, ridge=1.0)
        features = torch.arange(7)
        plain_components = plain.components(acts[0, 0], features)
        scaled_components = scaled.components(acts[0, 0] * factors, features)
        assert_near(plain_components, scaled_components)

    def test_no_rows_are_refused(self):
        with pytest.raises(ValueError, match="at least one row"):
            FeatureDirections.fit(lambda x: x, [])


def test_directions_of_the_packages_own_text_are_fitted_once(gpt2_bridge, tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_LENS_QK_CACHE", str(tmp_path))
    d = tiny_dictionary(gpt2_bridge)
    directions = Directions.from_own_text(d, gpt2_bridge, n_rows=7, n_pos=19)
    tokens = token_rows(gpt2_bridge, "", "text", 7, 19)
    x = AttentionLayer(gpt2_bridge, LAYER).inputs(tokens)
    expected = Directions.fit(d, list(x))
    for fit, expected_fit in zip(directions, expected, strict=True):
        torch.testing.assert_close(tuple(fit), tuple(expected_fit))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1

    with monkeypatch.context() as context:
        context.setattr(Directions, "fit", None)  # not asked again
        again = Directions.from_own_text(d, gpt2_bridge, n_rows=7, n_pos=19)
    for fit, first_fit in zip(again, directions, strict=True):
        torch.testing.assert_close(tuple(fit), tuple(first_fit), rtol=0, atol=0)

    other = tiny_dictionary(gpt2_bridge, seed=1)
    Directions.from_own_text(other, gpt2_bridge, n_rows=7, n_pos=19)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_a_score_row_is_the_models_own(model, layer, rows, x):
    _, scores = inputs_and_scores(model, rows)
    pattern = pattern_by_hand(scores)
    for head in range(layer.n_heads):
        row = score_row(layer, x, head)
        assert_near(row.scores, scores[0, head, QUERY, : QUERY + 1])
        assert_near(row.pattern, pattern[0, head, QUERY, : QUERY + 1])


@pytest.mark.parametrize("side", SIDES)
def test_edits_are_those_of_the_model(model, layer, rows, x, side):
    """Scores the model computes when a hook adds to its own x, except at the query's own key."""
    position = QUERY if side == "query" else KEY
    changes = torch.randn(3, x.shape[2], generator=seeded(0))
    names = layer.names
    for n, change in enumerate(changes):

        def edit(value, hook, change=change):
            edited = value.clone()
            edited[0, position] += change
            return edited

        hooks = [(names.input, edit)]
        _, values = observe(model, rows, hooks, (names.scores,))
        scores = values[names.scores][0]  # [head, pos_q, pos_k]
        for head in range(layer.n_heads):
            row = score_row(layer, x, head)
            edited_x = x[0, position] + changes
            edited = row.edited(side, KEY, edited_x)[n]
            expected = scores[head, QUERY, : QUERY + 1]
            assert_near(edited[:-1], expected[:-1], 1e-4)
            # the query's own key is edited in the model, not in a removal at the query
            own_key_changes = bool(edited[-1] != row.scores[-1])
            assert own_key_changes == (side == "query")


@pytest.mark.parametrize("side", SIDES)
def test_an_exact_dictionary_predicts_what_is_measured(model, layer, x, side):
    """Its features are the positive and negative parts of x: known directions, no error."""
    d = exact_dictionary(model)
    d_model = x.shape[2]
    coordinates = torch.eye(d_model)
    directions = torch.cat([coordinates, -coordinates])
    all_features = torch.ones(2 * d_model, dtype=torch.bool)
    position = QUERY if side == "query" else KEY
    features = d.features(x[:1])
    acts = features.query if side == "query" else features.key
    for head in range(layer.n_heads):
        row = score_row(layer, x, head)
        terms = HeadTerms(d, features, head).row(QUERY)
        active = terms.active(side, KEY, all_features)
        assert len(active) == d_model
        site = RemovalSite(
            side=side,
            key_pos=KEY,
            x=x[0, position],
            components=acts[0, position, active, None] * directions[active],
            rows=terms.rows(side, KEY, active),
        )
        uniform = torch.rand(5, d_model, generator=seeded(head))
        factors = (uniform < 0.3).float()
        measured = site.measure(row, factors)
        assert_near(site.predict(row, factors), measured, 1e-4)
        assert (measured - row.scores).abs().max() > 0.1


# Rankings and controls


def test_best_pairs_and_their_features():
    values = torch.tensor([[0.1, 3, -2], [5, 0, 2]])
    order = [[1, 0], [0, 1], [1, 2], [0, 0], [1, 1], [0, 2]]
    pairs = best_pairs(values, positive=True)
    assert pairs.tolist() == order[:4]
    assert best_pairs(values).tolist() == order
    assert best_first(values[0], positive=True).tolist() == [1, 0]
    query, key = pairs.T
    top_keys = top_features(key, 2, n=3)
    assert top_keys.tolist() == [True, True, False]
    top_queries = top_features(query, 1, n=2)
    assert top_queries.tolist() == [False, True]
    assert top_features(key, 50, n=3).all()


class TestControls:
    """Five features with orthogonal components of sizes 1 to 5."""

    site = RemovalSite(
        side="query",
        key_pos=0,
        x=torch.zeros(5),
        components=torch.diag(torch.arange(1.0, 6.0)),
        rows=torch.zeros(5, 1),
    )

    def controls(
        self,
        top: list[int],
        seed: int = 0,
    ):
        mask = torch.zeros(5, dtype=torch.bool)
        mask[top] = True
        return control_removals(self.site, mask, torch.Generator().manual_seed(seed))

    def test_others_are_equal_in_number_and_outside(self):
        samples = set()
        for seed in range(30):
            other = self.controls([4, 2], seed)["other"]
            numbers = other.nonzero()[:, 0]
            samples.add(tuple(numbers.tolist()))
        assert sorted(samples) == [(0, 1), (0, 3), (1, 3)]

    def test_matched_ones_are_nearest_in_size_largest_first(self):
        matched = self.controls([4, 2])["matched"].nonzero()
        assert matched.flatten().tolist() == [1, 3]
        matched = self.controls([0])["matched"].nonzero()
        assert matched.flatten().tolist() == [1]

    def test_rescaled_ones_have_the_size_of_the_top(self):
        controls = self.controls([4, 3, 2])
        assert list(controls) == ["rescaled"]  # two remain, of three
        factors = controls["rescaled"]
        assert factors[0] == factors[1] > 0
        assert not factors[2:].any()
        size = float((factors @ self.site.components).norm())
        assert size == pytest.approx(math.sqrt(25 + 16 + 9))

    def test_where_none_remain_there_is_no_control(self):
        assert self.controls([0, 1, 2, 3, 4]) == {}
        assert self.controls([]) == {}
