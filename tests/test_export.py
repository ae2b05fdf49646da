"""Exported halves: stock SAELens transcoders, loaded and attached in a process that cannot import this package."""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from sae_lens import SAE
from safetensors.torch import load_file, save_file
from tiny_dictionaries import D_KEY, D_QUERY, LAYER, empty_dictionary, observe, tiny_dictionary
from tiny_models import tiny_model, tiny_tokens
from torch import Tensor

import sae_lens_qk as qk
from sae_lens_qk.host.layer import hook_names

CLASSES = {"transcoder": "Transcoder", "jumprelu_transcoder": "JumpReLUTranscoder"}
KINDS = ("gpt2", "llama")  # learned positions; rotary embedding and grouped keys
SIDES = ("query", "key")


class Case(NamedTuple):
    kind: str
    half: str = "jumprelu_transcoder"
    dtype: str = "float32"
    mode: str = "bridge"

    @property
    def name(self) -> str:
        return "-".join(self)


CASES = [
    Case(kind, half, dtype)
    for kind in KINDS
    for half in CLASSES
    for dtype in ("float32", "float16")
]
CASES += [Case(kind, mode="bridge_compatibility") for kind in KINDS]


def random_dictionary(
    kind: str, half: str, dtype: str = "float32", mode: str = "bridge"
) -> qk.BilinearQKDictionary:
    """Every parameter random, thresholds positive."""
    made = empty_dictionary(tiny_model(kind, mode), D_QUERY, D_KEY, half)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in made.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise.abs() / 2 if name.endswith("threshold") else noise / 2)
    return made.to(getattr(torch, dtype))


def stock_user(work: str) -> None:
    """What someone without this package does: the source of a process of its own, so all imports stand in here."""
    import json
    import sys
    from pathlib import Path

    class NotInstalled:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "sae_lens_qk":
                raise ImportError("sae_lens_qk is not installed")

    sys.meta_path.insert(0, NotInstalled())
    try:
        import sae_lens_qk  # noqa: F401
    except ImportError as error:
        refusal = str(error)
    else:
        raise AssertionError("sae_lens_qk can be imported")

    import torch
    from sae_lens import SAE
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_grad_enabled(False)
    found = {"refusal": refusal}
    for folder in sorted(path for path in Path(work).iterdir() if path.is_dir()):
        told, given = (
            json.loads((folder / "case.json").read_text()),
            load_file(folder / "given.safetensors"),
        )
        stored = {side: SAE.load_from_disk(folder / side) for side in ("query", "key")}
        found[folder.name] = {
            side: {
                "class": f"{type(half).__module__}.{type(half).__qualname__}",
                "metadata": half.cfg.metadata.to_dict(),
                "dtypes": sorted({str(tensor.dtype) for tensor in half.state_dict().values()}),
            }
            for side, half in stored.items()
        }
        seen = {}
        for side, half in stored.items():
            seen[f"{side}_acts"] = half.encode(given["x"])
            seen[f"{side}_out"] = half.decode(seen[f"{side}_acts"])

        model = SAETransformerBridge.boot_transformers(
            "tiny",
            hf_model=AutoModelForCausalLM.from_pretrained(
                told["model"], attn_implementation="eager"
            ),
            tokenizer=AutoTokenizer.from_pretrained(told["model"]),
            device="cpu",
        )
        if told["compatibility_mode"]:
            model.enable_compatibility_mode()
        seen["logits_before"] = model(given["tokens"])
        for side in ("query", "key"):
            model.add_sae(SAE.load_from_disk(folder / side, dtype="float32"))
        seen["logits"], cache = model.run_with_cache(given["tokens"])
        seen["pattern"] = cache[told["hook_pattern"]]
        model.reset_saes()
        seen["logits_after"] = model(given["tokens"])
        save_file(
            {name: tensor.contiguous() for name, tensor in seen.items()},
            folder / "seen.safetensors",
        )
    assert not [name for name in sys.modules if name.split(".")[0] == "sae_lens_qk"]
    (Path(work) / "found.json").write_text(json.dumps(found))


