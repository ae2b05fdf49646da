"""Indirect objects: prompts token by token, heads against the model's own hooks and interventions, pairs against terms
written out by hand, removals against queries and keys replaced in the model."""

import json
import math

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from tiny_dictionaries import (
    LAYER,
    exact_dictionary,
    inputs_and_scores,
    kept_pairs,
    observe,
    pair_term,
    pattern_by_hand,
    scores_by_hand,
    tiny_dictionary,
)
from tiny_models import KINDS, tiny_hf_model, tiny_model, tiny_tokens
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import sae_lens_qk as qk
from sae_lens_qk.analysis import ioi, ioi_scan
from sae_lens_qk.explain.removals import Directions, FeatureDirections
from sae_lens_qk.analysis.ioi import MEASURES, feature_removals, name_pairs, pair_ablations, removal_summary, role_features, study_ioi, top_pairs, twin_patterns, twin_summary
from sae_lens_qk.analysis.ioi_prompts import NAMES, OBJECTS, PLACES, TEMPLATES, IOIPrompts, ioi_prompts
from sae_lens_qk.analysis.ioi_scan import copy_scores, scan_heads
from sae_lens_qk.host.proof import HostMismatchError
from sae_lens_qk.host.layer import LayerReplay, attention_spec, hook_names, layer_inputs, ov_weights, qk_weights, run_recording
from sae_lens_qk.host.residual import attention_input, logit_directions, residual_names, unembedded

WORDS = dict(
    templates=(
        "When {first} and {second} met, {subject} gave a {object} to",
        "At the {place} {first} saw {second}. {subject} ran to",
    ),
    names=("Mary", "John", "Tom", "Ann", "Bob", "Sue", "Jo-Jo"),
    places=("sea", "zoo"),
    objects=("pen", "hat", "tea-cup"),
)
N_TOKENS = (11, 12)  # of the templates, BOS included
HEAD, NAME = 1, "io"


