"""Terms of a score against terms written out by hand in float64, and their sums against the model's own hooks."""

import html
import json

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from tiny_dictionaries import (
    D_KEY,
    D_QUERY,
    LAYER,
    exact_dictionary,
    observe,
    pair_term,
    tiny_dictionary,
)
from tiny_models import tiny_tokens

import sae_lens_qk as qk
from sae_lens_qk.explain.attribution import COLUMNS, KINDS, Attribution, Attributions, attribute, overview
from sae_lens_qk.explain.prompt import Prompt
from sae_lens_qk.host.layer import hook_names

N_POS, HEAD, QUERY, KEY = 13, 2, 10, 4


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
    return Prompt.of(d, model, tokens)


@pytest.fixture(scope="module")
def a(prompt):
    return Attribution.of(prompt, HEAD, QUERY, KEY)


def own_scores(model, tokens):
    names = hook_names(model, LAYER)
    _, seen = observe(model, tokens, names=(names.scores, names.pattern))
    return seen[names.scores][0].double(), seen[names.pattern][0].double()


def acts_of(prompt):
    return prompt.query_acts[None].double().numpy(), prompt.key_acts[None].double().numpy()


# Prompts


def test_a_prompt_holds_what_the_model_computes(prompt, model, tokens):
    scores, pattern = own_scores(model, tokens)
    allowed = torch.ones(N_POS, N_POS).tril().bool()
    assert torch.equal(prompt.scores.double()[:, allowed], scores[:, allowed])
    assert torch.equal(prompt.pattern.double(), pattern)
    assert torch.equal(prompt.tokens, tokens[0]) and len(prompt.words) == N_POS
    assert prompt.words == list(model.to_str_tokens(tokens[0]))


def test_a_prompt_may_be_a_text(d, model):
    made = Prompt.of(d, model, "w [h")
    assert torch.equal(made.tokens, model.to_tokens("w [h")[0])


def test_a_prompt_is_one_sequence(d, model):
    with pytest.raises(
        ValueError, match=r"one sequence, tokens \[pos\] or \[1, pos\], got shape \[3, 7\]"
    ):
        Prompt.of(d, model, tiny_tokens(3, 7))


def test_a_prompt_refuses_another_model(d, gpt2_bridge, llama_bridge, model, tokens):
    other = llama_bridge if model is gpt2_bridge else gpt2_bridge
    with pytest.raises(qk.host.FingerprintError):
        Prompt.of(d, other, tokens)


def test_made_patterns_are_the_dictionarys(prompt, d):
    for source in ("transcoders", "feature_map"):
        assert torch.equal(prompt.made(source), d.pattern(prompt.x[None], source)[0])


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ((4, -1, 0), r"head must lie in \[0, [23]\], got 4"),
        ((0, 13, 0), r"query_pos must lie in \[-13, 12\], got 13"),
        ((0, 3, -14), r"key_pos must lie in \[-13, 12\], got -14"),
        ((0, 3, 4), "got query 3 and key 4"),
    ],
)
def test_places_are_checked(prompt, place, message):
    with pytest.raises(ValueError, match=message):
        prompt.place(*place)


def test_places_count_from_either_end(prompt):
    assert prompt.place(1, -1, -13) == (1, 12, 0)


# Terms


def test_every_term_is_the_one_by_hand(a, d, prompt):
    frame = a.to_frame()
    of_features = frame[frame["kind"] != "error"]
    acts = acts_of(prompt)
    _, pattern = own_scores(prompt.model, prompt.tokens[None])
    P = pattern[HEAD, QUERY, : QUERY + 1].numpy()
    for row in of_features.itertuples():
        c = pair_term(d, acts, (row.query_feature, row.key_feature, HEAD))[0, QUERY, : QUERY + 1]
        assert row.contribution == pytest.approx(c[KEY], abs=1e-5)
        assert row.pattern_effect == pytest.approx(c[KEY] - (P * c).sum(), abs=1e-5)
    n_active = int((acts[0][0, QUERY] > 0).sum()) + 1, int((acts[1][0, KEY] > 0).sum()) + 1
    assert len(of_features) == n_active[0] * n_active[1]
    assert len(frame) == (n_active[0] + 1) * (n_active[1] + 1)


