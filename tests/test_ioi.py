"""Indirect objects: prompts token by token, heads against hooks, pairs against terms by hand.

Heads are compared with the model's own hooks and interventions, pairs with terms written out.
"""

import jaxtyping
import numpy as np
import pytest
import torch
from ioi_words import N_PROMPTS, PROMPT_TOKENS, WORDS, word_tokenizer
from tiny_dictionaries import (
    inputs_and_scores,
    observe,
    pair_term,
    pair_weights,
    pattern_by_hand,
    tiny_dictionary,
)
from tiny_models import tiny_model

from examples.ioi.pairs import name_pairs, role_features, top_pairs
from examples.ioi.prompts import NAMES, OBJECTS, PLACES, TEMPLATES, IOIPrompts, ioi_prompts
from examples.ioi.scan import copy_scores, scan_heads
from sae_lens_qk.host.layer import AttentionLayer, run_recording
from sae_lens_qk.host.proof import HostMismatchError
from sae_lens_qk.host.residual import residual_names

HEAD = 1


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="module")
def batches(tokenizer) -> list[IOIPrompts]:
    return ioi_prompts(tokenizer, N_PROMPTS, **WORDS)


@pytest.fixture(scope="module")
def model(any_bridge):
    return any_bridge


@pytest.fixture(scope="module")
def d(model):
    return tiny_dictionary(model)


@pytest.fixture(scope="module")
def pairs(d, model, batches):
    return name_pairs(d, model, batches, [0, HEAD])


# Prompts


def test_prompts_token_by_token(tokenizer, batches):
    assert [batch.tokens.shape[1] for batch in batches] == list(PROMPT_TOKENS)
    assert sum(len(batch.tokens) for batch in batches) == N_PROMPTS
    for batch in batches:
        for tokens, io, s1, s2, io_token, s_token, third in zip(*batch, strict=True):
            words = tokenizer.convert_ids_to_tokens(tokens.tolist())
            assert words[0] == "<bos>"
            assert words[-1] == " to"
            assert "<unk>" not in words
            assert " Jo" not in words, "a name of several tokens"
            assert " cup" not in words
            assert tokens[io] == io_token
            assert tokens[s1] == tokens[s2] == s_token
            assert len({int(io_token), int(s_token), int(third)}) == 3
            assert int(third) not in tokens.tolist()
            assert s1 < s2


def test_first_prompt_is_abba(tokenizer, batches):
    batch = batches[1]
    words = tokenizer.convert_ids_to_tokens(batch.tokens[0].tolist())
    io, s = tokenizer.convert_ids_to_tokens([int(batch.io_token[0]), int(batch.s_token[0])])
    assert "".join(words).startswith(f"<bos>When{io} and{s} met,{s} gave a ")
    assert batch.is_abba[0]


