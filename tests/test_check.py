"""The causal check: removals against scores of an edited x computed apart from it, verdicts by hand."""

import math

import pandas as pd
import pytest
import torch
from rich.console import Console
from tiny_dictionaries import exact_dictionary, tiny_dictionary
from tiny_models import tiny_tokens

from sae_lens_qk.explain.attribution import attribute
from sae_lens_qk.explain.removals import CONTROLS, Directions, FeatureDirections
from sae_lens_qk.explain.check import Check, _against_controls
from sae_lens_qk.explain.prompt import ScorePlace
from sae_lens_qk.attention import attention_scores, pattern_from_scores
from sae_lens_qk.host.layer import layer_inputs
from sae_lens_qk.text import token_rows

N_POS, HEAD, QUERY, KEY = 13, 1, 10, 4


@pytest.fixture(scope="module", params=["gpt2_bridge", "llama_bridge"])
def exact(request):
    """An attribution by a dictionary whose features are the coordinates of x, each sign apart."""
    model = request.getfixturevalue(request.param)
    return attribute(exact_dictionary(model), model, tiny_tokens(1, N_POS), HEAD, QUERY, KEY)


@pytest.fixture(scope="module")
def directions(exact):
    d_model = exact.prompt.x.shape[1]
    signs = torch.cat([torch.eye(d_model), -torch.eye(d_model)])
    of_side = FeatureDirections(torch.zeros(d_model), signs, torch.full((2 * d_model,), 0.5))
    return Directions(of_side, of_side)


@pytest.fixture(scope="module")
def made(exact, directions):
    return exact.check(k=(1, 3), directions=directions, n_controls=7)


def centred(scores, pattern):
    return float(scores[KEY] - (pattern * scores).sum())


def strongest_features(exact, side):
    """By the effect of all their terms at the place, from the attribution's own terms and a loop."""
    prompt, terms = exact.prompt, exact.terms
    pattern, n = prompt.pattern[HEAD, QUERY, : QUERY + 1], 2 * prompt.x.shape[1]
    effects = {}
    for at, feature in enumerate(
        terms.query_features.tolist() if side == "query" else terms.key_features.tolist()
    ):
        row = torch.zeros(QUERY + 1)
        if side == "query":
            row.index_add_(0, terms.key_positions, terms.terms[at])
        elif terms.key_positions[at] == KEY:
            row[KEY] = terms.terms[:, at].sum()
        if feature < n and row.any():
            effects[feature] = centred(row, pattern)
    return sorted(effects, key=effects.get, reverse=True)


@pytest.mark.parametrize("side", ["query", "key"])
def test_removals_are_measured_with_the_models_own_weights(exact, made, side):
    """The coordinates of the k strongest features set to zero, scores computed anew from the whole sequence."""
    prompt, spec = exact.prompt, exact.prompt.dictionary.spec
    at = QUERY if side == "query" else KEY
    best = strongest_features(exact, side)
    for k in (1, 3):
        x = prompt.x.clone()
        x[at, [feature % x.shape[1] for feature in best[:k]]] = 0.0
        changed = (
            prompt.weights.queries(x if side == "query" else prompt.x),
            prompt.weights.keys(x if side == "key" else prompt.x),
        )
        scores = attention_scores(changed[0][None], changed[1][None], spec)
        clean, pattern = (
            prompt.scores[HEAD, QUERY, : QUERY + 1],
            prompt.pattern[HEAD, QUERY, : QUERY + 1],
        )
        drop = centred(clean - scores[0, HEAD, QUERY, : QUERY + 1], pattern)
        left = pattern_from_scores(scores)[0, HEAD, QUERY, KEY]
        row = made.table.set_index(["ranking", "side", "k"]).loc[("features", side, k)]
        assert row["score_drop"] == pytest.approx(drop, abs=1e-5)
        assert row["predicted"] == pytest.approx(drop, abs=1e-5)  # the dictionary is exact
        assert row["attention_drop"] == pytest.approx(float(pattern[KEY] - left), abs=1e-5)
        assert row["n_features"] == k


def test_pairs_name_their_distinct_features(made, exact):
    rows = made.table.query("ranking == 'pairs'")
    assert set(rows["side"]) == {"query", "key"} and (rows["n_features"] <= rows["k"]).all()
    best = exact.to_frame().query("kind == 'pair'").nlargest(3, "pattern_effect")
    for side in ("query", "key"):
        row = rows.set_index(["side", "k"]).loc[(side, 3)]
        assert row["n_features"] == best[f"{side}_feature"].nunique()


def test_a_check_is_the_same_each_time_and_draws_anew_with_another_seed(exact, directions, made):
    again = exact.check(k=(1, 3), directions=directions, n_controls=7)
    pd.testing.assert_frame_equal(again.table, made.table)
    other = exact.check(k=(1, 3), directions=directions, n_controls=7, seed=1).table
    assert other["score_drop"].equals(made.table["score_drop"]) and other["matched"].equals(
        made.table["matched"]
    )
    assert not other["other"].equals(made.table["other"])