def word_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a word, with the space before it; hyphens and stops are tokens."""
    text = " ".join(
        [
            "When At the and met gave a to saw ran",
            *WORDS["names"],
            *WORDS["places"],
            *WORDS["objects"],
        ]
    )
    words = dict.fromkeys(text.replace("-", " ").split())
    vocabulary = ["<unk>", "<bos>", ",", ".", "-", "When", "At", *(f" {word}" for word in words)]
    assert len(vocabulary) < 101  # what tiny models know
    made = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|[^\w\s]"), "isolated")
    special = {"bos_token": "<bos>", "add_bos_token": True} if bos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", name_or_path="tiny", **special
    )


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="module")
def batches(tokenizer) -> list[IOIPrompts]:
    return ioi_prompts(tokenizer, 7, **WORDS)


@pytest.fixture(scope="module", params=["gpt2_bridge", "neox_bridge", "llama_bridge"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def d(model):
    return tiny_dictionary(model)


@pytest.fixture(scope="module")
def pairs(d, model, batches):
    return name_pairs(d, model, batches, [0, HEAD])


# The hosts' reading


def test_values_and_outputs_are_the_models_own(any_model):
    """z from pattern and W_V, and what layer 1 adds to the residual stream from z and W_O."""
    tokens = tiny_tokens(3, 7)
    names, last = residual_names(any_model, 1), residual_names(any_model, 0)
    x = layer_inputs(any_model, 1, tokens)
    logits, seen = run_recording(
        any_model, tokens, [*names, *last, hook_names(any_model, 1).pattern]
    )
    W, spec = ov_weights(any_model, 1), attention_spec(any_model, 1)
    assert len(W.W_V) == len(W.b_V) == spec.n_kv_heads, "grouped values must not be repeated"
    values = (torch.einsum("npm,gmd->npgd", x, W.W_V) + W.b_V).repeat_interleave(
        spec.heads_per_kv, dim=2
    )
    z = torch.einsum("nhij,njhd->nihd", seen[hook_names(any_model, 1).pattern], values)
    torch.testing.assert_close(seen[names.z], z, rtol=0, atol=1e-5)
    written = torch.einsum("nihd,hdm->nim", z, W.W_O) + W.b_O
    final = seen[names.resid_pre] + written + seen[names.mlp_out]
    torch.testing.assert_close(unembedded(any_model, final), logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        attention_input(any_model, 1, seen[names.resid_pre]), x, rtol=0, atol=1e-5
    )
    assert not W.W_O.requires_grad
    assert written.abs().max() > 0.1


@pytest.mark.parametrize("function", [ov_weights, residual_names])
def test_layers_out_of_range_are_refused(gpt2_bridge, function):
    with pytest.raises(ValueError, match=r"layer must lie in \[0, 1\], got 2"):
        function(gpt2_bridge, 2)


FINAL_NORM = {
    "gpt2": "transformer.ln_f",
    "neox": "gpt_neox.final_layer_norm",
    "llama": "model.norm",
}


@pytest.mark.parametrize("mode", ["bridge", "bridge_compatibility", "hooked", "hooked_processed"])
@pytest.mark.parametrize("kind", KINDS)
def test_logit_directions_by_the_formula_of_the_norm(kind, mode):
    """d/dr of <(r - mean) gain / scale, W_U difference>, from the weights of the Hugging Face model."""
    hf_model = tiny_hf_model(kind)
    norm, unembed = hf_model.get_submodule(FINAL_NORM[kind]), hf_model.get_output_embeddings()
    residual = torch.randn(3, len(norm.weight), generator=torch.Generator().manual_seed(0))
    plus, minus = torch.tensor([5, 17, 90]), torch.tensor([41, 2, 89])
    made = logit_directions(tiny_model(kind, mode), residual, plus, minus)
    difference = (unembed.weight[plus] - unembed.weight[minus]).detach().double()
    direction = difference * norm.weight.detach().double()
    r = residual.double()
    if kind != "llama":  # RMSNorm does not centre
        r, direction = (t - t.mean(dim=1, keepdim=True) for t in (r, direction))
    direction = direction / (r.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    bias = (
        norm.bias.detach().double()
        if kind != "llama"
        else torch.zeros(r.shape[1], dtype=torch.float64)
    )
    torch.testing.assert_close(made.directions.double(), direction, rtol=0, atol=1e-4)
    torch.testing.assert_close(made.constants.double(), difference @ bias, rtol=0, atol=1e-4)


def test_replay_at_some_positions(any_model):
    tokens = tiny_tokens(3, 7)
    replay = LayerReplay(any_model, 1)
    logits, _ = replay.record(tokens, [])
    torch.testing.assert_close(replay.run([], slice(-1, None)), logits[:, -1:], rtol=0, atol=1e-5)
    replay.exact = False
    torch.testing.assert_close(replay.run([], slice(2, 5)), logits[:, 2:5], rtol=0, atol=1e-5)


# Prompts


def test_prompts_token_by_token(tokenizer, batches):
    assert [batch.tokens.shape[1] for batch in batches] == list(N_TOKENS)
    assert sum(len(batch.tokens) for batch in batches) == 7
    orders = []
    for batch in batches:
        for row, io, s1, s2, io_token, s_token, third in zip(*batch, strict=True):
            words = tokenizer.convert_ids_to_tokens(row.tolist())
            assert words[0] == "<bos>"
            assert "<unk>" not in words
            assert words[-1] == " to"
            assert row[io] == io_token
            assert row[s1] == row[s2] == s_token
            assert len({int(io_token), int(s_token), int(third)}) == 3
            assert int(third) not in row.tolist()
            assert " Jo" not in words, "a name of several tokens"
            assert " cup" not in words
            assert s1 < s2
            orders.append(bool(io < s1))
    assert orders.count(True) in (3, 4)
    words = tokenizer.convert_ids_to_tokens(batches[1].tokens[0].tolist())
    io, s = (tokenizer.convert_ids_to_tokens([int(batches[1][at][0])])[0] for at in (4, 5))
    assert "".join(words).startswith(f"<bos>When{io} and{s} met,{s} gave a ")  # ABBA first


def test_prompts_repeat_with_their_seed(tokenizer, batches):
    again, other = (ioi_prompts(tokenizer, 7, seed, **WORDS) for seed in (0, 1))
    assert all(
        torch.equal(a, b)
        for one, two in zip(batches, again, strict=True)
        for a, b in zip(one, two, strict=True)
    )
    assert not all(torch.equal(a.tokens, b.tokens) for a, b in zip(batches, other, strict=True))


def test_orders(tokenizer):
    for order in ("ABBA", "BABA"):
        for batch in ioi_prompts(tokenizer, 4, orders=(order,), **WORDS):
            assert ((batch.io_pos < batch.s1_pos) == (order == "ABBA")).all()


def test_twins_differ_in_one_name(batches):
    for batch in batches:
        at = torch.arange(len(batch.tokens))
        for kind, position, token in (
            ("third_name", batch.s2_pos, batch.third_token),
            ("other_io", batch.io_pos, batch.third_token),
            ("swapped", batch.s2_pos, batch.io_token),
        ):
            twin = batch.twin(kind)
            changed = twin.tokens != batch.tokens
            assert (changed.sum(dim=1) == 1).all()
            assert changed[at, position].all()
            assert torch.equal(twin.tokens[at, position], token)
            assert torch.equal(
                twin.io_token, batch.third_token if kind == "other_io" else batch.io_token
            )
            assert torch.equal(twin.positions, batch.positions)


def test_unknown_twins_are_refused(batches, monkeypatch):
    monkeypatch.setattr(
        jaxtyping.config, "jaxtyping_disable", True
    )  # what users meet outside pytest
    with pytest.raises(ValueError, match=r"kind must be one of .*'swapped'.*, got 'abc'"):
        batches[0].twin("abc")


def test_what_cannot_be_made_is_refused(tokenizer):
    with pytest.raises(
        ValueError, match=r"At least 3 of the names must be one token after a space, got \['Tom'\]"
    ):
        ioi_prompts(tokenizer, 2, **{**WORDS, "names": ("Tom", "Jo-Jo", "Tom", "Mary-Ann")})
    with pytest.raises(ValueError, match=r"At least 1 of the objects must be one token"):
        ioi_prompts(tokenizer, 2, **{**WORDS, "objects": ("tea-cup",)})
    with pytest.raises(ValueError, match="no BOS token"):
        ioi_prompts(word_tokenizer(bos=False), 2, **WORDS)
    for template in (
        "{first} and {second} met, {subject} ran to",
        "When Ann {first} {second} {subject} John met Bob Mary Tom Sue to",
    ):
        with pytest.raises(
            ValueError, match="must follow a space and stand for itself alone, got the template"
        ):
            ioi_prompts(tokenizer, 2, **{**WORDS, "templates": (template,)})


def test_own_words():
    """Placeholders are those that are filled; no word stands twice or serves as name and word of a template."""
    for words in (NAMES, PLACES, OBJECTS):
        assert len(set(words)) == len(words)
    for template in TEMPLATES:
        text = template.format(first="A1", second="B1", subject="C1", place="p1", object="o1")
        assert text.endswith(" to")
        assert all(text.count(f" {name}") == 1 for name in ("A1", "B1", "C1"))
        assert not set(NAMES) & set(text.replace(",", "").replace(".", "").split())


# Heads


def scan_by_hooks(model, batch: IOIPrompts) -> tuple[np.ndarray, np.ndarray]:
    """Attention from END to IO and logit differences, by loops over one prompt at a time."""
    attention, differences = [], []
    for n, tokens in enumerate(batch.tokens):
        names = [hook_names(model, layer).pattern for layer in (0, 1)]
        logits, seen = observe(model, tokens[None], names=tuple(names))
        attention.append(
            [[float(row[-1, batch.io_pos[n]]) for row in seen[name][0]] for name in names]
        )
        differences.append(
            float(logits[0, -1, batch.io_token[n]] - logits[0, -1, batch.s_token[n]])
        )
    return np.array(attention), np.array(differences)


def test_parts_add_up_to_the_logit_difference(any_model, batches):
    scan = scan_heads(any_model, batches, n_names=2)
    attention, differences = (
        np.concatenate(of)
        for of in zip(*(scan_by_hooks(any_model, b) for b in batches), strict=True)
    )
    assert scan.logit_difference == pytest.approx(differences.mean(), abs=1e-5)
    assert scan.accuracy == pytest.approx((differences > 0).mean())
    assert scan.parts["direct_effect"].sum() == pytest.approx(differences.mean(), abs=1e-4)
    assert scan.parts["direct_effect"].abs().max() > 0.1
    by_layer = scan.heads.groupby("layer")["direct_effect"].sum().to_numpy()
    of_heads = scan.parts.query("part == 'heads'")["direct_effect"].to_numpy()
    assert by_layer == pytest.approx(of_heads, abs=1e-5)
    assert scan.heads["attention_io"].to_numpy() == pytest.approx(
        attention.mean(axis=0).ravel(), abs=1e-6
    )
    assert list(scan.heads.columns) == [
        "layer",
        "head",
        "attention_io",
        "attention_s1",
        "attention_s2",
        "direct_effect",
        "copy_score",
        "negative_copy_score",
    ]


@pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale")
def test_direct_effects_predict_an_intervention(any_model, batches):
    """A last-layer head taken out, its MLP and the final norm's scale held: the logit difference falls by its effect."""
    batch = batches[1]
    names = residual_names(any_model, 1)
    scan = (
        scan_heads(any_model, [batch], n_names=1)
        .heads.query("layer == 1")["direct_effect"]
        .to_numpy()
    )
    logits, seen = run_recording(any_model, batch.tokens, [names.mlp_out, "ln_final.hook_scale"])
    clean = batch.logit_difference(logits[:, -1]).mean()
    for head, effect in enumerate(scan):

        def without(z, hook, head=head):
            edited = z.clone()
            edited[:, -1, head] = 0
            return edited

        hooks = [(names.z, without)]
        hooks += [
            (name, lambda value, hook, name=name: seen[name])
            for name in (names.mlp_out, "ln_final.hook_scale")
        ]
        edited = any_model.run_with_hooks(batch.tokens, fwd_hooks=hooks, prepend_bos=False)[:, -1]
        assert float(clean - batch.logit_difference(edited).mean()) == pytest.approx(
            effect, abs=1e-4
        )