def test_kinds_tell_constants_and_errors(a):
    frame = a.to_frame()
    is_constant = frame["query_feature"] == D_QUERY, frame["key_feature"] == D_KEY
    error = frame["query_feature"].isna() | frame["key_feature"].isna()
    both = is_constant[0].fillna(False) & is_constant[1].fillna(False)
    assert (frame["kind"] == "error").equals(error.astype(bool))
    assert (frame["kind"] == "constant").sum() == 1 == both.sum()
    assert set(frame["kind"]) == set(KINDS) - {"masked"}
    assert (frame.loc[frame["kind"] == "query_constant", "query_feature"] == D_QUERY).all()
    assert (frame.loc[frame["kind"] == "key_constant", "key_feature"] == D_KEY).all()
    assert (frame.loc[frame["kind"] == "pair", "query_feature"] < D_QUERY).all()
    assert tuple(frame.columns) == COLUMNS


def test_weights_are_the_maps(a, d):
    listed = {
        tuple(pair): float(m)
        for pair, m in zip(d.feature_map.indices.tolist(), d.feature_map.weights, strict=True)
    }
    frame = a.to_frame()
    for row in frame.itertuples():
        if row.kind == "error":
            assert np.isnan(row.weight)
        elif row.kind == "constant":
            assert row.weight == 1
        else:
            assert row.weight == pytest.approx(
                listed.get((row.query_feature, row.key_feature, HEAD), 0.0)
            )
    assert (frame["weight"] > 0).sum() > 3 and (frame["weight"] == 0).sum() > 3


@pytest.mark.parametrize("form", ["full", "kept"])
def test_terms_add_up_to_the_models_own_score(prompt, model, tokens, form):
    scores, _ = own_scores(model, tokens)
    for place in ((0, 12, 12), (1, 7, 0), (2, 12, 5), (2, 0, 0)):
        total = Attribution.of(prompt, *place).to_frame(form)["contribution"].sum()
        assert total == pytest.approx(float(scores[place]), abs=1e-5)


def test_kept_form_holds_the_maps_terms(a):
    full, kept = a.to_frame("full"), a.to_frame("kept")
    m, c, error = full["weight"].fillna(0), full["contribution"], full["kind"] == "error"
    by_kind = kept.set_index("kind")["contribution"]
    assert by_kind["masked"] == pytest.approx(((1 - m) * c)[~error].sum(), abs=1e-5)
    assert by_kind["error"] == pytest.approx(c[error].sum(), abs=1e-5)
    listed = kept[~kept["kind"].isin(["masked", "error"])].sort_values(
        ["query_feature", "key_feature"]
    )
    expected = full[m > 0].sort_values(["query_feature", "key_feature"])
    np.testing.assert_allclose(listed["contribution"], (m * c)[expected.index], atol=1e-6)
    np.testing.assert_allclose(
        listed["pattern_effect"], (m * full["pattern_effect"])[expected.index], atol=1e-6
    )


def test_attention_drop_is_that_of_a_pattern_without_the_pair(prompt, d, model, tokens):
    """Dropped by the patching hooks, recomputed by the model."""
    a = Attribution.of(prompt, HEAD, QUERY, KEY)
    frame = a.to_frame()
    names = hook_names(model, LAYER)
    pairs = frame[frame["kind"].isin(["pair", "query_constant", "key_constant"])].head(7)
    assert len(pairs) == 7
    for row in pairs.itertuples():
        hooks = d.fwd_hooks(
            model, "model", ablate_pairs=np.array([[row.query_feature, row.key_feature, HEAD]])
        )
        _, seen = observe(model, tokens, hooks, names=(names.pattern,))
        left = seen[names.pattern][0, HEAD, QUERY, KEY]
        assert row.attention_drop == pytest.approx(a.attention - float(left), abs=1e-5)


def test_removing_the_strongest_pairs_together_is_what_their_terms_predict(a, d, model, tokens):
    """A check of the code, no evidence: ablation inside the scores is linear."""
    triples = a.triples(4, form="full")
    assert triples.shape == (4, 3) and set(triples[:, 2].tolist()) == {HEAD}
    name = hook_names(model, LAYER).pattern
    _, seen = observe(
        model, tokens, d.fwd_hooks(model, "model", ablate_pairs=triples), names=(name,)
    )
    removed = sum(
        pair_term(d, acts_of(a.prompt), tuple(triple))[0, QUERY, : QUERY + 1]
        for triple in triples.tolist()
    )
    left = (a.prompt.scores[HEAD, QUERY, : QUERY + 1] - torch.from_numpy(removed)).softmax(dim=-1)
    torch.testing.assert_close(
        seen[name][0, HEAD, QUERY, : QUERY + 1].double(), left, atol=1e-5, rtol=0
    )


