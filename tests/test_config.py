"""Configs: read and written without loss, nothing unknown accepted, nothing changed by training."""

import copy
import json

import pytest
import yaml
from sae_lens import LoggingConfig
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from tiny_models import tiny_model

import sae_lens_qk as qk
from sae_lens_qk.training.mask import MaskTrainingSAE
from sae_lens_qk.training.transcoders import TranscodersTrainingSAE

CHANGED = {
    "model_name": "some/model",
    "layer": 3,
    "context_size": 32,
    "train_batch_size_tokens": 64,
    "training_tokens": 6400,
    "n_batches_in_buffer": 4,
    "lr": 1e-5,
    "seed": 7,
    "checkpoint_path": None,
    "output_path": None,
    "input_cache_path": "$CACHE",
    "input_cache_tokens": 6400,
    "dataset_path": "$TEXTS/train.parquet",
    "from_pretrained_path": "some/dictionary",
}


def changed_config() -> qk.BilinearQKRunnerConfig:
    return qk.BilinearQKRunnerConfig(
        **CHANGED,
        sae=qk.TranscodersTrainingConfig(
            d_in=5, d_query=29, d_key=31, k=4.5, kl_full_coefficient=2.0, dead_k=3
        ),
        mask=qk.MaskStepConfig(
            training_tokens=640,
            train_batch_size_tokens=32,
            n_pairs=11,
            n_candidates=13,
            sparsity_coefficient=1e-7,
            fine_tune_lr=3e-4,
            unmasked_coefficient=0.5,
            compact=True,
            polish=False,
        ),
        logger=LoggingConfig(
            log_to_wandb=False,
            wandb_project="mine",
            run_name="run",
        ),
    )


@pytest.mark.parametrize("suffix", ["json", "yaml"])
@pytest.mark.parametrize(
    "make", [qk.BilinearQKRunnerConfig, changed_config], ids=["default", "changed"]
)
def test_round_trip(make, suffix, tmp_path):
    cfg = make()
    path = tmp_path / f"config.{suffix}"
    cfg.save(path)
    reread = qk.BilinearQKRunnerConfig.from_file(path)
    assert reread == cfg
    assert reread.to_dict() == cfg.to_dict()
    assert reread.sae == cfg.sae
    assert reread.mask == cfg.mask
    assert reread.logger == cfg.logger
    parse = json.loads if suffix == "json" else yaml.safe_load
    content = parse(path.read_text())
    assert content["mask"]["n_pairs"] == cfg.mask.n_pairs
    assert content["sae"]["architecture"] == "bilinear_qk_transcoders"


def test_changed_values_are_those_that_are_read(tmp_path):
    path = tmp_path / "config.json"
    changed_config().save(path)
    cfg = qk.BilinearQKRunnerConfig.from_file(path)
    assert cfg != qk.BilinearQKRunnerConfig()
    assert {name: getattr(cfg, name) for name in CHANGED} == CHANGED
    assert (cfg.sae.d_query, cfg.sae.d_key, cfg.sae.d_sae, cfg.sae.k) == (29, 31, 60, 4.5)


def test_to_dict_is_json():
    values = json.loads(json.dumps(changed_config().to_dict()))
    assert {name: values[name] for name in CHANGED} == CHANGED
    assert values["logger"]["wandb_project"] == "mine"
    assert qk.BilinearQKRunnerConfig.from_dict(values) == changed_config()


