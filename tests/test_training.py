"""Both training steps end to end on tiny models: they learn, resume exactly, and refuse what cannot work."""

import json
import logging
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sae_lens import LanguageModelSAETrainingRunner
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.transcoder import Transcoder, TranscoderConfig
from safetensors.torch import load_file
from tiny_dictionaries import tiny_dictionary
from tiny_models import KINDS, tiny_model
from torch import Tensor

import sae_lens_qk as qk
from sae_lens_qk.attention import attention_scores, log_pattern, pattern_from_scores, pattern_kl
from sae_lens_qk.config import QKFields
from sae_lens_qk.host.proof import FingerprintError
from sae_lens_qk.host.layer import attention_spec, ov_weights, qk_weights, run_recording
from sae_lens_qk.training.candidates import rank_pairs
from sae_lens_qk.training.losses import Moved, TruePattern, dead_feature_loss, pattern_losses, sqrt_penalty
from sae_lens_qk.training.mask import MaskTrainingSAE
from sae_lens_qk.training.transcode import strengths, transcode
from sae_lens_qk.training.transcoders import NonFiniteLossError, TranscodersTrainingSAE, batch_cutoff, strength_threshold

BATCH = 23 * 8
"""Tokens."""


def tiny_config(tmp_path: Path, **changes) -> qk.BilinearQKRunnerConfig:
    sae = qk.TranscodersTrainingConfig(
        d_in=1, d_query=29, d_key=31, k=4.0, **changes.pop("sae", {})
    )
    mask_defaults = dict(
        training_tokens=BATCH * 12, n_pairs=400, n_candidates=1500, ranking_tokens=BATCH * 2
    )
    mask = qk.MaskStepConfig(**{**mask_defaults, **changes.pop("mask", {})})
    values = dict(
        sae=sae,
        mask=mask,
        layer=1,
        model_name="tiny",
        context_size=23,
        train_batch_size_tokens=BATCH,
        store_batch_size_prompts=8,
        n_batches_in_buffer=8,
        training_tokens=BATCH * 40,
        lr=3e-3,
        lr_warm_up_steps=0,
        dead_feature_window=10,
        n_checkpoints=3,
        checkpoint_path=str(tmp_path / "checkpoints"),
        output_path=str(tmp_path / "output"),
    )
    return qk.BilinearQKRunnerConfig(**{**values, **changes})


def layer_inputs(model, layer: int, tokens: torch.Tensor) -> torch.Tensor:
    seen = {}
    name = f"blocks.{layer}.attn.hook_in"
    with torch.no_grad():
        model.run_with_hooks(
            tokens, fwd_hooks=[(name, lambda value, hook: seen.update(x=value))], prepend_bos=False
        )
    return seen["x"]


@pytest.mark.parametrize("initialization", ["scores", "data", "kaiming"])
def test_without_decoder_bias_the_mean_starts_in_a_feature(initialization):
    model = tiny_model("llama")
    weights, spec = qk_weights(model, 1), attention_spec(model, 1)
    x = torch.randn(BATCH, 20, generator=torch.Generator().manual_seed(0)) + 2
    shared = dict(
        d_in=20,
        d_query=29,
        d_key=31,
        k=4.0,
        initialization=initialization,
        attention=spec.to_dict(),
    )
    made = {}
    for bias in (True, False):
        torch.manual_seed(0)
        made[bias] = TranscodersTrainingSAE(
            qk.TranscodersTrainingConfig(**shared, decoder_bias=bias)
        )
        made[bias].attach(weights, 23, x)
    for side, mean in (
        ("query", weights.queries(x.mean(0)[None])),
        ("key", weights.keys(x.mean(0)[None])),
    ):
        with_bias, without = getattr(made[True], side), getattr(made[False], side)
        torch.testing.assert_close(with_bias.b_dec.data, mean.flatten())
        torch.testing.assert_close(without.W_dec[0].data, mean.flatten())
        assert (without.encode(x)[:, 0] == 1).all()
        assert not without.b_dec.any()
        assert torch.equal(with_bias.W_dec[1:], without.W_dec[1:])


def test_without_decoder_bias_none_appears(tmp_path, text_dataset):
    cfg = tiny_config(tmp_path, sae={"decoder_bias": False}, mask={"fine_tune_lr": 3e-3})
    dictionary = qk.BilinearQKTrainingRunner(cfg, tiny_model("llama"), text_dataset).run()
    assert not dictionary.cfg.decoder_bias
    assert not dictionary.query.b_dec.any()
    assert not dictionary.key.b_dec.any()
    assert qk.BilinearQKDictionary.load_from_disk(tmp_path / "output").cfg.decoder_bias is False