class Outcome(NamedTuple):
    """The dictionary here, the layer's input and the tokens, and what the other process found."""

    case: Case
    dictionary: qk.BilinearQKDictionary
    x: Tensor
    tokens: Tensor
    found: dict
    seen: dict[str, Tensor]


@pytest.fixture(scope="module")
def process(tmp_path_factory, gpt2_folder, llama_folder) -> Path:
    """Folder with one exported dictionary a case, after the other process has used them all."""
    work, tokens = tmp_path_factory.mktemp("exported"), tiny_tokens(3, 17)
    model_folders = {"gpt2": gpt2_folder, "llama": llama_folder}
    for case in CASES:
        model = tiny_model(case.kind, case.mode)
        names = hook_names(model, LAYER)
        _, inputs = observe(model, tokens, names=(names.input,))
        random_dictionary(*case).export_transcoders(work / case.name)
        save_file(
            {"x": inputs[names.input].contiguous(), "tokens": tokens},
            work / case.name / "given.safetensors",
        )
        told = {
            "model": str(model_folders[case.kind]),
            "compatibility_mode": case.mode == "bridge_compatibility",
            "hook_pattern": f"blocks.{LAYER}.attn.hook_pattern",
        }
        (work / case.name / "case.json").write_text(json.dumps(told))
    script = f"{inspect.getsource(stock_user)}\nstock_user({str(work)!r})"
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, cwd=work
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return work


@pytest.fixture(scope="module")
def found(process) -> dict:
    return json.loads((process / "found.json").read_text())


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def outcome(request, process, found) -> Outcome:
    case: Case = request.param
    folder = process / case.name
    given, seen = load_file(folder / "given.safetensors"), load_file(folder / "seen.safetensors")
    return Outcome(
        case, random_dictionary(*case), given["x"], given["tokens"], found[case.name], seen
    )


# In a process without this package


def test_the_other_process_cannot_import_this_package(found):
    assert found["refusal"] == "sae_lens_qk is not installed"
    assert set(found) == {"refusal", *(case.name for case in CASES)}


def test_both_halves_load_as_stock_transcoders(outcome):
    cfg = outcome.dictionary.cfg
    for side, letter in zip(SIDES, "qk", strict=True):
        half = outcome.found[side]
        assert half["class"] == f"sae_lens.saes.transcoder.{CLASSES[cfg.half_architecture]}"
        assert half["metadata"]["model_name"] == cfg.model_name == "tiny"
        assert half["metadata"]["model_mode"] == outcome.case.mode
        assert half["metadata"]["hook_name"] == f"blocks.{LAYER}.attn.{letter}.hook_in"
        assert half["metadata"]["hook_name_out"] == f"blocks.{LAYER}.attn.{letter}.hook_out"
        assert half["dtypes"] == [str(outcome.dictionary.dtype)] == [f"torch.{cfg.dtype}"]


def test_features_and_outputs_are_the_dictionarys(outcome):
    d, seen = outcome.dictionary, outcome.seen
    computed = {"query_acts": d.encode_query(outcome.x), "key_acts": d.encode_key(outcome.x)}
    made = d.queries_keys(outcome.x)
    computed |= {"query_out": made.queries.flatten(2), "key_out": made.keys.flatten(2)}
    tolerance = 1e-5 if d.dtype == torch.float32 else 1e-2
    for name, expected in computed.items():
        assert seen[name].dtype == expected.dtype == d.dtype
        torch.testing.assert_close(seen[name], expected, rtol=tolerance, atol=tolerance)
    for side, d_features in zip(SIDES, (D_QUERY, D_KEY), strict=True):
        acts = seen[f"{side}_acts"]
        assert acts.shape[-1] == d_features
        assert 0.1 < (acts > 0).float().mean() < 0.7
    assert not torch.allclose(
        seen["query_acts"][..., :D_QUERY], seen["key_acts"][..., :D_QUERY], atol=0.1
    )


