"""Interventions on indirect objects, against full passes of the model under hooks by hand.

Ablations of pairs, removals of features from the model's own x, twins, and the study of it all.
"""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from ioi_words import N_PROMPTS, WORDS, first_prompts, word_tokenizer
from tiny_dictionaries import (
    LAYER,
    exact_dictionary,
    inputs_and_scores,
    observe,
    pattern_by_hand,
    scores_by_hand,
    tiny_dictionary,
)
from tiny_models import tiny_model, tiny_tokens

import sae_lens_qk as qk
from examples.ioi.interventions import (
    MEASURES,
    ablations,
    feature_removals,
    pair_ablations,
    removal_summary,
)
from examples.ioi.pairs import name_pairs, top_pairs
from examples.ioi.prompts import TEMPLATES, IOIPrompts, ioi_prompts
from examples.ioi.scan import scan_heads
from examples.ioi.study import study_ioi
from examples.ioi.twins import twin_patterns, twin_summary
from sae_lens_qk.explain.removals import Directions, FeatureDirections
from sae_lens_qk.host.layer import AttentionLayer

HEAD = 1
NAME = "io"


@pytest.fixture(scope="module")
def batches() -> list[IOIPrompts]:
    return ioi_prompts(word_tokenizer(), N_PROMPTS, **WORDS)


@pytest.fixture(scope="module")
def model(any_bridge):
    return any_bridge


@pytest.fixture(scope="module")
def d(model):
    return tiny_dictionary(model)


@pytest.fixture(scope="module")
def pairs(d, model, batches):
    return name_pairs(d, model, batches, [0, HEAD])


def measures_in_full(
    model,
    batch: IOIPrompts,
    hooks,
    head: int,
) -> np.ndarray:
    """`MEASURES` in a full pass [prompt, measure]."""
    name = AttentionLayer(model, LAYER).names.pattern
    logits, values = observe(model, batch.tokens, hooks, (name,))
    prompts = torch.arange(len(batch.tokens))
    row = values[name][:, head, -1]
    io_logits = logits[prompts, -1, batch.io_token]
    s_logits = logits[prompts, -1, batch.s_token]
    columns = [
        row[prompts, batch.io_pos],
        row[prompts, batch.s1_pos],
        row[prompts, batch.s2_pos],
        io_logits - s_logits,
    ]
    return torch.stack(columns, dim=1).double().numpy()


# Ablations of pairs


def test_ablations_are_patched_passes(d, model, batches, pairs):
    targets = {HEAD: NAME, 0: "s2"}
    table = pair_ablations(d, model, batches, pairs, targets, ks=(1, 3, 10**6), n_controls=2)
    assert list(table.columns) == ["head", "name", "condition", "k", *MEASURES]
    assert set(table["k"]) == {0, 1, 3}
    best = top_pairs(pairs, HEAD, NAME)
    edits = {
        ("model", 0): None,
        ("transcoders", 0): {"source": "transcoders"},
        ("feature_map", 0): {"source": "feature_map"},
        ("removed", 3): {"source": "model", "ablate_pairs": best[:3]},
        ("kept", 1): {"source": "transcoders", "keep_pairs": best[:1]},
    }
    rows = table[table["head"] == HEAD].set_index(["condition", "k"])
    for condition, edit in edits.items():
        hooks = [] if edit is None else d.fwd_hooks(model, heads=[HEAD], **edit)
        full_passes = [measures_in_full(model, batch, hooks, HEAD) for batch in batches]
        expected = np.concatenate(full_passes).mean(axis=0)
        assert rows.loc[condition, list(MEASURES)].tolist() == pytest.approx(expected, abs=1e-4)
    attention = rows["attention_io"]
    assert (attention["removed"] < attention["model", 0]).all()


def test_removed_scores_by_hand(d, model, batches, pairs):
    """The scores minus the terms of the best pairs, in float64."""
    batch = batches[0]
    best = [tuple(pair) for pair in top_pairs(pairs, HEAD, NAME)[:4].tolist()]
    table = pair_ablations(d, model, [batch], pairs, {HEAD: NAME}, ks=(4,))
    actual = table[table["condition"] == "removed"]["attention_io"].item()
    x, own_scores = inputs_and_scores(model, batch.tokens)
    terms = scores_by_hand(d, x, dict.fromkeys(best, 1.0), include_constant=False)
    row = pattern_by_hand(own_scores.double() - terms)[:, HEAD, -1]
    expected = row.gather(1, batch.io_pos[:, None]).mean()
    assert actual == pytest.approx(float(expected), abs=1e-5)


