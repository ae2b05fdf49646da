"""BilinearQKDictionary: a SAELens SAE that saves, loads, casts and refuses as it should."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from oracles import loop_kernel
from sae_lens import SAE, HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import JumpReLUTranscoder, Transcoder
from safetensors.torch import load_file, save_file
from tiny_models import KINDS, tiny_hf_model, tiny_model, tiny_tokenizer, tiny_tokens
from torch import Tensor

import sae_lens_qk as qk
from sae_lens_qk.attention import AttentionSpec, attention_scores, pattern_from_scores, rotate
from sae_lens_qk.feature_map import SparseFeatureMap
from sae_lens_qk.host.layer import attention_spec, hook_names, qk_weights

WEIGHTS = "sae_weights.safetensors"
SPEC = AttentionSpec(6, 3, d_head=10, d_model=13, scale=0.4, rotary_inv_freq=(1.0, 0.3, 0.02))
D_QUERY, D_KEY = 307, 311  # feature numbers above 256, which bfloat16 cannot hold
SOURCES = ("transcoders", "feature_map")


def make_dictionary(
    half: str = "jumprelu_transcoder",
    spec: AttentionSpec = SPEC,
    d_query: int = D_QUERY,
    d_key: int = D_KEY,
    n_pairs: int = 1009,
    **cfg,
) -> qk.BilinearQKDictionary:
    """Every parameter random, thresholds positive, a map of random pairs, constants among them, half of them measured."""
    config = qk.BilinearQKConfig(
        d_in=spec.d_model,
        d_query=d_query,
        d_key=d_key,
        half_architecture=half,
        attention=spec.to_dict(),
        model_name="tiny",
        **cfg,
    )
    made = qk.BilinearQKDictionary(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = {"W_enc": spec.d_model**-0.5, "W_dec": 0.1}.get(name.split(".")[1], 0.3)
            parameter.copy_(0.2 + noise.abs() if name.endswith("threshold") else scale * noise)
    if n_pairs:
        codes = torch.randperm(d_query * d_key * spec.n_heads, generator=generator)[: n_pairs - 10]
        query_key = codes // spec.n_heads
        pairs = torch.stack([query_key // d_key, query_key % d_key, codes % spec.n_heads], dim=1)
        constants = [(d_query, 3 * i, i % 3) for i in range(5)] + [
            (5 * i, d_key, i % 3) for i in range(5)
        ]
        pairs = torch.cat([torch.tensor(constants), pairs])[
            torch.randperm(n_pairs, generator=generator)
        ]
        weights = torch.rand(n_pairs, generator=generator)
        spread = torch.rand(
            n_pairs, 3, generator=generator
        )  # importance and co-occurrence span 1e-6 to 1
        statistics = torch.stack(
            [10 ** (-6 * spread[:, 0]), 4 * spread[:, 1] - 2, 10 ** (-6 * spread[:, 2])], dim=1
        )
        statistics[::2] = 0
        made.set_feature_map(
            SparseFeatureMap(pairs, weights, d_query, d_key, spec.n_heads, statistics)
        )
    return made.requires_grad_(False)


def random_x(spec: AttentionSpec = SPEC) -> Tensor:
    return torch.randn(2, 11, spec.d_model, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def dictionary() -> qk.BilinearQKDictionary:
    """Shared and not to be changed."""
    return make_dictionary()


@pytest.fixture(scope="module")
def saved(dictionary, tmp_path_factory) -> Path:
    """Shared and not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    dictionary.save_model(folder)
    return folder


def in_step(d: qk.BilinearQKDictionary, dtype: torch.dtype, device: str = "cpu") -> bool:
    """Weights, modules and configs all name the same dtype and device."""
    floats = [tensor for tensor in d.state_dict().values() if tensor.is_floating_point()]
    modules = (d, d.query, d.key)
    return (
        {tensor.dtype for tensor in floats} == {dtype}
        and {tensor.device.type for tensor in d.state_dict().values()} == {device}
        and {(module.dtype, module.device.type) for module in modules} == {(dtype, device)}
        and {(module.cfg.dtype, module.cfg.device) for module in modules}
        == {(str(dtype).removeprefix("torch."), device)}
    )


# As an SAE