def test_an_exact_dictionary_leaves_no_error(model, tokens):
    a = attribute(exact_dictionary(model), model, tokens, HEAD, QUERY, KEY)
    frame = a.to_frame()
    assert frame.loc[frame["kind"] == "error", "contribution"].abs().max() < 1e-5
    assert a.form == "full" and a.to_frame()["weight"].dropna().eq(1).all()
    with pytest.raises(ValueError, match="no feature map"):
        a.to_frame("kept")


def test_unknown_forms_and_signs_are_refused(a, monkeypatch):
    monkeypatch.setattr(
        "jaxtyping.config.jaxtyping_disable", True
    )  # what users meet outside pytest
    with pytest.raises(ValueError, match="form must be 'full' or 'kept', got 'all'"):
        a.to_frame("all")
    with pytest.raises(
        ValueError, match="sign must be 'both', 'supporting' or 'inhibiting', got 'up'"
    ):
        a.top(3, "up")


# Views


def test_top_shows_both_signs(a):
    frame = a.to_frame("kept")
    effects = sorted(frame.loc[~frame["kind"].isin(["masked", "error"]), "pattern_effect"])
    supporting, inhibiting = (
        [e for e in effects[:-4:-1] if e > 0],
        [e for e in effects[:3] if e < 0],
    )
    assert a.top(3)["pattern_effect"].tolist() == supporting + inhibiting
    assert supporting and inhibiting
    assert a.top(2, "inhibiting")["pattern_effect"].tolist() == inhibiting[:2]
    assert (
        a.top(100, form="full")["kind"]
        .isin(["pair", "query_constant", "key_constant", "constant"])
        .all()
    )


@pytest.mark.parametrize("form", ["full", "kept"])
def test_marginals_are_sums_over_partners(a, form):
    frame = a.to_frame(form)
    for table, column in zip(a.marginals(form), ("query_feature", "key_feature"), strict=True):
        assert table["contribution"].sum() == pytest.approx(a.score, abs=1e-5)
        of_features = frame[~frame["kind"].isin(["masked", "error"])]
        assert set(table.loc[table["n_terms"] > 0, "feature"]) == set(of_features[column])
        for row in table.dropna().itertuples():
            terms = of_features[of_features[column] == row.feature]
            assert row.n_terms == len(terms)
            assert row.contribution == pytest.approx(terms["contribution"].sum(), abs=1e-6)
            if column == "key_feature":
                assert row.pattern_effect == pytest.approx(terms["pattern_effect"].sum(), abs=1e-6)
        assert table["pattern_effect"].abs().is_monotonic_decreasing


def test_a_query_features_effect_counts_what_it_meets_at_other_keys(a, d, prompt):
    weights, acts, P = (
        d.feature_map,
        acts_of(prompt),
        prompt.pattern[HEAD, QUERY, : QUERY + 1].double().numpy(),
    )
    table = a.marginals("kept").query.dropna()
    for row in table[table["feature"] < D_QUERY].itertuples():
        listed = weights.restrict(heads=HEAD, query_features=int(row.feature))
        pairs = zip(listed.indices.tolist(), listed.weights.tolist(), strict=True)
        terms = sum(m * pair_term(d, acts, tuple(pair))[0, QUERY, : QUERY + 1] for pair, m in pairs)
        assert row.pattern_effect == pytest.approx(terms[KEY] - (P * terms).sum(), abs=1e-5)


def test_query_effects_add_up_to_the_centred_score(a):
    scores, P = (
        a.prompt.scores[HEAD, QUERY, : QUERY + 1],
        a.prompt.pattern[HEAD, QUERY, : QUERY + 1],
    )
    for form in ("full", "kept"):
        total = a.marginals(form).query["pattern_effect"].sum()
        assert total == pytest.approx(float(scores[KEY] - (P * scores).sum()), abs=1e-5)


def test_parts_add_up(a):
    parts = a.parts("kept")
    assert parts["contribution"].sum() == pytest.approx(a.score, abs=1e-5)
    assert set(parts["kind"]) == set(KINDS)
    assert parts["n_terms"].sum() == len(a.to_frame("kept"))