def test_controls_are_other_pairs():
    best = torch.arange(15).view(5, 3)
    frequent = torch.arange(30).view(10, 3)
    conditions = list(ablations(best, frequent, (2, 5, 6), 3, seed=0))
    names = [(condition.name, condition.k) for condition in conditions]
    assert [name for name in names if name[0] != "control"] == [
        ("model", 0),
        ("transcoders", 0),
        ("feature_map", 0),
        ("removed", 2),
        ("kept", 2),
        ("removed", 5),
        ("kept", 5),
    ]
    controls = []
    for condition in conditions:
        if (condition.name, condition.k) == ("control", 2):
            pairs = condition.edits["ablate_pairs"].tolist()
            controls.append({tuple(pair) for pair in pairs})
    assert len(controls) == 3
    assert controls[0] != controls[1] or controls[0] != controls[2]
    removed = {tuple(pair) for pair in best[:2].tolist()}
    assert not any(control & removed for control in controls)


def test_too_few_pairs_give_no_control():
    best = torch.arange(15).view(5, 3)
    frequent = torch.arange(18).view(6, 3)  # one besides the best
    names = [condition.name for condition in ablations(best, frequent, (5,), 3, seed=0)]
    assert "removed" in names
    assert "control" not in names


# Removals of features


def exact_directions(d_model: int) -> Directions:
    """Of the features of `exact_dictionary`: the positive and negative parts of x."""
    vectors = torch.cat([torch.eye(d_model), -torch.eye(d_model)])
    side = FeatureDirections(torch.zeros(d_model), vectors, torch.full((2 * d_model,), 0.5))
    return Directions(side, side)


def test_removals_from_an_exact_dictionary_are_predicted(model, batches):
    d = exact_dictionary(model)
    some = [first_prompts(batch, 2) for batch in batches]
    targets = {HEAD: NAME, 0: "s1"}
    table = feature_removals(d, model, some, targets, exact_directions(d.cfg.d_in), ks=(2,))
    identity = ["prompt", "head", "name", "side", "ranking", "k", "condition"]
    assert list(table.columns) == [*identity, "attention_drop", "predicted_drop", "logit_drop"]
    actual = table["attention_drop"].to_numpy()
    assert table["predicted_drop"].to_numpy() == pytest.approx(actual, abs=1e-4)
    assert set(table["condition"]) == {"top", "other", "matched", "rescaled"}
    assert set(table["prompt"]) == set(range(4))
    assert not table.duplicated(identity).any()
    top = table.query("condition == 'top' and ranking == 'features' and side == 'query'")
    assert top["attention_drop"].mean() > 0


@pytest.mark.parametrize("side", ["query", "key"])
def test_removals_are_edits_of_the_models_own_vectors(model, batches, side):
    """The best feature by hand leaves x; that query or key replaces the model's in a full pass.

    Features of the exact dictionary are coordinates of x.
    """
    d = exact_dictionary(model)
    head = 2
    batch = first_prompts(batches[0], 2)
    table = feature_removals(d, model, [batch], {head: NAME}, exact_directions(d.cfg.d_in), ks=(1,))
    table = table.query("condition == 'top' and ranking == 'features' and side == @side")
    drops = table.set_index("prompt")
    layer = AttentionLayer(model, LAYER)
    x, own_scores = inputs_and_scores(model, batch.tokens)
    clean = measures_in_full(model, batch, [], head)
    for n, key_pos in enumerate(batch.io_pos.tolist()):
        own_row = own_scores[n, head, -1].double()
        pattern = own_row.softmax(dim=-1)
        edited_rows = rows_without_coordinates(model, batch, x, n, head, side, key_pos)
        if side == "key":  # what other keys of the same group become does not count
            is_key = torch.arange(len(own_row)) == key_pos
            edited_rows = [torch.where(is_key, row, own_row) for row in edited_rows]
        effects = []
        for row in edited_rows:
            drop = own_row - row
            effects.append(float(drop[key_pos] - pattern @ drop))
        edited = edited_rows[int(np.argmax(effects))].softmax(dim=-1)
        attention_drop = float(pattern[key_pos] - edited[key_pos])
        assert drops.loc[n, "attention_drop"] == pytest.approx(attention_drop, abs=1e-4)

        def overwrite(value, hook, n=n, edited=edited):
            patched = value.clone()
            patched[n, head, -1] = edited
            return patched

        after = measures_in_full(model, batch, [(layer.names.pattern, overwrite)], head)
        logit_drop = clean[n, -1] - after[n, -1]
        assert drops.loc[n, "logit_drop"] == pytest.approx(logit_drop, abs=1e-4)


