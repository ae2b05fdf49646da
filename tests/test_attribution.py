"""Terms of a score against terms written out by hand in float64, sums against the model's hooks."""

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from comparing import assert_near
from rich.console import Console
from tiny_dictionaries import (
    D_KEY,
    D_QUERY,
    LAYER,
    exact_dictionary,
    observe,
    pair_term,
    pair_weights,
    tiny_dictionary,
)
from tiny_models import tiny_tokens

from sae_lens_qk.explain.attribution import Attribution, Attributions, attribute
from sae_lens_qk.explain.prompt import RecordedPrompt
from sae_lens_qk.explain.removals import Directions

N_POS = 13
HEAD = 2
QUERY = 10
KEY = 4
ROW = slice(QUERY + 1)
SCORES = f"blocks.{LAYER}.attn.hook_attn_scores"
PATTERN = f"blocks.{LAYER}.attn.hook_pattern"
SOURCES = ("transcoders", "feature_map")
FEATURES = ["query_feature", "key_feature"]
MEASURES = ["weight", "contribution", "pattern_effect", "attention_drop"]
KINDS = {"pair", "query_constant", "key_constant", "constant", "masked", "error"}


@pytest.fixture(scope="module", params=["gpt2_bridge", "neox_bridge", "llama_bridge"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def tokens():
    return tiny_tokens(1, N_POS)


@pytest.fixture(scope="module")
def d(model):
    return tiny_dictionary(model)


@pytest.fixture(scope="module")
def prompt(d, model, tokens):
    return RecordedPrompt.record(d, model, tokens)


@pytest.fixture(scope="module")
def attribution(prompt):
    return Attribution.of(prompt, HEAD, QUERY, KEY)


@pytest.fixture(scope="module")
def checked(attribution):
    """With its check, by directions fitted on random rows."""
    generator = torch.Generator().manual_seed(0)
    prompt = attribution.prompt
    rows = torch.randn(5, *prompt.x.shape, generator=generator)
    directions = Directions.fit(prompt.dictionary, list(rows))
    settings = {"k": (1, 2), "directions": directions, "n_controls": 3}
    return attribution.checked(**settings)


@pytest.fixture(scope="module")
def pattern_row(model, tokens) -> np.ndarray:
    """The model's own, at the head and query."""
    row = observed(model, tokens, PATTERN)[HEAD, QUERY, ROW]
    return row.double().numpy()


def term_by_hand(prompt, pair) -> np.ndarray:
    """[key], of the query."""
    query_acts = prompt.query_acts[None].double().numpy()
    key_acts = prompt.key_acts[None].double().numpy()
    return pair_term(prompt.dictionary, query_acts, key_acts, pair)[0, QUERY, ROW]


def observed(model, tokens, name, hooks=()) -> torch.Tensor:
    """[head, pos_q, pos_k] of the model's own, with some hooks."""
    _, values = observe(model, tokens, hooks, names=(name,))
    return values[name][0]


def near(value) -> Any:
    return pytest.approx(float(value), abs=1e-5)


def without_sums(frame):
    return frame[~frame["kind"].isin(["masked", "error"])]


# Terms


def test_every_term_is_the_one_by_hand(attribution, prompt, pattern_row):
    frame = attribution.to_frame()
    terms = frame[frame["kind"] != "error"]
    for row in terms.itertuples():
        c = term_by_hand(prompt, (row.query_feature, row.key_feature, HEAD))
        assert row.contribution == pytest.approx(c[KEY], abs=1e-5)
        effect = c[KEY] - (pattern_row * c).sum()
        assert row.pattern_effect == pytest.approx(effect, abs=1e-5)
    n_query = np.count_nonzero(prompt.query_acts[QUERY]) + 1  # and the constant
    n_key = np.count_nonzero(prompt.key_acts[KEY]) + 1
    assert len(terms) == n_query * n_key
    assert len(frame) == (n_query + 1) * (n_key + 1)


def test_kinds_tell_constants_and_errors(attribution):
    frame = attribution.to_frame()
    assert list(frame.columns) == ["kind", *FEATURES, *MEASURES]
    for row in frame.itertuples():
        if pd.isna(row.query_feature) or pd.isna(row.key_feature):
            expected = "error"
        elif row.query_feature == D_QUERY and row.key_feature == D_KEY:
            expected = "constant"
        elif row.query_feature == D_QUERY:
            expected = "query_constant"
        elif row.key_feature == D_KEY:
            expected = "key_constant"
        else:
            expected = "pair"
        assert row.kind == expected
    assert set(frame["kind"]) == KINDS - {"masked"}


def test_weights_are_the_maps(attribution, d):
    weights = pair_weights(d)
    frame = attribution.to_frame()
    for row in frame.itertuples():
        if row.kind == "error":
            assert np.isnan(row.weight)
        elif row.kind == "constant":
            assert row.weight == 1
        else:
            pair = (row.query_feature, row.key_feature, HEAD)
            assert row.weight == pytest.approx(weights.get(pair, 0.0))
    assert (frame["weight"] > 0).sum() > 3
    assert (frame["weight"] == 0).sum() > 3


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "position",
    [
        (0, 12, 12),
        (1, 7, 0),
        (2, 12, 5),
        (2, 0, 0),
    ],
)
def test_terms_add_up_to_the_models_own_score(prompt, model, tokens, source, position):
    scores = observed(model, tokens, SCORES)
    frame = Attribution.of(prompt, *position).to_frame(source)
    assert frame["contribution"].sum() == near(scores[position])


def test_the_map_counts_its_terms_and_sums_up_the_rest(attribution):
    all_terms = attribution.to_frame("transcoders")
    by_map = attribution.to_frame("feature_map")
    is_error = all_terms["kind"] == "error"
    weight = all_terms["weight"].fillna(0.0)
    rest = (1 - weight) * all_terms["contribution"]
    masked = rest[~is_error].sum()
    errors = all_terms["contribution"][is_error].sum()
    sums = by_map.set_index("kind")["contribution"]
    assert sums["masked"] == pytest.approx(masked, abs=1e-5)
    assert sums["error"] == pytest.approx(errors, abs=1e-5)
    actual = without_sums(by_map).set_index(FEATURES).sort_index()
    in_map = all_terms[weight > 0].set_index(FEATURES).sort_index()
    for column in ("contribution", "pattern_effect"):
        expected = in_map["weight"] * in_map[column]
        np.testing.assert_allclose(actual[column], expected, atol=1e-6)


def test_attention_drop_is_that_of_a_pattern_without_the_pair(attribution, d, model, tokens):
    """Dropped by the patching hooks, recomputed by the model."""
    frame = attribution.to_frame()
    pairs = frame.query("kind not in ('error', 'constant')").head(7)
    assert len(pairs) == 7
    for row in pairs.itertuples():
        pair = np.array([[row.query_feature, row.key_feature, HEAD]])
        hooks = d.fwd_hooks(model, "model", ablate_pairs=pair)
        remaining = observed(model, tokens, PATTERN, hooks)[HEAD, QUERY, KEY]
        assert row.attention_drop == near(attribution.attention - remaining)


def test_strongest_pairs_removed_together_do_what_their_terms_predict(
    attribution, d, model, tokens
):
    """A check of the code, no evidence: ablation inside the scores is linear."""
    triples = attribution.triples(4, source="transcoders")
    assert triples.shape == (4, 3)
    assert set(triples[:, 2].tolist()) == {HEAD}
    hooks = d.fwd_hooks(model, "model", ablate_pairs=triples)
    pattern = observed(model, tokens, PATTERN, hooks)[HEAD, QUERY, ROW]
    terms = [term_by_hand(attribution.prompt, pair) for pair in triples.tolist()]
    removed = sum(terms)
    scores = attribution.prompt.scores[HEAD, QUERY, ROW].double()
    expected = (scores - torch.from_numpy(removed)).softmax(dim=-1)
    assert_near(pattern.double(), expected)


def test_an_exact_dictionary_leaves_no_error(model, tokens):
    attribution = attribute(exact_dictionary(model), model, tokens, HEAD, QUERY, KEY)
    frame = attribution.to_frame()
    errors = frame.query("kind == 'error'")["contribution"]
    assert errors.abs().max() < 1e-5
    assert frame["weight"].dropna().eq(1).all()
    assert attribution.to_dict(1)["source"] == "transcoders"
    with pytest.raises(ValueError, match="no feature map"):
        attribution.to_frame("feature_map")


def test_unknown_sources_and_signs_are_refused(attribution, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # what users meet
    with pytest.raises(ValueError, match=r"source must be .* got 'all'"):
        attribution.to_frame("all")
    with pytest.raises(ValueError, match=r"sign must be .* got 'up'"):
        attribution.top(3, "up")


# Sums


def test_top_has_both_signs(attribution):
    effects = without_sums(attribution.to_frame("feature_map"))["pattern_effect"]
    supporting = effects[effects > 0].sort_values(ascending=False).tolist()
    inhibiting = effects[effects < 0].sort_values().tolist()
    expected = {
        "both": supporting[:3] + inhibiting[:3],
        "supporting": supporting[:3],
        "inhibiting": inhibiting[:3],
    }
    for sign, values in expected.items():
        top = attribution.top(3, sign)
        assert top["pattern_effect"].tolist() == values
    kinds = attribution.top(100, source="transcoders")["kind"]
    assert set(kinds) <= KINDS - {"masked", "error"}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("side", ["query", "key"])
def test_marginals_are_sums_over_partners(attribution, source, side):
    frame = attribution.to_frame(source)
    table = getattr(attribution.marginals(source), side)
    terms = without_sums(frame)
    assert table["contribution"].sum() == near(attribution.score)
    assert table["pattern_effect"].abs().is_monotonic_decreasing
    with_terms = table.query("n_terms > 0")
    assert set(with_terms["feature"]) == set(terms[f"{side}_feature"])
    for row in table.dropna().itertuples():
        partners = terms[terms[f"{side}_feature"] == row.feature]
        assert row.n_terms == len(partners)
        total = partners["contribution"].sum()
        assert row.contribution == pytest.approx(total, abs=1e-6)
        if side == "key":
            effect = partners["pattern_effect"].sum()
            assert row.pattern_effect == pytest.approx(effect, abs=1e-6)


def test_a_query_features_effect_counts_what_it_meets_at_other_keys(attribution, d, pattern_row):
    table = attribution.marginals("feature_map").query.dropna()
    weights = pair_weights(d)
    for row in table[table["feature"] < D_QUERY].itertuples():
        total = np.zeros(QUERY + 1)
        for pair, weight in weights.items():
            if pair[0] == row.feature and pair[2] == HEAD:
                total += weight * term_by_hand(attribution.prompt, pair)
        effect = total[KEY] - (pattern_row * total).sum()
        assert row.pattern_effect == pytest.approx(effect, abs=1e-5)


@pytest.mark.parametrize("source", SOURCES)
def test_query_effects_add_up_to_the_centred_score(attribution, source, pattern_row):
    scores = attribution.prompt.scores[HEAD, QUERY, ROW].numpy()
    total = attribution.marginals(source).query["pattern_effect"].sum()
    expected = scores[KEY] - (pattern_row * scores).sum()
    assert total == pytest.approx(expected, abs=1e-5)


def test_parts_add_up(attribution):
    parts = attribution.parts("feature_map")
    assert parts["contribution"].sum() == near(attribution.score)
    assert set(parts["kind"]) == KINDS
    assert parts["n_terms"].sum() == len(attribution.to_frame("feature_map"))


# Views: one dict for the terminal, notebooks and the page


@pytest.mark.parametrize("source", SOURCES)
def test_the_dict_holds_what_the_tables_hold(checked, source):
    values = json.loads(checked.to_json(4, source))
    tables = checked.tables(4, source)
    rows = values | values["marginals"]
    rows["check"] = values["check"]["table"]
    for name, table in tables.items():
        assert len(rows[name]) == len(table)
        assert list(rows[name][0]) == list(table.columns)
        for column in table.columns:
            cells = [row[column] for row in rows[name]]
            expected = table[column].astype(object)
            assert cells == expected.where(expected.notna(), None).tolist()
    position = [values[name] for name in ("head", "query_pos", "key_pos")]
    assert tuple(position) == checked.position
    assert values["title"] == str(checked)
    assert values["tokens"] == checked.prompt.words
    assert values["score"] == checked.score
    assert values["attention"] == checked.attention
    rebuilt = checked.prompt.rebuilt_pattern(source)
    assert values["rebuilt"] == float(rebuilt[checked.position])
    assert values["source"] == source
    assert (values["d_query"], values["d_key"]) == (D_QUERY, D_KEY)
    assert values["check"]["verdict"] == checked.causal_check.verdict


def test_the_docstring_lists_the_keys(checked):
    for name in checked.to_dict(1):
        assert name in Attribution.to_dict.__doc__


def test_without_a_check_there_is_none_to_show(attribution):
    assert attribution.to_dict(1)["check"] is None
    assert "check" not in attribution.tables(1)


def test_json_has_the_fields_of_graph_viewers(attribution, prompt):
    values = json.loads(attribution.to_json(n=4))
    traced = values["qk_tracing_results"]
    best = without_sums(attribution.to_frame("feature_map")).iloc[0]
    query_node = f"{LAYER}q_{best['query_feature']}_{QUERY}"
    key_node = f"{LAYER}k_{best['key_feature']}_{KEY}"
    pairs = traced["pair_wise_contributors"]
    assert len(pairs) == 4
    assert pairs[0] == [query_node, key_node, best["contribution"]]
    ends = {end for pair in pairs for end in pair[:2]}
    marginals = attribution.marginals()
    for side, name in (("query", "top_q"), ("key", "top_k")):
        contributors = traced[f"{name}_marginal_contributors"]
        table = getattr(marginals, side).dropna()
        contributions = [value for _, value in contributors]
        assert contributions == table["contribution"].head(4).tolist()
        ends |= {node for node, _ in contributors}
    assert len(traced) == 3
    assert ends == {node["node_id"] for node in values["nodes"]}
    for node in values["nodes"]:
        is_query = node["feature_type"].startswith("query")
        pos = QUERY if is_query else KEY
        acts = (prompt.query_acts if is_query else prompt.key_acts)[pos]
        is_constant = node["feature"] == len(acts)
        expected = 1.0 if is_constant else float(acts[node["feature"]])
        assert node["ctx_idx"] == pos
        assert node["token"] == prompt.words[pos]
        assert node["layer"] == LAYER
        assert node["activation"] == pytest.approx(expected)
        assert node["feature_type"].endswith("constant") == is_constant


def test_the_terminal_shows_what_the_tables_hold(checked):
    console = Console(width=140)
    with console.capture() as capture:
        console.print(checked)
    text = capture.get()
    rebuilt = checked.to_dict(1)["rebuilt"]
    assert f"with {checked.attention:.3f}; rebuilt from features {rebuilt:.3f}" in text
    for row in checked.top(1).itertuples():
        assert f"{row.pattern_effect:+.3f}" in text
        assert f"{row.attention_drop:+.3f}" in text
    for words in ("supporting pairs", "inhibiting pairs", "constant"):
        assert words in text
    assert f"the explanation {checked.causal_check.verdict}" in text


def test_notebooks_show_tables_and_escape_tokens(checked, prompt):
    page = checked._repr_html_()
    assert f"{checked.top(1, 'supporting')['pattern_effect'].iloc[0]:.3f}" in page
    assert f"the explanation {checked.causal_check.verdict}" in page
    hostile_words = list(prompt.words)
    hostile_words[KEY] = "<script>alert(1)</script>"
    values = {name: getattr(prompt, name) for name in RecordedPrompt.__dataclass_fields__}
    hostile = RecordedPrompt(**{**values, "words": hostile_words})
    d = prompt.dictionary
    attributions = attribute(d, prompt.model, hostile, [HEAD], QUERY, [KEY])
    for page in (attributions[0]._repr_html_(), attributions._repr_html_()):
        assert "<script>" not in page
        assert "&lt;script&gt;" in page


def test_an_attribution_names_itself_in_a_line(attribution):
    assert repr(attribution) == f"Attribution({attribution})"
    assert "attends to" in str(attribution)
    assert "\n" not in str(attribution)


# One score or many


@pytest.mark.parametrize(
    ("head", "query_pos", "key_pos"),
    [
        (HEAD, QUERY, KEY),
        (np.int64(HEAD), np.int32(QUERY), np.uint8(KEY)),
        (torch.tensor(HEAD), torch.tensor(QUERY), torch.tensor(KEY)),
        (np.array(HEAD), QUERY - N_POS, np.array(KEY - N_POS)),
    ],
)
def test_one_number_each_gives_one_attribution(d, model, prompt, head, query_pos, key_pos):
    attribution = attribute(d, model, prompt, head, query_pos, key_pos)
    assert isinstance(attribution, Attribution)
    assert attribution.position == (HEAD, QUERY, KEY)


@pytest.mark.parametrize(
    "several", [[2], (2,), range(2, 3), np.array([2]), torch.tensor([2]), pd.Series([2])]
)
@pytest.mark.parametrize("name", ["head", "query_pos", "key_pos"])
def test_several_give_a_list_even_if_one(d, model, prompt, name, several):
    numbers = {"head": 2, "query_pos": 2, "key_pos": 2, name: several}
    attributions = attribute(d, model, prompt, **numbers)
    assert isinstance(attributions, Attributions)
    assert [attribution.position for attribution in attributions] == [(2, 2, 2)]


def test_many_scores_at_once_are_the_single_ones(d, model, tokens, prompt):
    attributions = attribute(d, model, tokens, [0, 2], [-1, 6], [2, 9, -3])
    # key 9 and -3 come after query 6
    cells = [(12, 2), (12, 9), (12, 10), (6, 2)]
    positions = [(head, i, j) for head in (0, 2) for i, j in cells]
    assert [tuple(attribution.position) for attribution in attributions] == positions
    frame = attributions.to_frame("feature_map").set_index(["head", "query_pos", "key_pos"])
    for position in positions:
        expected = Attribution.of(prompt, *position).to_frame("feature_map")
        actual = frame.loc[[position]].reset_index(drop=True)
        pd.testing.assert_frame_equal(actual, expected)
    assert isinstance(attributions[2:4], Attributions)
    values = json.loads(attributions.to_json(1))
    query_positions = [value["query_pos"] for value in values]
    assert query_positions == [12, 12, 12, 6] * 2
    attention = [attribution.attention for attribution in attributions]
    assert attributions.summary()["attention"].tolist() == attention


def test_none_stands_for_all(d, model, prompt):
    attributions = attribute(d, model, prompt, query_pos=3)
    heads = range(d.spec.n_heads)
    expected = [(head, 3, key) for head in heads for key in range(4)]
    assert [tuple(attribution.position) for attribution in attributions] == expected


def test_a_recorded_prompt_of_another_dictionary_or_model_is_refused(
    prompt, model, gpt2_bridge, llama_bridge
):
    with pytest.raises(ValueError, match="recorded with another dictionary"):
        attribute(tiny_dictionary(model, seed=1), model, prompt)
    other = llama_bridge if model is gpt2_bridge else gpt2_bridge
    with pytest.raises(ValueError, match="recorded with another model"):
        attribute(prompt.dictionary, other, prompt)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"query_pos": 2, "key_pos": 5}, r"None of the keys \[5\]"),
        ({"head": 0, "query_pos": 2, "key_pos": 5}, "got query 2 and key 5"),
        ({"head": 1.0}, "head must be integers"),
        ({"head": True}, "head must be integers"),
        ({"head": []}, "head must be at least one integer"),
        ({"key_pos": [[1, 2]]}, "key_pos must be a number or a list"),
        ({"head": [0, 99]}, "head must lie in"),
        ({"key_pos": [99]}, "key_pos must lie in"),
    ],
)
def test_numbers_of_no_score_are_refused(d, model, prompt, numbers, message):
    with pytest.raises(ValueError, match=message):
        attribute(d, model, prompt, **numbers)


# Names of version 0.1


@pytest.mark.parametrize(("form", "source"), [("full", "transcoders"), ("kept", "feature_map")])
def test_form_is_accepted_with_a_warning(attribution, form, source):
    expected = attribution.to_frame(source)
    with pytest.warns(DeprecationWarning, match="source="):
        pd.testing.assert_frame_equal(attribution.to_frame(form=form), expected)
    with pytest.warns(DeprecationWarning, match="source="):
        pd.testing.assert_frame_equal(attribution.to_frame(form), expected)
    with pytest.warns(DeprecationWarning, match="source="):
        assert attribution.to_json(3, form=form) == attribution.to_json(3, source)


def test_shown_is_render(attribution):
    with pytest.warns(DeprecationWarning, match=r"Attribution\.render"):
        attribution.shown(3)
