"""A recorded prompt against the model's own hooks; tokens in every form; positions."""

import html

import numpy as np
import pytest
import torch
from tiny_dictionaries import inputs_and_scores, observe, tiny_dictionary
from tiny_models import tiny_tokens

import sae_lens_qk as qk
from sae_lens_qk.explain.attribution import Attribution, overview
from sae_lens_qk.explain.prompt import RecordedPrompt
from sae_lens_qk.host.layer import AttentionLayer
from sae_lens_qk.host.proof import FingerprintError

N_POS = 13
HEAD = 2
QUERY = 10
KEY = 4


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


# What is recorded


def test_a_prompt_holds_what_the_model_computes(prompt, d, model, tokens):
    x, scores = inputs_and_scores(model, tokens)
    name = AttentionLayer(model, d.cfg.layer).names.pattern
    _, values = observe(model, tokens, names=(name,))
    allowed = torch.ones(N_POS, N_POS).tril().bool()
    assert torch.equal(prompt.scores[:, allowed], scores[0][:, allowed])
    assert torch.equal(prompt.pattern, values[name][0])
    assert torch.equal(prompt.x, x[0])
    assert torch.equal(prompt.query_acts, d.encode_query(x)[0])
    assert torch.equal(prompt.key_acts, d.encode_key(x)[0])
    assert torch.equal(prompt.tokens, tokens[0])
    assert prompt.words == list(model.to_str_tokens(tokens[0]))


def test_rebuilt_patterns_are_the_dictionarys(prompt, d):
    for source in ("transcoders", "feature_map"):
        expected = d.pattern(prompt.x[None], source)[0]
        assert torch.equal(prompt.rebuilt_pattern(source), expected)
    assert prompt.source == "feature_map"
    assert torch.equal(prompt.rebuilt_pattern(), prompt.rebuilt_pattern("feature_map"))


def test_a_prompt_may_be_a_text(d, model):
    prompt = RecordedPrompt.record(d, model, "w [h")
    assert torch.equal(prompt.tokens, model.to_tokens("w [h")[0])


@pytest.mark.parametrize(
    "convert",
    [
        lambda tokens: tokens,
        lambda tokens: tokens[0],
        lambda tokens: tokens[0].tolist(),
        lambda tokens: tokens[0].numpy(),
        lambda tokens: tokens.numpy().astype(np.uint16),
        lambda tokens: list(tokens[0].numpy()),
        lambda tokens: tokens.to(torch.int32),
    ],
)
def test_tokens_come_in_every_form(prompt, d, model, tokens, convert):
    again = RecordedPrompt.record(d, model, convert(tokens))
    assert torch.equal(again.tokens, prompt.tokens)
    assert torch.equal(again.scores, prompt.scores)


@pytest.fixture
def unchecked_types(monkeypatch):
    """What users meet, who have no shape checks."""
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (tiny_tokens(3, 7), r"one sequence.*got shape \[3, 7\]"),
        ([], "at least one integer"),
        (torch.zeros(1, 0, dtype=torch.int64), "at least one integer"),
        ([1.0, 2.0], "tokens must be integers"),
        (torch.tensor([True, False]), "tokens must be integers"),
        ([1, 10**6], r"ids in \[0, "),
        ([1, -1], r"ids in \[0, "),
        (["w", "h"], "tokens must be integers"),
    ],
)
def test_other_tokens_are_refused(d, model, tokens, message):
    with pytest.raises(ValueError, match=message):
        RecordedPrompt.record(d, model, tokens)


def test_a_prompt_of_another_model_is_refused(d, gpt2_bridge, llama_bridge, model, tokens):
    other = llama_bridge if model is gpt2_bridge else gpt2_bridge
    with pytest.raises(FingerprintError):
        RecordedPrompt.record(d, other, tokens)


def test_a_prompt_belongs_to_its_dictionary_and_model(prompt, d, model):
    prompt.require(d)
    prompt.require(d, model)
    with pytest.raises(ValueError, match="recorded with another dictionary"):
        prompt.require(tiny_dictionary(model))


# Positions


@pytest.mark.parametrize(
    ("position", "message"),
    [
        ((4, -1, 0), r"head must lie in \[0, [23]\], got 4"),
        ((0, 13, 0), r"query_pos must lie in \[-13, 12\], got 13"),
        ((0, 3, -14), r"key_pos must lie in \[-13, 12\], got -14"),
        ((0, 3, 4), "got query 3 and key 4"),
    ],
)
def test_positions_are_checked(prompt, position, message):
    with pytest.raises(ValueError, match=message):
        prompt.position(*position)


def test_positions_count_from_either_end(prompt):
    assert prompt.position(1, -1, -13) == (1, 12, 0)
    assert prompt.position(np.int64(1), torch.tensor(-1), np.array(0)) == (1, 12, 0)


@pytest.mark.parametrize("token", [4, -9, "4", "-9", np.int64(4)])
def test_tokens_are_found_by_position(prompt, token):
    assert prompt.find(token) == 4