def rows_without_coordinates(model, batch, x, n, head, side, key_pos) -> list[torch.Tensor]:
    """The last row of scores of one prompt without each coordinate of x, at the model's hooks."""
    layer = AttentionLayer(model, LAYER)
    position = x.shape[1] - 1 if side == "query" else key_pos
    inputs = x[n, position].repeat(x.shape[2], 1)
    inputs.fill_diagonal_(0.0)
    if side == "query":
        hook_name = layer.names.queries
        vectors = layer.qk_weights.queries(inputs)[:, head]
        index = head
    else:
        hook_name = layer.names.keys
        index = head // layer.spec.heads_per_kv
        vectors = layer.qk_weights.keys(inputs)[:, index]
    rows = []
    for vector in vectors:

        def replace(value, hook, vector=vector):
            heads = value.reshape(*value.shape[:2], -1, layer.spec.d_head).clone()
            heads[n, position, index] = vector
            return heads.reshape(value.shape)

        _, values = observe(model, batch.tokens, [(hook_name, replace)], (layer.names.scores,))
        rows.append(values[layer.names.scores][n, head, -1].double())
    return rows


def test_removal_summary_by_hand():
    identity = {"head": 0, "name": "io", "side": "key", "ranking": "pairs", "k": 2}
    columns = ["prompt", "condition", "attention_drop", "predicted_drop", "logit_drop"]
    rows = [
        (0, "top", 0.5, 0.4, 1.0),
        (0, "other", 0.1, 9.0, 0.2),
        (0, "matched", 0.7, 9.0, 0.4),
        (1, "top", 0.3, 0.2, 0.0),
        (1, "other", 0.1, 9.0, 0.6),
        (2, "top", 9.0, 9.0, 9.0),
    ]
    removals = pd.DataFrame(rows, columns=columns).assign(**identity)
    summary = removal_summary(removals).set_index("control")
    metrics = ["attention_drop", "predicted_drop", "logit_drop"]
    metrics += ["control_attention_drop", "control_logit_drop", "wins"]
    other = summary.loc["other"]
    assert other["n"] == 2
    assert other[metrics].tolist() == pytest.approx([0.4, 0.3, 0.5, 0.1, 0.4, 1.0])
    assert other[list(identity)].to_dict() == identity
    matched = summary.loc["matched"]
    assert matched["n"] == 1
    assert matched[metrics].tolist() == pytest.approx([0.5, 0.4, 1.0, 0.7, 0.4, 0.0])


# Twins


@pytest.mark.parametrize("kind", ["clean", "third_name", "other_io", "swapped"])
def test_twins_are_what_the_model_does(d, model, batches, kind):
    table = twin_patterns(d, model, batches, [HEAD])
    assert len(table) == N_PROMPTS * 4 * 3
    n_earlier = 0
    for batch in batches:
        twin = batch if kind == "clean" else batch.twin(kind)
        numbers = n_earlier + np.arange(len(batch.tokens))
        n_earlier += len(batch.tokens)
        x, own_scores = inputs_and_scores(model, twin.tokens)
        scores = {
            "model": own_scores,
            "transcoders": d.scores(x),
            "feature_map": d.scores(x, "feature_map"),
        }
        for source, source_scores in scores.items():
            rows = table.query("prompts == @kind and source == @source").set_index("prompt")
            rows = rows.loc[numbers]
            hooks = [] if source == "model" else d.fwd_hooks(model, source=source, heads=[HEAD])
            expected = measures_in_full(model, twin, hooks, HEAD)
            assert rows[list(MEASURES)].to_numpy() == pytest.approx(expected, abs=1e-4)
            for n, number in enumerate(numbers):
                row = source_scores[n, HEAD, -1]
                preference = float(row[batch.io_pos[n]] - row[batch.s1_pos[n]])
                assert rows.loc[number, "preference"] == pytest.approx(preference, abs=1e-4)
                assert (rows.loc[number, "order"] == "ABBA") == bool(batch.is_abba[n])