def test_strongest_pairs_of_every_cell_are_those_of_its_attribution(prompt):
    listed = prompt.strongest(2, heads=[HEAD]).set_index(["head", "query_pos", "key_pos"])
    for place in ((HEAD, 12, 3), (HEAD, 5, 5), (HEAD, 12, 12)):
        cell = listed.loc[[place]]
        top = Attribution.of(prompt, *place).top(2, form="kept")
        np.testing.assert_allclose(
            cell["pattern_effect"].sort_values(), top["pattern_effect"].sort_values(), atol=1e-5
        )
        found = set(zip(cell["query_feature"], cell["key_feature"], strict=True))
        assert found == set(zip(top["query_feature"], top["key_feature"], strict=True))
    assert set(listed.index.get_level_values("head")) == {HEAD}


def test_strongest_pairs_without_a_map_are_all_pairs(model, tokens):
    prompt = Prompt.of(tiny_dictionary(model, n_pairs=0), model, tokens)
    cell = prompt.strongest(3, heads=[1]).query("query_pos == 12 and key_pos == 6")
    top = Attribution.of(prompt, 1, 12, 6).top(3)
    np.testing.assert_allclose(
        cell["pattern_effect"].sort_values(), top["pattern_effect"].sort_values(), atol=1e-5
    )


def test_the_overview_shows_where_each_head_looks(prompt):
    made = overview(prompt, -3).set_index("head")
    i = N_POS - 3
    for head, row in enumerate(prompt.pattern[:, i]):
        j = max(range(1, i + 1), key=lambda at, row=row: float(row[at]))
        shown = made.loc[head]
        assert (shown["key_pos"], shown["key"]) == (j, prompt.words[j])
        assert (shown["attention"], shown["to_first"]) == (
            pytest.approx(float(row[j])),
            pytest.approx(float(row[0])),
        )
        assert shown["rebuilt"] == pytest.approx(float(prompt.made()[head, i, j]))
        best = Attribution.of(prompt, head, i, j).top(1, "supporting").iloc[0]
        assert (shown["query_feature"], shown["key_feature"]) == (
            best["query_feature"],
            best["key_feature"],
        )
    assert overview(prompt, 0)["key_pos"].eq(0).all()


@pytest.mark.parametrize("token", [4, -9, "4", "-9"])
def test_tokens_are_found_by_position(prompt, token):
    assert prompt.find(token) == 4


def test_tokens_are_found_by_text(prompt):
    once = next(
        word for word in prompt.words if prompt.words.count(word) == 1 and not word.isdigit()
    )
    assert prompt.find(once) == prompt.words.index(once) == prompt.find(f" {once} ")
    with pytest.raises(ValueError, match="The token 'Zeus' is not among"):
        prompt.find("Zeus")
    with pytest.raises(ValueError, match=r"query_pos must lie in \[-13, 12\], got 99"):
        prompt.find("99")


def test_a_token_that_stands_twice_needs_a_position(d, model):
    with pytest.raises(ValueError, match=r"The token 'h' stands at \[\d+, \d+\]: give a position"):
        Prompt.of(d, model, "hwh").find("h")


# JSON, tables


def test_json_has_the_fields_of_graph_viewers(a, prompt):
    made = json.loads(a.to_json(n=4))
    traced = made["qk_tracing_results"]
    assert set(traced) == {
        "pair_wise_contributors",
        "top_q_marginal_contributors",
        "top_k_marginal_contributors",
    }
    frame = a.to_frame("kept")
    best = frame[~frame["kind"].isin(["masked", "error"])].iloc[0]
    first = traced["pair_wise_contributors"][0]
    assert first[:2] == [
        f"{LAYER}q_{best.query_feature}_{QUERY}",
        f"{LAYER}k_{best.key_feature}_{KEY}",
    ]
    assert (
        first[2] == pytest.approx(best.contribution) and len(traced["pair_wise_contributors"]) == 4
    )
    marginals = a.marginals().query.dropna()
    assert traced["top_q_marginal_contributors"][0][1] == pytest.approx(
        marginals["contribution"].iloc[0]
    )
    nodes = {node["node_id"]: node for node in made["nodes"]}
    named = {end for pair in traced["pair_wise_contributors"] for end in pair[:2]}
    named |= {end for side in ("q", "k") for end, _ in traced[f"top_{side}_marginal_contributors"]}
    assert named == set(nodes)
    for node in nodes.values():
        at = QUERY if node["feature_type"].startswith("query") else KEY
        acts, constant = (prompt.query_acts, D_QUERY) if at == QUERY else (prompt.key_acts, D_KEY)
        assert node["ctx_idx"] == at and node["token"] == prompt.words[at]
        expected = 1.0 if node["feature"] == constant else float(acts[at, node["feature"]])
        assert node["activation"] == pytest.approx(expected)
        assert node["feature_type"].endswith("constant") == (node["feature"] == constant)
    assert made["score"] == pytest.approx(a.score) and (made["head"], made["key_pos"]) == (
        HEAD,
        KEY,
    )


