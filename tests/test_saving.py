"""A saved dictionary comes back bit by bit, and a damaged folder says what is wrong with it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from comparing import assert_near
from random_dictionaries import (
    D_KEY,
    D_QUERY,
    N_PAIRS,
    SOURCES,
    SPEC,
    is_in_step,
    random_dictionary,
    random_x,
)
from sae_lens import SAE
from safetensors.torch import load_file, save_file
from torch import Tensor

import sae_lens_qk as qk

WEIGHTS = "sae_weights.safetensors"
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


@pytest.fixture(scope="module")
def dictionary() -> qk.BilinearQKDictionary:
    """Shared and not to be changed."""
    return random_dictionary()


@pytest.fixture(scope="module")
def folder(dictionary, tmp_path_factory) -> Path:
    """Of the saved dictionary, shared and not to be changed."""
    path = tmp_path_factory.mktemp("saved")
    dictionary.save_model(path)
    return path


# Round trips


def test_a_folder_holds_json_and_safetensors_alone(dictionary, folder):
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["README.md", "SHA256SUMS", "cfg.json", WEIGHTS]
    cfg = json.loads((folder / "cfg.json").read_text())
    assert cfg["architecture"] == "bilinear_qk"
    sizes = (cfg["d_query"], cfg["d_key"], cfg["d_sae"], cfg["n_pairs"])
    assert sizes == (D_QUERY, D_KEY, D_QUERY + D_KEY, N_PAIRS)
    assert qk.AttentionSpec.from_dict(cfg["attention"]) == SPEC
    assert "feature_map.indices" in dictionary.state_dict(), "saving changed the dictionary"


def test_stored_tensors_are_the_halves_and_the_map(folder):
    tensors = load_file(folder / WEIGHTS)
    halves = {f"{side}.{name}" for side in ("query", "key") for name in PARAMETERS}
    parts = {"feature_map.digits", "feature_map.weights", "feature_map.statistics"}
    assert set(tensors) == halves | parts
    assert tensors.pop("feature_map.digits").dtype == torch.uint8
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("loader", [qk.BilinearQKDictionary, SAE])
def test_a_loaded_dictionary_computes_the_same_bits(dictionary, folder, loader):
    loaded = loader.load_from_disk(folder)
    assert isinstance(loaded, qk.BilinearQKDictionary)
    assert loaded.cfg.to_dict() == dictionary.cfg.to_dict()
    loaded_tensors = loaded.state_dict()
    for name, tensor in dictionary.state_dict().items():
        assert loaded_tensors[name].dtype == tensor.dtype
        if name == "feature_map.statistics":  # stored as logarithms
            torch.testing.assert_close(loaded_tensors[name], tensor, rtol=1e-5, atol=0)
        else:
            assert torch.equal(loaded_tensors[name], tensor), name
    x = random_x()
    for source in SOURCES:
        assert torch.equal(loaded.pattern(x, source), dictionary.pattern(x, source))
    assert is_in_step(loaded, torch.float32)


@pytest.mark.parametrize("half", ["transcoder", "jumprelu_transcoder"])
@pytest.mark.parametrize("n_pairs", [0, 101])
def test_both_kinds_of_halves_with_and_without_a_map(half, n_pairs, tmp_path):
    d = random_dictionary(
        half,
        d_query=29,
        d_key=31,
        n_pairs=n_pairs,
    )
    d.save_model(tmp_path)
    loaded = qk.BilinearQKDictionary.load_from_disk(tmp_path)
    assert loaded.has_feature_map == d.has_feature_map == (n_pairs > 0)
    assert torch.equal(loaded.pattern(random_x()), d.pattern(random_x()))
    assert type(loaded.query) is type(d.query)


@pytest.mark.parametrize("loader", [qk.BilinearQKDictionary, SAE])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float16, 1e-3), (torch.bfloat16, 6e-3), (torch.float64, 1e-7)],
)
def test_loading_in_another_dtype_keeps_the_map(dictionary, folder, dtype, tolerance, loader):
    loaded = loader.load_from_disk(folder, dtype=str(dtype).removeprefix("torch."))
    assert is_in_step(loaded, dtype)
    feature_map = loaded.feature_map
    assert feature_map.indices.dtype == torch.int64
    assert torch.equal(feature_map.indices, dictionary.feature_map.indices)
    assert feature_map.indices.amax(dim=0)[:2].tolist() == [D_QUERY, D_KEY]
    weights = dictionary.feature_map.weights
    assert_near(feature_map.weights.float(), weights, 2**-8)
    assert loaded.encode(random_x()).dtype == dtype
    for source in SOURCES:
        difference = loaded.pattern(random_x(), source) - dictionary.pattern(random_x(), source)
        assert difference.abs().mean() < tolerance


@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"),
    [
        (torch.float16, 0.02, 1e-7),  # subnormal
        (torch.bfloat16, 0.1, 0.0),
        (torch.float32, 1e-5, 0.0),
        (torch.float64, 1e-5, 0.0),
    ],
)
def test_a_dictionary_saved_in_a_dtype_comes_back_in_it(dictionary, tmp_path, dtype, rtol, atol):
    cast = random_dictionary().to(dtype)
    cast.save_model(tmp_path)
    loaded = qk.BilinearQKDictionary.load_from_disk(tmp_path)
    assert is_in_step(loaded, dtype)
    assert torch.equal(loaded.feature_map.indices, dictionary.feature_map.indices)
    assert torch.equal(loaded.feature_map.weights, cast.feature_map.weights)
    statistics = loaded.feature_map.statistics.double()
    expected = dictionary.feature_map.statistics.double()
    assert torch.equal(statistics[:, 2] == 0, expected[:, 2] == 0), "measured or not"
    torch.testing.assert_close(statistics, expected, rtol=rtol, atol=atol)


def test_a_map_without_statistics_is_saved_without_them(tmp_path):
    """As files of earlier versions are."""
    d = random_dictionary(
        d_query=29,
        d_key=31,
        n_pairs=101,
    )
    indices = d.feature_map.indices
    weights = d.feature_map.weights
    d.set_feature_map(qk.SparseFeatureMap(indices, weights, 29, 31, 6))
    d.save_model(tmp_path)
    assert "feature_map.statistics" not in load_file(tmp_path / WEIGHTS)
    loaded = qk.BilinearQKDictionary.load_from_disk(tmp_path)
    assert torch.equal(loaded.feature_map.indices, indices)
    assert torch.equal(loaded.feature_map.weights, weights)
    assert loaded.feature_map.statistics.shape == (101, 3)
    statistics = loaded.pair_frame()[["importance", "effect", "co_occurrence"]]
    assert statistics.isna().all(axis=None)


# What a damaged or foreign folder says


def write_bytes(content: bytes):
    return lambda folder: (folder / WEIGHTS).write_bytes(content)


def truncate(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-1000])


def edit_tensor(name: str, change):
    """Damage that replaces a stored tensor by `change(tensor)`; None: removes it."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        tensors[name] = change(tensors[name])
        if tensors[name] is None:
            del tensors[name]
        save_file(tensors, folder / WEIGHTS)

    return damage