def test_an_exact_dictionary_predicts_twins(model, batches):
    patterns = twin_patterns(exact_dictionary(model), model, batches, [HEAD, 0])
    summary = twin_summary(patterns)
    assert set(summary["source"]) == {"model", "transcoders"}
    twins = summary[summary["prompts"] != "clean"]
    assert twins["pearson"].to_numpy() == pytest.approx(1.0, abs=1e-4)
    changes = twins.pivot(
        index=["head", "prompts"],
        columns="source",
        values="change",
    )
    assert changes["transcoders"].to_numpy() == pytest.approx(changes["model"].to_numpy(), abs=1e-4)
    assert changes["model"].abs().max() > 0.01


def test_twin_summary_by_hand():
    preferences = {
        ("clean", "model"): (3.0, 1.0, 2.0),
        ("swapped", "model"): (1.0, 1.0, -2.0),
        ("clean", "transcoders"): (1.0, 1.0, 1.0),
        ("swapped", "transcoders"): (1.0, 2.0, 0.0),
    }
    rows = []
    for (kind, source), values in preferences.items():
        rows += [(prompt, kind, source, value) for prompt, value in enumerate(values)]
    frame = pd.DataFrame(rows, columns=["prompt", "prompts", "source", "preference"])
    frame["head"] = 0
    for name in MEASURES:
        frame[name] = frame["prompt"].astype(float)
    summary = twin_summary(frame).set_index(["prompts", "source"])
    own = summary.loc[("swapped", "model")]
    assert own[["preference", "change", "pearson"]].tolist() == pytest.approx([0, 2, 1])
    rebuilt = summary.loc[("swapped", "transcoders")]
    assert rebuilt[["preference", "change"]].tolist() == pytest.approx([1, 0])
    # of the changes, clean minus swapped
    assert rebuilt["pearson"] == pytest.approx(np.corrcoef([2, 0, 4], [0, -1, 1])[0, 1])
    clean = summary.loc[("clean", "model")]
    assert clean["change"] == 0
    assert math.isnan(clean["pearson"])
    assert (summary["logit_difference"] == 1).all()


# Together


@pytest.fixture(scope="module")
def study():
    """Dictionary, model and result."""
    model = tiny_model("llama")
    model.tokenizer = word_tokenizer()
    d = tiny_dictionary(model)
    rows = AttentionLayer(model, LAYER).inputs(tiny_tokens(3, 29))
    directions = Directions.fit(d, list(rows))
    result = study_ioi(d, model, {HEAD: NAME, 3: "s2"}, 6, directions, ks=(1, 2), **WORDS)
    return d, model, result


def test_a_study_is_plain_json(study):
    _, _, result = study
    values = json.loads(json.dumps(result.to_dict(n_pairs=3), allow_nan=False))
    assert values["n_prompts"] == 6
    assert values["logit_difference"] == pytest.approx(result.scan.logit_difference)
    assert len(values["heads"]) == 2 * 4
    assert len(values["pairs"]) == 2 * 3 * 3
    assert all(pair["weight"] > 0 for pair in values["pairs"])
    for name in ("ablations", "removals", "twins"):
        assert {row["head"] for row in values[name]} == {HEAD, 3}


def test_a_study_chooses_and_measures_on_different_prompts(study):
    d, model, result = study
    pairs = name_pairs(d, model, ioi_prompts(model.tokenizer, 6, 1, **WORDS), [HEAD, 3])
    pd.testing.assert_frame_equal(result.pairs, pairs)
    test_prompts = ioi_prompts(model.tokenizer, 6, 0, **WORDS)
    expected = pair_ablations(d, model, test_prompts, pairs, {HEAD: NAME, 3: "s2"}, (1, 2))
    pd.testing.assert_frame_equal(result.ablations, expected)


@pytest.mark.slow
def test_smollm2_suppresses_the_repeated_subject():
    """Head 3 of layer 23 looks at S2 and lowers the subject's logit.

    Ten pairs of features hold that attention.
    """
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
    total = scan.parts["direct_effect"].sum()
    assert total == pytest.approx(scan.logit_difference, abs=1e-3)
    other_prompts = ioi_prompts(model.tokenizer, 16, 1, templates=TEMPLATES[:2])
    pairs = name_pairs(d, model, other_prompts, [3], ["s2"])
    table = pair_ablations(d, model, prompts, pairs, {3: "s2"}, ks=(10,)).set_index("condition")
    removed = table.loc["removed"]
    control = table.loc["control"]
    assert removed["attention_s2"] < 0.5 * control["attention_s2"]
    assert removed["logit_difference"] < 0.7 * control["logit_difference"]