def test_the_terminal_shows_what_the_tables_hold(a, prompt):
    console = Console(width=140)
    with console.capture() as capture:
        console.print(a)
    shown = capture.get()
    made = float(prompt.made()[HEAD, QUERY, KEY])
    assert f"with {a.attention:.3f}; rebuilt from features {made:.3f}" in shown
    for row in a.top(1).itertuples():
        assert f"{row.pattern_effect:+.3f}" in shown and f"{row.attention_drop:+.3f}" in shown
    assert "supporting pairs" in shown and "inhibiting pairs" in shown and "constant" in shown


def test_they_name_themselves_in_a_line(a, prompt):
    text, n = "".join(prompt.words), len(prompt.words)
    assert repr(prompt) == f"Prompt({text!r}, {n} tokens, layer {prompt.dictionary.cfg.layer})"
    assert repr(a) == f"Attribution({a})"
    assert "attends to" in repr(a)
    assert "\n" not in repr(a)


def test_notebooks_show_tables_and_escape_tokens(a, prompt):
    assert f"{a.top(1, 'supporting')['pattern_effect'].iloc[0]:.3f}" in a._repr_html_()
    words = list(prompt.words)
    words[KEY] = "<script>alert(1)</script>"
    hostile = Prompt(
        **{**{f: getattr(prompt, f) for f in prompt.__dataclass_fields__}, "words": words}
    )
    made = attribute(prompt.dictionary, prompt.model, hostile, [HEAD], QUERY, [KEY])
    for shown in (made[0]._repr_html_(), made._repr_html_()):
        assert "<script>" not in shown and "&lt;script&gt;" in shown


def test_notebooks_show_every_heads_pattern(prompt, d):
    shown, made = prompt._repr_html_(), prompt.made()
    assert shown.count("<table") == 2 * d.spec.n_heads
    n_cells = N_POS * (N_POS + 1) // 2
    assert shown.count("<td") == 2 * d.spec.n_heads * n_cells
    q, k = (html.escape(repr(prompt.words[at])) for at in (QUERY, KEY))
    for pattern in (prompt.pattern, made):
        assert f'title="{q} ({QUERY}) to {k} ({KEY}): {pattern[HEAD, QUERY, KEY]:.3f}"' in shown


def test_notebooks_show_the_tokens_of_long_prompts(d, model):
    shown = Prompt.of(d, model, tiny_tokens(1, 51))._repr_html_()
    assert "<table" not in shown and shown.startswith("0:&#x27;")


# Many places


def test_many_scores_at_once_are_the_single_ones(d, model, tokens, prompt):
    made = attribute(d, model, tokens, [0, 2], [-1, 6], [2, 9, -3])
    assert isinstance(made, Attributions)
    assert [tuple(one.place) for one in made] == [
        (h, i, j) for h in (0, 2) for i in (12, 6) for j in (2, 9, 10) if j <= i
    ]
    frame = made.to_frame("kept")
    for one in made:
        here = (
            frame.set_index(["head", "query_pos", "key_pos"])
            .loc[[one.place]]
            .reset_index(drop=True)
        )
        pd.testing.assert_frame_equal(here, Attribution.of(prompt, *one.place).to_frame("kept"))
    assert len(made[2:4]) == 2 and isinstance(made[:1], Attributions)
    assert [one["query_pos"] for one in json.loads(made.to_json())] == [
        one.place.query_pos for one in made
    ]
    summary = made.summary()
    assert summary["attention"].tolist() == [one.attention for one in made]


def test_none_stands_for_all(d, model, tokens):
    made = attribute(d, model, tokens, query_pos=3)
    assert [tuple(one.place) for one in made] == [
        (h, 3, j) for h in range(d.spec.n_heads) for j in range(4)
    ]


def test_no_allowed_place_is_an_error(d, model, tokens):
    with pytest.raises(
        ValueError, match=r"None of the keys \[5\] is at or before one of the queries \[2\]"
    ):
        attribute(d, model, tokens, None, 2, 5)