def test_orders_take_turns(batches):
    n_abba = sum(int(batch.is_abba.sum()) for batch in batches)
    assert n_abba in (N_PROMPTS // 2, N_PROMPTS // 2 + 1)


@pytest.mark.parametrize("order", ["ABBA", "BABA"])
def test_one_order(tokenizer, order):
    for batch in ioi_prompts(tokenizer, 4, orders=(order,), **WORDS):
        assert ((batch.io_pos < batch.s1_pos) == (order == "ABBA")).all()


def test_prompts_repeat_with_their_seed(tokenizer, batches):
    same = ioi_prompts(tokenizer, N_PROMPTS, 0, **WORDS)
    for batch, same_batch in zip(batches, same, strict=True):
        for tensor, same_tensor in zip(batch, same_batch, strict=True):
            assert torch.equal(tensor, same_tensor)
    other = ioi_prompts(tokenizer, N_PROMPTS, 1, **WORDS)
    assert not torch.equal(batches[0].tokens, other[0].tokens)


@pytest.mark.parametrize(
    ("kind", "position", "token"),
    [
        ("third_name", "s2_pos", "third_token"),
        ("other_io", "io_pos", "third_token"),
        ("swapped", "s2_pos", "io_token"),
    ],
)
def test_twins_differ_in_one_name(batches, kind, position, token):
    for batch in batches:
        prompts = torch.arange(len(batch.tokens))
        twin = batch.twin(kind)
        changed = twin.tokens != batch.tokens
        assert (changed.sum(dim=1) == 1).all()
        assert changed[prompts, getattr(batch, position)].all()
        new_tokens = twin.tokens[prompts, getattr(batch, position)]
        assert torch.equal(new_tokens, getattr(batch, token))
        io_token = batch.third_token if kind == "other_io" else batch.io_token
        assert torch.equal(twin.io_token, io_token)
        assert torch.equal(twin.positions, batch.positions)


def test_unknown_twins_are_refused(batches, monkeypatch):
    # what users meet outside pytest
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"one of .*'swapped'.*, got 'abc'"):
        batches[0].twin("abc")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"names": ("Tom", "Jo-Jo", "Tom", "Mary-Ann")}, r"At least 3 of the names.*\['Tom'\]"),
        ({"objects": ("tea-cup",)}, "At least 1 of the objects"),
        ({"templates": ("{first} and {second} met, {subject} ran to",)}, "stand for itself alone"),
        (
            {"templates": ("When Ann {first} {second} {subject} John met Bob Mary Tom Sue to",)},
            "stand for itself alone",
        ),
    ],
)
def test_unusable_words_are_refused(tokenizer, words, message):
    with pytest.raises(ValueError, match=message):
        ioi_prompts(tokenizer, 2, **{**WORDS, **words})


def test_tokenizers_without_bos_are_refused():
    with pytest.raises(ValueError, match="no BOS token"):
        ioi_prompts(word_tokenizer(bos=False), 2, **WORDS)


def test_own_words():
    """Placeholders are those that are filled; no word is repeated, no name stands in a template."""
    for words in (NAMES, PLACES, OBJECTS):
        assert len(set(words)) == len(words)
    for template in TEMPLATES:
        text = template.format(
            first="A1",
            second="B1",
            subject="C1",
            place="p1",
            object="o1",
        )
        assert text.endswith(" to")
        assert all(text.count(f" {name}") == 1 for name in ("A1", "B1", "C1"))
        assert not set(NAMES) & set(text.replace(",", "").replace(".", "").split())


# Heads


def scan_by_hooks(model, batch: IOIPrompts) -> tuple[np.ndarray, np.ndarray]:
    """Attention from END to IO [prompt, layer, head] and logit differences, prompt by prompt."""
    names = [AttentionLayer(model, layer).names.pattern for layer in (0, 1)]
    attention = []
    differences = []
    for n, tokens in enumerate(batch.tokens):
        logits, values = observe(model, tokens[None], names=tuple(names))
        io_pos = batch.io_pos[n]
        attention.append([[float(row[-1, io_pos]) for row in values[name][0]] for name in names])
        io_logit = logits[0, -1, batch.io_token[n]]
        s_logit = logits[0, -1, batch.s_token[n]]
        differences.append(float(io_logit - s_logit))
    return np.array(attention), np.array(differences)


