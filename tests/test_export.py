"""Exported halves: stock SAELens transcoders, used in a process without this package."""

import inspect
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from comparing import assert_near
from sae_lens import SAE
from safetensors.torch import load_file, save_file
from tiny_dictionaries import D_KEY, D_QUERY, LAYER, empty_dictionary, tiny_dictionary
from tiny_models import tiny_model, tiny_tokens
from torch import Tensor

import sae_lens_qk as qk
from sae_lens_qk.host.layer import AttentionLayer

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
    d = empty_dictionary(tiny_model(kind, mode), D_QUERY, D_KEY, half)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in d.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) / 2
        parameter.copy_(noise.abs() if name.endswith("threshold") else noise)
    return d.to(getattr(torch, dtype))


def stock_user(work: str) -> None:
    """What someone without this package does.

    The source of a process of its own, so all imports stand in here.
    """
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
    report = {"refusal": refusal}
    for folder in sorted(path for path in Path(work).iterdir() if path.is_dir()):
        case = json.loads((folder / "case.json").read_text())
        inputs = load_file(folder / "inputs.safetensors")
        report[folder.name] = {}
        outputs = {}
        for side in ("query", "key"):
            half = SAE.load_from_disk(folder / side)
            weights = half.state_dict().values()
            report[folder.name][side] = {
                "class": f"{type(half).__module__}.{type(half).__qualname__}",
                "metadata": half.cfg.metadata.to_dict(),
                "dtypes": sorted({str(tensor.dtype) for tensor in weights}),
            }
            acts = half.encode(inputs["x"])
            outputs[f"{side}_acts"] = acts
            outputs[f"{side}_out"] = half.decode(acts)

        hf_model = AutoModelForCausalLM.from_pretrained(case["model"], attn_implementation="eager")
        model = SAETransformerBridge.boot_transformers(
            "tiny",
            hf_model=hf_model,
            tokenizer=AutoTokenizer.from_pretrained(case["model"]),
            device="cpu",
        )
        if case["compatibility_mode"]:
            model.enable_compatibility_mode()
        outputs["logits_before"] = model(inputs["tokens"])
        for side in ("query", "key"):
            model.add_sae(SAE.load_from_disk(folder / side, dtype="float32"))
        outputs["logits"], cache = model.run_with_cache(inputs["tokens"])
        outputs["pattern"] = cache[case["hook_pattern"]]
        model.reset_saes()
        outputs["logits_after"] = model(inputs["tokens"])
        outputs = {name: tensor.contiguous() for name, tensor in outputs.items()}
        save_file(outputs, folder / "outputs.safetensors")
    assert not [name for name in sys.modules if name.split(".")[0] == "sae_lens_qk"]
    (Path(work) / "report.json").write_text(json.dumps(report))


class Outcome(NamedTuple):
    """The dictionary here, the layer's input and the tokens, and what the other process reports."""

    case: Case
    dictionary: qk.BilinearQKDictionary
    x: Tensor
    tokens: Tensor
    report: dict
    outputs: dict[str, Tensor]


@pytest.fixture(scope="module")
def work(tmp_path_factory, gpt2_folder, llama_folder) -> Path:
    """Folder with one exported dictionary per case, after the other process has used them all."""
    path = tmp_path_factory.mktemp("exported")
    tokens = tiny_tokens(3, 17)
    model_folders = {"gpt2": gpt2_folder, "llama": llama_folder}
    for case in CASES:
        folder = path / case.name
        random_dictionary(*case).export_transcoders(folder)
        layer = AttentionLayer(tiny_model(case.kind, case.mode), LAYER)
        x = layer.inputs(tokens).contiguous()
        save_file({"x": x, "tokens": tokens}, folder / "inputs.safetensors")
        values = {
            "model": str(model_folders[case.kind]),
            "compatibility_mode": case.mode == "bridge_compatibility",
            "hook_pattern": layer.names.pattern,
        }
        (folder / "case.json").write_text(json.dumps(values))
    script = f"{inspect.getsource(stock_user)}\nstock_user({str(path)!r})"
    command = [sys.executable, "-W", "ignore", "-c", script]
    process = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=path,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return path


