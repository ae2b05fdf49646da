"""Recipes: the command line runs every one, on the real architecture with random weights."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from datasets import Dataset
from tiny_models import tiny_tokenizer
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import sae_lens_qk as qk
from sae_lens_qk.__main__ import main
from sae_lens_qk.host.models import shipped_folder
from sae_lens_qk.pretrained.registry import registry
from sae_lens_qk.training.mask import MaskTrainingSAE
from sae_lens_qk.training.transcoders import TranscodersTrainingSAE

RECIPES = sorted(path.stem for path in (shipped_folder() / "recipes").iterdir())
AUTHORS = "smollm2-135m-instruct-L23-authors"
STEPS = 2
L0 = 16


class Attention(NamedTuple):
    heads: int
    kv_heads: int
    d_head: int
    d_model: int
    rotary_base: float | None


ATTENTION = {
    "gpt2": Attention(12, 12, 64, 768, None),
    "smollm2": Attention(9, 3, 64, 576, 100_000.0),
}


def family(recipe: str) -> str:
    return recipe.split("-")[0]


def recipe_path(recipe: str) -> Path:
    return shipped_folder() / "recipes" / f"{recipe}.yaml"


def recipe_options(recipe: str) -> dict[str, Any]:
    return flat_options(yaml.safe_load(recipe_path(recipe).read_text()))


def flat_options(config: dict[str, Any]) -> dict[str, Any]:
    """Values of a config by option of the command line."""
    options = {}
    for name, value in config.items():
        if name in ("sae", "mask", "card"):
            options |= {f"{name}.{key}": entry for key, entry in value.items()}
        else:
            options[name] = value
    return options


def random_model(
    recipe: str,
    layer: int,
) -> TransformerBridge:
    """The recipe's model at its real widths, cut above the layer.

    No layer reads a later one; with one more than it needs the bridge stops there instead of
    running the unembedding.
    """
    n_layers = layer + 2
    if family(recipe) == "gpt2":
        config: Any = GPT2Config(n_layer=n_layers)
    else:
        config = LlamaConfig(
            hidden_size=576,
            num_hidden_layers=n_layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=64,
            intermediate_size=1536,
            vocab_size=49152,
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        )
    model.config.architectures = [type(model).__name__]  # the bridge reads it
    bridge = TransformerBridge.boot_transformers(
        "tiny", hf_model=model.eval(), tokenizer=tiny_tokenizer(), device="cpu"
    )
    return bridge.requires_grad_(False).eval()


class Recorder:
    """What passes the training SAEs of both steps: weights before the first update, every loss."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.start: dict[type, dict[str, Tensor]] = {}
        self.losses: dict[type, list[dict[str, float]]] = {}
        for sae_class in (TranscodersTrainingSAE, MaskTrainingSAE):
            monkeypatch.setattr(sae_class, "training_forward_pass", self.recorded(sae_class))

    def recorded(self, sae_class):
        forward = sae_class.training_forward_pass

        def recorded_forward(sae, step_input):
            if sae_class not in self.start:
                weights = sae.state_dict()
                self.start[sae_class] = {name: tensor.clone() for name, tensor in weights.items()}
            output = forward(sae, step_input)
            losses = {name: loss.item() for name, loss in output.losses.items()}
            self.losses.setdefault(sae_class, []).append(losses)
            return output

        return recorded_forward


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    return Recorder(monkeypatch)


@pytest.fixture
def sparse_relu(monkeypatch):
    """ReLU transcoders that start with the L0 training ends with.

    At random a third of the features fire, and their pairs would take hours to rank.
    """
    attach = TranscodersTrainingSAE.attach

    def attach_sparse(sae, weights, context_size, first_batch=None):
        attach(sae, weights, context_size, first_batch)
        if sae.cfg.activation != "relu":
            return
        for half in (sae.query, sae.key):
            hidden = first_batch[:1000] @ half.W_enc.detach()
            share = L0 / hidden.shape[1]
            half.b_enc.data.copy_(-hidden.quantile(1 - share, dim=0))

    monkeypatch.setattr(TranscodersTrainingSAE, "attach", attach_sparse)


