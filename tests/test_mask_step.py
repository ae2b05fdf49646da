"""Step 2 on finished transcoders: pruning, polishing, tuning along, resuming, compaction."""

import json
import logging
from pathlib import Path

import pytest
import torch
from comparing import assert_near
from safetensors.torch import load_file
from tiny_dictionaries import tiny_dictionary
from tiny_models import KINDS, tiny_model
from tiny_training import (
    BATCH,
    CONTEXT,
    D_KEY,
    D_QUERY,
    assert_same_weights,
    mean_kl,
    step_input,
    stop_at_step,
    tiny_config,
    tiny_runner,
    training_rows,
)
from torch import Tensor

import sae_lens_qk as qk
from sae_lens_qk.host.layer import AttentionLayer
from sae_lens_qk.host.proof import FingerprintError
from sae_lens_qk.training.candidates import rank_pairs
from sae_lens_qk.training.losses import AttentionOutput, NonFiniteLossError
from sae_lens_qk.training.mask import MaskTrainingSAE
from sae_lens_qk.training.transcoders import TranscodersTrainingSAE

N_STEPS = 30
PRUNED_AT = 18
"""Pairs are pruned during the first 18 steps."""
N_RANKING_ROWS = 16


@pytest.fixture(scope="module")
def step_1(tmp_path_factory, text_dataset):
    """Kind of model -> folder of its transcoders, trained once; shared, not to be changed.

    Some features are dead.
    """
    folders: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind in folders:
            return folders[kind]
        work = tmp_path_factory.mktemp("step_1")
        changes = {"checkpoint_path": None, "output_path": None}
        dictionary = tiny_runner(
            work, text_dataset, kind, mask={"training_tokens": 0}, **changes
        ).run()
        dictionary.query.b_enc.data[2:5] = -100.0
        dictionary.key.b_enc.data[2:7] = -100.0
        dictionary.save_model(work / "output")
        folders[kind] = work / "output"
        return folders[kind]

    return folder


@pytest.fixture
def mask_runner(step_1, tmp_path, text_dataset):
    """Makes runs of step 2 alone, 30 steps."""

    def make(
        kind: str = "llama", folder: Path = tmp_path, mask: dict | None = None, **changes
    ) -> qk.BilinearQKTrainingRunner:
        settings = {"training_tokens": BATCH * N_STEPS, "n_checkpoints": 3, **(mask or {})}
        start = str(step_1(kind))
        return tiny_runner(
            folder, text_dataset, kind, mask=settings, from_pretrained_path=start, **changes
        )

    return make


def mean_l0(
    d: qk.BilinearQKDictionary,
    x: Tensor,
) -> list[float]:
    return [float((acts > 0).sum(dim=-1).float().mean()) for acts in d.features(x)]


def saved_weights(folder: Path) -> Tensor:
    return load_file(folder / "output" / "sae_weights.safetensors")["feature_map.weights"]


def assert_measured(
    d: qk.BilinearQKDictionary,
    runner: qk.BilinearQKTrainingRunner,
) -> None:
    """Its statistics are those of the finished dictionary, on the ranking tokens."""
    x = training_rows(runner, N_RANKING_ROWS)
    exact = rank_pairs(d, runner.layer.qk_weights, [x], 10_000)
    rows = exact.find(d.feature_map.indices)
    is_measured = d.feature_map.statistics[:, 2] > 0
    assert is_measured.double().mean() > 0.9
    assert (rows[is_measured] >= 0).all()
    actual = d.feature_map.statistics[is_measured]
    expected = exact.statistics[rows[is_measured]]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_tuning_the_transcoders_along_improves_the_map(kind, step_1, mask_runner, tmp_path):
    """Against a run that leaves them frozen, on the same tokens with the same candidates."""
    start = qk.BilinearQKDictionary.load_from_disk(step_1(kind))
    dictionaries = {}
    for name, lr in (("frozen", 0.0), ("tuned", 3e-3)):
        runner = mask_runner(kind, tmp_path / name, mask={"fine_tune_lr": lr})
        dictionaries[name] = runner.run()
        weights = saved_weights(tmp_path / name)
        assert len(weights) == 400
        assert ((weights > 0) & (weights <= 1)).all()
        assert (weights < 1).any()
        assert_measured(dictionaries[name], runner)
    frozen = dictionaries["frozen"]
    tuned = dictionaries["tuned"]
    for name, tensor in start.query.state_dict().items():
        assert torch.equal(frozen.query.state_dict()[name], tensor), name
        assert not torch.equal(tuned.query.state_dict()[name], tensor), name
    frozen_kl = mean_kl(frozen, runner, "feature_map")
    assert mean_kl(tuned, runner, "feature_map") < 0.95 * frozen_kl
    assert mean_kl(tuned, runner, "transcoders") < mean_kl(start, runner, "transcoders")
    x = training_rows(runner)
    l0 = mean_l0(start, x)
    assert mean_l0(tuned, x) == pytest.approx(l0, rel=0.2)
    assert min(l0) > 3