def test_tokens_are_found_by_text(prompt):
    words = prompt.words
    once = next(word for word in words if words.count(word) == 1 and not word.isdigit())
    assert prompt.find(once) == words.index(once)
    assert prompt.find(f" {once} ") == words.index(once)
    with pytest.raises(ValueError, match="'Zeus' is not among"):
        prompt.find("Zeus")
    with pytest.raises(ValueError, match=r"must lie in \[-13, 12\], got 99"):
        prompt.find("99")


def test_a_token_that_stands_twice_needs_a_position(d, model):
    with pytest.raises(ValueError, match="give a position"):
        RecordedPrompt.record(d, model, "hwh").find("h")


# The pairs behind every attention weight


def features_and_effects(pairs):
    pairs = pairs.sort_values("pattern_effect")
    features = list(zip(pairs["query_feature"], pairs["key_feature"], strict=True))
    return features, pairs["pattern_effect"].tolist()


@pytest.mark.parametrize("n_pairs", [200, 0])
@pytest.mark.parametrize("position", [(HEAD, 12, 3), (HEAD, 5, 5), (HEAD, 12, 12), (0, 7, 0)])
def test_strongest_pairs_are_those_of_the_attribution(model, tokens, n_pairs, position):
    prompt = RecordedPrompt.record(tiny_dictionary(model, n_pairs), model, tokens)
    pairs = prompt.strongest(2).set_index(["head", "query_pos", "key_pos"]).loc[[position]]
    top = Attribution.of(prompt, *position).top(2)
    features, effects = features_and_effects(pairs)
    expected_features, expected_effects = features_and_effects(top)
    assert features == expected_features
    assert effects == pytest.approx(expected_effects, abs=1e-5)


def test_strongest_pairs_come_in_order(prompt):
    pairs = prompt.strongest(3, heads=np.array([2, 0]), query_positions=[-1, 4])
    assert set(pairs["head"]) == {0, 2}
    assert set(pairs["query_pos"]) == {4, 12}
    is_supporting = pairs["pattern_effect"] > 0
    assert is_supporting.is_monotonic_decreasing  # supporters first
    cells = ["head", "query_pos", "key_pos"]
    for sign in (is_supporting, ~is_supporting):
        part = pairs[sign]
        assert part.equals(part.sort_values([*cells, "pattern_effect"], ascending=[1, 1, 1, 0]))
        assert part.groupby(cells).size().max() == 3


def test_the_overview_shows_where_each_head_looks(prompt):
    heads = overview(prompt, -3).set_index("head")
    i = N_POS - 3
    for head, row in enumerate(prompt.pattern[:, i].tolist()):
        j = max(range(1, i + 1), key=row.__getitem__)
        look = heads.loc[head]
        assert look["key_pos"] == j
        assert look["key"] == prompt.words[j]
        assert look["attention"] == pytest.approx(row[j])
        assert look["to_first"] == pytest.approx(row[0])
        assert look["rebuilt"] == pytest.approx(float(prompt.rebuilt_pattern()[head, i, j]))
        best = Attribution.of(prompt, head, i, j).top(1, "supporting").iloc[0]
        assert look["query_feature"] == best["query_feature"]
        assert look["key_feature"] == best["key_feature"]
    assert overview(prompt, 0)["key_pos"].eq(0).all()


# Views


def test_a_prompt_names_itself_in_a_line(prompt, d):
    text = "".join(prompt.words)
    expected = f"RecordedPrompt({text!r}, {N_POS} tokens, layer {d.cfg.layer})"
    assert repr(prompt) == expected


def test_notebooks_show_every_heads_pattern(prompt, d):
    page = prompt._repr_html_()
    n_cells = N_POS * (N_POS + 1) // 2
    assert page.count("<table") == 2 * d.spec.n_heads
    assert page.count("<td") == 2 * d.spec.n_heads * n_cells
    query = html.escape(repr(prompt.words[QUERY]))
    key = html.escape(repr(prompt.words[KEY]))
    for pattern in (prompt.pattern, prompt.rebuilt_pattern()):
        weight = pattern[HEAD, QUERY, KEY]
        assert f'title="{query} ({QUERY}) to {key} ({KEY}): {weight:.3f}"' in page


def test_notebooks_show_the_tokens_of_long_prompts(d, model):
    page = RecordedPrompt.record(d, model, tiny_tokens(1, 51))._repr_html_()
    assert "<table" not in page
    assert page.startswith("0:&#x27;")


def test_old_names_warn(d, model, tokens, prompt):
    with pytest.warns(DeprecationWarning, match=r"now RecordedPrompt\.record"):
        old = RecordedPrompt.of(d, model, tokens)
    with pytest.warns(DeprecationWarning, match="rebuilt_pattern"):
        assert torch.equal(old.made(), prompt.rebuilt_pattern("feature_map"))


def test_a_windowed_prompt_has_no_position_outside_its_window(prompt, monkeypatch):
    values = {**prompt.dictionary.spec.to_dict(), "window": 4}
    monkeypatch.setattr(prompt.dictionary, "spec", qk.AttentionSpec.from_dict(values))
    assert prompt.position(0, 10, 7) == (0, 10, 7)
    with pytest.raises(ValueError, match="its last 4 keys alone"):
        prompt.position(0, 10, 6)