@pytest.mark.parametrize("mode", ["bridge", "hooked"])
def test_models_that_write_otherwise_are_found_out(batches, mode):
    model = tiny_model("llama", mode)
    name = "blocks.1.hook_out" if mode == "bridge" else "blocks.1.hook_resid_post"
    model.add_hook(name, lambda value, hook: value + torch.arange(value.shape[-1]))
    with pytest.raises(
        HostMismatchError,
        match="it writes to its residual stream in a way this package does not compute",
    ):
        scan_heads(model, batches)


def test_copy_scores_by_loops(model, batches, monkeypatch):
    """Each name alone; the negative one from the negated output, where the package negates logits."""
    rank = 40  # of 101, so that heads differ
    monkeypatch.setattr(ioi_scan, "COPIED_RANK", rank)
    made = copy_scores(model, batches, n_names=3)
    names: dict[int, torch.Tensor] = {}
    for batch in batches:
        _, seen = observe(model, batch.tokens, names=(residual_names(model, 1).resid_pre,))
        for n, token in enumerate(batch.io_token.tolist()):
            names[token] = seen[residual_names(model, 1).resid_pre][n, batch.io_pos[n]]
    chosen = list(names.items())[:3]
    spec = attention_spec(model, 1)
    for layer in (0, 1):
        W = ov_weights(model, layer)
        for head in range(spec.n_heads):
            hits = np.zeros(2)
            for token, residual in chosen:
                x = model.blocks[layer].ln1(residual[None, None])[0, 0]
                written = x @ W.W_V[head // spec.heads_per_kv] @ W.W_O[head]
                for sign in (0, 1):
                    logits = model.unembed(model.ln_final((-1) ** sign * written[None, None]))[0, 0]
                    hits[sign] += token in logits.topk(rank).indices
            assert made[layer, head].tolist() == pytest.approx(hits / 3)
    assert 0 < made.sum() < made.numel()


# Pairs


def test_pairs_are_means_of_terms(d, model, batches, pairs):
    """Terms in float64; the pairs of a head and name add up to its scores, and their effects to the centred scores."""
    kept = kept_pairs(d)
    n_prompts = sum(len(batch.tokens) for batch in batches)
    cells, centred, scores_at = {}, 0.0, 0.0
    listed = pairs.query("head == @HEAD and name == 's1'")
    some = listed.sample(5, random_state=0)[["query_feature", "key_feature"]].to_numpy().tolist()
    for batch in batches:
        x, own = inputs_and_scores(model, batch.tokens)
        acts = d.encode_query(x).double().numpy(), d.encode_key(x).double().numpy()
        terms = {(a, b): pair_term(d, acts, (a, b, HEAD)) for a, b in some}
        made = d.scores(x)[:, HEAD, -1].double()
        for n, j in enumerate(batch.s1_pos.tolist()):
            P = pattern_by_hand(own.double())[n, HEAD, -1]
            scores_at += float(made[n, j]) / n_prompts
            centred += float(made[n, j] - P @ made[n]) / n_prompts
            for pair, term in terms.items():
                row = term[n, -1]
                active = acts[0].shape[2] == pair[0] or acts[0][n, -1, pair[0]] > 0
                active = active and (acts[1].shape[2] == pair[1] or acts[1][n, j, pair[1]] > 0)
                value = np.array([1.0, row[j], row[j] - float(P @ row)]) * active / n_prompts
                cells[pair] = cells.get(pair, 0.0) + value
    for (a, b), expected in cells.items():
        row = listed.query("query_feature == @a and key_feature == @b").iloc[0]
        assert row[["active", "contribution", "pattern_effect"]].tolist() == pytest.approx(
            expected, abs=1e-4
        )
        assert row["weight"] == pytest.approx(kept.get((a, b, HEAD), 0.0))
    assert listed["contribution"].sum() == pytest.approx(scores_at, abs=1e-4)
    if (pairs["active"] == 1).all():
        assert listed["pattern_effect"].sum() == pytest.approx(centred, abs=1e-4)
    assert 0 < (pairs["weight"] > 0).sum() < len(pairs)
    assert not pairs.duplicated(["head", "name", "query_feature", "key_feature"]).any()


def test_features_by_role(d, model, batches):
    made = role_features(d, model, batches)
    for kind, order in (("clean", "ABBA"), ("swapped", "BABA"), ("other_io", "ABBA")):
        for role in ("end", "io", "s1", "s2"):
            acts = []
            for batch in batches:
                tokens = (batch if kind == "clean" else batch.twin(kind)).tokens
                x, _ = inputs_and_scores(model, tokens)
                for n in range(len(tokens)):
                    if (batch.io_pos[n] < batch.s1_pos[n]) == (order == "ABBA"):
                        at = (
                            x.shape[1] - 1
                            if role == "end"
                            else int(getattr(batch, f"{role}_pos")[n])
                        )
                        acts.append(
                            d.encode_query(x[n, at]) if role == "end" else d.encode_key(x[n, at])
                        )
            expected = torch.stack(acts)
            rows = made.query("prompts == @kind and order == @order and role == @role").set_index(
                "feature"
            )
            assert set(rows.index) == set((expected > 0).any(dim=0).nonzero()[:, 0].tolist())
            assert set(rows["side"]) == {"query" if role == "end" else "key"}
            for feature, row in rows.iterrows():
                assert row["active"] == pytest.approx(
                    float((expected[:, feature] > 0).float().mean())
                )
                assert row["mean"] == pytest.approx(float(expected[:, feature].mean()), abs=1e-5)


def test_top_pairs(pairs):
    made = top_pairs(pairs, HEAD, "io").tolist()
    kept = pairs[
        (pairs["head"] == HEAD)
        & (pairs["name"] == "io")
        & (pairs["weight"] > 0)
        & (pairs["pattern_effect"] > 0)
    ]
    assert len(made) == len(kept) > 3
    effects = [
        kept.query("query_feature == @a and key_feature == @b")["pattern_effect"].item()
        for a, b, _ in made
    ]
    assert effects == sorted(effects, reverse=True)
    assert {head for _, _, head in made} == {HEAD}
    frequent = top_pairs(pairs, HEAD, "io", active=0.5).tolist()
    assert 0 < len(frequent) < len(made)
    assert [pair for pair in made if pair in frequent] == frequent


def test_pairs_without_a_map(model, batches):
    made = name_pairs(tiny_dictionary(model, n_pairs=0), model, batches[:1], [HEAD], ["s2"])
    assert set(made["name"]) == {"s2"}
    assert not made["weight"].any()


# Interventions


def measured(model, batch: IOIPrompts, hooks, head: int) -> np.ndarray:
    """`MEASURES` in a full pass."""
    name = hook_names(model, LAYER).pattern
    logits, seen = observe(model, batch.tokens, hooks, (name,))
    at = torch.arange(len(batch.tokens))
    row = seen[name][:, head, -1]
    attention = [row[at, position] for position in (batch.io_pos, batch.s1_pos, batch.s2_pos)]
    difference = logits[at, -1, batch.io_token] - logits[at, -1, batch.s_token]
    return torch.stack([*attention, difference], dim=1).double().numpy()


def test_ablations_are_patched_passes(d, model, batches, pairs):
    made = pair_ablations(
        d, model, batches, pairs, {HEAD: "io", 0: "s2"}, ks=(1, 3, 10**6), n_controls=2
    )
    assert list(made.columns) == ["head", "name", "condition", "k", *MEASURES]
    assert set(made["k"]) == {0, 1, 3}
    best = top_pairs(pairs, HEAD, "io")
    edits = {
        ("model", 0): None,
        ("transcoders", 0): {"source": "transcoders"},
        ("feature_map", 0): {"source": "feature_map"},
        ("removed", 3): {"source": "model", "ablate_pairs": best[:3]},
        ("kept", 1): {"source": "transcoders", "keep_pairs": best[:1]},
    }
    by_condition = made.query("head == @HEAD").set_index(["condition", "k"])
    for condition, edit in edits.items():
        hooks = [] if edit is None else d.fwd_hooks(model, heads=[HEAD], **edit)
        expected = np.concatenate([measured(model, batch, hooks, HEAD) for batch in batches]).mean(
            axis=0
        )
        assert by_condition.loc[condition, list(MEASURES)].tolist() == pytest.approx(
            expected, abs=1e-4
        )
    attention = by_condition["attention_io"]
    assert (attention["removed"] < attention["model", 0]).all()


def test_removed_scores_by_hand(d, model, batches, pairs):
    """The scores minus the terms of the best pairs, in float64."""
    batch, best = batches[0], top_pairs(pairs, HEAD, "io")[:4]
    made = pair_ablations(d, model, [batch], pairs, {HEAD: "io"}, ks=(4,)).query(
        "condition == 'removed'"
    )
    x, own = inputs_and_scores(model, batch.tokens)
    without = own.double() - scores_by_hand(
        d, x, {tuple(pair): 1.0 for pair in best.tolist()}, include_constant=False
    )
    row = pattern_by_hand(without)[:, HEAD, -1]
    expected = row.gather(1, batch.io_pos[:, None]).mean()
    assert made["attention_io"].item() == pytest.approx(float(expected), abs=1e-5)


def test_controls_are_other_pairs():
    best, frequent = torch.arange(15).view(5, 3), torch.arange(30).view(10, 3)
    made = list(ioi._ablations(best, frequent, (2, 5, 6), 3, seed=0))
    assert [(condition, k) for condition, k, _ in made if condition != "control"] == [
        ("model", 0),
        ("transcoders", 0),
        ("feature_map", 0),
        ("removed", 2),
        ("kept", 2),
        ("removed", 5),
        ("kept", 5),
    ]
    drawn = [
        edits["ablate_pairs"] for condition, k, edits in made if condition == "control" and k == 2
    ]
    assert len(drawn) == 3
    assert len({tuple(pairs.flatten().tolist()) for pairs in drawn}) > 1
    for pairs in drawn:
        assert not {tuple(pair) for pair in pairs.tolist()} & {
            tuple(pair) for pair in best[:2].tolist()
        }
    assert not [
        k
        for condition, k, _ in ioi._ablations(best, frequent[:6], (5,), 3, 0)
        if condition == "control"
    ]


def exact_directions(d_model: int) -> Directions:
    """Of the features of `exact_dictionary`: the positive and negative parts of x."""
    directions = torch.cat([torch.eye(d_model), -torch.eye(d_model)])
    return Directions(
        *(
            FeatureDirections(torch.zeros(d_model), directions, torch.full((2 * d_model,), 0.5))
            for _ in "qk"
        )
    )


def test_removals_from_an_exact_dictionary_are_predicted(model, batches):
    d, some = (
        exact_dictionary(model),
        [IOIPrompts(*(tensor[:2] for tensor in batch)) for batch in batches],
    )
    made = feature_removals(
        d, model, some, {HEAD: "io", 0: "s1"}, exact_directions(d.cfg.d_in), ks=(2,)
    )
    assert list(made.columns) == [
        "prompt",
        "head",
        "name",
        "side",
        "ranking",
        "k",
        "condition",
        "attention_drop",
        "predicted_drop",
        "logit_drop",
    ]
    assert made["predicted_drop"].to_numpy() == pytest.approx(
        made["attention_drop"].to_numpy(), abs=1e-4
    )
    assert set(made["condition"]) == {"top", "other", "matched", "rescaled"}
    assert set(made["prompt"]) == set(range(4))
    assert not made.duplicated(["prompt", "head", "side", "ranking", "k", "condition"]).any()
    top = made.query("condition == 'top' and ranking == 'features' and side == 'query'")
    assert top["attention_drop"].mean() > 0


@pytest.mark.parametrize("side", ["query", "key"])
def test_removals_are_edits_of_the_models_own_vectors(model, batches, side):
    """The best feature by hand leaves x; the query or key so made replaces the model's in a full pass."""
    d, batch, head = exact_dictionary(model), IOIPrompts(*(tensor[:2] for tensor in batches[0])), 2
    d_model, spec = d.cfg.d_in, attention_spec(model, LAYER)
    made = feature_removals(d, model, [batch], {head: "io"}, exact_directions(d_model), ks=(1,))
    made = made.query("condition == 'top' and ranking == 'features' and side == @side").set_index(
        "prompt"
    )
    names, weights = hook_names(model, LAYER), qk_weights(model, LAYER)
    x, own = inputs_and_scores(model, batch.tokens)
    clean = measured(model, batch, [], head)
    hook_name = names.queries if side == "query" else names.keys
    for n, j in enumerate(batch.io_pos.tolist()):
        at = x.shape[1] - 1 if side == "query" else j
        candidates = x[n, at].repeat(d_model, 1)
        candidates.fill_diagonal_(0.0)  # without one coordinate each
        project = weights.queries if side == "query" else weights.keys
        group = head if side == "query" else head // spec.heads_per_kv
        changes = []
        for vector in project(candidates)[:, group]:

            def replace(value, hook, vector=vector):
                edited = (
                    value.clone().unflatten(-1, (-1, spec.d_head))
                    if value.ndim == 3
                    else value.clone()
                )
                edited[n, at, group] = vector
                return edited.flatten(2) if value.ndim == 3 else edited

            _, seen = observe(model, batch.tokens, [(hook_name, replace)], (names.scores,))
            changes.append(seen[names.scores][n, head, -1].double())
        P, own_row = own[n, head, -1].double().softmax(-1), own[n, head, -1].double()
        if side == "key":
            changes = [
                torch.where(torch.arange(len(P)) == j, change, own_row) for change in changes
            ]
        effects = [float((own_row - change)[j] - P @ (own_row - change)) for change in changes]
        best = int(np.argmax(effects))
        row = changes[best].softmax(-1)
        assert made.loc[n, "attention_drop"] == pytest.approx(float(P[j] - row[j]), abs=1e-4)

        def overwrite(pattern, hook, row=row):
            edited = pattern.clone()
            edited[n, head, -1] = row
            return edited

        after = measured(model, batch, [(names.pattern, overwrite)], head)
        assert made.loc[n, "logit_drop"] == pytest.approx(clean[n, -1] - after[n, -1], abs=1e-4)


def test_removal_summary_by_hand():
    place = {"head": 0, "name": "io", "side": "key", "ranking": "pairs", "k": 2}
    rows = [  # prompt, condition, attention, predicted, logits
        (0, "top", 0.5, 0.4, 1.0),
        (0, "other", 0.1, 9.0, 0.2),
        (0, "matched", 0.7, 9.0, 0.4),
        (1, "top", 0.3, 0.2, 0.0),
        (1, "other", 0.1, 9.0, 0.6),
        (2, "top", 9.0, 9.0, 9.0),
    ]
    columns = ["prompt", "condition", "attention_drop", "predicted_drop", "logit_drop"]
    made = removal_summary(pd.DataFrame(rows, columns=columns).assign(**place)).set_index("control")
    assert made.loc["other", "n"] == 2
    assert made.loc["matched", "n"] == 1
    figures = [
        "attention_drop",
        "predicted_drop",
        "logit_drop",
        "control_attention_drop",
        "control_logit_drop",
        "wins",
    ]
    assert made.loc["other", figures].tolist() == pytest.approx([0.4, 0.3, 0.5, 0.1, 0.4, 1.0])
    assert made.loc["matched", figures].tolist() == pytest.approx([0.5, 0.4, 1.0, 0.7, 0.4, 0.0])
    assert made.loc["other", list(place)].to_dict() == place


# Twins


def test_twins_are_what_the_model_does(d, model, batches):
    made = twin_patterns(d, model, batches, [HEAD])
    assert len(made) == 7 * 4 * 3
    n_before = 0
    for batch in batches:
        for kind in ("clean", "third_name", "other_io", "swapped"):
            twin = batch if kind == "clean" else batch.twin(kind)
            x, own = inputs_and_scores(model, twin.tokens)
            scores = {
                "model": own,
                "transcoders": d.scores(x),
                "feature_map": d.scores(x, "feature_map"),
            }
            for source, values in scores.items():
                rows = made.query("prompts == @kind and source == @source").set_index("prompt")
                rows = rows.loc[n_before : n_before + len(batch.tokens) - 1]
                hooks = [] if source == "model" else d.fwd_hooks(model, source=source, heads=[HEAD])
                expected = measured(model, twin, hooks, HEAD)
                assert rows[list(MEASURES)].to_numpy() == pytest.approx(expected, abs=1e-4)
                preferences = [
                    float(
                        values[n, HEAD, -1, batch.io_pos[n]] - values[n, HEAD, -1, batch.s1_pos[n]]
                    )
                    for n in range(len(batch.tokens))
                ]
                assert rows["preference"].tolist() == pytest.approx(preferences, abs=1e-4)
                assert (
                    (rows["order"] == "ABBA").to_numpy() == (batch.io_pos < batch.s1_pos).numpy()
                ).all()
        n_before += len(batch.tokens)


def test_an_exact_dictionary_predicts_twins(model, batches):
    made = twin_summary(twin_patterns(exact_dictionary(model), model, batches, [HEAD, 0]))
    assert set(made["source"]) == {"model", "transcoders"}
    twins = made.query("prompts != 'clean'")
    assert twins["pearson"].to_numpy() == pytest.approx(1.0, abs=1e-4)
    by_source = twins.set_index(["head", "prompts", "source"])["change"].unstack()
    assert by_source["transcoders"].to_numpy() == pytest.approx(
        by_source["model"].to_numpy(), abs=1e-4
    )
    assert by_source["model"].abs().max() > 0.01


def test_twin_summary_by_hand():
    rows = [
        (prompt, kind, source, preference)
        for kind, source, preferences in (
            ("clean", "model", (3.0, 1.0, 2.0)),
            ("swapped", "model", (1.0, 1.0, -2.0)),
            ("clean", "transcoders", (1.0, 1.0, 1.0)),
            ("swapped", "transcoders", (1.0, 2.0, 0.0)),
        )
        for prompt, preference in enumerate(preferences)
    ]
    frame = pd.DataFrame(rows, columns=["prompt", "prompts", "source", "preference"]).assign(head=0)
    for name in MEASURES:
        frame[name] = frame["prompt"].astype(float)
    made = twin_summary(frame).set_index(["prompts", "source"])
    assert made.loc[
        ("swapped", "model"), ["preference", "change", "pearson"]
    ].tolist() == pytest.approx([0, 2, 1])
    rebuilt = made.loc[("swapped", "transcoders")]
    assert rebuilt[["preference", "change"]].tolist() == pytest.approx([1, 0])
    expected = np.corrcoef([2, 0, 4], [0, -1, 1])[0, 1]  # changes, clean minus swapped
    assert rebuilt["pearson"] == pytest.approx(expected)
    assert made.loc[("clean", "model"), "change"] == 0
    assert math.isnan(made.loc[("clean", "model"), "pearson"])
    assert (made["logit_difference"] == 1).all()


# Together


@pytest.fixture(scope="module")
def studied(tokenizer):
    model = tiny_model("llama")
    model.tokenizer = tokenizer
    d = tiny_dictionary(model)
    rows = layer_inputs(model, LAYER, tiny_tokens(3, 29))
    return (
        d,
        model,
        study_ioi(
            d, model, {HEAD: "io", 3: "s2"}, 6, Directions.fit(d, list(rows)), ks=(1, 2), **WORDS
        ),
    )


def test_a_study_is_plain_json(studied):
    _, _, result = studied
    made = json.loads(json.dumps(result.to_dict(n_pairs=3), allow_nan=False))
    assert made["n_prompts"] == 6
    assert made["logit_difference"] == pytest.approx(result.scan.logit_difference)
    assert len(made["heads"]) == 2 * 4
    assert len(made["pairs"]) == 2 * 3 * 3
    assert all(pair["weight"] > 0 for pair in made["pairs"])
    for name in ("ablations", "removals", "twins"):
        assert {row["head"] for row in made[name]} == {HEAD, 3}


def test_a_study_chooses_and_measures_on_different_prompts(studied, tokenizer):
    d, model, result = studied
    chosen, measured_on = (ioi_prompts(tokenizer, 6, seed, **WORDS) for seed in (1, 0))
    pd.testing.assert_frame_equal(result.pairs, name_pairs(d, model, chosen, [HEAD, 3]))
    expected = pair_ablations(d, model, measured_on, result.pairs, {HEAD: "io", 3: "s2"}, (1, 2))
    pd.testing.assert_frame_equal(result.ablations, expected)


@pytest.mark.slow
def test_smollm2_suppresses_the_repeated_subject():
    """Head 3 of layer 23 looks at S2 and takes the subject's logit down; ten pairs of features hold that attention."""
    d = qk.BilinearQKDictionary.from_pretrained("smollm2-135m-instruct-L23")
    model = qk.load_model(d)
    prompts = ioi_prompts(model.tokenizer, 16, templates=TEMPLATES[:2])
    scan = scan_heads(model, prompts, n_names=8)
    heads = scan.heads.set_index(["layer", "head"])
    assert scan.accuracy > 0.9
    assert heads["direct_effect"].idxmax() == (23, 3)
    assert heads.loc[(23, 3), "negative_copy_score"] > 0.9
    assert heads.loc[(23, 0), "copy_score"] > 0.8
    assert heads.loc[(23, 3), "attention_s2"] > 0.5
    assert scan.parts["direct_effect"].sum() == pytest.approx(scan.logit_difference, abs=1e-3)
    chosen = name_pairs(
        d, model, ioi_prompts(model.tokenizer, 16, 1, templates=TEMPLATES[:2]), [3], ["s2"]
    )
    made = pair_ablations(d, model, prompts, chosen, {3: "s2"}, ks=(10,)).set_index("condition")
    assert made.loc["removed", "attention_s2"] < 0.5 * made.loc["control", "attention_s2"]
    assert made.loc["removed", "logit_difference"] < 0.7 * made.loc["control", "logit_difference"]