@pytest.mark.parametrize("polish", [True, False])
@pytest.mark.parametrize("lr", [0.0, 1e-3], ids=["frozen", "tuned"])
def test_pairs_fall_geometrically_and_polish_ends_the_penalty(lr, polish, mask_runner, monkeypatch):
    forward = MaskTrainingSAE.training_forward_pass
    steps = []

    def recording(self, step_input):
        output = forward(self, step_input)
        steps.append((step_input.n_training_steps, set(output.losses), output.metrics["n_pairs"]))
        total = sum(value.item() for value in output.losses.values())
        assert output.loss.item() == pytest.approx(total, rel=1e-6)
        if not lr:
            assert torch.equal(output.feature_acts, self.dictionary.encode(step_input.sae_in))
            return output
        # k features per token whatever the thresholds say; first tokens are all alike: ties
        query_acts, key_acts = output.feature_acts.split([D_QUERY, D_KEY], dim=1)
        for acts, k in ((query_acts, self.cfg.k_query), (key_acts, self.cfg.k_key)):
            assert 0 <= int((acts > 0).sum()) - int(k * BATCH) < 8
        return output

    monkeypatch.setattr(MaskTrainingSAE, "training_forward_pass", recording)
    mask = {"fine_tune_lr": lr, "polish": polish, "n_pairs": 211}
    dictionary = mask_runner(mask=mask).run()
    assert len(dictionary.feature_map) == 211
    always = {"kl", "kl_unmasked"} if lr else {"kl"}
    assert [step for step, _, _ in steps] == list(range(N_STEPS))
    for step, losses, n_pairs in steps:
        assert losses - {"mask_sparsity"} == always
        assert ("mask_sparsity" in losses) == (not polish or step < PRUNED_AT)
        pruned_at = PRUNED_AT if step >= PRUNED_AT else step // 10 * 10
        assert n_pairs == round(1500 * (211 / 1500) ** (pruned_at / PRUNED_AT))


def test_pairs_driven_to_zero_are_dropped(mask_runner, tmp_path):
    mask = {"sparsity_coefficient": 5e-4, "lr": 0.1, "polish": False}
    dictionary = mask_runner(mask=mask).run()
    assert 0 < len(dictionary.feature_map) < 300
    weights = saved_weights(tmp_path)
    assert len(weights) == len(dictionary.feature_map)
    assert ((weights > 0) & (weights <= 1)).all()


@pytest.mark.parametrize(
    ("mask", "cached"),
    [({}, False), ({"fine_tune_lr": 3e-3}, False), ({"fine_tune_lr": 3e-3, "compact": True}, True)],
    ids=["frozen", "tuned", "tuned, compacted, cached"],
)
def test_step_2_resumes_to_the_same_weights(mask, cached, mask_runner, tmp_path, caplog):
    def run(folder: Path, **changes):
        if cached:
            changes["input_cache_path"] = str(folder / "cache")
        return mask_runner(folder=folder, mask=mask, **changes).run()

    whole = run(tmp_path / "whole")
    interrupted = tmp_path / "interrupted"
    with pytest.raises(
        NonFiniteLossError, match=r"mask loss is nan at step 25 .*before the update"
    ):
        stop_at_step(lambda: run(interrupted), 25, MaskTrainingSAE)
    with caplog.at_level(logging.INFO, logger="sae_lens_qk"):
        resumed = run(interrupted, resume_from_checkpoint=str(interrupted / "checkpoints"))
    assert any("resuming mask from" in message for message in caplog.messages)
    assert resumed.cfg.to_dict() == whole.cfg.to_dict()
    assert_same_weights(resumed, whole)


def test_a_checkpoint_holds_its_settings(mask_runner, tmp_path):
    """As SAELens loads it, without the run's config."""
    mask_runner(mask={"fine_tune_lr": 3e-3, "output_coefficient": 0.5}).run()
    checkpoint = max((tmp_path / "checkpoints" / "mask").glob("*"), key=lambda path: path.name)
    sae = MaskTrainingSAE.load_from_disk(checkpoint)
    assert sae.cfg.mask.fine_tune
    assert sae.cfg.mask.output_coefficient == 0.5
    assert sae.cfg.mask.mask_speed == pytest.approx(1e-2 / 3e-3)
    assert sae.cfg.prune_steps == PRUNED_AT
    assert qk.MaskTrainingConfig.from_dict(sae.cfg.to_dict()) == sae.cfg


