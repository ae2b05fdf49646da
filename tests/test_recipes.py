"""Recipes: every one is a config that the command line runs, on the real architecture with random weights."""

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


def options_of(config: dict[str, Any]) -> dict[str, Any]:
    """Values of a config by option of the command line."""
    blocks = {f"{name}.": config[name] for name in ("sae", "mask", "card") if name in config}
    top = {name: value for name, value in config.items() if f"{name}." not in blocks}
    return top | {
        f"{prefix}{name}": value
        for prefix, block in blocks.items()
        for name, value in block.items()
    }


def random_model(recipe: str, layer: int) -> TransformerBridge:
    """The recipe's model at its real widths, cut two layers above: no layer reads a later one, and with one more than it
    needs the bridge stops there instead of running the unembedding."""
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


class Seen:
    """What passes the training SAEs of both steps: the weights before the first update, and every loss."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.start: dict[type, dict[str, Tensor]] = {}
        self.losses: dict[type, list[dict[str, float]]] = {}
        for sae_class in (TranscodersTrainingSAE, MaskTrainingSAE):
            monkeypatch.setattr(sae_class, "training_forward_pass", self.watch(sae_class))

    def watch(self, sae_class):
        forward = sae_class.training_forward_pass

        def watched(sae, step_input):
            self.start.setdefault(
                sae_class, {name: tensor.clone() for name, tensor in sae.state_dict().items()}
            )
            output = forward(sae, step_input)
            self.losses.setdefault(sae_class, []).append(
                {name: loss.item() for name, loss in output.losses.items()}
            )
            return output

        return watched


@pytest.fixture
def seen(monkeypatch) -> Seen:
    return Seen(monkeypatch)


@pytest.fixture
def sparse_relu(monkeypatch):
    """ReLU transcoders that start with the L0 training ends with: at random a third of the features fire, and their pairs
    would take hours to rank."""
    attach = TranscodersTrainingSAE.attach

    def attach_sparse(sae, weights, context_size, first_batch=None):
        attach(sae, weights, context_size, first_batch)
        for half in (sae.query, sae.key) if sae.cfg.activation == "relu" else ():
            hidden = first_batch[:1000] @ half.W_enc.detach()
            half.b_enc.data.copy_(-hidden.quantile(1 - L0 / hidden.shape[1], dim=0))

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
"""For speed: without a cache each row is computed some ten times, for checks, initialisation, ranking and training."""
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
def test_both_steps_run(recipe, changes, seen, sparse_relu, tmp_path, monkeypatch):
    asked = qk.BilinearQKRunnerConfig.from_file(recipe_path(recipe))
    trained = dry_run(recipe, changes, tmp_path, monkeypatch)
    check_dictionary(trained, asked, recipe)

    assert len(trained.feature_map) == asked.mask.n_pairs
    assert trained.cfg.original_sizes == (asked.sae.d_query, asked.sae.d_key) == (2400, 2400)
    assert (trained.cfg.d_query < 2400 and trained.cfg.d_key < 2400) == asked.mask.compact
    check_losses(seen, TranscodersTrainingSAE, {"kl_full", "kl_query", "kl_key"})
    check_losses(seen, MaskTrainingSAE, {"kl"})

    before = qk.BilinearQKDictionary.load_from_disk(
        tmp_path / "checkpoints" / "transcoders_final"
    ).state_dict()
    check_moved(seen.start[TranscodersTrainingSAE], before)
    assert seen.start[MaskTrainingSAE]["scaled_mask"].unique().numel() == 1
    assert trained.feature_map.weights.unique().numel() > 1
    after = {f"dictionary.{name}": tensor for name, tensor in trained.state_dict().items()}
    tuned = not torch.equal(
        seen.start[MaskTrainingSAE]["dictionary.query.W_enc"], after["dictionary.query.W_enc"]
    )
    assert tuned == (asked.mask.fine_tune_lr > 0)


@pytest.mark.slow
def test_the_authors_recipe_runs(seen, tmp_path, monkeypatch):
    """Step 1 alone, from their own initialisation."""
    asked = qk.BilinearQKRunnerConfig.from_file(recipe_path(AUTHORS))
    trained = dry_run(AUTHORS, CACHE, tmp_path, monkeypatch)
    check_dictionary(trained, asked, AUTHORS)
    assert not trained.has_feature_map
    check_losses(seen, TranscodersTrainingSAE, {"kl_full", "kl_query", "kl_key", "sparsity"})
    assert MaskTrainingSAE not in seen.losses
    check_moved(seen.start[TranscodersTrainingSAE], trained.state_dict())


def dry_run(
    recipe: str, changes: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> qk.BilinearQKDictionary:
    """`python -m sae_lens_qk train --config <recipe>` for two steps of each stage on random tokens.

    Model and text are put where the recipe looks for them; token counts and paths are changed, and `changes`. The warm-up
    stays, so the weights move little, and what fires at the start fires at the end.
    """
    asked = qk.BilinearQKRunnerConfig.from_file(recipe_path(recipe))
    model = random_model(recipe, asked.layer)
    monkeypatch.setattr("sae_lens_qk.training.runner.load_model", lambda name, device: model)
    context_size = changes.get("context_size", asked.context_size)
    batch = changes.get("train_batch_size_tokens", asked.train_batch_size_tokens)
    n_rows = max(STEPS * batch, changes.get("input_cache_tokens", 0)) // context_size
    monkeypatch.setattr(
        "sae_lens_qk.training.runner._CALIBRATION_ROWS", n_rows
    )  # there are no more
    tokens = torch.randint(
        model.cfg.d_vocab, (n_rows, context_size), generator=torch.Generator().manual_seed(0)
    )
    Dataset.from_dict({"tokens": tokens.tolist()}).to_parquet(str(folder / "train.parquet"))
    options = {
        "training_tokens": STEPS * batch,
        "checkpoint_path": folder / "checkpoints",
        "output_path": folder / "output",
        **changes,
    }
    if asked.mask.training_tokens:
        options |= {"mask.training_tokens": STEPS * batch, "mask.ranking_tokens": 2 * context_size}
    if asked.dataset_path.startswith("$"):
        monkeypatch.setenv("QK_CORPUS", str(folder))
    else:
        options["dataset_path"] = folder  # the Hub's name of the text
    monkeypatch.chdir(folder)
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    assert main(["--debug", "train", "--config", recipe, *arguments]) == 0
    return qk.BilinearQKDictionary.from_pretrained(str(folder / "output"), verify="strict")


def check_dictionary(
    trained: qk.BilinearQKDictionary, asked: qk.BilinearQKRunnerConfig, recipe: str
) -> None:
    """Layer, hook and sizes are the recipe's, and so are the settings saved beside it."""
    cfg, spec, expected = trained.cfg, trained.spec, ATTENTION[family(recipe)]
    assert (cfg.model_name, cfg.layer) == (asked.model_name, asked.layer)
    assert cfg.hook_name == f"blocks.{asked.layer}.attn.hook_in"
    assert (spec.n_heads, spec.n_kv_heads, spec.d_head, spec.d_model) == expected[:4]
    base = expected.rotary_base
    assert spec.rotary_inv_freq == pytest.approx(
        [base ** (-2 * i / 64) for i in range(32)] if base else []
    )
    assert cfg.half_architecture == (
        "transcoder" if asked.sae.activation == "relu" else "jumprelu_transcoder"
    )
    assert all(tensor.isfinite().all() for tensor in trained.state_dict().values())
    wanted, used = (
        options_of(yaml.safe_load(recipe_path(recipe).read_text())),
        options_of(trained.runner_cfg),
    )
    assert {name for name in wanted if used[name] != wanted[name]} <= CHANGED


