"""Both training steps end to end on tiny models: they learn, resume, refuse what cannot work."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from comparing import assert_near
from datasets import Dataset
from sae_lens import LanguageModelSAETrainingRunner
from tiny_models import tiny_model
from tiny_training import (
    BATCH,
    CONTEXT,
    D_KEY,
    D_QUERY,
    assert_same_weights,
    step_input,
    stop_at_step,
    tiny_config,
    tiny_runner,
    training_rows,
)

import sae_lens_qk as qk
from sae_lens_qk.host.layer import AttentionLayer
from sae_lens_qk.training.losses import NonFiniteLossError
from sae_lens_qk.training.mask import MaskTrainingSAE
from sae_lens_qk.training.transcoders import TranscodersTrainingSAE

NO_FILES = {"output_path": None, "checkpoint_path": None}
NO_MAP = {"training_tokens": 0}


# Start


@pytest.mark.parametrize("initialization", ["scores", "data", "kaiming"])
def test_without_decoder_bias_the_mean_starts_in_a_feature(initialization):
    layer = AttentionLayer(tiny_model("llama"), 1)
    weights = layer.qk_weights
    x = torch.randn(BATCH, 20, generator=torch.Generator().manual_seed(0)) + 2

    def attached(decoder_bias: bool) -> TranscodersTrainingSAE:
        torch.manual_seed(0)
        cfg = qk.TranscodersTrainingConfig(
            d_in=20,
            d_query=D_QUERY,
            d_key=D_KEY,
            k=4.0,
            initialization=initialization,
            attention=layer.spec.to_dict(),
            decoder_bias=decoder_bias,
        )
        sae = TranscodersTrainingSAE(cfg)
        sae.attach(weights, CONTEXT, x)
        return sae

    biased = attached(True)
    unbiased = attached(False)
    mean = x.mean(dim=0)[None]
    means = {"query": weights.queries(mean), "key": weights.keys(mean)}
    for side, expected in means.items():
        half = getattr(unbiased, side)
        biased_half = getattr(biased, side)
        assert_near(biased_half.b_dec.data, expected.flatten())
        assert_near(half.W_dec[0].data, expected.flatten())
        assert (half.encode(x)[:, 0] == 1).all()
        assert not half.b_dec.any()
        assert torch.equal(biased_half.W_dec[1:], half.W_dec[1:])


def test_without_decoder_bias_none_appears(tmp_path, text_dataset):
    changes = {"sae": {"decoder_bias": False}, "mask": {"fine_tune_lr": 3e-3}}
    dictionary = tiny_runner(tmp_path, text_dataset, **changes).run()
    assert not dictionary.cfg.decoder_bias
    assert not dictionary.query.b_dec.any()
    assert not dictionary.key.b_dec.any()
    assert qk.BilinearQKDictionary.load_from_disk(tmp_path / "output").cfg.decoder_bias is False


# What is learned


@pytest.mark.parametrize(
    ("kind", "fine_tune_lr"), [("gpt2", 0.0), ("neox", 0.0), ("llama", 0.0), ("llama", 3e-3)]
)
def test_both_steps_learn_the_pattern(kind, fine_tune_lr, tmp_path, text_dataset):
    runner = tiny_runner(tmp_path, text_dataset, kind, mask={"fine_tune_lr": fine_tune_lr})
    dictionary = runner.run()
    spec = dictionary.spec
    assert 0 < len(dictionary.feature_map) <= 400
    x = training_rows(runner, n_rows=8)
    weights = runner.layer.qk_weights
    true = spec.log_pattern(spec.scores(weights.queries(x), weights.keys(x)))
    uniform = spec.log_pattern(torch.zeros_like(true))
    uniform_kl = spec.kl(true, uniform).mean()
    for source, share in (("transcoders", 0.6), ("feature_map", 0.8)):
        kl = spec.kl(true, dictionary.pattern(x, source).log()).mean()
        assert kl < share * uniform_kl
    reloaded = qk.BilinearQKDictionary.load_from_disk(tmp_path / "output")
    assert torch.equal(reloaded.pattern(x, "feature_map"), dictionary.pattern(x, "feature_map"))


def test_what_other_tools_read_is_in_the_metadata(tmp_path, text_dataset):
    """Also after step 2, which starts from the transcoders of a folder."""
    tiny_runner(tmp_path / "first", text_dataset, mask=NO_MAP).run()
    start = str(tmp_path / "first" / "output")
    tiny_runner(tmp_path, text_dataset, from_pretrained_path=start).run()
    for folder, step in ((tmp_path / "first", "transcoders"), (tmp_path, "mask")):
        saved = json.loads((folder / "output" / "cfg.json").read_text())
        metadata = saved["metadata"]
        assert saved["architecture"] == "bilinear_qk"
        assert metadata["model_name"] == "tiny"
        assert metadata["hook_name"] == "blocks.1.attn.hook_in"
        assert metadata["context_size"] == CONTEXT
        assert metadata["prepend_bos"] is True
        assert metadata["training_architecture"] == f"bilinear_qk_{step}"
        assert metadata["calibration"]["l0_query"] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("activation", ["batchtopk", "topk", "relu"])
def test_published_form_equals_training_form_with_its_threshold(activation, tmp_path, text_dataset):
    runner = tiny_runner(
        tmp_path, text_dataset, sae={"activation": activation}, mask=NO_MAP, **NO_FILES
    )
    sae = TranscodersTrainingSAE(runner.cfg.sae)
    rows = training_rows(runner, n_rows=64)
    sae.attach(runner.layer.qk_weights, CONTEXT, rows.flatten(0, 1))
    if activation != "relu":
        report = sae.calibrate([rows.flatten(0, 1)])
        assert report["l0_query"] == pytest.approx(4, abs=0.01)
        assert report["l0_key"] == pytest.approx(4, abs=0.01)
        if activation == "topk":  # as trained: exactly k per token
            assert report["l0_query_before"] == report["l0_key_before"] == 4
        assert report["pattern_kl"] == pytest.approx(report["pattern_kl_before"], abs=0.2)
    published = sae.to_dictionary()
    assert_near(published.encode(rows), sae.eval().encode(rows), 1e-6)


@pytest.mark.parametrize("activation", ["batchtopk", "topk"])
def test_query_features_are_silent_at_position_0(activation, tmp_path, text_dataset):
    """They do not compete there, and by the end the published ones do not fire; key features do."""
    runner = tiny_runner(
        tmp_path,
        text_dataset,
        sae={"activation": activation, "decoder_bias": False},
        mask=NO_MAP,
        training_tokens=BATCH * 120,
    )
    x = training_rows(runner, n_rows=8)
    sae = TranscodersTrainingSAE(runner.cfg.sae)
    sae.attach(runner.layer.qk_weights, CONTEXT, x.flatten(0, 1))
    output = sae.training_forward_pass(step_input(x.flatten(0, 1)))
    acts = output.feature_acts.to_dense().unflatten(0, (-1, CONTEXT))
    query, key = acts.split([D_QUERY, D_KEY], dim=-1)
    assert not query[:, 0].any()
    assert key[:, 0].any()
    assert output.losses["first_position"] > 0
    l0 = 4 if activation == "batchtopk" else 4 * (CONTEXT - 1) / CONTEXT
    assert output.metrics["l0_query"] == pytest.approx(l0, abs=0.05)
    dictionary = runner.run()
    l0_by_position = (dictionary.encode_query(x) > 0).sum(dim=-1).float().mean(dim=0)
    # the feature that stands for the mean may stay
    assert l0_by_position[0] <= 2 < l0_by_position[1:].min()
    assert dictionary.encode_key(x)[:, 0].any()


def test_looking_leaves_the_threshold_alone(tmp_path, text_dataset):
    """In training mode too; only a training step moves it."""
    runner = tiny_runner(tmp_path, text_dataset, **NO_FILES)
    x = training_rows(runner, n_rows=8).flatten(0, 1)
    sae = TranscodersTrainingSAE(runner.cfg.sae).train()
    sae.attach(runner.layer.qk_weights, CONTEXT, x)
    first = sae.encode(x)
    assert sae.query_threshold == sae.key_threshold == 0
    assert torch.equal(sae.encode(x), first)
    sae.training_forward_pass(step_input(x))
    assert sae.query_threshold > 0
    assert sae.key_threshold > 0


# Resuming


@pytest.mark.parametrize("cached", [False, True], ids=["store", "cache"])
def test_resume_continues_to_the_same_weights(cached, tmp_path, text_dataset):
    def run(folder: Path, **changes):
        if cached:
            changes["input_cache_path"] = str(folder / "cache")
        return tiny_runner(folder, text_dataset, **changes).run()

    whole = run(tmp_path / "whole")
    interrupted = tmp_path / "interrupted"
    with pytest.raises(NonFiniteLossError):
        stop_at_step(lambda: run(interrupted), 25, TranscodersTrainingSAE)
    resumed = run(interrupted, resume_from_checkpoint=str(interrupted / "checkpoints"))
    assert_same_weights(resumed, whole)


def test_nan_activations_stop_training_and_keep_the_last_checkpoint(tmp_path, text_dataset):
    runner = tiny_runner(tmp_path, text_dataset, "gpt2")
    with pytest.raises(NonFiniteLossError, match=r"loss is nan at step 25 .*before the update"):
        stop_at_step(runner.run, 25, TranscodersTrainingSAE)
    checkpoints = list((tmp_path / "checkpoints" / "transcoders").glob("*/sae_weights.safetensors"))
    assert checkpoints
    assert not (tmp_path / "output").exists()


# The runner


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
            "fine_tune_lr needs batchtopk or topk",
        ),
        ({"from_pretrained_path": "nowhere"}, "There is no dictionary 'nowhere'"),
    ],
)
def test_bad_configs_are_refused_before_anything_is_written(
    changes, message, tmp_path, text_dataset
):
    with pytest.raises(ValueError, match=message):
        tiny_runner(tmp_path, text_dataset, "gpt2", **changes)
    assert not list(tmp_path.iterdir())


def test_short_dataset_is_refused(tmp_path):
    dataset = Dataset.from_dict({"text": ["short"]})
    with pytest.raises(ValueError, match="one batch of 8 rows of 23 tokens"):
        tiny_runner(tmp_path, dataset, "gpt2")
    assert not list(tmp_path.iterdir())


def test_the_order_of_arguments_is_that_of_saelens(tmp_path, text_dataset, recwarn):
    cfg = tiny_config(tmp_path)
    model = tiny_model("llama")
    runner = qk.BilinearQKTrainingRunner(cfg, text_dataset, model)
    assert not [w for w in recwarn if issubclass(w.category, DeprecationWarning)]
    with pytest.warns(DeprecationWarning, match="give override_model by name"):
        swapped = qk.BilinearQKTrainingRunner(cfg, model, text_dataset)
    for either in (runner, swapped):
        assert either.model is model
        assert either.dataset is text_dataset


@pytest.mark.parametrize("cached", [False, True], ids=["store", "cache"])
def test_each_step_sees_batches_of_its_own_size(cached, tmp_path, text_dataset, monkeypatch):
    shapes = {TranscodersTrainingSAE: [], MaskTrainingSAE: []}

    def record_shapes(sae_class: type) -> None:
        forward = sae_class.training_forward_pass

        def recording(sae, step_input):
            shapes[sae_class].append(step_input.sae_in.shape)
            return forward(sae, step_input)

        monkeypatch.setattr(sae_class, "training_forward_pass", recording)

    record_shapes(TranscodersTrainingSAE)
    record_shapes(MaskTrainingSAE)
    changes = {"mask": {"train_batch_size_tokens": BATCH // 2}}
    if cached:
        changes["input_cache_path"] = str(tmp_path / "cache")
    dictionary = tiny_runner(tmp_path, text_dataset, **changes).run()
    assert 0 < len(dictionary.feature_map) <= 400  # pruned to its size over its own steps
    assert shapes[TranscodersTrainingSAE] == [(BATCH, 20)] * 40
    assert shapes[MaskTrainingSAE] == [(BATCH // 2, 20)] * 24


def test_stock_runner_trains_our_architecture(text_dataset):
    examples = Path(__file__).parents[1] / "examples"
    example = runpy.run_path(str(examples / "train_with_stock_runner.py"))
    dictionary = example["train"](
        tiny_model("llama"),
        layer=1,
        dataset=text_dataset,
        context_size=CONTEXT,
        n_steps=20,
        d_features=D_QUERY,
    )
    assert dictionary.cfg.half_architecture == "jumprelu_transcoder"


def test_training_without_attach_says_what_to_do(tmp_path, text_dataset):
    runner = tiny_runner(tmp_path, text_dataset)
    stock = LanguageModelSAETrainingRunner(
        runner.cfg, override_dataset=text_dataset, override_model=runner.model
    )
    with pytest.raises(RuntimeError, match=r"call sae\.attach"):
        stock.run()


def test_one_side_through_active_entries_next_to_a_dense_one():
    """As penalised ReLU sides pass to few active features at different steps."""
    layer = AttentionLayer(tiny_model("llama"), 1)
    x = torch.randn(CONTEXT * 40, 20, generator=torch.Generator().manual_seed(0))
    cfg = qk.TranscodersTrainingConfig(
        d_in=20,
        d_query=D_QUERY,
        d_key=D_KEY,
        activation="relu",
        attention=layer.spec.to_dict(),
    )
    sae = TranscodersTrainingSAE(cfg)
    sae.attach(layer.qk_weights, CONTEXT, x)
    sae.query.b_enc.data -= 2.0
    sae.key.b_enc.data += 2.0
    output = sae.training_forward_pass(step_input(x, sparsity=1e-3))
    output.loss.backward()
    acts = output.feature_acts.to_dense()
    torch.testing.assert_close(acts, sae.encode(x))
    query_rates, key_rates = acts.bool().float().mean(dim=0).split([D_QUERY, D_KEY])
    # so that one side is sparse, the other dense
    assert 0 < query_rates.mean() < 0.5 < key_rates.mean()
    assert sae.query.W_enc.grad.any()
    assert sae.key.W_enc.grad.any()


# The input cache


def test_cache_of_other_inputs_is_refused(tmp_path, text_dataset):
    changes = {"input_cache_path": str(tmp_path / "cache"), **NO_FILES}
    tiny_runner(tmp_path, text_dataset, **changes).fill_input_cache()
    other = tiny_runner(tmp_path, text_dataset, seed=1, **changes)
    with pytest.raises(ValueError, match="caches other inputs"):
        other.fill_input_cache()


def test_inputs_computed_in_bfloat16_are_a_cache_of_their_own(tmp_path, text_dataset):
    def runner(
        name: str,
        autocast: bool,
    ) -> qk.BilinearQKTrainingRunner:
        changes = {"input_cache_path": str(tmp_path / name), "autocast_lm": autocast}
        return tiny_runner(tmp_path, text_dataset, **changes, **NO_FILES)

    exact = runner("exact", False).fill_input_cache().rows(slice(None))
    half = runner("half", True).fill_input_cache().rows(slice(None))
    difference = (half - exact).norm() / exact.norm()
    assert 1e-3 < difference < 0.03
    for name, autocast in (("exact", True), ("half", False)):
        with pytest.raises(ValueError, match=r"it has \{'autocast_lm'"):
            runner(name, autocast).fill_input_cache()


def test_cache_holds_the_models_inputs_and_resumes(tmp_path, text_dataset):
    def runner(n_rows: int) -> qk.BilinearQKTrainingRunner:
        changes = {
            "input_cache_path": str(tmp_path / "cache"),
            "input_cache_tokens": CONTEXT * n_rows,
        }
        return tiny_runner(tmp_path, text_dataset, **changes, **NO_FILES)

    assert runner(13).fill_input_cache().n_rows == 13
    whole = runner(31)
    cache = whole.fill_input_cache()
    assert cache.n_rows == 31
    tokens = torch.from_numpy(cache.tokens[:].copy()).long()
    expected = whole.layer.inputs(tokens)
    torch.testing.assert_close(cache.rows(slice(0, 31)), expected, rtol=1e-3, atol=2e-3)
    assert torch.equal(tokens, whole.store().get_batch_tokens(batch_size=31))
    batches = cache.batches(4, seed=3)
    tenth = [next(batches) for _ in range(10)][-1]
    assert torch.equal(tenth, next(cache.batches(4, seed=3, start_step=9)))