CHANGED = {
    "training_tokens",
    "mask.training_tokens",
    "mask.ranking_tokens",
    "dataset_path",
    "checkpoint_path",
    "output_path",
    "input_cache_path",
    "input_cache_tokens",
    "context_size",
    "train_batch_size_tokens",
}
"""All that a dry run may change."""


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


SHORT_ROWS = {"context_size": 16, "train_batch_size_tokens": 8 * 16}
"""For speed.

Without a cache each row is computed some ten times: checks, initialisation, ranking, training.
"""
CACHE = {"input_cache_path": "cache", "input_cache_tokens": STEPS * 2048}


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("gpt2-small-L2", SHORT_ROWS),  # from a stream without a cache, as the recipe says
        slow("gpt2-small-L6", CACHE),
        slow("gpt2-small-L10", CACHE),
        slow("gpt2-small-L10-batchtopk", CACHE),
        ("smollm2-135m-instruct-L1", SHORT_ROWS | {"input_cache_path": "cache"}),
        slow("smollm2-135m-instruct-L17", CACHE),
        slow("smollm2-135m-instruct-L23", CACHE),
    ],
)
def test_both_steps_run(recipe, changes, recorder, sparse_relu, tmp_path, monkeypatch):
    cfg = qk.BilinearQKRunnerConfig.from_file(recipe_path(recipe))
    d = dry_run(recipe, changes, tmp_path, monkeypatch)
    check_dictionary(d, cfg, recipe)

    assert len(d.feature_map) == cfg.mask.n_pairs
    assert d.cfg.original_sizes == (2400, 2400)
    assert cfg.sae.d_query == cfg.sae.d_key == 2400
    is_compact = d.cfg.d_query < 2400 and d.cfg.d_key < 2400
    assert is_compact == cfg.mask.compact
    check_losses(recorder, TranscodersTrainingSAE, {"kl_full", "kl_query", "kl_key"})
    check_losses(recorder, MaskTrainingSAE, {"kl"})

    transcoders_path = tmp_path / "checkpoints" / "transcoders_final"
    transcoders = qk.BilinearQKDictionary.load_from_disk(transcoders_path)
    check_updates(recorder.start[TranscodersTrainingSAE], transcoders.state_dict())
    mask_start = recorder.start[MaskTrainingSAE]
    assert mask_start["scaled_mask"].unique().numel() == 1
    assert d.feature_map.weights.unique().numel() > 1
    W_enc_before = mask_start["dictionary.query.W_enc"]
    is_tuned = not torch.equal(W_enc_before, d.state_dict()["query.W_enc"])
    assert is_tuned == (cfg.mask.fine_tune_lr > 0)


@pytest.mark.slow
def test_the_authors_recipe_runs(recorder, tmp_path, monkeypatch):
    """Step 1 alone, from their own initialisation."""
    cfg = qk.BilinearQKRunnerConfig.from_file(recipe_path(AUTHORS))
    d = dry_run(AUTHORS, CACHE, tmp_path, monkeypatch)
    check_dictionary(d, cfg, AUTHORS)
    assert not d.has_feature_map
    loss_names = {"kl_full", "kl_query", "kl_key", "sparsity"}
    check_losses(recorder, TranscodersTrainingSAE, loss_names)
    assert MaskTrainingSAE not in recorder.losses
    check_updates(recorder.start[TranscodersTrainingSAE], d.state_dict())