def test_a_partial_file_leaves_the_defaults(tmp_path):
    (tmp_path / "config.yaml").write_text("layer: 5\nsae:\n  k: 8\nmask: {n_pairs: 10}\n")
    cfg = qk.BilinearQKRunnerConfig.from_file(tmp_path / "config.yaml")
    assert (cfg.layer, cfg.sae.k, cfg.mask.n_pairs) == (5, 8, 10)
    assert cfg.sae.d_query == qk.TranscodersTrainingConfig(d_in=1).d_query
    assert cfg.mask.n_candidates == qk.MaskStepConfig().n_candidates
    assert not cfg.logger.log_to_wandb


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"trainig_tokens": 1},
            "^Unknown config key trainig_tokens. Close to it: .*training_tokens",
        ),
        ({"zzz": 1}, "^Unknown config key zzz.$"),
        (
            {"sae": {"activatoin": "topk"}},
            "^Unknown config key sae.activatoin. Close to it: activation.$",
        ),
        ({"mask": {"n_pair": 1}}, "^Unknown config key mask.n_pair. Close to it: n_pairs.$"),
        (
            {"logger": {"wandb_proj": "p"}},
            "^Unknown config key logger.wandb_proj. Close to it: .*wandb_project",
        ),
        (
            {"sae": {"architecture": "standard"}},
            "must be 'bilinear_qk_transcoders', got",
        ),
        ({"mask": 3}, "^mask must be a mapping of config fields, got 3"),
        ({"lr": "1e-3"}, "^lr must be float, got the text '1e-3'"),
        ({"mask": {"lr": "1e-2"}}, "^mask.lr must be float"),
        ({"mask": {"fine_tune_lr": "small"}}, "^mask.fine_tune_lr must be float"),
        (
            {"mask": {"fine_tune": True}},
            "^Unknown config key mask.fine_tune. Close to it: fine_tune_lr.$",
        ),
        ({"sae": {"dead_k": "many"}}, "^sae.dead_k must be int"),
    ],
)
def test_wrong_keys_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        qk.BilinearQKRunnerConfig.from_dict(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- layer\n", "must hold a mapping .* got list"),
        ("layer: [1,\n", "is neither YAML nor JSON"),
    ],
)
def test_wrong_files_are_refused(text, message, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        qk.BilinearQKRunnerConfig.from_file(path)
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"There is no config file .*other.yaml"):
        qk.BilinearQKRunnerConfig.from_file(tmp_path / "other.yaml")


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "1E-3", "+1e-03", "0.001"])
def test_numbers_in_scientific_notation_are_numbers(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"lr: {text}\nmask: {{lr: {text}}}\nmodel_name: 1e-3b\n")
    cfg = qk.BilinearQKRunnerConfig.from_file(path)
    assert (cfg.lr, cfg.mask.lr, cfg.model_name) == (1e-3, 1e-3, "1e-3b")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: qk.MaskStepConfig(n_pairs=10, n_candidates=9),
            r"at least mask\.n_pairs, got 9 and 10",
        ),
        (lambda: qk.MaskStepConfig(prune_until=1.5), r"prune_until must lie in \[0, 1\], got 1.5"),
        (
            lambda: qk.MaskStepConfig(n_pairs=0, n_candidates=0),
            "mask.n_pairs must be at least 1, got 0",
        ),
        (
            lambda: qk.MaskStepConfig(fine_tune_lr=-1e-3),
            "fine_tune_lr must not be negative",
        ),
        (
            lambda: qk.MaskStepConfig(fine_tune_lr=1e-3, lr=0.0),
            r"mask\.lr must be positive .*, got 0\.0",
        ),
        (
            lambda: qk.MaskTrainingConfig(
                d_in=4,
                mask=qk.MaskStepConfig(fine_tune_lr=1e-3),
                half_architecture="transcoder",
            ),
            "Only JumpReLU transcoders can be tuned",
        ),
        (
            lambda: qk.TranscodersTrainingConfig(d_in=4, d_query=0),
            "d_query and d_key must be positive|k must lie",
        ),
        (
            lambda: qk.TranscodersTrainingConfig(
                d_in=4,
                d_query=8,
                k=9,
            ),
            r"k must lie in .*, got 9",
        ),
        (lambda: qk.TranscodersTrainingConfig(d_in=4, k=0), "k must lie in"),
        (
            lambda: qk.TranscodersTrainingConfig(
                d_in=4,
                k=2.5,
                activation="topk",
            ),
            "topk needs a whole number k, got 2.5",
        ),
        (
            lambda: qk.TranscodersTrainingConfig(d_in=4, activation="gelu"),
            "batchtopk, topk or relu, got 'gelu'",
        ),
        (
            lambda: qk.TranscodersTrainingConfig(d_in=4, initialization="zeros"),
            "scores, data or kaiming, got 'zeros'",
        ),
        (
            lambda: qk.BilinearQKConfig(d_in=4, apply_b_dec_to_input=True),
            "apply_b_dec_to_input must be False",
        ),
        (
            lambda: qk.BilinearQKConfig(d_in=4, normalize_activations="layer_norm"),
            "normalize_activations must be 'none'",
        ),
        (
            lambda: qk.BilinearQKConfig(
                d_in=4, attention=qk.AttentionSpec(2, 1, 3, 5, 1.0).to_dict()
            ),
            "d_in must be the attention's d_model 5, got 4",
        ),
        (
            lambda: qk.BilinearQKRunnerConfig(mask=qk.MaskStepConfig(training_tokens=100)),
            "be 0 or cover one batch of 2048, got 100",
        ),
        (
            lambda: qk.BilinearQKRunnerConfig(mask=qk.MaskStepConfig(train_batch_size_tokens=500)),
            "multiple of context_size, got 500 and 256",
        ),
        (
            lambda: qk.BilinearQKRunnerConfig(mask=qk.MaskStepConfig(train_batch_size_tokens=0)),
            "multiple of context_size, got 0 and 256",
        ),
        (
            lambda: qk.BilinearQKRunnerConfig(logger=LoggingConfig(log_to_wandb=True)),
            "log_to_wandb must be False",
        ),
        (
            lambda: qk.BilinearQKRunnerConfig(n_batches_in_buffer=7),
            r"must hold one batch of 2048 tokens, got 7 \* 256",
        ),
        (lambda: qk.BilinearQKRunnerConfig(layer=-1), "layer must not be negative, got -1"),
    ],
)
def test_wrong_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_architectures_are_registered():
    assert SAE_CLASS_REGISTRY["bilinear_qk"] == (qk.BilinearQKDictionary, qk.BilinearQKConfig)
    assert SAE_TRAINING_CLASS_REGISTRY["bilinear_qk_transcoders"] == (
        TranscodersTrainingSAE,
        qk.TranscodersTrainingConfig,
    )
    assert SAE_TRAINING_CLASS_REGISTRY["bilinear_qk_mask"] == (
        MaskTrainingSAE,
        qk.MaskTrainingConfig,
    )