def test_is_a_registered_sae(dictionary):
    assert isinstance(dictionary, SAE)
    assert SAE_CLASS_REGISTRY["bilinear_qk"] == (qk.BilinearQKDictionary, qk.BilinearQKConfig)
    assert dictionary.cfg.architecture() == "bilinear_qk"
    assert isinstance(SAE.from_dict(dictionary.cfg.to_dict()), qk.BilinearQKDictionary)
    assert type(dictionary.query) is JumpReLUTranscoder
    assert type(make_dictionary("transcoder").key) is Transcoder


def test_a_second_import_does_not_fail(monkeypatch):
    name = "sae_lens_qk.dictionary"
    first = sys.modules[name]
    registered = dict(SAE_CLASS_REGISTRY)
    monkeypatch.setattr(qk, "dictionary", first)  # put back at the end, as is sys.modules
    monkeypatch.delitem(sys.modules, name)
    again = importlib.import_module(name)
    assert again is not first
    assert registered == SAE_CLASS_REGISTRY


def test_d_sae_is_derived(dictionary):
    assert dictionary.cfg.d_sae == D_QUERY + D_KEY
    assert qk.BilinearQKConfig(d_in=13, d_sae=5, d_query=7, d_key=11).d_sae == 18


def test_encode_and_decode_are_the_two_halves_side_by_side(dictionary):
    x = random_x()
    acts = dictionary.encode(x)
    assert acts.shape == (2, 11, D_QUERY + D_KEY)
    for half, part in (
        (dictionary.query, acts[..., :D_QUERY]),
        (dictionary.key, acts[..., D_QUERY:]),
    ):
        hidden = x @ half.W_enc + half.b_enc
        torch.testing.assert_close(part, hidden * (hidden > half.threshold), rtol=0, atol=1e-6)
        assert 0.01 < (part > 0).float().mean() < 0.5
        assert (part >= 0).all()
    assert torch.equal(dictionary.encode_query(x), acts[..., :D_QUERY])
    assert torch.equal(dictionary.encode_key(x), acts[..., D_QUERY:])
    decoded = dictionary.decode(acts)
    assert decoded.shape == (2, 11, (6 + 3) * 10)
    queries = acts[..., :D_QUERY] @ dictionary.query.W_dec + dictionary.query.b_dec
    keys = acts[..., D_QUERY:] @ dictionary.key.W_dec + dictionary.key.b_dec
    torch.testing.assert_close(decoded, torch.cat([queries, keys], dim=-1), rtol=0, atol=1e-6)
    assert torch.equal(dictionary(x), decoded)
    by_head = dictionary.queries_keys(x)
    assert torch.equal(by_head.queries.flatten(2), decoded[..., :60])
    assert torch.equal(by_head.keys, decoded[..., 60:].unflatten(-1, (3, 10)))