def set_value(
    name: str,
    position: tuple[int, ...],
    value: float,
):
    """Damage to one number of a stored tensor."""

    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.float() if value != value else tensor  # integers hold no NaN
        tensor[position] = value
        return tensor

    return edit_tensor(name, change)


def edit_cfg(**changes):
    def damage(folder: Path) -> None:
        path = folder / "cfg.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def write_cfg(text: str):
    return lambda folder: (folder / "cfg.json").write_text(text)


DAMAGES = {
    "truncated": (truncate, "truncated or corrupted"),
    "empty": (write_bytes(b""), "truncated or corrupted"),
    "random bytes": (write_bytes(bytes(range(255, 0, -1)) * 7), "truncated or corrupted"),
    "NaN": (set_value("key.W_enc", (3, 5), torch.nan), "not finite, first in key.W_enc"),
    "infinite": (set_value("query.b_dec", (7,), torch.inf), "not finite, first in query.b_dec"),
    "wrong d_query": (edit_cfg(d_query=306), r"W_dec should have shape \(306, 60\)"),
    "wrong n_pairs": (edit_cfg(n_pairs=1000), r"indices should have shape \(1000, 3\)"),
    "other halves": (
        edit_cfg(half_architecture="transcoder"),
        "threshold should have shape None",
    ),
    "tensor missing": (
        edit_tensor("query.W_enc", lambda tensor: None),
        r"shape \(13, 307\), the file has None",
    ),
    "query feature out of range": (
        set_value("feature_map.digits", (17, 0, 1), 2),
        "belongs to another dictionary",
    ),
    "head out of range": (
        set_value("feature_map.digits", (17, 2, 0), 6),
        "belongs to another dictionary",
    ),
    "pair twice": (
        edit_tensor("feature_map.digits", lambda digits: digits[[0, *range(1, 1008), 0]]),
        "twice: merge duplicates first",
    ),
    "NaN in the statistics": (
        set_value("feature_map.statistics", (17, 0), torch.nan),
        "not finite, first in feature_map.stat",
    ),
    "statistics of other pairs": (
        edit_tensor("feature_map.statistics", lambda statistics: statistics[:1000]),
        r"statistics should have shape \(1009, 3\)",
    ),
    "NaN in a pair": (
        set_value("feature_map.digits", (17, 0, 3), torch.nan),
        "Packed pairs must be integers",
    ),
    "pairs of another format": (
        edit_tensor("feature_map.digits", lambda digits: digits[..., :3].contiguous()),
        r"\[n_pairs, 3, 4\], got shape \[1009, 3, 3\]",
    ),
    "pair weight above 1": (
        set_value("feature_map.weights", (2,), 1.5),
        r"must be finite numbers in \[0, 1\]",
    ),
    "cfg cut off": (write_cfg('{"d_in": '), "JSONDecodeError"),
    "cfg without fields": (write_cfg("{}"), "KeyError"),
    "unknown architecture": (edit_cfg(architecture="nope"), r"KeyError\('nope'\)"),
    "another SAE": (edit_cfg(architecture="standard"), "not of type BilinearQKDictionary"),
    "no attention": (edit_cfg(attention={}), "cfg.attention is empty"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_folders_are_refused_in_one_line(damage, message, folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        qk.BilinearQKDictionary.load_from_disk(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["cfg.json", WEIGHTS])
def test_missing_files_are_named(missing, folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"{missing} is missing"):
        qk.BilinearQKDictionary.load_from_disk(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a dictionary folder"):
        qk.BilinearQKDictionary.load_from_disk(tmp_path / "nowhere")