@pytest.fixture(scope="module")
def report(work) -> dict:
    return json.loads((work / "report.json").read_text())


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def outcome(request, work, report) -> Outcome:
    case: Case = request.param
    inputs = load_file(work / case.name / "inputs.safetensors")
    outputs = load_file(work / case.name / "outputs.safetensors")
    return Outcome(
        case=case,
        dictionary=random_dictionary(*case),
        x=inputs["x"],
        tokens=inputs["tokens"],
        report=report[case.name],
        outputs=outputs,
    )


# In a process without this package


@pytest.mark.slow
def test_the_other_process_cannot_import_this_package(report):
    assert report["refusal"] == "sae_lens_qk is not installed"
    assert set(report) == {"refusal", *(case.name for case in CASES)}


@pytest.mark.slow
def test_both_halves_load_as_stock_transcoders(outcome):
    cfg = outcome.dictionary.cfg
    for side, letter in zip(SIDES, "qk", strict=True):
        half = outcome.report[side]
        hook = f"blocks.{LAYER}.attn.{letter}"
        assert half["class"] == f"sae_lens.saes.transcoder.{CLASSES[cfg.half_architecture]}"
        assert half["metadata"]["model_name"] == cfg.model_name == "tiny"
        assert half["metadata"]["model_mode"] == outcome.case.mode
        assert half["metadata"]["hook_name"] == f"{hook}.hook_in"
        assert half["metadata"]["hook_name_out"] == f"{hook}.hook_out"
        assert half["dtypes"] == [str(outcome.dictionary.dtype)] == [f"torch.{cfg.dtype}"]


@pytest.mark.slow
def test_features_and_outputs_are_the_dictionarys(outcome):
    d = outcome.dictionary
    outputs = outcome.outputs
    features = d.features(outcome.x)
    reconstruction = d.reconstruct(features)
    expected = {
        "query_acts": features.query,
        "key_acts": features.key,
        "query_out": reconstruction.queries.flatten(2),
        "key_out": reconstruction.keys.flatten(2),
    }
    tolerance = 1e-5 if d.dtype == torch.float32 else 1e-2
    for name, tensor in expected.items():
        assert outputs[name].dtype == tensor.dtype == d.dtype
        torch.testing.assert_close(outputs[name], tensor, rtol=tolerance, atol=tolerance)
    query_acts = outputs["query_acts"]
    key_acts = outputs["key_acts"]
    assert query_acts.shape[-1] == D_QUERY
    assert key_acts.shape[-1] == D_KEY
    for acts in (query_acts, key_acts):
        assert 0.1 < (acts > 0).float().mean() < 0.7
    # the sides differ, so that a swapped one shows
    assert not torch.allclose(query_acts, key_acts[..., :D_QUERY], atol=0.1)


@pytest.mark.slow
def test_both_attached_give_the_dictionarys_pattern(outcome):
    """Weights of fewer bits were loaded in float32 there.

    A stock SAE in float16 does not run in a float32 GPT-2.
    """
    d = outcome.dictionary.to(torch.float32)
    pattern = d.pattern(outcome.x)
    assert_near(outcome.outputs["pattern"], pattern)
    # heads differ, so that a permuted one shows
    other_heads = pattern.roll(1, dims=1)
    differences = (other_heads - pattern).abs()
    largest = differences.amax(dim=(0, 2, 3))  # [head]
    assert largest.min() > 0.1