@pytest.mark.parametrize("architecture", ["bilinear_qk_transcoders", "bilinear_qk_mask"])
def test_stock_command_line_builds_our_configs(architecture):
    config_class = SAE_TRAINING_CLASS_REGISTRY[architecture][1]
    cfg = config_class(d_in=512, d_sae=1024)
    assert (cfg.d_in, cfg.d_sae) == (512, cfg.d_query + cfg.d_key)
    assert cfg.architecture() == architecture
    options = {
        "architecture": architecture,
        "d_in": "20",
        "d_query": "29",
        "n_batches_in_buffer": "16",
        "lr": "0.5",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    parsed = _parse_cfg_args(arguments)
    sae = parsed.sae
    assert type(sae) is config_class
    assert (sae.d_in, sae.d_query, sae.d_sae) == (20, 29, 29 + sae.d_key)
    assert parsed.lr == 0.5  # the trainer's, not that of the mask block
    assert sae.get_inference_config_class() is qk.BilinearQKConfig


def test_step_2_keeps_its_settings_in_json():
    mask = qk.MaskStepConfig(
        lr=0.5,
        fine_tune_lr=0.1,
        n_pairs=7,
        output_coefficient=2.0,
    )
    cfg = qk.MaskTrainingConfig(
        d_in=4,
        n_pairs=11,
        prune_steps=3,
        k_query=1.5,
        mask=mask,
    )
    values = json.loads(json.dumps(cfg.to_dict()))
    assert values["mask"]["n_pairs"] == 7
    assert values["metadata"]["training_architecture_details"]["mask"] == values["mask"]
    reread = qk.MaskTrainingConfig.from_dict(values)
    assert reread.mask == mask
    assert (reread.n_pairs, reread.prune_steps, reread.k_query) == (11, 3, 1.5)


def test_training_leaves_the_config_as_it_is(tmp_path, text_dataset):
    batch = 23 * 8
    cfg = qk.BilinearQKRunnerConfig(
        model_name="tiny",
        layer=1,
        context_size=23,
        train_batch_size_tokens=batch,
        training_tokens=batch * 4,
        n_batches_in_buffer=8,
        n_checkpoints=1,
        lr_warm_up_steps=0,
        checkpoint_path=str(tmp_path / "checkpoints"),
        output_path=str(tmp_path / "output"),
        sae=qk.TranscodersTrainingConfig(
            d_in=1,
            d_query=29,
            d_key=31,
            k=4.0,
        ),
        mask=qk.MaskStepConfig(
            training_tokens=batch * 3, n_pairs=50, n_candidates=90, ranking_tokens=batch
        ),
    )
    before = copy.deepcopy(cfg)
    dictionary = qk.BilinearQKTrainingRunner(cfg, tiny_model("llama"), text_dataset).run()
    assert cfg == before
    assert cfg.to_dict() == before.to_dict()
    assert dictionary.cfg.d_in == 20  # what the run filled in went into its own copy
    assert (
        qk.BilinearQKRunnerConfig.from_file(tmp_path / "output" / "runner_cfg.json").mask
        == before.mask
    )


def test_mask_step_takes_the_settings_of_step_2():
    cfg = changed_config()
    cfg.mask.lr = 0.5
    cfg.mask.fine_tune_lr = 0.0
    cfg.mask.n_checkpoints = 2
    step = cfg.mask_step()
    assert (step.training_tokens, step.n_checkpoints) == (640, 2)
    assert (step.lr, step.lr_warm_up_steps) == (0.5, 0)
    assert step.train_batch_size_tokens == cfg.mask.train_batch_size_tokens
    assert step.train_batch_size_tokens != cfg.train_batch_size_tokens
    cfg.mask.train_batch_size_tokens = None
    assert cfg.mask_step().train_batch_size_tokens == cfg.train_batch_size_tokens
    assert (cfg.training_tokens, cfg.lr) == (6400, 1e-5)


def test_mask_step_of_a_tuning_run_takes_the_learning_rate_of_the_transcoders():
    """SAETrainer has one; the mask's is a multiple of it."""
    cfg = changed_config()
    assert (cfg.mask_step().lr, cfg.mask.lr) == (3e-4, 1e-2)
    assert cfg.mask.fine_tune
    assert cfg.mask.mask_speed == pytest.approx(1e-2 / 3e-4)
    cfg.mask.fine_tune_lr = 0.0
    assert cfg.mask_step().lr == 1e-2
    assert not cfg.mask.fine_tune
    assert cfg.mask.mask_speed == 1.0


def test_original_sizes_are_those_before_compaction():
    cfg = qk.BilinearQKConfig(
        d_in=4,
        d_query=29,
        d_key=31,
    )
    assert cfg.original_sizes == (29, 31)
    compacted = qk.BilinearQKConfig(
        d_in=4, d_query=29, d_key=31, d_query_before=37, d_key_before=41
    )
    assert compacted.original_sizes == (37, 41)
    assert qk.BilinearQKConfig.from_dict(
        json.loads(json.dumps(compacted.to_dict()))
    ).original_sizes == (37, 41)