def test_pattern_is_the_softmax_of_either_source(dictionary):
    x = random_x()
    queries, keys = dictionary(x).split([60, 30], dim=-1)
    full = attention_scores(queries.unflatten(-1, (6, 10)), keys.unflatten(-1, (3, 10)), SPEC)
    torch.testing.assert_close(dictionary.pattern(x), pattern_from_scores(full), rtol=0, atol=1e-6)
    everything = make_dictionary(d_query=29, d_key=31, n_pairs=0)
    everything.set_feature_map(SparseFeatureMap.all_pairs(29, 31, 6))
    assert everything.cfg.n_pairs == (30 * 32 - 1) * 6
    from_map, from_halves = (
        everything.pattern(x, source) for source in ("feature_map", "transcoders")
    )
    torch.testing.assert_close(from_map, from_halves, rtol=0, atol=1e-5)
    assert (dictionary.pattern(x, "feature_map") - dictionary.pattern(x)).abs().max() > 0.05
    for source in SOURCES:
        assert dictionary.pattern(x, source).shape == (2, 6, 11, 11)
        torch.testing.assert_close(
            dictionary.pattern(x, source).sum(dim=-1), torch.ones(2, 6, 11), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("side", ["query", "key"])
def test_hooks_on_the_halves_act_on_both_sources(dictionary, side, source):
    """Silencing a side leaves its bias: what the scores become is known."""
    x = random_x()
    before = dictionary.scores(x, source)
    silence = [(f"{side}.hook_sae_acts_post", lambda acts, hook: acts * 0)]
    with dictionary.hooks(fwd_hooks=silence):
        scores, pattern = dictionary.scores(x, source), dictionary.pattern(x, source)
    assert (pattern - pattern_from_scores(before)).abs().max() > 0.01
    if source == "transcoders":
        queries, keys = dictionary.queries_keys(x)
        if side == "query":
            queries = dictionary.query.b_dec.unflatten(0, (6, 10)).expand_as(queries)
        else:
            keys = dictionary.key.b_dec.unflatten(0, (3, 10)).expand_as(keys)
        expected = attention_scores(queries, keys, SPEC)
    else:
        column, constant = (0, D_QUERY) if side == "query" else (1, D_KEY)
        left = dictionary.feature_map.select(dictionary.feature_map.indices[:, column] == constant)
        assert len(left) > 0
        expected = left.scores(
            dictionary.encode_query(x), dictionary.encode_key(x), dictionary.decoders, SPEC
        )
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    assert torch.equal(dictionary.scores(x, source), before), "the hook stayed behind"


# Saving and loading


def test_saved_folder_holds_json_and_safetensors_alone(dictionary, saved):
    assert sorted(path.name for path in saved.iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "cfg.json",
        WEIGHTS,
    ]
    cfg = json.loads((saved / "cfg.json").read_text())
    assert cfg["architecture"] == "bilinear_qk"
    assert (cfg["d_query"], cfg["d_key"], cfg["d_sae"], cfg["n_pairs"]) == (307, 311, 618, 1009)
    assert AttentionSpec.from_dict(cfg["attention"]) == SPEC
    tensors = load_file(saved / WEIGHTS)
    assert set(tensors) == {
        *(
            f"{side}.{name}"
            for side in ("query", "key")
            for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
        ),
        "feature_map.digits",
        "feature_map.weights",
        "feature_map.statistics",
    }
    assert tensors.pop("feature_map.digits").dtype == torch.uint8
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert "feature_map.indices" in dictionary.state_dict(), "saving changed the dictionary"


@pytest.mark.parametrize("loader", [qk.BilinearQKDictionary, SAE])
def test_a_loaded_dictionary_computes_the_same_bits(dictionary, saved, loader):
    loaded = loader.load_from_disk(saved)
    assert isinstance(loaded, qk.BilinearQKDictionary)
    assert loaded.cfg.to_dict() == dictionary.cfg.to_dict()
    for name, tensor in dictionary.state_dict().items():
        if name == "feature_map.statistics":  # stored as logarithms
            torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=1e-5, atol=0)
        else:
            assert torch.equal(loaded.state_dict()[name], tensor), name
        assert loaded.state_dict()[name].dtype == tensor.dtype
    for source in SOURCES:
        assert torch.equal(
            loaded.pattern(random_x(), source), dictionary.pattern(random_x(), source)
        )
    assert in_step(loaded, torch.float32)


@pytest.mark.parametrize("half", ["transcoder", "jumprelu_transcoder"])
@pytest.mark.parametrize("n_pairs", [0, 101])
def test_both_halves_round_trip_with_and_without_a_map(half, n_pairs, tmp_path):
    made = make_dictionary(half, d_query=29, d_key=31, n_pairs=n_pairs)
    made.save_model(tmp_path)
    loaded = qk.BilinearQKDictionary.load_from_disk(tmp_path)
    assert loaded.has_feature_map == made.has_feature_map == (n_pairs > 0)
    assert torch.equal(loaded.pattern(random_x()), made.pattern(random_x()))
    assert type(loaded.query) is type(made.query)


