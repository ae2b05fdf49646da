"""The causal check: removals against scores of an edited x, verdicts by hand."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from tiny_dictionaries import exact_dictionary, tiny_dictionary
from tiny_models import tiny_tokens

from sae_lens_qk.attention import SIDES
from sae_lens_qk.explain.attribution import attribute
from sae_lens_qk.explain.check import Check, against_controls
from sae_lens_qk.explain.prompt import ScorePosition
from sae_lens_qk.explain.removals import Directions, FeatureDirections

N_POS = 13
HEAD = 1
QUERY = 10
KEY = 4


@pytest.fixture(scope="module", params=["gpt2_bridge", "llama_bridge"])
def exact(request):
    """An attribution by a dictionary whose features are the coordinates of x, each sign apart."""
    model = request.getfixturevalue(request.param)
    d = exact_dictionary(model)
    return attribute(d, model, tiny_tokens(1, N_POS), HEAD, QUERY, KEY)


@pytest.fixture(scope="module")
def directions(exact):
    d_model = exact.prompt.x.shape[1]
    coordinates = torch.eye(d_model)
    fit = FeatureDirections(
        mean=torch.zeros(d_model),
        directions=torch.cat([coordinates, -coordinates]),
        rates=torch.full((2 * d_model,), 0.5),
    )
    return Directions(fit, fit)


@pytest.fixture(scope="module")
def result(exact, directions):
    return check_with(exact, directions)


def check_with(exact, directions, seed: int = 0) -> Check:
    settings = {"k": (1, 3), "n_controls": 7, "seed": seed}
    return exact.check(directions=directions, **settings)


def centred(row, pattern) -> float:
    return float(row[KEY] - (pattern * row).sum())


def strongest_features(exact, side):
    """By the effect of all their terms at the site, from the attribution's own terms."""
    prompt = exact.prompt
    terms = exact.terms
    pattern = prompt.pattern[HEAD, QUERY, : QUERY + 1]
    n_features = 2 * prompt.x.shape[1]
    all_features = terms.query_features if side == "query" else terms.key_features
    effects = {}
    for number, feature in enumerate(all_features.tolist()):
        row = torch.zeros(QUERY + 1)
        if side == "query":
            row.index_add_(0, terms.key_positions, terms.terms[number])
        elif terms.key_positions[number] == KEY:
            row[KEY] = terms.terms[:, number].sum()
        if feature < n_features and row.any():
            effects[feature] = centred(row, pattern)
    return sorted(effects, key=effects.__getitem__, reverse=True)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("side", SIDES)
def test_removals_are_measured_with_the_models_own_weights(exact, result, side, k):
    """The coordinates of the k strongest features set to zero, all scores computed anew."""
    prompt = exact.prompt
    spec = prompt.dictionary.spec
    x = prompt.x.clone()
    d_model = x.shape[1]
    position = QUERY if side == "query" else KEY
    coordinates = [feature % d_model for feature in strongest_features(exact, side)[:k]]
    x[position, coordinates] = 0.0
    queries = prompt.weights.queries(x if side == "query" else prompt.x)
    keys = prompt.weights.keys(x if side == "key" else prompt.x)
    scores = spec.scores(queries[None], keys[None])
    pattern = prompt.pattern[HEAD, QUERY, : QUERY + 1]
    drops = prompt.scores - scores[0]  # [head, pos_q, pos_k]
    change = drops[HEAD, QUERY, : QUERY + 1]
    remaining = spec.pattern(scores)[0, HEAD, QUERY, KEY]
    table = result.table.set_index(["ranking", "side", "k"])
    row = table.loc[("features", side, k)]
    drop = centred(change, pattern)
    assert row["score_drop"] == pytest.approx(drop, abs=1e-5)
    assert row["predicted"] == pytest.approx(drop, abs=1e-5)  # the dictionary is exact
    attention_drop = float(pattern[KEY] - remaining)
    assert row["attention_drop"] == pytest.approx(attention_drop, abs=1e-5)
    assert row["n_features"] == k


def test_pairs_name_their_distinct_features(result, exact):
    rows = result.table.query("ranking == 'pairs'")
    by_side = rows.set_index(["side", "k"])
    assert (rows["n_features"] <= rows["k"]).all()
    best = exact.to_frame().query("kind == 'pair'").nlargest(3, "pattern_effect")
    for side in SIDES:
        row = by_side.loc[(side, 3)]
        assert row["n_features"] == best[f"{side}_feature"].nunique()