@pytest.mark.parametrize(
    ("kind", "fine_tune_lr"), [("gpt2", 0.0), ("neox", 0.0), ("llama", 0.0), ("llama", 3e-3)]
)
def test_both_steps_learn_the_pattern(kind, fine_tune_lr, tmp_path, text_dataset):
    model = tiny_model(kind)
    cfg = tiny_config(tmp_path, mask={"fine_tune_lr": fine_tune_lr})
    dictionary = qk.BilinearQKTrainingRunner(cfg, model, text_dataset).run()
    assert 0 < len(dictionary.feature_map) <= 400
    x = layer_inputs(
        model, 1, model.tokenizer(text_dataset[5]["text"], return_tensors="pt").input_ids[:, :23]
    )
    weights = qk_weights(model, 1)
    true = log_pattern(attention_scores(weights.queries(x), weights.keys(x), dictionary.spec))
    uniform = pattern_kl(true, log_pattern(torch.zeros_like(true))).mean()
    for source, share in (("transcoders", 0.6), ("feature_map", 0.8)):
        assert pattern_kl(true, dictionary.pattern(x, source).log()).mean() < share * uniform
    reloaded = qk.BilinearQKDictionary.load_from_disk(tmp_path / "output")
    assert torch.equal(reloaded.pattern(x, "feature_map"), dictionary.pattern(x, "feature_map"))
    saved = json.loads((tmp_path / "output" / "cfg.json").read_text())
    assert saved["architecture"] == "bilinear_qk"
    assert saved["metadata"]["calibration"]["l0_query"] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("activation", ["batchtopk", "topk", "relu"])
def test_published_form_equals_training_form_with_its_threshold(activation, tmp_path, text_dataset):
    no_map = {"mask": {"training_tokens": 0}, "output_path": None, "checkpoint_path": None}
    cfg = tiny_config(tmp_path, sae={"activation": activation}, **no_map)
    runner = qk.BilinearQKTrainingRunner(cfg, tiny_model("llama"), text_dataset)
    sae = TranscodersTrainingSAE(runner.cfg.sae)
    rows = torch.cat(list(runner._some_rows(None, 64)))
    sae.attach(runner.weights, 23, rows.flatten(0, 1))
    if activation != "relu":
        report = sae.calibrate([rows.flatten(0, 1)])
        assert report["l0_query"] == pytest.approx(4, abs=0.01)
        assert report["l0_key"] == pytest.approx(4, abs=0.01)
        if activation == "topk":  # as trained: exactly k a token
            assert report["l0_query_before"] == report["l0_key_before"] == 4
        assert report["pattern_kl"] == pytest.approx(report["pattern_kl_before"], abs=0.2)
    published = sae.to_dictionary()
    torch.testing.assert_close(published.encode(rows), sae.eval().encode(rows), rtol=0, atol=1e-6)


@pytest.mark.parametrize("cached", [False, True], ids=["store", "cache"])
def test_resume_continues_to_the_same_weights(cached, tmp_path, text_dataset):
    def run(folder: Path, **changes):
        cache = {"input_cache_path": str(folder / "cache")} if cached else {}
        cfg = tiny_config(folder, **cache, **changes)
        return qk.BilinearQKTrainingRunner(cfg, tiny_model("llama"), text_dataset).run()

    whole = run(tmp_path / "whole")

    interrupted = tmp_path / "interrupted"
    with pytest.raises(NonFiniteLossError):
        _stop_at_step(run, 25, interrupted)
    resumed = run(interrupted, resume_from_checkpoint=str(interrupted / "checkpoints"))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def _stop_at_step(run, step: int, folder: Path, sae_class=TranscodersTrainingSAE):
    forward = sae_class.training_forward_pass

    def poisoned(self, step_input: TrainStepInput):
        if step_input.n_training_steps == step:
            step_input = replace(step_input, sae_in=step_input.sae_in * torch.nan)
        return forward(self, step_input)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sae_class, "training_forward_pass", poisoned)
        run(folder)


def test_nan_activations_stop_training_and_keep_the_last_checkpoint(tmp_path, text_dataset):
    runner = qk.BilinearQKTrainingRunner(tiny_config(tmp_path), tiny_model("gpt2"), text_dataset)
    with pytest.raises(
        NonFiniteLossError, match=r"loss is nan at step 25.*stopped before the update"
    ):
        _stop_at_step(lambda _: runner.run(), 25, tmp_path)
    checkpoints = list((tmp_path / "checkpoints" / "transcoders").glob("*/sae_weights.safetensors"))
    assert checkpoints
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activations_mixing_fraction": 0.5}, "activations_mixing_fraction must be 0.0"),
        ({"train_batch_size_tokens": 100}, "multiple of context_size"),
        ({"layer": 7}, r"layer must lie in \[0, 1\], got 7"),
        ({"exclude_special_tokens": True}, "exclude_special_tokens must be False"),
        ({"seqpos_slice": (1, None)}, "seqpos_slice must be"),
        ({"training_tokens": 10}, "must cover one batch"),
        ({"autocast": True}, "autocast must be False"),
        ({"mask": {"n_candidates": 10**12}}, "GiB are free: ask for fewer"),
        (
            {"mask": {"fine_tune_lr": 1e-3}, "sae": {"activation": "relu"}},
            "mask.fine_tune_lr needs batchtopk or topk",
        ),
        ({"from_pretrained_path": "nowhere"}, "There is no dictionary 'nowhere'"),
    ],
)
def test_bad_configs_are_refused_before_anything_is_written(
    changes, message, tmp_path, text_dataset
):
    with pytest.raises(ValueError, match=message):
        qk.BilinearQKTrainingRunner(
            tiny_config(tmp_path, **changes), tiny_model("gpt2"), text_dataset
        )
    assert not list(tmp_path.iterdir())


# Step 2 on finished transcoders