@pytest.mark.parametrize("loader", [qk.BilinearQKDictionary, SAE])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_loading_in_another_dtype_keeps_the_map(dictionary, saved, dtype, loader):
    loaded = loader.load_from_disk(saved, dtype=dtype)
    assert in_step(loaded, getattr(torch, dtype))
    assert loaded.feature_map.indices.dtype == torch.int64
    assert torch.equal(loaded.feature_map.indices, dictionary.feature_map.indices)
    assert loaded.feature_map.indices.amax(dim=0)[:2].tolist() == [D_QUERY, D_KEY]
    torch.testing.assert_close(
        loaded.feature_map.weights.float(), dictionary.feature_map.weights, rtol=0, atol=2**-8
    )
    assert loaded.encode(random_x()).dtype == getattr(torch, dtype)
    for source in SOURCES:
        difference = loaded.pattern(random_x(), source) - dictionary.pattern(random_x(), source)
        assert difference.abs().mean() < {"float16": 1e-3, "bfloat16": 6e-3, "float64": 1e-7}[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_dictionary_saved_in_another_dtype_comes_back_in_it(dictionary, tmp_path, dtype):
    cast = make_dictionary().to(dtype)
    cast.save_model(tmp_path)
    loaded = qk.BilinearQKDictionary.load_from_disk(tmp_path)
    assert in_step(loaded, dtype)
    assert torch.equal(loaded.feature_map.indices, dictionary.feature_map.indices)
    assert torch.equal(loaded.feature_map.weights, cast.feature_map.weights)
    statistics, expected = (
        loaded.feature_map.statistics.double(),
        dictionary.feature_map.statistics.double(),
    )
    assert torch.equal(statistics[:, 2] == 0, expected[:, 2] == 0), "measured or not"
    tolerance = {
        torch.float16: 0.02,
        torch.bfloat16: 0.1,
        torch.float32: 1e-5,
        torch.float64: 1e-5,
    }[dtype]
    subnormal = 1e-7 if dtype == torch.float16 else 0.0
    torch.testing.assert_close(statistics, expected, rtol=tolerance, atol=subnormal)


def test_a_map_without_statistics_is_saved_without_them(tmp_path):
    """As files of earlier versions are."""
    made = make_dictionary(d_query=29, d_key=31, n_pairs=101)
    bare = SparseFeatureMap(made.feature_map.indices, made.feature_map.weights, 29, 31, 6)
    made.set_feature_map(bare)
    made.save_model(tmp_path)
    assert "feature_map.statistics" not in load_file(tmp_path / WEIGHTS)
    loaded = qk.BilinearQKDictionary.load_from_disk(tmp_path)
    assert loaded.feature_map.equals(bare)
    assert loaded.feature_map.statistics.shape == (101, 3)
    assert loaded.pair_frame()[["importance", "effect", "co_occurrence"]].isna().all(axis=None)


@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (lambda d: d.half(), torch.float16),
        (lambda d: d.bfloat16(), torch.bfloat16),
        (lambda d: d.to(torch.bfloat16), torch.bfloat16),
        (lambda d: d.to("cpu", torch.float16), torch.float16),
        (lambda d: d.to(dtype=torch.float64), torch.float64),
        (lambda d: d.double(), torch.float64),
        (lambda d: d.half().float(), torch.float32),
        (lambda d: d.cpu(), torch.float32),
    ],
    ids=[
        "half",
        "bfloat16",
        "to bfloat16",
        "to cpu float16",
        "to float64",
        "double",
        "half float",
        "cpu",
    ],
)
def test_casts_keep_config_and_halves_in_step(cast, dtype):
    d = make_dictionary()
    indices = d.feature_map.indices.clone()
    assert cast(d) is d
    assert in_step(d, dtype)
    assert torch.equal(d.feature_map.indices, indices)
    acts = d.encode(random_x())
    assert acts.dtype == dtype
    assert (acts > 0).any()
    for source in SOURCES:
        assert d.pattern(random_x(), source).isfinite().all()


def test_moves_keep_config_and_halves_in_step():
    assert in_step(make_dictionary().to("meta"), torch.float32, "meta")


@pytest.mark.parametrize("half", ["transcoder", "jumprelu_transcoder"])
def test_folding_decoder_norms_leaves_the_pattern(half):
    d = make_dictionary(half)
    x = random_x()
    before = {source: d.pattern(x, source) for source in SOURCES}
    acts, norms = d.encode(x), d.get_W_dec_norm()
    assert norms.shape == (D_QUERY + D_KEY,)
    assert norms.std() > 0.01
    d.fold_W_dec_norm()
    for source in SOURCES:
        torch.testing.assert_close(d.pattern(x, source), before[source], rtol=0, atol=1e-5)
    torch.testing.assert_close(d.get_W_dec_norm(), torch.ones(D_QUERY + D_KEY), rtol=0, atol=1e-5)
    torch.testing.assert_close(d.encode(x), acts * norms, rtol=0, atol=1e-5)


# What a damaged or foreign folder says