def check_losses(seen: Seen, sae_class: type, names: set[str]) -> None:
    assert len(seen.losses[sae_class]) == STEPS
    for losses in seen.losses[sae_class]:
        assert names <= set(losses)
        assert torch.tensor(list(losses.values())).isfinite().all()


def check_moved(start: dict[str, Tensor], end: dict[str, Tensor]) -> None:
    for name in ("query.W_enc", "query.W_dec", "key.W_enc", "key.W_dec"):
        assert start[name].shape == end[name].shape
        assert not torch.equal(start[name], end[name]), name


def test_every_dictionary_has_a_recipe():
    assert set(RECIPES) == {*registry(), AUTHORS}
    assert {name: entry.recipe for name, entry in registry().items()} == {
        name: recipe_path(name) for name in registry()
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_of_its_own_dictionary(recipe):
    cfg = qk.BilinearQKRunnerConfig.from_file(recipe_path(recipe))
    dictionary = recipe.removesuffix("-authors").removesuffix("-batchtopk")
    model, layer = dictionary.rsplit("-L", 1)
    model = {"smollm2-135m-instruct": "smollm2-135m-instruct-q4_1"}.get(model, model)
    assert (cfg.model_name, cfg.layer) == (model, int(layer))
    assert (cfg.output_path, cfg.checkpoint_path) == (f"output/{recipe}", f"checkpoints/{recipe}")
    assert cfg.input_cache_path in (
        None,
        f"cache/{dictionary}",
    )  # shared by recipes of one layer, and by no others
    assert cfg.from_pretrained_path is None
    assert cfg.resume_from_checkpoint is None


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_on_any_machine(recipe):
    text = recipe_path(recipe).read_text()
    assert not re.search(r"(^|[\s'\"=:\[])(/|~|[A-Z]:\\)\w", text, re.MULTILINE)
    assert set(re.findall(r"recipes/([\w-]+)\.yaml", text)) <= {recipe}
    assert set(re.findall(r"\$\w+", text)) <= {"$QK_CORPUS"}
    assert "device" not in yaml.safe_load(text)


@pytest.mark.parametrize("recipe", ["gpt2-small-L2", "gpt2-small-L6", "gpt2-small-L10"])
def test_the_variants_differ_from_the_post_in_how_they_train_alone(recipe):
    """Model, layer, text, tokens and widths stay; activation, initialisation, learning rate and step 2 are as on SmolLM2."""
    post, variant = (
        options_of(yaml.safe_load(recipe_path(name).read_text()))
        for name in (recipe, f"{recipe}-batchtopk")
    )
    best = options_of(yaml.safe_load(recipe_path("smollm2-135m-instruct-L23").read_text()))
    changed = {name for name in post | variant if post.get(name) != variant.get(name)}
    ours = {
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
    assert changed <= ours | {
        "lr_warm_up_steps",
        "sae.sparsity_coefficient",
        "sae.initialization",
        "checkpoint_path",
        "output_path",
    }
    assert {name: variant[name] for name in ours} == {name: best[name] for name in ours}


@pytest.mark.parametrize("recipe", ["gpt2-small-L2", "gpt2-small-L6", "gpt2-small-L10"])
def test_gpt2_recipes_are_at_the_settings_of_the_post(recipe):
    cfg = qk.BilinearQKRunnerConfig.from_file(recipe_path(recipe))
    assert (cfg.sae.d_query, cfg.sae.d_key, cfg.sae.activation, cfg.sae.initialization) == (
        2400,
        2400,
        "relu",
        "kaiming",
    )
    assert (cfg.training_tokens, cfg.context_size, cfg.train_batch_size_tokens) == (
        200_000_000,
        256,
        8 * 256,
    )
    assert (cfg.lr, cfg.lr_scheduler_name, cfg.lr_warm_up_steps) == (1e-3, "cosineannealing", 5000)
    assert (cfg.dataset_path, cfg.streaming) == ("Skylion007/openwebtext", True)
    kl = (
        cfg.sae.kl_full_coefficient,
        cfg.sae.kl_query_coefficient,
        cfg.sae.kl_key_coefficient,
        cfg.sae.mse_coefficient,
    )
    assert kl == (3, 1, 1, 0)
    assert cfg.sae.sparsity_coefficient == pytest.approx(
        1.5e-6 * 2048, rel=0.01
    )  # theirs is on the sum over a batch
    assert 25_000 <= cfg.mask.n_pairs <= 51_000


def test_help_by_name_shows_the_values_of_the_recipe(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--config", "gpt2-small-L10", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    options = options_of(yaml.safe_load(recipe_path("gpt2-small-L10").read_text()))
    assert len(options) == 28
    for name, value in options.items():
        default = re.match(r".*?\(default: (.*?)\)", shown.split(f" --{name} ")[-1])
        assert default and default[1] == str(value), name