@pytest.mark.parametrize(
    ("drops", "beaten", "holds"),
    [
        ([2.0, 1.0, 1.0, 0.0, 1.5], 1.0, True),
        ([2.0, 1.0, 3.0, 0.0, 1.5], 1.0, False),  # the matched control drops it more
        ([2.0, 2.5, 1.0, 0.0, 1.5], 2 / 3, False),
        ([-0.5, -1.0, -1.0, -2.0, -1.5], 1.0, True),
    ],
)
def test_verdicts_by_hand(drops, beaten, holds):
    names = ["top", "other", "matched", "other", "rescaled"]
    made = _against_controls(names, torch.tensor(drops))
    assert made["other"] == pytest.approx((drops[1] + drops[3]) / 2) and made["matched"] == drops[2]
    assert made["beaten"] == pytest.approx(beaten) and made["holds"] is holds


def test_without_other_features_there_is_no_verdict():
    made = _against_controls(["top", "rescaled"], torch.tensor([1.0, 0.5]))
    assert made["holds"] is None and math.isnan(made["beaten"]) and made["rescaled"] == 0.5


def table(verdicts):
    rows = [("features", side, k, holds) for (side, k), holds in verdicts.items()]
    return pd.DataFrame(rows, columns=["ranking", "side", "k", "holds"])


@pytest.mark.parametrize(
    ("verdicts", "holds"),
    [
        ({("query", 1): False, ("query", 2): True, ("key", 5): True}, True),
        ({("query", 2): True, ("key", 2): False}, False),
        ({("query", 2): True, ("key", 2): None}, True),
        ({("query", 1): True, ("key", 5): None}, None),
    ],
)
def test_an_explanation_holds_where_every_k_from_two_on_does(verdicts, holds):
    made = Check(ScorePlace(0, 1, 1), 0.5, table(verdicts))
    assert made.holds is holds
    words = {True: "holds", False: "does not hold", None: "cannot be judged"}[holds]
    assert made.verdict.startswith(words) and made.verdict in made._repr_html_()


def test_printing_shows_all_of_it(made):
    """In a script as well, where pandas would leave out the columns in the middle."""
    title, header, *rows = str(made).splitlines()
    assert title.endswith(f"attention {made.attention:.3f}: the explanation {made.verdict}")
    assert header.split() == list(made.table.columns)
    assert len(rows) == len(made.table)
    assert f"{made.table['score_drop'].iloc[0]:.3f}" in rows[0].split()


def test_the_terminal_shows_the_verdict(made):
    console = Console(width=140)
    with console.capture() as capture:
        console.print(made)
    assert (
        f"the explanation {made.verdict}" in capture.get()
        and f"{made.table['score_drop'].iloc[0]:+.3f}" in capture.get()
    )


def test_wrong_numbers_are_refused(exact, directions):
    for k in ((), (0, 2)):
        with pytest.raises(
            ValueError, match="k must be numbers of pairs or features to remove, 1 or more"
        ):
            exact.check(k=k, directions=directions)


def test_too_large_k_is_left_out(exact, directions):
    made = exact.check(k=(2, 10_000), directions=directions)
    assert set(made.table["k"]) == {2}


def test_features_that_are_always_on_stay(llama_bridge):
    d = tiny_dictionary(llama_bridge)
    a = attribute(d, llama_bridge, tiny_tokens(1, N_POS), HEAD, QUERY, KEY)
    rows = list(
        torch.randn(5, N_POS, a.prompt.x.shape[1], generator=torch.Generator().manual_seed(0))
    )
    fitted = Directions.fit(d, rows)
    made = a.check(k=(1,), directions=fitted)
    nothing = Directions(*(side._replace(rates=torch.ones_like(side.rates)) for side in fitted))
    assert len(made.table) and not len(a.check(k=(1,), directions=nothing).table)
    assert a.check(k=(1,), directions=nothing).holds is None
    assert set(CONTROLS) <= set(made.table.columns)


def test_directions_of_the_packages_own_text_are_fitted_once(gpt2_bridge, tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_LENS_QK_CACHE", str(tmp_path))
    d = tiny_dictionary(gpt2_bridge)
    made = Directions.from_own_text(d, gpt2_bridge, n_rows=7, n_pos=19)
    x = layer_inputs(gpt2_bridge, d.cfg.layer, token_rows(gpt2_bridge, "", "text", 7, 19))
    for side, expected in zip(made, Directions.fit(d, list(x)), strict=True):
        for tensor, other in zip(side, expected, strict=True):
            torch.testing.assert_close(tensor, other)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1

    monkeypatch.setattr(Directions, "fit", None)  # not asked again
    again = Directions.from_own_text(d, gpt2_bridge, n_rows=7, n_pos=19)
    assert all(
        torch.equal(a, b)
        for one, other in zip(again, made, strict=True)
        for a, b in zip(one, other, strict=True)
    )
    with pytest.raises(TypeError):  # another dictionary is another file
        Directions.from_own_text(
            tiny_dictionary(gpt2_bridge, seed=1), gpt2_bridge, n_rows=7, n_pos=19
        )