def dry_run(
    recipe: str, changes: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> qk.BilinearQKDictionary:
    """`python -m sae_lens_qk train --config <recipe>` for two steps per stage on random tokens.

    Model and text are put where the recipe looks for them; token counts and paths are changed, and
    `changes`. The warm-up stays, so the weights move little, and what fires at the start fires at
    the end.
    """
    cfg = qk.BilinearQKRunnerConfig.from_file(recipe_path(recipe))
    model = random_model(recipe, cfg.layer)
    monkeypatch.setattr("sae_lens_qk.training.runner.load_model", lambda name, device: model)
    context_size = changes.get("context_size", cfg.context_size)
    batch_tokens = changes.get("train_batch_size_tokens", cfg.train_batch_size_tokens)
    n_rows = max(STEPS * batch_tokens, changes.get("input_cache_tokens", 0)) // context_size
    # there are no more rows
    monkeypatch.setattr("sae_lens_qk.training.runner._CALIBRATION_ROWS", n_rows)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.cfg.d_vocab, (n_rows, context_size), generator=generator)
    dataset = Dataset.from_dict({"tokens": tokens.tolist()})
    dataset.to_parquet(str(folder / "train.parquet"))
    options = {
        "training_tokens": STEPS * batch_tokens,
        "checkpoint_path": folder / "checkpoints",
        "output_path": folder / "output",
        **changes,
    }
    if cfg.mask.training_tokens:
        options["mask.training_tokens"] = STEPS * batch_tokens
        options["mask.ranking_tokens"] = 2 * context_size
    if cfg.dataset_path.startswith("$"):
        monkeypatch.setenv("QK_CORPUS", str(folder))
    else:
        options["dataset_path"] = folder  # the Hub's name of the text
    monkeypatch.chdir(folder)
    arguments = ["--debug", "train", "--config", recipe]
    for name, value in options.items():
        arguments += [f"--{name}", str(value)]
    assert main(arguments) == 0
    return qk.BilinearQKDictionary.from_pretrained(str(folder / "output"), verify="strict")


def check_dictionary(
    d: qk.BilinearQKDictionary, cfg: qk.BilinearQKRunnerConfig, recipe: str
) -> None:
    """Layer, hook and sizes are the recipe's, and so are the settings saved with it."""
    assert d.cfg.model_name == cfg.model_name
    assert d.cfg.layer == cfg.layer
    assert d.cfg.hook_name == f"blocks.{cfg.layer}.attn.hook_in"
    is_relu = cfg.sae.activation == "relu"
    assert d.cfg.half_architecture == ("transcoder" if is_relu else "jumprelu_transcoder")
    attention = ATTENTION[family(recipe)]
    assert d.spec.n_heads == attention.heads
    assert d.spec.n_kv_heads == attention.kv_heads
    assert d.spec.d_head == attention.d_head
    assert d.spec.d_model == attention.d_model
    base = attention.rotary_base
    inv_freq = [base ** (-2 * i / 64) for i in range(32)] if base else []
    assert d.spec.rotary_inv_freq == pytest.approx(inv_freq)
    for tensor in d.state_dict().values():
        assert tensor.isfinite().all()
    saved = flat_options(d.runner_cfg)
    for name, value in recipe_options(recipe).items():
        assert saved[name] == value or name in CHANGED


def check_losses(
    recorder: Recorder,
    sae_class: type,
    names: set[str],
) -> None:
    assert len(recorder.losses[sae_class]) == STEPS
    for losses in recorder.losses[sae_class]:
        assert names <= set(losses)
        assert torch.tensor(list(losses.values())).isfinite().all()


def check_updates(
    start: dict[str, Tensor],
    end: dict[str, Tensor],
) -> None:
    for name in ("query.W_enc", "query.W_dec", "key.W_enc", "key.W_dec"):
        assert start[name].shape == end[name].shape
        assert not torch.equal(start[name], end[name]), name