def test_a_check_repeats_and_another_seed_draws_other_controls(exact, directions, result):
    again = check_with(exact, directions)
    pd.testing.assert_frame_equal(again.table, result.table)
    other = check_with(exact, directions, seed=1).table
    assert other["score_drop"].equals(result.table["score_drop"])
    assert other["matched"].equals(result.table["matched"])
    assert not other["other"].equals(result.table["other"])


# Verdicts


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
    row = against_controls(names, torch.tensor(drops))
    mean_of_others = (drops[1] + drops[3]) / 2
    assert row["other"] == pytest.approx(mean_of_others)
    assert row["matched"] == drops[2]
    assert row["beaten"] == pytest.approx(beaten)
    assert row["holds"] is holds


def test_without_other_features_there_is_no_verdict():
    drops = torch.tensor([1.0, 0.5])
    row = against_controls(["top", "rescaled"], drops)
    assert row["holds"] is None
    assert math.isnan(row["beaten"])
    assert row["rescaled"] == 0.5


@pytest.mark.parametrize(
    ("verdicts", "holds", "words"),
    [
        ({1: False, 2: True, 5: True}, True, "holds"),
        ({2: True, 5: False}, False, "does not hold"),
        ({2: True, 5: None}, True, "holds"),
        ({1: True, 5: None}, None, "cannot be judged"),
    ],
)
def test_an_explanation_holds_where_every_k_from_two_on_does(verdicts, holds, words):
    rows = [("features", "key", k, value) for k, value in verdicts.items()]
    table = pd.DataFrame(rows, columns=["ranking", "side", "k", "holds"])
    check = Check(ScorePosition(0, 1, 1), 0.5, table)
    assert check.holds is holds
    assert check.verdict.startswith(words)
    assert check.verdict in check._repr_html_()
    assert check.to_dict()["holds"] is holds


# Views


def test_printing_shows_all_of_it(result):
    """In a script as well, where pandas would leave out the columns in the middle."""
    title, header, *rows = str(result).splitlines()
    assert title.endswith(f"attention {result.attention:.3f}: the explanation {result.verdict}")
    assert header.split() == list(result.table.columns)
    assert len(rows) == len(result.table)
    assert f"{result.table['score_drop'].iloc[0]:.3f}" in rows[0].split()


def test_the_terminal_shows_the_verdict(result):
    console = Console(width=140)
    with console.capture() as capture:
        console.print(result)
    assert f"the explanation {result.verdict}" in capture.get()
    assert f"{result.table['score_drop'].iloc[0]:+.3f}" in capture.get()


def test_json_holds_verdict_and_table(result):
    text = json.dumps(result.to_dict(), allow_nan=False)
    values = json.loads(text)
    table = pd.DataFrame(values["table"])
    assert values["verdict"] == result.verdict
    assert list(table) == list(result.table)
    assert table["score_drop"].tolist() == result.table["score_drop"].tolist()
    assert set(table["holds"]) <= {True, False, None}


# What is left out


@pytest.mark.parametrize("k", [(), (0, 2), (1.5,)])
def test_other_numbers_of_features_are_refused(exact, directions, k, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # what users meet
    with pytest.raises(ValueError, match="k must be"):
        exact.check(k=k, directions=directions)


@pytest.mark.parametrize("k", [2, np.int64(2), np.array([2, 10_000]), (2, 10_000)])
def test_larger_k_than_there_are_features_are_left_out(exact, directions, k):
    table = exact.check(
        k=k,
        directions=directions,
        n_controls=2,
    ).table
    assert set(table["k"]) == {2}


def test_features_that_are_always_on_stay(llama_bridge):
    d = tiny_dictionary(llama_bridge)
    tokens = tiny_tokens(1, N_POS)
    attribution = attribute(d, llama_bridge, tokens, HEAD, QUERY, KEY)
    generator = torch.Generator().manual_seed(0)
    shape = attribution.prompt.x.shape
    rows = torch.randn(5, *shape, generator=generator)
    fit = Directions.fit(d, list(rows))
    query_rates = torch.ones_like(fit.query.rates)
    key_rates = torch.ones_like(fit.key.rates)
    always_on = Directions(
        query=fit.query._replace(rates=query_rates),
        key=fit.key._replace(rates=key_rates),
    )
    something = attribution.check(k=(1,), directions=fit)
    assert len(something.table)
    nothing = attribution.check(k=(1,), directions=always_on)
    assert not len(nothing.table)
    assert nothing.holds is None