def test_parts_add_up_to_the_logit_difference(any_model, batches):
    scan = scan_heads(any_model, batches, n_names=2)
    expected = [scan_by_hooks(any_model, batch) for batch in batches]
    attention = np.concatenate([batch_attention for batch_attention, _ in expected])
    differences = np.concatenate([batch_differences for _, batch_differences in expected])
    assert scan.logit_difference == pytest.approx(differences.mean(), abs=1e-5)
    assert scan.accuracy == pytest.approx((differences > 0).mean())
    assert scan.parts["direct_effect"].sum() == pytest.approx(differences.mean(), abs=1e-4)
    assert scan.parts["direct_effect"].abs().max() > 0.1
    layer_sums = scan.heads.groupby("layer")["direct_effect"].sum().to_numpy()
    head_parts = scan.parts.query("part == 'heads'")["direct_effect"].to_numpy()
    assert layer_sums == pytest.approx(head_parts, abs=1e-5)
    mean_attention = attention.mean(axis=0).ravel()
    assert scan.heads["attention_io"].to_numpy() == pytest.approx(mean_attention, abs=1e-6)
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
    """A last-layer head is removed, its MLP and the final norm's scale held.

    The logit difference falls by the head's effect.
    """
    batch = batches[1]
    names = residual_names(AttentionLayer(any_model, 1))
    held_names = (names.mlp_out, "ln_final.hook_scale")
    heads = scan_heads(any_model, [batch], n_names=1).heads
    effects = heads[heads["layer"] == 1]["direct_effect"]
    logits, values = run_recording(any_model, batch.tokens, held_names)
    clean = batch.logit_difference(logits[:, -1]).mean()
    hold = [(name, lambda value, hook, name=name: values[name]) for name in held_names]
    for head, effect in enumerate(effects):

        def remove(z, hook, head=head):
            edited = z.clone()
            edited[:, -1, head] = 0
            return edited

        hooks = [(names.z, remove), *hold]
        logits = any_model.run_with_hooks(batch.tokens, fwd_hooks=hooks, prepend_bos=False)
        drop = float(clean - batch.logit_difference(logits[:, -1]).mean())
        assert drop == pytest.approx(effect, abs=1e-4)


@pytest.mark.parametrize("mode", ["bridge", "hooked"])
def test_models_that_write_otherwise_are_refused(batches, mode):
    model = tiny_model("llama", mode)
    name = "blocks.1.hook_out" if mode == "bridge" else "blocks.1.hook_resid_post"
    model.add_hook(name, lambda value, hook: value + torch.arange(value.shape[-1]))
    with pytest.raises(HostMismatchError, match="writes to its residual stream"):
        scan_heads(model, batches)