def test_every_dictionary_has_a_recipe():
    assert set(RECIPES) == {*registry(), AUTHORS}
    for name, entry in registry().items():
        assert entry.recipe == recipe_path(name)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_of_its_own_dictionary(recipe):
    cfg = qk.BilinearQKRunnerConfig.from_file(recipe_path(recipe))
    dictionary = recipe.removesuffix("-authors").removesuffix("-batchtopk")
    model, layer = dictionary.rsplit("-L", 1)
    model = {"smollm2-135m-instruct": "smollm2-135m-instruct-q4_1"}.get(model, model)
    assert cfg.model_name == model
    assert cfg.layer == int(layer)
    assert cfg.output_path == f"output/{recipe}"
    assert cfg.checkpoint_path == f"checkpoints/{recipe}"
    # shared by recipes of one layer, and by no others
    assert cfg.input_cache_path in (None, f"cache/{dictionary}")
    assert cfg.from_pretrained_path is None
    assert cfg.resume_from_checkpoint is None


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_on_any_machine(recipe):
    text = recipe_path(recipe).read_text()
    assert not re.search(r"(^|[\s'\"=:\[])(/|~|[A-Z]:\\)\w", text, re.MULTILINE)
    assert set(re.findall(r"recipes/([\w-]+)\.yaml", text)) <= {recipe}
    assert set(re.findall(r"\$\w+", text)) <= {"$QK_CORPUS"}
    assert "device" not in yaml.safe_load(text)


POST_RECIPES = ["gpt2-small-L2", "gpt2-small-L6", "gpt2-small-L10"]
"""At the settings of the post."""
SMOLLM2_SETTINGS = {
    "lr",
    "sae.activation",
    "sae.k",
    "sae.decoder_bias",
    "sae.kl_query_coefficient",
    "sae.kl_key_coefficient",
    "mask.lr",
    "mask.fine_tune_lr",
    "mask.sparsity_coefficient",
    "mask.n_pairs",
    "mask.n_candidates",
    "mask.prune_until",
    "mask.compact",
    "mask.output_coefficient",
}
OTHER_DIFFERENCES = {
    "lr_warm_up_steps",
    "sae.sparsity_coefficient",
    "sae.initialization",
    "checkpoint_path",
    "output_path",
}


@pytest.mark.parametrize("recipe", POST_RECIPES)
def test_the_variants_differ_from_the_post_in_how_they_train_alone(recipe):
    """Model, layer, text, tokens and widths stay; training is as on SmolLM2."""
    post = recipe_options(recipe)
    variant = recipe_options(f"{recipe}-batchtopk")
    smollm2 = recipe_options("smollm2-135m-instruct-L23")
    for name in post | variant:
        if name not in SMOLLM2_SETTINGS | OTHER_DIFFERENCES:
            assert post.get(name) == variant.get(name)
    for name in SMOLLM2_SETTINGS:
        assert variant[name] == smollm2[name]


@pytest.mark.parametrize("recipe", POST_RECIPES)
def test_gpt2_recipes_are_at_the_settings_of_the_post(recipe):
    cfg = qk.BilinearQKRunnerConfig.from_file(recipe_path(recipe))
    assert cfg.sae.d_query == 2400
    assert cfg.sae.d_key == 2400
    assert cfg.sae.activation == "relu"
    assert cfg.sae.initialization == "kaiming"
    assert cfg.training_tokens == 200_000_000
    assert cfg.context_size == 256
    assert cfg.train_batch_size_tokens == 8 * 256
    assert cfg.lr == 1e-3
    assert cfg.lr_scheduler_name == "cosineannealing"
    assert cfg.lr_warm_up_steps == 5000
    assert cfg.dataset_path == "Skylion007/openwebtext"
    assert cfg.streaming
    assert cfg.sae.kl_full_coefficient == 3
    assert cfg.sae.kl_query_coefficient == 1
    assert cfg.sae.kl_key_coefficient == 1
    assert cfg.sae.mse_coefficient == 0
    # theirs is on the sum over a batch
    assert cfg.sae.sparsity_coefficient == pytest.approx(1.5e-6 * 2048, rel=0.01)
    assert 25_000 <= cfg.mask.n_pairs <= 51_000


def test_help_by_name_shows_the_values_of_the_recipe(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--config", "gpt2-small-L10", "--help"])
    page = " ".join(capsys.readouterr().out.split())
    options = recipe_options("gpt2-small-L10")
    assert len(options) == 28
    for name, value in options.items():
        default = re.match(r".*?\(default: (.*?)\)", page.split(f" --{name} ")[-1])
        assert default and default[1] == str(value), name