def edit_weights(folder: Path, name: str, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[name] = change(tensors[name])
    save_file(
        {key: tensor for key, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS
    )


def edit_cfg(folder: Path, **changes) -> None:
    path = folder / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def with_value(at: tuple[int, ...], value: float):
    def change(tensor: Tensor) -> Tensor:
        tensor[at] = value
        return tensor

    return change


DAMAGES = {
    "truncated": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1000]),
        "truncated or corrupted",
    ),
    "empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "truncated or corrupted"),
    "random bytes": (
        lambda folder: (folder / WEIGHTS).write_bytes(bytes(range(255, 0, -1)) * 7),
        "truncated or corrupted",
    ),
    "NaN": (
        lambda folder: edit_weights(folder, "key.W_enc", with_value((3, 5), torch.nan)),
        "not finite, first in key.W_enc",
    ),
    "infinite": (
        lambda folder: edit_weights(folder, "query.b_dec", with_value((7,), torch.inf)),
        "not finite, first in query.b_dec",
    ),
    "wrong d_query": (
        lambda folder: edit_cfg(folder, d_query=306),
        r"query.W_dec should have shape \(306, 60\), the file has \(307, 60\)",
    ),
    "wrong n_pairs": (
        lambda folder: edit_cfg(folder, n_pairs=1000),
        r"feature_map.indices should have shape \(1000, 3\), the file has \(1009, 3\)",
    ),
    "other halves": (
        lambda folder: edit_cfg(folder, half_architecture="transcoder"),
        r"threshold should have shape None, the file has \(311,\)",
    ),
    "tensor missing": (
        lambda folder: edit_weights(folder, "query.W_enc", lambda tensor: None),
        r"query.W_enc should have shape \(13, 307\), the file has None",
    ),
    "query feature out of range": (
        lambda folder: edit_weights(folder, "feature_map.digits", with_value((17, 0, 1), 2)),
        r"Pair indices must lie in \[0, 307\] x \[0, 311\] x \[0, 5\].*another dictionary",
    ),
    "head out of range": (
        lambda folder: edit_weights(folder, "feature_map.digits", with_value((17, 2, 0), 6)),
        r"Pair indices must lie in .*311, 6\]: the map belongs to another dictionary",
    ),
    "pair twice": (
        lambda folder: edit_weights(
            folder, "feature_map.digits", lambda digits: digits[[0, *range(1, 1008), 0]]
        ),
        r"The map lists the pair \(0, \d+, \d\) twice: merge duplicates first",
    ),
    "NaN in the statistics": (
        lambda folder: edit_weights(
            folder, "feature_map.statistics", with_value((17, 0), torch.nan)
        ),
        "not finite, first in feature_map.statistics",
    ),
    "statistics of other pairs": (
        lambda folder: edit_weights(
            folder, "feature_map.statistics", lambda statistics: statistics[:1000]
        ),
        r"feature_map.statistics should have shape \(1009, 3\), the file has \(1000, 3\)",
    ),
    "NaN in a pair": (
        lambda folder: edit_weights(
            folder,
            "feature_map.digits",
            lambda digits: with_value((17, 0, 3), torch.nan)(digits.float()),
        ),
        "Packed pairs must be integers 0 to 255",
    ),
    "pairs of another format": (
        lambda folder: edit_weights(
            folder, "feature_map.digits", lambda digits: digits[..., :3].contiguous()
        ),
        r"of shape \[n_pairs, 3, 4\], got shape \[1009, 3, 3\]",
    ),
    "pair weight above 1": (
        lambda folder: edit_weights(folder, "feature_map.weights", with_value((2,), 1.5)),
        r"Pair weights must be finite numbers in \[0, 1\]",
    ),
    "cfg cut off": (
        lambda folder: (folder / "cfg.json").write_text('{"d_in": '),
        r"cfg.json is not the config of a dictionary \(JSONDecodeError",
    ),
    "cfg without fields": (
        lambda folder: (folder / "cfg.json").write_text("{}"),
        r"cfg.json is not the config of a dictionary \(KeyError",
    ),
    "unknown architecture": (
        lambda folder: edit_cfg(folder, architecture="nope"),
        r"cfg.json is not the config of a dictionary \(KeyError\('nope'\)",
    ),
    "another SAE": (
        lambda folder: edit_cfg(folder, architecture="standard"),
        "not of type BilinearQKDictionary",
    ),
    "no attention": (lambda folder: edit_cfg(folder, attention={}), "cfg.attention is empty"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_refused_in_one_line(damage, saved, tmp_path):
    change, message = DAMAGES[damage]
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    change(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        qk.BilinearQKDictionary.load_from_disk(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["cfg.json", WEIGHTS])
def test_missing_files_are_named(missing, saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    (tmp_path / missing).unlink()
    with pytest.raises(
        FileNotFoundError, match=f"{tmp_path} is not a dictionary folder: {missing} is missing"
    ):
        qk.BilinearQKDictionary.load_from_disk(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a dictionary folder"):
        qk.BilinearQKDictionary.load_from_disk(tmp_path / "nowhere")


# What is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda d: qk.BilinearQKDictionary(d.cfg, use_error_term=True),
            "two outputs and no error term: use d.patched",
        ),
        (
            lambda d: setattr(d, "use_error_term", True),
            "two outputs and no error term: use d.patched",
        ),
        (
            lambda d: d.fold_activation_norm_scaling_factor(2.0),
            "trained without activation normalisation",
        ),
        (
            lambda d: d.fold_activation_whitening(*torch.ones(3, 13)),
            "trained without activation whitening",
        ),
        (
            lambda d: d.fold_and_get_W_dec_norm(),
            r"two decoders: fold d.query and d.key, or call d.fold_W_dec_norm\(\)",
        ),
        (lambda d: d.turn_on_forward_pass_hook_z_reshaping(), "read the layer's input, not hook_z"),
        (lambda d: setattr(d, "hook_z_reshaping_mode", True), "cannot be attached with add_sae"),
    ],
)
def test_what_has_no_meaning_here_is_refused(dictionary, call, message):
    before = {name: tensor.clone() for name, tensor in dictionary.state_dict().items()}
    with pytest.raises(NotImplementedError, match=message):
        call(dictionary)
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in dictionary.state_dict().items()
    )