def test_both_attached_give_the_dictionarys_pattern(outcome):
    """Weights of fewer bits were loaded in float32 there: a stock SAE in float16 does not run in a float32 GPT-2."""
    d = outcome.dictionary.to(torch.float32)
    pattern = d.pattern(outcome.x)
    torch.testing.assert_close(outcome.seen["pattern"], pattern, rtol=0, atol=1e-5)
    others = pattern.roll(1, dims=1)  # heads differ, so that a permuted one shows
    assert (others - pattern).abs().amax(dim=(0, 2, 3)).min() > 0.1


def test_the_model_changes_as_it_does_under_patched_and_is_restored(outcome):
    model, seen = tiny_model(outcome.case.kind, outcome.case.mode), outcome.seen
    plain = model(outcome.tokens)
    torch.testing.assert_close(seen["logits_before"], plain, rtol=0, atol=1e-5)
    assert torch.equal(seen["logits_after"], seen["logits_before"])
    with outcome.dictionary.to(torch.float32).patched(model, source="transcoders"):
        patched = model(outcome.tokens)
    torch.testing.assert_close(seen["logits"], patched, rtol=0, atol=1e-4)
    assert (seen["logits"] - plain).abs().max() > 1


# What is written


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("half", CLASSES)
def test_folders_hold_config_and_weights_alone(half, dtype, tmp_path):
    d = random_dictionary("llama", half, dtype)
    before, cfg_before = (
        {name: tensor.clone() for name, tensor in d.state_dict().items()},
        d.cfg.to_dict(),
    )
    folders = d.export_transcoders(str(tmp_path / "new" / "folder"))
    assert (folders.query, folders.key) == tuple(
        tmp_path / "new" / "folder" / side for side in SIDES
    )
    assert list(files_of(tmp_path / "new" / "folder")) == [
        f"{side}/{file}"
        for side in reversed(SIDES)
        for file in ("cfg.json", "sae_weights.safetensors")
    ]
    for side, folder, d_out in zip(SIDES, folders, (d.spec.d_queries, d.spec.d_keys), strict=True):
        cfg = json.loads((folder / "cfg.json").read_text())
        assert (cfg["architecture"], cfg["dtype"], cfg["device"]) == (half, dtype, "cpu")
        assert (cfg["d_in"], cfg["d_sae"], cfg["d_out"]) == (20, getattr(d.cfg, f"d_{side}"), d_out)
        tensors = load_file(folder / "sae_weights.safetensors")
        assert set(tensors) == {"W_enc", "b_enc", "W_dec", "b_dec"} | (
            {"threshold"} if "jump" in half else set()
        )
        for name, tensor in tensors.items():
            assert torch.equal(tensor, before[f"{side}.{name}"]), name
            assert tensor.dtype == getattr(torch, dtype)
    assert d.cfg.to_dict() == cfg_before, "exporting changed the dictionary"
    assert all(torch.equal(tensor, before[name]) for name, tensor in d.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("loader", ["load_from_disk", "from_pretrained", "stock"])
def test_a_dictionary_from_disk_exports_the_same_files(loader, dtype, tmp_path):
    """Loading builds the halves on meta: that device must not be what their configs say."""
    d = tiny_dictionary(tiny_model("llama")).to(getattr(torch, dtype))
    d.save_model(tmp_path / "saved")
    load = {
        "load_from_disk": qk.BilinearQKDictionary.load_from_disk,
        "from_pretrained": lambda path: qk.BilinearQKDictionary.from_pretrained(
            str(path), dtype=None
        ),
        "stock": SAE.load_from_disk,
    }[loader]
    loaded = load(tmp_path / "saved")
    assert isinstance(loaded, qk.BilinearQKDictionary)
    d.export_transcoders(tmp_path / "made")
    loaded.export_transcoders(tmp_path / "loaded")
    assert files_of(tmp_path / "loaded") == files_of(tmp_path / "made")
    assert '"device": "cpu"' in (tmp_path / "loaded" / "key" / "cfg.json").read_text()


def test_exporting_again_replaces_what_was_there(tmp_path):
    for half in CLASSES:
        random_dictionary("gpt2", half).export_transcoders(tmp_path / "one")
    random_dictionary("gpt2", half).export_transcoders(tmp_path / "other")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "other")