def test_copy_scores_by_loops(model, batches):
    """Each name alone; the negative score from the negated output, not from negated logits."""
    rank = 40  # of 101, so that heads differ
    n_names = 3
    scores = copy_scores(model, batches, n_names, rank)
    layers = [AttentionLayer(model, index) for index in (0, 1)]
    resid_pre = residual_names(layers[1]).resid_pre
    residuals: dict[int, torch.Tensor] = {}
    for batch in batches:
        _, values = observe(model, batch.tokens, names=(resid_pre,))
        for n, token in enumerate(batch.io_token.tolist()):
            residuals[token] = values[resid_pre][n, batch.io_pos[n]]
    for layer in layers:
        weights = layer.ov_weights
        for head in range(layer.n_heads):
            n_copied = np.zeros(2)
            for token, residual in list(residuals.items())[:n_names]:
                x = layer.block.ln1(residual[None, None])[0, 0]
                value = x @ weights.W_V[head // layer.spec.heads_per_kv]
                output = value @ weights.W_O[head]
                for column, sign in enumerate((1, -1)):
                    logits = model.unembed(model.ln_final(sign * output[None, None]))[0, 0]
                    n_copied[column] += token in logits.topk(rank).indices
            assert scores[layer.index, head].tolist() == pytest.approx(n_copied / n_names)
    assert 0 < scores.sum() < scores.numel()


# Pairs


def test_pairs_are_means_of_terms(d, model, batches, pairs):
    """Terms in float64."""
    rows = pairs.query("head == @HEAD and name == 's1'").sample(5, random_state=0)
    n_prompts = sum(len(batch.tokens) for batch in batches)
    weights = pair_weights(d)
    for row in rows.to_dict("records"):
        pair = (row["query_feature"], row["key_feature"], HEAD)
        expected = np.zeros(3)  # active, contribution, pattern_effect
        for batch in batches:
            x, own_scores = inputs_and_scores(model, batch.tokens)
            pattern = pattern_by_hand(own_scores.double())[:, HEAD, -1].numpy()
            query_acts = d.encode_query(x).double().numpy()
            key_acts = d.encode_key(x).double().numpy()
            term = pair_term(d, query_acts, key_acts, pair)[:, -1]  # [prompt, key]
            for n, j in enumerate(batch.s1_pos.tolist()):
                if fires(query_acts[n, -1], pair[0]) and fires(key_acts[n, j], pair[1]):
                    effect = term[n, j] - pattern[n] @ term[n]
                    expected += np.array([1.0, term[n, j], effect]) / n_prompts
        actual = [row["active"], row["contribution"], row["pattern_effect"]]
        assert actual == pytest.approx(expected, abs=1e-4)
        assert row["weight"] == pytest.approx(weights.get(pair, 0.0))


def fires(
    acts: np.ndarray,
    feature: int,
) -> bool:
    """The constant, after the last feature, always does."""
    return feature == len(acts) or acts[feature] > 0


def test_pairs_add_up_to_the_scores(d, model, batches, pairs):
    """Those of a head and name; some are kept by the map, some not, none is listed twice."""
    n_prompts = sum(len(batch.tokens) for batch in batches)
    mean_score = 0.0
    for batch in batches:
        x, _ = inputs_and_scores(model, batch.tokens)
        scores = d.scores(x)[:, HEAD, -1].double()
        mean_score += float(scores.gather(1, batch.s1_pos[:, None]).sum()) / n_prompts
    total = pairs.query("head == @HEAD and name == 's1'")["contribution"].sum()
    assert total == pytest.approx(mean_score, abs=1e-4)
    assert 0 < (pairs["weight"] > 0).sum() < len(pairs)
    assert not pairs.duplicated(["head", "name", "query_feature", "key_feature"]).any()


@pytest.mark.parametrize("role", ["end", "io", "s1", "s2"])
@pytest.mark.parametrize(
    ("kind", "order"), [("clean", "ABBA"), ("swapped", "BABA"), ("other_io", "ABBA")]
)
def test_features_by_role(d, model, batches, kind, order, role):
    acts = []
    for batch in batches:
        tokens = batch.tokens if kind == "clean" else batch.twin(kind).tokens
        x, _ = inputs_and_scores(model, tokens)
        for n in range(len(tokens)):
            if batch.is_abba[n] != (order == "ABBA"):
                continue
            if role == "end":
                acts.append(d.encode_query(x[n, -1]))
            else:
                position = getattr(batch, f"{role}_pos")[n]
                acts.append(d.encode_key(x[n, position]))
    expected = torch.stack(acts)
    table = role_features(d, model, batches)
    rows = table.query("prompts == @kind and order == @order and role == @role")
    assert set(rows["side"]) == {"query" if role == "end" else "key"}
    live = (expected > 0).any(dim=0).nonzero()[:, 0].tolist()
    assert sorted(rows["feature"]) == live
    for row in rows.to_dict("records"):
        values = expected[:, row["feature"]]
        assert row["active"] == pytest.approx(float((values > 0).float().mean()))
        assert row["mean"] == pytest.approx(float(values.mean()), abs=1e-5)


def test_top_pairs(pairs):
    top = top_pairs(pairs, HEAD, "io").tolist()
    supports = (pairs["head"] == HEAD) & (pairs["name"] == "io")
    supports &= (pairs["weight"] > 0) & (pairs["pattern_effect"] > 0)
    rows = pairs[supports].set_index(["query_feature", "key_feature"])
    assert len(top) == len(rows) > 3
    assert {head for _, _, head in top} == {HEAD}
    effects = [rows.loc[(a, b), "pattern_effect"] for a, b, _ in top]
    assert effects == sorted(effects, reverse=True)
    frequent = top_pairs(pairs, HEAD, "io", active=0.5).tolist()
    assert 0 < len(frequent) < len(top)
    assert [pair for pair in top if pair in frequent] == frequent


def test_pairs_without_a_map(model, batches):
    d = tiny_dictionary(model, n_pairs=0)
    pairs = name_pairs(d, model, batches[:1], [HEAD], ["s2"])
    assert set(pairs["name"]) == {"s2"}
    assert not pairs["weight"].any()