def test_given_transcoders_skip_step_1(step_1, mask_runner, tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError("step 1 ran")

    monkeypatch.setattr(TranscodersTrainingSAE, "training_forward_pass", refuse)
    dictionary = mask_runner().run()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["mask"]
    start = qk.BilinearQKDictionary.load_from_disk(step_1("llama"))
    x = torch.randn(2, CONTEXT, start.cfg.d_in, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dictionary.encode(x), start.encode(x))
    calibration = json.loads((step_1("llama") / "cfg.json").read_text())["metadata"]["calibration"]
    names = {"l0_query", "l0_key", "pattern_kl"}
    assert set(calibration) == names | {f"{name}_before" for name in names}
    metadata = json.loads((tmp_path / "output" / "cfg.json").read_text())["metadata"]
    assert metadata["calibration"] == dictionary.cfg.metadata.calibration == calibration
    assert metadata["training_architecture"] == "bilinear_qk_mask"


@pytest.mark.parametrize(
    ("model", "layer", "error", "message"),
    [
        (("llama", 0), 0, ValueError, "is of layer 1, the run of 0"),
        (("llama", 1), 1, FingerprintError, "has other weights"),
        (("gpt2", 0), 1, FingerprintError, "has other weights"),
    ],
)
def test_transcoders_of_another_layer_or_model_are_refused(
    model, layer, error, message, step_1, tmp_path, text_dataset
):
    kind, seed = model
    cfg = tiny_config(tmp_path, from_pretrained_path=str(step_1("llama")), layer=layer)
    with pytest.raises(error, match=message):
        qk.BilinearQKTrainingRunner(cfg, text_dataset, tiny_model(kind, seed=seed))
    assert not list(tmp_path.iterdir())


def test_relu_transcoders_cannot_be_tuned(tmp_path, text_dataset):
    changes = {"sae": {"activation": "relu"}, "checkpoint_path": None}
    tiny_runner(tmp_path, text_dataset, mask={"training_tokens": 0}, **changes).run()
    start = str(tmp_path / "output")
    with pytest.raises(ValueError, match="fine_tune_lr needs batchtopk or topk"):
        tiny_runner(
            tmp_path / "tuned",
            text_dataset,
            mask={"fine_tune_lr": 1e-3},
            from_pretrained_path=start,
        )
    assert not (tmp_path / "tuned").exists()


def test_a_run_drops_dead_features(step_1, mask_runner, tmp_path):
    """Those that never fire on the ranking tokens; there the transcoders attend as before."""
    start = qk.BilinearQKDictionary.load_from_disk(step_1("llama"))
    runner = mask_runner(mask={"compact": True})
    dictionary = runner.run()
    x = training_rows(runner, N_RANKING_ROWS)
    before = start.features(x)
    after = dictionary.features(x)
    for side in ("query", "key"):
        acts = getattr(before, side)
        is_live = (acts > 0).flatten(0, 1).any(dim=0)
        numbers = getattr(dictionary.cfg, f"{side}_numbers")
        assert numbers == is_live.nonzero()[:, 0].tolist()
        assert getattr(dictionary.cfg, f"d_{side}") == len(numbers) < acts.shape[-1]
        assert torch.equal(getattr(after, side), acts[..., numbers])
    assert_near(dictionary.pattern(x), start.pattern(x), 1e-6)
    assert dictionary.cfg.original_sizes == (D_QUERY, D_KEY)
    reloaded = qk.BilinearQKDictionary.load_from_disk(tmp_path / "output")
    assert reloaded.cfg.query_numbers == dictionary.cfg.query_numbers
    assert torch.equal(reloaded.pattern(x, "feature_map"), dictionary.pattern(x, "feature_map"))


@pytest.mark.parametrize("fine_tune_lr", [0.0, 1e-3], ids=["frozen", "tuned"])
def test_step_2_counts_the_attention_output(fine_tune_lr):
    """Of the map, and of the tuned transcoders too: error times coefficient, with gradients."""
    model = tiny_model("llama")
    layer = AttentionLayer(model, 1)
    weights = layer.qk_weights
    d = tiny_dictionary(model, decoder_bias=True)
    d.set_feature_map(d.feature_map.reweighted(torch.ones(len(d.feature_map))))
    cfg = qk.MaskTrainingConfig(
        d_in=20,
        d_query=D_QUERY,
        d_key=D_KEY,
        n_pairs=len(d.feature_map),
        attention=layer.spec.to_dict(),
        k_query=9.0,
        k_key=9.0,
        prune_steps=0,
        mask=qk.MaskStepConfig(output_coefficient=2.5, fine_tune_lr=fine_tune_lr),
    )
    sae = MaskTrainingSAE(cfg)
    with pytest.raises(ValueError, match=r"pass ov=layer\.ov_weights"):
        sae.attach(weights, CONTEXT, d, d.feature_map)
    sae.attach(weights, CONTEXT, d, d.feature_map, layer.ov_weights)
    x = torch.randn(2, CONTEXT, 20, generator=torch.Generator().manual_seed(0))
    losses = sae.training_forward_pass(step_input(x.flatten(0, 1), mask_sparsity=0.0)).losses
    is_tuned = fine_tune_lr > 0
    assert ("output_unmasked" in losses) == is_tuned
    if not is_tuned:  # tuning decides by rank what fires, the dictionary by thresholds
        true = d.spec.pattern(d.spec.scores(weights.queries(x), weights.keys(x)))
        difference = d.pattern(x, "feature_map") - true
        error = AttentionOutput.of(x, layer.ov_weights).error(true, difference)
        assert float(losses["output"]) == pytest.approx(2.5 * float(error), rel=1e-4)
    output_losses = [loss for name, loss in losses.items() if name.startswith("output")]
    sum(output_losses).backward()
    assert sae.scaled_mask.grad.any()
    assert (sae.dictionary.query.W_enc.grad is not None) == is_tuned