@pytest.mark.slow
def test_the_model_changes_as_it_does_under_patched_and_is_restored(outcome):
    model = tiny_model(outcome.case.kind, outcome.case.mode)
    logits = model(outcome.tokens)
    outputs = outcome.outputs
    assert_near(outputs["logits_before"], logits)
    assert torch.equal(outputs["logits_after"], outputs["logits_before"])
    d = outcome.dictionary.to(torch.float32)
    with d.patched(model, source="transcoders"):
        patched_logits = model(outcome.tokens)
    assert_near(outputs["logits"], patched_logits, 1e-4)
    assert (outputs["logits"] - logits).abs().max() > 1


# What is written


def folder_files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {}
    for path in paths:
        name = path.relative_to(folder).as_posix()
        files[name] = path.read_bytes()
    return files


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("half", CLASSES)
def test_folders_hold_config_and_weights_alone(half, dtype, tmp_path):
    d = random_dictionary("llama", half, dtype)
    weights = {name: tensor.clone() for name, tensor in d.state_dict().items()}
    cfg = d.cfg.to_dict()
    path = tmp_path / "new" / "folder"
    folders = d.export_transcoders(str(path))
    assert folders == (path / "query", path / "key")
    assert list(folder_files(path)) == [
        "key/cfg.json",
        "key/sae_weights.safetensors",
        "query/cfg.json",
        "query/sae_weights.safetensors",
    ]
    query_cfg = {"d_sae": D_QUERY, "d_out": d.spec.d_queries}
    key_cfg = {"d_sae": D_KEY, "d_out": d.spec.d_keys}
    shared = {"architecture": half, "dtype": dtype, "device": "cpu", "d_in": 20}
    check_half(folders.query, weights, {**shared, **query_cfg})
    check_half(folders.key, weights, {**shared, **key_cfg})

    # exporting changes nothing
    assert d.cfg.to_dict() == cfg
    for name, tensor in d.state_dict().items():
        assert torch.equal(tensor, weights[name])


def check_half(
    folder: Path,
    weights: dict[str, Tensor],
    expected: dict[str, Any],
) -> None:
    """The folder of a side holds that side's weights, and this config among other fields."""
    cfg = json.loads((folder / "cfg.json").read_text())
    for name, value in expected.items():
        assert cfg[name] == value
    tensors = load_file(folder / "sae_weights.safetensors")
    names = {"W_enc", "b_enc", "W_dec", "b_dec"}
    if cfg["architecture"] == "jumprelu_transcoder":
        names.add("threshold")
    assert set(tensors) == names
    for name, tensor in tensors.items():
        original = weights[f"{folder.name}.{name}"]
        assert torch.equal(tensor, original), name
        assert tensor.dtype == getattr(torch, cfg["dtype"])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("loader", ["load_from_disk", "from_pretrained", "stock"])
def test_a_dictionary_from_disk_exports_the_same_files(loader, dtype, tmp_path):
    """Loading builds the halves on meta: that device must not be what their configs say."""
    d = tiny_dictionary(tiny_model("llama")).to(getattr(torch, dtype))
    d.save_model(tmp_path / "saved")
    loaders = {
        "load_from_disk": qk.BilinearQKDictionary.load_from_disk,
        "from_pretrained": partial(qk.BilinearQKDictionary.from_pretrained, dtype=None),
        "stock": SAE.load_from_disk,
    }
    copy_of_it = loaders[loader](str(tmp_path / "saved"))
    assert isinstance(copy_of_it, qk.BilinearQKDictionary)
    d.export_transcoders(tmp_path / "original")
    copy_of_it.export_transcoders(tmp_path / "copy")
    files = folder_files(tmp_path / "copy")
    assert files == folder_files(tmp_path / "original")
    assert b'"device": "cpu"' in files["key/cfg.json"]


def test_exporting_again_replaces_what_was_there(tmp_path):
    for half in CLASSES:
        random_dictionary("gpt2", half).export_transcoders(tmp_path / "one")
    random_dictionary("gpt2", half).export_transcoders(tmp_path / "other")
    assert folder_files(tmp_path / "one") == folder_files(tmp_path / "other")