@pytest.fixture(scope="module")
def step_1(tmp_path_factory, text_dataset):
    """Kind of model -> folder of its transcoders, trained once; shared and not to be changed. Some features are dead."""
    folders: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in folders:
            made = tmp_path_factory.mktemp("step_1")
            cfg = tiny_config(
                made, mask={"training_tokens": 0}, checkpoint_path=None, output_path=None
            )
            dictionary = qk.BilinearQKTrainingRunner(cfg, tiny_model(kind), text_dataset).run()
            for half, n_dead in ((dictionary.query, 3), (dictionary.key, 5)):
                half.b_enc.data[2 : 2 + n_dead] = -100.0
            dictionary.save_model(made / "output")
            folders[kind] = made / "output"
        return folders[kind]

    return folder


def mask_runner(
    start: Path, folder: Path, text_dataset, kind: str = "llama", **changes
) -> qk.BilinearQKTrainingRunner:
    """A run of step 2 alone, 30 steps; pairs are pruned during the first 18."""
    mask = {"training_tokens": BATCH * 30, "n_checkpoints": 3, **changes.pop("mask", {})}
    cfg = tiny_config(folder, mask=mask, from_pretrained_path=str(start), **changes)
    return qk.BilinearQKTrainingRunner(cfg, tiny_model(kind), text_dataset)


def training_rows(runner: qk.BilinearQKTrainingRunner, n_rows: int = 160) -> Tensor:
    return torch.cat(list(runner._some_rows(None, n_rows)))


@torch.no_grad()
def mean_kl(d: qk.BilinearQKDictionary, runner: qk.BilinearQKTrainingRunner, source: str) -> float:
    x, weights = training_rows(runner), runner.weights
    true = log_pattern(attention_scores(weights.queries(x), weights.keys(x), d.spec))
    return float(pattern_kl(true, log_pattern(d.scores(x, source))).mean())


def mean_l0(d: qk.BilinearQKDictionary, x: Tensor) -> list[float]:
    return [
        float((encode(x) > 0).sum(dim=-1).float().mean())
        for encode in (d.encode_query, d.encode_key)
    ]