def sae_model(mode: str, kind: str = "gpt2"):
    """The model in SAELens's own classes, to which SAEs can be attached."""
    if mode == "bridge":
        options = dict(hf_model=tiny_hf_model(kind), tokenizer=tiny_tokenizer(), device="cpu")
        return (
            SAETransformerBridge.boot_transformers("tiny", **options).requires_grad_(False).eval()
        )
    hooked = tiny_model(kind, "hooked")
    model = HookedSAETransformer(hooked.cfg, tokenizer=tiny_tokenizer(), move_to_device=False)
    model.load_state_dict(hooked.state_dict())
    return model.requires_grad_(False).eval()


def dictionary_of(model, **cfg) -> qk.BilinearQKDictionary:
    fingerprint = list(qk_weights(model, 1).fingerprint())
    return make_dictionary(
        spec=attention_spec(model, 1), d_query=29, d_key=31, layer=1, fingerprint=fingerprint, **cfg
    )


@pytest.mark.parametrize("mode", ["bridge", "hooked"])
def test_add_sae_is_refused(mode):
    model = sae_model(mode)
    d = dictionary_of(model, metadata=SAEMetadata(hook_name=hook_names(model, 1).input))
    logits = model(tiny_tokens(2, 7))
    with pytest.raises(
        NotImplementedError,
        match=r"cannot be attached with add_sae.*use d.patched\(model\), or attach d.query",
    ):
        model.add_sae(d)
    assert not model.acts_to_saes
    assert torch.equal(model(tiny_tokens(2, 7)), logits)


