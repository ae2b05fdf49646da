"""Both training steps end to end on tiny models: they learn, resume exactly, and refuse what cannot work."""

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sae_lens import LanguageModelSAETrainingRunner
from sae_lens.saes.sae import TrainStepInput
from tiny_models import tiny_model

import sae_lens_qk as qk
from sae_lens_qk.attention import attention_scores, log_pattern, pattern_from_scores, pattern_kl
from sae_lens_qk.feature_map import SparseFeatureMap
from sae_lens_qk.host import qk_weights
from sae_lens_qk.pair_scores import pair_kernel, with_constant
from sae_lens_qk.training.candidates import rank_pairs
from sae_lens_qk.training.losses import dead_feature_loss, pattern_losses, sqrt_penalty
from sae_lens_qk.training.transcoders import NonFiniteLossError, TranscodersTrainingSAE


def tiny_config(tmp_path: Path, **changes) -> qk.BilinearQKRunnerConfig:
    sae = qk.TranscodersTrainingConfig(d_in=1, d_query=29, d_key=31, k=4.0, **changes.pop("sae", {}))
    mask = qk.MaskStepConfig(
        training_tokens=23 * 8 * 12, n_pairs=400, n_candidates=1500, ranking_tokens=23 * 16, **changes.pop("mask", {})
    )
    values = dict(
        sae=sae, mask=mask, layer=1, model_name="tiny", context_size=23, train_batch_size_tokens=23 * 8,
        store_batch_size_prompts=8, n_batches_in_buffer=8, training_tokens=23 * 8 * 40, lr=3e-3, lr_warm_up_steps=0,
        dead_feature_window=10, n_checkpoints=3, checkpoint_path=str(tmp_path / "checkpoints"),
        output_path=str(tmp_path / "output"),
    )  # fmt: skip
    return qk.BilinearQKRunnerConfig(**{**values, **changes})


def layer_inputs(model, layer: int, tokens: torch.Tensor) -> torch.Tensor:
    seen = {}
    name = f"blocks.{layer}.attn.hook_in"
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[(name, lambda value, hook: seen.update(x=value))], prepend_bos=False)
    return seen["x"]


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama"])
def test_both_steps_learn_the_pattern(kind, tmp_path, text_dataset):
    model = tiny_model(kind)
    dictionary = qk.BilinearQKTrainingRunner(tiny_config(tmp_path), model, text_dataset).run()
    assert 0 < len(dictionary.feature_map) <= 400
    x = layer_inputs(model, 1, model.tokenizer(text_dataset[5]["text"], return_tensors="pt").input_ids[:, :23])
    weights = qk_weights(model, 1)
    true = log_pattern(attention_scores(weights.queries(x), weights.keys(x), dictionary.spec))
    uniform = pattern_kl(true, log_pattern(torch.zeros_like(true))).mean()
    for source, share in (("transcoders", 0.6), ("feature_map", 0.8)):
        assert pattern_kl(true, dictionary.pattern(x, source).log()).mean() < share * uniform
    reloaded = qk.BilinearQKDictionary.load_from_disk(tmp_path / "output")
    assert torch.equal(reloaded.pattern(x, "feature_map"), dictionary.pattern(x, "feature_map"))
    assert json.loads((tmp_path / "output" / "cfg.json").read_text())["architecture"] == "bilinear_qk"


@pytest.mark.parametrize("activation", ["batchtopk", "topk", "relu"])
def test_published_form_equals_training_form_with_its_threshold(activation, tmp_path, text_dataset):
    cfg = tiny_config(tmp_path, sae={"activation": activation}, mask={}, output_path=None, checkpoint_path=None)
    cfg.mask.training_tokens = 0
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


def _stop_at_step(run, step: int, folder: Path):
    forward = TranscodersTrainingSAE.training_forward_pass

    def poisoned(self, step_input: TrainStepInput):
        if step_input.n_training_steps == step:
            step_input = replace(step_input, sae_in=step_input.sae_in * torch.nan)
        return forward(self, step_input)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TranscodersTrainingSAE, "training_forward_pass", poisoned)
        run(folder)


def test_nan_activations_stop_training_and_keep_the_last_checkpoint(tmp_path, text_dataset):
    runner = qk.BilinearQKTrainingRunner(tiny_config(tmp_path), tiny_model("gpt2"), text_dataset)
    with pytest.raises(NonFiniteLossError, match=r"loss is nan at step 25.*stopped before the update"):
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
    ],
)
def test_bad_configs_are_refused_before_anything_is_written(changes, message, tmp_path, text_dataset):
    with pytest.raises(ValueError, match=message):
        qk.BilinearQKTrainingRunner(tiny_config(tmp_path, **changes), tiny_model("gpt2"), text_dataset)
    assert not list(tmp_path.iterdir())


def test_short_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="shorter than one batch of 8 rows of 23 tokens"):
        qk.BilinearQKTrainingRunner(tiny_config(tmp_path), tiny_model("gpt2"), Dataset.from_dict({"text": ["short"]}))
    assert not list(tmp_path.iterdir())


def test_stock_runner_trains_our_architecture(text_dataset):
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "train_with_stock_runner.py"))
    dictionary = example["train"](
        tiny_model("llama"), layer=1, dataset=text_dataset, context_size=23, n_steps=20, d_features=29
    )
    assert dictionary.cfg.half_architecture == "jumprelu_transcoder"