def assert_measured(d: qk.BilinearQKDictionary, runner: qk.BilinearQKTrainingRunner) -> None:
    """Its statistics are those of the finished dictionary, on the ranking tokens."""
    x, kept = training_rows(runner, n_rows=16), d.feature_map
    exact = rank_pairs(d, runner.weights, [x], 10_000)
    at = exact.find(kept.indices)
    measured = kept.statistics[:, 2] > 0
    assert measured.double().mean() > 0.9
    assert (at[measured] >= 0).all()
    torch.testing.assert_close(
        kept.statistics[measured], exact.statistics[at[measured]], rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_tuning_the_transcoders_along_improves_the_map(kind, step_1, tmp_path, text_dataset):
    """Against a run that leaves them frozen, on the same tokens with the same candidates."""
    start = qk.BilinearQKDictionary.load_from_disk(step_1(kind))
    made = {}
    for name, lr in (("frozen", 0.0), ("tuned", 3e-3)):
        runner = mask_runner(
            step_1(kind), tmp_path / name, text_dataset, kind, mask={"fine_tune_lr": lr}
        )
        made[name] = runner.run()
        saved = load_file(tmp_path / name / "output" / "sae_weights.safetensors")[
            "feature_map.weights"
        ]
        assert len(saved) == 400
        assert ((saved > 0) & (saved <= 1)).all()
        assert (saved < 1).any()
        assert_measured(made[name], runner)
    frozen, tuned = made["frozen"], made["tuned"]
    for name, tensor in start.query.state_dict().items():
        assert torch.equal(frozen.query.state_dict()[name], tensor), name
        assert not torch.equal(tuned.query.state_dict()[name], tensor), name
    assert mean_kl(tuned, runner, "feature_map") < 0.95 * mean_kl(frozen, runner, "feature_map")
    assert mean_kl(tuned, runner, "transcoders") < mean_kl(start, runner, "transcoders")
    before, after = mean_l0(start, training_rows(runner)), mean_l0(tuned, training_rows(runner))
    assert after == pytest.approx(before, rel=0.2)
    assert min(before) > 3


@pytest.mark.parametrize("polish", [True, False])
@pytest.mark.parametrize("lr", [0.0, 1e-3], ids=["frozen", "tuned"])
def test_pairs_fall_geometrically_and_polish_ends_the_penalty(
    lr, polish, step_1, tmp_path, text_dataset, monkeypatch
):
    forward, seen = MaskTrainingSAE.training_forward_pass, []

    def recording(self, step_input: TrainStepInput):
        output = forward(self, step_input)
        seen.append((step_input.n_training_steps, set(output.losses), output.metrics["n_pairs"]))
        total = sum(value.item() for value in output.losses.values())
        assert output.loss.item() == pytest.approx(total, rel=1e-6)
        if lr:  # k features a token whatever the thresholds say
            for side, k in zip(
                output.feature_acts.split([29, 31], dim=1),
                (self.cfg.k_query, self.cfg.k_key),
                strict=True,
            ):
                assert (
                    0 <= int((side > 0).sum()) - int(k * BATCH) < 8
                )  # first tokens are all alike: ties
        else:
            assert torch.equal(output.feature_acts, self.dictionary.encode(step_input.sae_in))
        return output

    monkeypatch.setattr(MaskTrainingSAE, "training_forward_pass", recording)
    mask = {"fine_tune_lr": lr, "polish": polish, "n_pairs": 211}
    dictionary = mask_runner(step_1("llama"), tmp_path, text_dataset, mask=mask).run()
    assert len(dictionary.feature_map) == 211
    always = {"kl", "kl_unmasked"} if lr else {"kl"}
    assert [step for step, _, _ in seen] == list(range(30))
    for step, losses, n_pairs in seen:
        assert losses - {"mask_sparsity"} == always
        assert ("mask_sparsity" in losses) == (not polish or step < 18)
        pruned_at = 18 if step >= 18 else step // 10 * 10
        assert n_pairs == round(1500 * (211 / 1500) ** (pruned_at / 18))


def test_pairs_driven_to_zero_are_dropped(step_1, tmp_path, text_dataset):
    mask = {"sparsity_coefficient": 5e-4, "lr": 0.1, "polish": False}
    dictionary = mask_runner(step_1("llama"), tmp_path, text_dataset, mask=mask).run()
    assert 0 < len(dictionary.feature_map) < 300
    saved = load_file(tmp_path / "output" / "sae_weights.safetensors")["feature_map.weights"]
    assert len(saved) == len(dictionary.feature_map)
    assert ((saved > 0) & (saved <= 1)).all()


@pytest.mark.parametrize(
    ("mask", "cached"),
    [({}, False), ({"fine_tune_lr": 3e-3}, False), ({"fine_tune_lr": 3e-3, "compact": True}, True)],
    ids=["frozen", "tuned", "tuned, compacted, cached"],
)
def test_step_2_resumes_to_the_same_weights(mask, cached, step_1, tmp_path, text_dataset, caplog):
    def run(folder: Path, **changes):
        cache = {"input_cache_path": str(folder / "cache")} if cached else {}
        return mask_runner(
            step_1("llama"), folder, text_dataset, mask=mask, **cache, **changes
        ).run()

    whole = run(tmp_path / "whole")
    interrupted = tmp_path / "interrupted"
    with pytest.raises(
        NonFiniteLossError, match="mask loss is nan at step 25: training stopped before the update"
    ):
        _stop_at_step(run, 25, interrupted, MaskTrainingSAE)
    with caplog.at_level(logging.INFO, logger="sae_lens_qk"):
        resumed = run(interrupted, resume_from_checkpoint=str(interrupted / "checkpoints"))
    assert any("resuming mask from" in message for message in caplog.messages)
    assert resumed.cfg.to_dict() == whole.cfg.to_dict()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.parametrize("cached", [False, True], ids=["store", "cache"])
def test_each_step_sees_batches_of_its_own_size(cached, tmp_path, text_dataset, monkeypatch):
    seen = {TranscodersTrainingSAE: [], MaskTrainingSAE: []}
    for sae_class, sizes in seen.items():
        forward = sae_class.training_forward_pass
        monkeypatch.setattr(
            sae_class,
            "training_forward_pass",
            lambda sae, step_input, forward=forward, sizes=sizes: (
                sizes.append(step_input.sae_in.shape) or forward(sae, step_input)
            ),
        )
    cache = {"input_cache_path": str(tmp_path / "cache")} if cached else {}
    cfg = tiny_config(tmp_path, mask={"train_batch_size_tokens": BATCH // 2}, **cache)
    dictionary = qk.BilinearQKTrainingRunner(cfg, tiny_model("llama"), text_dataset).run()
    assert 0 < len(dictionary.feature_map) <= 400  # pruned to its size over its own steps
    assert seen == {
        TranscodersTrainingSAE: [(BATCH, 20)] * 40,
        MaskTrainingSAE: [(BATCH // 2, 20)] * 24,
    }


def test_given_transcoders_skip_step_1(step_1, tmp_path, text_dataset, monkeypatch):
    def refused(*args):
        raise AssertionError("step 1 ran")

    monkeypatch.setattr(TranscodersTrainingSAE, "training_forward_pass", refused)
    dictionary = mask_runner(step_1("llama"), tmp_path, text_dataset).run()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["mask"]
    start = qk.BilinearQKDictionary.load_from_disk(step_1("llama"))
    x = torch.randn(2, 23, start.cfg.d_in, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dictionary.encode(x), start.encode(x))
    calibration = json.loads((step_1("llama") / "cfg.json").read_text())["metadata"]["calibration"]
    assert set(calibration) == {
        f"{name}{when}" for name in ("l0_query", "l0_key", "pattern_kl") for when in ("", "_before")
    }
    finished = json.loads((tmp_path / "output" / "cfg.json").read_text())["metadata"]
    assert finished["calibration"] == dictionary.cfg.metadata.calibration == calibration
    assert finished["training_architecture"] == "bilinear_qk_mask"


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
        qk.BilinearQKTrainingRunner(cfg, tiny_model(kind, seed=seed), text_dataset)
    assert not list(tmp_path.iterdir())


def test_relu_transcoders_cannot_be_tuned(tmp_path, text_dataset):
    changes = {
        "sae": {"activation": "relu"},
        "mask": {"training_tokens": 0},
        "checkpoint_path": None,
    }
    runner = qk.BilinearQKTrainingRunner(
        tiny_config(tmp_path, **changes), tiny_model("llama"), text_dataset
    )
    runner.run()
    with pytest.raises(ValueError, match=r"mask.fine_tune_lr needs batchtopk or topk transcoders"):
        mask_runner(
            tmp_path / "output", tmp_path / "tuned", text_dataset, mask={"fine_tune_lr": 1e-3}
        )
    assert not (tmp_path / "tuned").exists()


def test_a_run_drops_dead_features(step_1, tmp_path, text_dataset):
    """Those that never fire on the ranking tokens; there the frozen transcoders attend as before."""
    start = qk.BilinearQKDictionary.load_from_disk(step_1("llama"))
    runner = mask_runner(step_1("llama"), tmp_path, text_dataset, mask={"compact": True})
    dictionary = runner.run()
    x = training_rows(runner, n_rows=16)  # ranking_tokens
    sides = (
        (start.encode_query, dictionary.encode_query, "query"),
        (start.encode_key, dictionary.encode_key, "key"),
    )
    for before, after, side in sides:
        acts = before(x)
        live = (acts > 0).flatten(0, 1).any(dim=0)
        numbers = getattr(dictionary.cfg, f"{side}_numbers")
        assert numbers == live.nonzero()[:, 0].tolist()
        assert getattr(dictionary.cfg, f"d_{side}") == len(numbers) < acts.shape[-1]
        assert torch.equal(after(x), acts[..., numbers])
    torch.testing.assert_close(dictionary.pattern(x), start.pattern(x), rtol=0, atol=1e-6)
    assert dictionary.cfg.original_sizes == (29, 31)
    loaded = qk.BilinearQKDictionary.load_from_disk(tmp_path / "output")
    assert loaded.cfg.query_numbers == dictionary.cfg.query_numbers
    assert torch.equal(loaded.pattern(x, "feature_map"), dictionary.pattern(x, "feature_map"))


def test_short_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="shorter than one batch of 8 rows of 23 tokens"):
        qk.BilinearQKTrainingRunner(
            tiny_config(tmp_path), tiny_model("gpt2"), Dataset.from_dict({"text": ["short"]})
        )
    assert not list(tmp_path.iterdir())


def test_stock_runner_trains_our_architecture(text_dataset):
    example = runpy.run_path(
        str(Path(__file__).parents[1] / "examples" / "train_with_stock_runner.py")
    )
    dictionary = example["train"](
        tiny_model("llama"),
        layer=1,
        dataset=text_dataset,
        context_size=23,
        n_steps=20,
        d_features=29,
    )
    assert dictionary.cfg.half_architecture == "jumprelu_transcoder"


def test_training_without_attach_says_what_to_do(tmp_path, text_dataset):
    cfg = tiny_config(tmp_path)
    runner = qk.BilinearQKTrainingRunner(cfg, tiny_model("llama"), text_dataset)
    stock = LanguageModelSAETrainingRunner(
        runner.cfg, override_dataset=text_dataset, override_model=runner.model
    )
    with pytest.raises(RuntimeError, match=r"call sae.attach"):
        stock.run()


def test_cache_of_other_inputs_is_refused(tmp_path, text_dataset):
    cache = str(tmp_path / "cache")
    run = {"input_cache_path": cache, "output_path": None, "checkpoint_path": None}
    qk.BilinearQKTrainingRunner(
        tiny_config(tmp_path, **run), tiny_model("llama"), text_dataset
    ).fill_input_cache()
    other = qk.BilinearQKTrainingRunner(
        tiny_config(tmp_path, **run), tiny_model("llama", seed=1), text_dataset
    )
    with pytest.raises(ValueError, match="caches other inputs"):
        other.fill_input_cache()


def test_inputs_computed_in_bfloat16_are_a_cache_of_their_own(tmp_path, text_dataset):
    model, rows = tiny_model("llama"), {}
    run = {"output_path": None, "checkpoint_path": None}
    for name, autocast in (("exact", False), ("half", True)):
        cfg = tiny_config(
            tmp_path, input_cache_path=str(tmp_path / name), autocast_lm=autocast, **run
        )
        rows[name] = (
            qk.BilinearQKTrainingRunner(cfg, model, text_dataset)
            .fill_input_cache()
            .rows(slice(None))
        )
    difference = (rows["half"] - rows["exact"]).norm() / rows["exact"].norm()
    assert 1e-3 < difference < 0.03
    for name, autocast in (("exact", True), ("half", False)):
        cfg = tiny_config(
            tmp_path, input_cache_path=str(tmp_path / name), autocast_lm=autocast, **run
        )
        with pytest.raises(ValueError, match=r"caches other inputs: it has \{'autocast_lm'"):
            qk.BilinearQKTrainingRunner(cfg, model, text_dataset).fill_input_cache()


def test_cache_holds_the_models_inputs_and_resumes(tmp_path, text_dataset):
    model = tiny_model("llama")
    changes = {
        "input_cache_path": str(tmp_path / "cache"),
        "output_path": None,
        "checkpoint_path": None,
    }
    part = qk.BilinearQKTrainingRunner(
        tiny_config(tmp_path, **changes, input_cache_tokens=23 * 13), model, text_dataset
    )
    assert part.fill_input_cache().n_rows == 13
    whole = qk.BilinearQKTrainingRunner(
        tiny_config(tmp_path, **changes, input_cache_tokens=23 * 31), model, text_dataset
    )
    cache = whole.fill_input_cache()
    assert cache.n_rows == 31
    expected = layer_inputs(model, 1, torch.from_numpy(cache.tokens[:].copy()).long())
    torch.testing.assert_close(cache.rows(slice(0, 31)), expected, rtol=1e-3, atol=2e-3)
    store_tokens = whole._store().get_batch_tokens(batch_size=31)
    assert torch.equal(torch.from_numpy(cache.tokens[:].copy()).long(), store_tokens)
    batches, again = cache.batches(4, seed=3), cache.batches(4, seed=3, start_step=9)
    nine = [next(batches) for _ in range(10)][-1]
    assert torch.equal(nine, next(again))


def test_losses_against_loops():
    generator = torch.Generator().manual_seed(0)
    spec = qk.AttentionSpec(
        n_heads=4, n_kv_heads=2, d_head=6, d_model=5, scale=0.4, rotary_inv_freq=(1.0, 0.3)
    )
    q, q_hat = (torch.randn(2, 7, 4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    k, k_hat = (torch.randn(2, 7, 2, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    losses = pattern_losses(q, k, q_hat, k_hat, spec)
    for name, a, b in (("kl_full", q_hat, k_hat), ("kl_query", q_hat, k), ("kl_key", q, k_hat)):
        P, other = (pattern_from_scores(attention_scores(*pair, spec)) for pair in ((q, k), (a, b)))
        total = 0.0
        for row in range(2):
            for head in range(4):
                for i in range(7):
                    for j in range(i + 1):
                        total += float(
                            P[row, head, i, j] * (P[row, head, i, j] / other[row, head, i, j]).log()
                        )
        assert float(losses[name]) == pytest.approx(total / (2 * 4 * 7), rel=1e-10)

    acts, W_dec = torch.rand(3, 5, generator=generator), torch.randn(5, 2, generator=generator)
    by_hand = (
        sum(
            (float(acts[t, f]) * float(W_dec[f].norm()) + 1e-7) ** 0.5
            for t in range(3)
            for f in range(5)
        )
        / 3
    )
    assert float(sqrt_penalty(acts, W_dec)) == pytest.approx(by_hand, rel=1e-5)


def test_difference_of_patterns_and_its_gradient():
    """Of the compiled loop, against autograd through a plain softmax; alone and together with the divergence."""
    generator = torch.Generator().manual_seed(0)
    true = TruePattern.of(
        torch.randn(2, 7, 3, 5, generator=generator),
        torch.randn(2, 7, 3, 5, generator=generator),
        qk.AttentionSpec(n_heads=3, n_kv_heads=3, d_head=5, d_model=11, scale=0.4),
    )
    true = TruePattern(*(tensor.double() for tensor in true))
    toward, start = (
        torch.randn(2, 3, 7, 7, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    for of_kl in (0.0, 1.7):
        compiled, plain = (start.clone().requires_grad_() for _ in range(2))
        kl, difference = true.compare(compiled)
        log_made = log_pattern(plain)
        assert torch.allclose(difference, log_made.exp() - true.pattern, atol=1e-12)
        loss = (difference * toward).sum()
        (loss + of_kl * kl.sum() if of_kl else loss).backward()
        (
            (log_made.exp() * toward).sum() + of_kl * pattern_kl(true.log_pattern, log_made).sum()
        ).backward()
        assert torch.allclose(compiled.grad, plain.grad, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_heads_write_is_the_hosts(kind):
    """The model's own pattern and its own inputs give its attention output, up to b_O."""
    model = tiny_model(kind)
    names = [f"blocks.1.attn.{name}" for name in ("hook_in", "hook_pattern", "hook_out")]
    tokens = torch.randint(
        0, model.cfg.d_vocab, (3, 13), generator=torch.Generator().manual_seed(0)
    )
    x, pattern, written = run_recording(model, tokens, names)[1].values()
    ov = ov_weights(model, 1)
    torch.testing.assert_close(
        Moved.of(x, ov).output(pattern) + ov.b_O, written, rtol=1e-5, atol=1e-5
    )


def test_error_of_what_the_heads_write_is_a_share_of_variance():
    generator = torch.Generator().manual_seed(0)
    moved = Moved(
        torch.randn(2, 7, 2, 3, generator=generator), torch.randn(4, 3, 5, generator=generator)
    )
    P, other = torch.rand(2, 2, 4, 7, 7, generator=generator).softmax(dim=-1)
    true, off = (torch.zeros(2, 7, 5) for _ in range(2))
    for pattern, out in ((P, true), (other - P, off)):
        for row in range(2):
            for i in range(7):
                for head in range(4):
                    out[row, i] += (
                        sum(
                            pattern[row, head, i, j] * moved.values[row, j, head // 2]
                            for j in range(7)
                        )
                        @ moved.W_O[head]
                    )
    expected = off.square().sum() / (true - true.flatten(0, 1).mean(dim=0)).square().sum()
    assert float(moved.error(P, other - P)) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("fine_tune", [False, True])
def test_step_2_counts_what_the_heads_write(fine_tune):
    """Of the map, and of the tuned transcoders too: the error times the coefficient, with a gradient."""
    model = tiny_model("llama")
    d, weights, ov = (
        tiny_dictionary(model, decoder_bias=True),
        qk_weights(model, 1),
        ov_weights(model, 1),
    )
    d.set_feature_map(d.feature_map.reweighted(torch.ones(len(d.feature_map))))
    shared = {
        name: value for name, value in vars(d.cfg).items() if name in QKFields.__dataclass_fields__
    }
    cfg = qk.MaskTrainingConfig(
        **shared,
        d_in=20,
        fine_tune=fine_tune,
        k_query=9.0,
        k_key=9.0,
        prune_steps=0,
        output_coefficient=2.5,
    )
    sae = MaskTrainingSAE(cfg)
    with pytest.raises(ValueError, match=r"pass ov=qk\.host\.ov_weights"):
        sae.attach(weights, 23, d, d.feature_map)
    sae.attach(weights, 23, d, d.feature_map, ov)
    x = torch.randn(2, 23, 20, generator=torch.Generator().manual_seed(0))
    made = sae.training_forward_pass(
        TrainStepInput(x.flatten(0, 1), {"mask_sparsity": 0.0}, None, 0, is_logging_step=False)
    )
    true = pattern_from_scores(attention_scores(weights.queries(x), weights.keys(x), d.spec))
    assert ("output_unmasked" in made.losses) == fine_tune
    if not fine_tune:  # tuning decides by rank what fires, the dictionary by thresholds
        error = Moved.of(x, ov).error(true, d.pattern(x, "feature_map") - true)
        assert float(made.losses["output"]) == pytest.approx(2.5 * float(error), rel=1e-4)
    sum(loss for name, loss in made.losses.items() if name.startswith("output")).backward()
    assert sae.scaled_mask.grad.any()
    assert (sae.dictionary.query.W_enc.grad is not None) == fine_tune


@pytest.mark.parametrize("activation", ["batchtopk", "topk"])
def test_query_features_are_silent_at_position_0(activation, tmp_path, text_dataset):
    """They do not compete there, and by the end the published ones do not fire there; key features do."""
    model = tiny_model("llama")
    cfg = tiny_config(
        tmp_path,
        sae={"activation": activation, "decoder_bias": False},
        mask={"training_tokens": 0},
        training_tokens=BATCH * 120,
    )
    runner = qk.BilinearQKTrainingRunner(cfg, model, text_dataset)
    x = next(runner._some_rows(None, 8))
    sae = TranscodersTrainingSAE(runner.cfg.sae)
    sae.attach(runner.weights, 23, x.flatten(0, 1))
    made = sae.training_forward_pass(
        TrainStepInput(x.flatten(0, 1), {}, None, 0, is_logging_step=False)
    )
    query, key = made.feature_acts.to_dense().unflatten(0, (-1, 23)).split([29, 31], dim=-1)
    assert not query[:, 0].any()
    assert key[:, 0].any()
    assert made.losses["first_position"] > 0
    assert made.metrics["l0_query"] == pytest.approx(
        4 if activation == "batchtopk" else 4 * 22 / 23, abs=0.05
    )
    dictionary = runner.run()
    l0 = (dictionary.encode_query(x) > 0).sum(dim=-1).float().mean(dim=0)
    assert l0[0] <= 2 < l0[1:].min()  # the feature that stands for the mean may stay
    assert dictionary.encode_key(x)[:, 0].any()


@pytest.mark.parametrize("few", [0, 1 << 14], ids=["dense", "active entries"])
def test_activations_are_never_negative(few, monkeypatch):
    """Strengths are rounded otherwise than pre-activations, so that one may be positive and the other not: the square root
    of the authors' penalty was NaN there."""
    monkeypatch.setattr("sae_lens_qk.training.transcode._FEW", few)
    half = small_half()
    x = torch.randn(11, 6, generator=torch.Generator().manual_seed(0))
    made = transcode(half, x, strengths(half, x), torch.ones(11, 7, dtype=torch.bool))
    assert made.acts.is_sparse == (few > 0)
    hidden_pre = x @ half.W_enc + half.b_enc
    assert (hidden_pre < 0).any()
    assert torch.allclose(made.acts.to_dense(), hidden_pre.relu(), atol=1e-5)


def test_selection_in_bfloat16_keeps_float32_activations():
    half = small_half()
    x = torch.randn(301, 6, generator=torch.Generator().manual_seed(0))
    exact, rounded = strengths(half, x), strengths(half, x, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).abs().max() < 0.01 * exact.abs().max()
    kept = rounded >= batch_cutoff(rounded, 2.0)
    assert 2.0 <= kept.sum() / len(x) < 2.1
    acts = transcode(half, x, rounded, kept).acts.to_dense()
    assert torch.allclose(acts, (x @ half.W_enc + half.b_enc) * kept, atol=1e-5)


def test_dead_feature_loss_wakes_only_dead_features():
    generator = torch.Generator().manual_seed(0)
    half = small_half()
    dead = torch.tensor([True, False, False, True, False, False, True])
    residual, x = (
        torch.randn(11, half.cfg.d_out, generator=generator),
        torch.randn(11, half.cfg.d_in, generator=generator),
    )
    dead_feature_loss(residual, x, strengths(half, x), half, dead, k=2).backward()
    for grad in (half.W_dec.grad, half.W_enc.grad.T, half.b_enc.grad):
        assert (grad[~dead] == 0).all()
        assert (grad[dead] != 0).any()


def test_the_penalty_on_active_entries_alone_is_the_same():
    half, dense = small_half("float64"), small_half("float64")
    x = torch.randn(11, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hidden_pre = x @ dense.W_enc + dense.b_enc
    made = transcode(half, x, strengths(half, x), hidden_pre > 0).acts
    penalties = sqrt_penalty(made, half.W_dec), sqrt_penalty(hidden_pre.relu(), dense.W_dec)
    assert float(penalties[0]) == pytest.approx(float(penalties[1]), rel=1e-12)
    for penalty in penalties:
        penalty.backward()
    for name in ("W_enc", "b_enc", "W_dec"):
        assert torch.allclose(half.get_parameter(name).grad, dense.get_parameter(name).grad), name


def test_one_side_through_active_entries_beside_a_dense_one():
    """As penalised ReLU sides pass to few active features at different steps."""
    model = tiny_model("llama")
    x = torch.randn(23 * 40, 20, generator=torch.Generator().manual_seed(0))
    spec = attention_spec(model, 1).to_dict()
    sae = TranscodersTrainingSAE(
        qk.TranscodersTrainingConfig(
            d_in=20, d_query=29, d_key=31, activation="relu", attention=spec
        )
    )
    sae.attach(qk_weights(model, 1), 23, x)
    sae.query.b_enc.data -= 2.0
    sae.key.b_enc.data += 2.0
    made = sae.training_forward_pass(
        TrainStepInput(x, {"sparsity": 1e-3}, None, 0, is_logging_step=False)
    )
    made.loss.backward()
    torch.testing.assert_close(made.feature_acts.to_dense(), sae.encode(x))
    fired = made.feature_acts.to_dense().bool().float().mean(dim=0).split([29, 31])
    assert (
        0 < fired[0].mean() < 0.5 < fired[1].mean()
    )  # so that one side is sparse, the other dense
    assert sae.query.W_enc.grad.any()
    assert sae.key.W_enc.grad.any()


def small_half(dtype: str = "float32") -> Transcoder:
    half = Transcoder(
        TranscoderConfig(d_in=6, d_sae=7, d_out=5, dtype=dtype, apply_b_dec_to_input=False)
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in half.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return half


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_through_active_entries_are_the_dense_ones(dtype):
    """With a token at which nothing fires, a feature that never fires and one that always does."""
    half, dense = small_half(dtype), small_half(dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(11, 6, generator=generator, dtype=half.W_dec.dtype)
    toward = torch.randn(11, 5, generator=generator, dtype=half.W_dec.dtype)
    hidden_pre = x @ dense.W_enc + dense.b_enc
    for of_half in (half, dense):
        of_half.b_enc.data[2] -= (
            float(hidden_pre[:, 2].min()) - 0.1
        )  # so that it is positive everywhere
    hidden_pre = x @ dense.W_enc + dense.b_enc
    kept = (torch.rand(11, 7, generator=generator) < 0.7) & (hidden_pre > 0)
    kept[:, 2], kept[:, 3], kept[4] = True, False, False
    expected = hidden_pre * kept @ dense.W_dec + dense.b_dec
    made = transcode(half, x, strengths(half, x), kept)
    assert torch.allclose(made.acts.to_dense(), hidden_pre * kept, atol=1e-5)
    assert torch.allclose(made.strength, hidden_pre * dense.W_dec.norm(dim=1), atol=1e-5)
    toward_acts = torch.randn(11, 7, generator=generator, dtype=half.W_dec.dtype)
    for output, acts in ((made.output, made.acts.to_dense()), (expected, hidden_pre * kept)):
        ((output * toward).sum() + (acts * toward_acts).sum()).backward()
    assert torch.allclose(made.output, expected, atol=1e-5)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        grad = half.get_parameter(name).grad
        assert grad.is_contiguous()
        assert torch.allclose(grad, dense.get_parameter(name).grad, atol=1e-5), name
    assert half.W_dec.grad[3].abs().max() == 0


@pytest.mark.parametrize("k", [0.01, 1.0, 3.7, 64.0, 122.0])
def test_batch_cutoff_is_the_exact_one(k):
    """Also where the sample is far off: features that differ in strength, at any place."""
    generator = torch.Generator().manual_seed(0)
    uneven, seen, unseen = (
        torch.rand(122, generator=generator),
        torch.arange(122) % 61 == 0,
        torch.arange(122) % 61 == 1,
    )
    for scale in (torch.ones(122), uneven, seen, unseen):
        strength = torch.randn(301, 122, generator=generator) * scale
        expected = strength.flatten().sort(descending=True).values[int(k * 301) - 1]
        assert batch_cutoff(strength, k) == expected


@pytest.mark.parametrize("k", [1.5, 4.0])
def test_threshold_over_several_batches_is_that_of_all_tokens_at_once(k):
    """Batches differ in strength, so that cutting each of them to its share would lower the threshold."""
    half = tiny_dictionary(tiny_model("llama")).query
    generator = torch.Generator().manual_seed(0)
    batches = [
        factor * torch.randn(53, half.cfg.d_in, generator=generator) for factor in (3.0, 1.0, 0.3)
    ]
    whole = strength_threshold(half, [torch.cat(batches)], k)
    assert torch.equal(strength_threshold(half, batches, k), whole)
    x = torch.cat(batches)
    strength = (half.process_sae_in(x) @ half.W_enc + half.b_enc).relu() * half.W_dec.norm(dim=1)
    assert int((strength > whole).sum()) == int(k * len(x))