@pytest.mark.parametrize("kind", KINDS)
def test_the_halves_can_be_attached_as_the_refusal_says(kind):
    """Stock SAELens with both halves attached attends as the dictionary reconstructs."""
    model = sae_model("bridge", kind)
    d = dictionary_of(model)
    names = hook_names(model, 1)
    seen = {}
    model.add_sae(d.query)
    model.add_sae(d.key)
    record = [
        (name, lambda value, hook, name=name: seen.update({name: value}))
        for name in (names.input, names.pattern)
    ]
    model.run_with_hooks(tiny_tokens(2, 7), fwd_hooks=record, prepend_bos=False)
    torch.testing.assert_close(seen[names.pattern], d.pattern(seen[names.input]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "call", ["encode", "encode_query", "encode_key", "forward", "queries_keys", "scores", "pattern"]
)
def test_inputs_of_another_width_are_refused(dictionary, call):
    with pytest.raises(
        ValueError, match=r"x must have width d_in = 13 in its last axis, got shape \[2, 11, 12\]"
    ):
        getattr(dictionary, call)(torch.zeros(2, 11, 12))


def test_the_map_is_needed_for_its_pattern():
    d = make_dictionary(n_pairs=0)
    assert not d.has_feature_map
    assert len(d.pair_frame()) == 0
    with pytest.raises(ValueError, match=r"no feature map: run step 2 .* or use 'transcoders'"):
        d.pattern(random_x(), source="feature_map")


def test_unknown_sources_are_refused(dictionary, monkeypatch):
    monkeypatch.setattr(
        "jaxtyping.config.jaxtyping_disable", True
    )  # what users meet outside pytest
    with pytest.raises(
        ValueError, match="source must be 'transcoders' or 'feature_map', got 'model'"
    ):
        dictionary.pattern(random_x(), source="model")


@pytest.mark.parametrize("source", SOURCES)
def test_nan_inputs_give_nan(dictionary, source):
    """From the position of the NaN on; what comes before, and the other sequence, are untouched."""
    x = random_x()
    clean = dictionary.pattern(x, source)
    x[1, 5] = torch.nan
    pattern = dictionary.pattern(x, source)
    assert pattern[1, :, 5:, :].isnan().any(dim=-1).all()
    torch.testing.assert_close(pattern[0], clean[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(pattern[1, :, :5], clean[1, :, :5], rtol=0, atol=1e-6)


@pytest.mark.parametrize("sizes", [(306, 311, 6), (307, 312, 6), (307, 311, 5)])
def test_maps_of_another_dictionary_are_refused(dictionary, sizes):
    """Their constant feature would be taken for a real one."""
    foreign = SparseFeatureMap([(0, 1, 2)], torch.ones(1), *sizes)
    kept = dictionary.feature_map
    with pytest.raises(
        ValueError, match=r"must be for \(d_query, d_key, n_heads\) = \(307, 311, 6\), got one for"
    ):
        dictionary.set_feature_map(foreign)
    assert dictionary.feature_map is kept
    assert dictionary.cfg.n_pairs == 1009


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input must be False"),
        (
            {"normalize_activations": "layer_norm"},
            "normalize_activations must be 'none', got 'layer_norm'",
        ),
        ({"d_in": 12}, "d_in must be the attention's d_model 13, got 12"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        qk.BilinearQKConfig(
            **{"d_in": 13, "d_query": 7, "d_key": 11, "attention": SPEC.to_dict(), **changes}
        )


def test_a_dictionary_needs_its_attention():
    with pytest.raises(ValueError, match=r"cfg\.attention is empty"):
        qk.BilinearQKDictionary(qk.BilinearQKConfig(d_in=13, d_query=7, d_key=11))


# The table of pairs


def test_pair_frame_lists_every_pair_with_its_score_and_statistics(dictionary, saved):
    before = {name: tensor.clone() for name, tensor in dictionary.state_dict().items()}
    frame, kept = dictionary.pair_frame(), dictionary.feature_map
    assert list(frame.columns) == [
        "query_feature",
        "key_feature",
        "head",
        "weight",
        "score_at_0",
        "importance",
        "effect",
        "co_occurrence",
    ]
    assert len(frame) == 1009
    listed = torch.tensor(frame[["query_feature", "key_feature", "head"]].to_numpy().tolist())
    assert torch.equal(listed, kept.indices)
    expected = []
    for a, b, h in listed.tolist():
        q = dictionary.query.b_dec if a == D_QUERY else dictionary.query.W_dec[a]
        k = dictionary.key.b_dec if b == D_KEY else dictionary.key.W_dec[b]
        expected.append(
            float(q[10 * h : 10 * h + 10] @ k[10 * (h // 2) : 10 * (h // 2) + 10]) * SPEC.scale
        )
    pd.testing.assert_series_equal(
        frame["score_at_0"], pd.Series(expected, name="score_at_0"), check_dtype=False, atol=1e-6
    )
    assert torch.equal(torch.tensor(frame["weight"].to_list()), kept.weights)
    measured = kept.statistics[:, 2] > 0
    assert 0 < int(measured.sum()) < 1009
    statistics = frame[["importance", "effect", "co_occurrence"]].to_numpy()
    assert np.isnan(statistics[~measured.numpy()]).all()
    assert np.array_equal(statistics[measured.numpy()], kept.statistics[measured].numpy())
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in dictionary.state_dict().items()
    ), "left unchanged"
    loaded = qk.BilinearQKDictionary.load_from_disk(saved)
    pd.testing.assert_frame_equal(loaded.pair_frame(), frame, rtol=1e-5)


OFFSETS = (0, 1, 5, 40)


@pytest.mark.parametrize("rotary", [(), (1.0, 0.3, 0.02)], ids=["none", "partial"])
def test_pair_kernel_equals_the_loop(rotary):
    d = make_dictionary(
        spec=AttentionSpec(6, 3, d_head=10, d_model=13, scale=0.4, rotary_inv_freq=rotary)
    )
    kinds = [(7, 5, 4), (D_QUERY, 5, 4), (7, D_KEY, 1), (D_QUERY, D_KEY, 5), (300, 310, 0)]
    kernel = d.pair_kernel(kinds, OFFSETS)
    assert kernel.shape == (5, 4)
    for pair, scores in zip(kinds, kernel.tolist(), strict=True):
        assert scores == pytest.approx(
            [loop_kernel(pair, d.decoders, d.spec, offset) for offset in OFFSETS], abs=1e-5
        )
    assert torch.equal(kernel, d.pair_kernel(torch.tensor(kinds), torch.tensor(OFFSETS)))
    assert (kernel[:, 1:] == kernel[:, :1]).all() == (not rotary)
    assert d.pair_kernel([], OFFSETS).shape == (0, 4)


def test_pair_kernel_is_what_a_unit_of_both_activations_adds(dictionary):
    """Second difference of the transcoders' scores: activation 1 more of the query feature, of the key feature, of both."""
    x, (a, b, h), (i, j) = random_x(), (300, 17, 4), (9, 2)

    def scores(query_more: float, key_more: float) -> Tensor:
        def more(at, value):
            return lambda acts, hook: acts.index_put(
                (torch.tensor(1), *map(torch.tensor, at)), acts[(1, *at)] + value
            )

        hooks = [("query", (i, a), query_more), ("key", (j, b), key_more)]
        with dictionary.hooks(
            fwd_hooks=[(f"{side}.hook_sae_acts_post", more(at, v)) for side, at, v in hooks]
        ):
            return dictionary.scores(x)[1]

    difference = scores(1, 1) - scores(1, 0) - scores(0, 1) + scores(0, 0)
    kernel = dictionary.pair_kernel([(a, b, head) for head in range(6)], [i - j])[:, 0]
    torch.testing.assert_close(difference[:, i, j], kernel, rtol=0, atol=1e-5)
    assert kernel[h].abs() > 1e-3
    difference[:, i, j] = 0
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("pair", "offset"),
    [
        ((D_QUERY + 1, 0, 0), 0),
        ((0, D_KEY + 1, 0), 0),
        ((0, 0, 6), 0),
        ((-1, 0, 0), 0),
        ((0, 0, 0), -1),
    ],
)
def test_pair_kernel_refuses_what_is_out_of_range(dictionary, pair, offset):
    with pytest.raises(
        ValueError, match=r"lie in \[0, 307\] x \[0, 311\] x \[0, 5\] and offsets be at least 0"
    ):
        dictionary.pair_kernel([(1, 2, 3), pair], [1, offset])


def test_decoders_end_with_the_biases(dictionary):
    decoders = dictionary.decoders
    assert decoders.query.shape == (D_QUERY + 1, 6, 10)
    assert decoders.key.shape == (D_KEY + 1, 3, 10)
    assert torch.equal(decoders.query[-1].flatten(), dictionary.query.b_dec)
    assert torch.equal(decoders.key[-1].flatten(), dictionary.key.b_dec)
    assert torch.equal(decoders.query[5, 4], dictionary.query.W_dec[5, 40:50])


def test_one_pair_of_one_prompt_by_hand():
    """Scores of a map with a single pair: weight x both activations x rotated decoder product, elsewhere the constants."""
    d = make_dictionary(d_query=29, d_key=31, n_pairs=0)
    x = random_x()
    query_acts, key_acts = d.encode_query(x), d.encode_key(x)
    a, b = int(query_acts[1, 8].argmax()), int(key_acts[1, 3].argmax())
    assert min(query_acts[1, 8, a], key_acts[1, 3, b]) > 0.5
    d.set_feature_map(SparseFeatureMap([(a, b, 4)], torch.tensor([0.25]), 29, 31, 6))
    turned = rotate(d.query.W_dec[a, 40:50].expand(1, 1, 1, 10), SPEC, torch.tensor([5]))[0, 0, 0]
    term = (
        0.25
        * query_acts[1, 8, a]
        * key_acts[1, 3, b]
        * SPEC.scale
        * (turned @ d.key.W_dec[b, 20:30])
    )
    biases = [
        side.b_dec.unflatten(0, (heads, 10)).expand(1, 11, -1, -1)
        for side, heads in ((d.query, 6), (d.key, 3))
    ]
    constant = attention_scores(*biases, SPEC)
    scores = d.scores(x, "feature_map")
    assert abs(term) > 1e-3
    torch.testing.assert_close(scores[1, 4, 8, 3], constant[0, 4, 8, 3] + term, rtol=0, atol=1e-6)
    others = [head for head in range(6) if head != 4]
    torch.testing.assert_close(
        scores[:, others], constant[:, others].tril().expand(2, -1, -1, -1), rtol=0, atol=1e-6
    )