def test_training_without_attach_says_what_to_do(tmp_path, text_dataset):
    cfg = tiny_config(tmp_path)
    runner = qk.BilinearQKTrainingRunner(cfg, tiny_model("llama"), text_dataset)
    stock = LanguageModelSAETrainingRunner(runner.cfg, override_dataset=text_dataset, override_model=runner.model)
    with pytest.raises(RuntimeError, match=r"call sae.attach"):
        stock.run()


def test_cache_of_other_inputs_is_refused(tmp_path, text_dataset):
    cache = str(tmp_path / "cache")
    run = {"input_cache_path": cache, "output_path": None, "checkpoint_path": None}
    small = {"mask": {}, **run}
    qk.BilinearQKTrainingRunner(tiny_config(tmp_path, **small), tiny_model("llama"), text_dataset)._fill_cache()
    other = qk.BilinearQKTrainingRunner(
        tiny_config(
            tmp_path,
            **small,
        ),
        tiny_model("llama", seed=1),
        text_dataset,
    )
    with pytest.raises(ValueError, match="caches other inputs"):
        other._fill_cache()


def test_cache_holds_the_models_inputs_and_resumes(tmp_path, text_dataset):
    model = tiny_model("llama")
    changes = {"input_cache_path": str(tmp_path / "cache"), "output_path": None, "checkpoint_path": None}
    part = qk.BilinearQKTrainingRunner(tiny_config(tmp_path, **changes, input_cache_tokens=23 * 13), model, text_dataset)
    assert part._fill_cache().n_rows == 13
    whole = qk.BilinearQKTrainingRunner(tiny_config(tmp_path, **changes, input_cache_tokens=23 * 31), model, text_dataset)
    cache = whole._fill_cache()
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
    spec = qk.AttentionSpec(n_heads=4, n_kv_heads=2, d_head=6, d_model=5, scale=0.4, rotary_inv_freq=(1.0, 0.3))
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
                        total += float(P[row, head, i, j] * (P[row, head, i, j] / other[row, head, i, j]).log())
        assert float(losses[name]) == pytest.approx(total / (2 * 4 * 7), rel=1e-10)

    acts, W_dec = torch.rand(3, 5, generator=generator), torch.randn(5, 2, generator=generator)
    by_hand = sum((float(acts[t, f]) * float(W_dec[f].norm()) + 1e-7) ** 0.5 for t in range(3) for f in range(5)) / 3
    assert float(sqrt_penalty(acts, W_dec)) == pytest.approx(by_hand, rel=1e-5)


def test_dead_feature_loss_wakes_only_dead_features():
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(11, 5, generator=generator)
    W_dec = torch.randn(7, 5, generator=generator, requires_grad=True)
    dead = torch.tensor([True, False, False, True, False, False, True])
    loss = dead_feature_loss(residual, torch.randn(11, 7, generator=generator), W_dec, dead, k=2)
    loss.backward()
    assert W_dec.grad is not None
    assert (W_dec.grad[~dead] == 0).all()
    assert (W_dec.grad[dead] != 0).any()


def test_importance_against_a_loop_and_as_a_prediction(tmp_path, text_dataset):
    model = tiny_model("llama")
    cfg = tiny_config(tmp_path, output_path=None, checkpoint_path=None)
    cfg.mask.training_tokens = 0
    runner = qk.BilinearQKTrainingRunner(cfg, model, text_dataset)
    d, weights = runner.run(), qk_weights(model, 1)
    x = torch.cat(list(runner._some_rows(None, 8)))[:2]
    importance = pair_importance(d, weights, [x])

    P = pattern_from_scores(attention_scores(weights.queries(x), weights.keys(x), d.spec)).double()
    query_acts, key_acts = with_constant(d.encode_query(x)).double(), with_constant(d.encode_key(x)).double()
    candidates = choose_candidates(importance, 12)
    kernel = pair_kernel(candidates.indices, d.decoders, d.spec, torch.arange(23)).double()
    for (a, b, h), M in zip(candidates.indices.tolist(), kernel, strict=True):
        expected = 0.0
        for row in range(2):
            for i in range(23):
                c = torch.stack([query_acts[row, i, a] * key_acts[row, j, b] * M[i - j] for j in range(i + 1)])
                p = P[row, h, i, : i + 1]
                expected += 0.5 * float(((p * c**2).sum() - (p * c).sum() ** 2).detach())
        assert float(importance[h, a, b]) == pytest.approx(expected, rel=1e-3)
    assert importance[:, -1, -1].abs().max() == 0

    true = log_pattern(attention_scores(weights.queries(x), weights.keys(x), d.spec))
    for triple in candidates.indices[:3].tolist():  # dropping a weak pair from the true scores costs what was predicted
        small = SparseFeatureMap([triple], torch.ones(1), 29, 31, 4)
        step = 0.05  # in the range where the leading order holds
        change = small.scores(d.encode_query(x), d.encode_key(x), d.decoders, d.spec, include_constant=False) * step
        cost = pattern_kl(true, log_pattern(attention_scores(weights.queries(x), weights.keys(x), d.spec) - change)).sum()
        assert float(cost) == pytest.approx(step**2 * float(importance[triple[2], triple[0], triple[1]]), rel=0.1, abs=2e-6)
