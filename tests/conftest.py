"""Fixtures over the tiny models.

The models are shared by the whole session. A test that changes a model (weights, permanent hooks,
attached SAEs) builds its own with `tiny_model`, in some 0.05 s; what it leaves behind in a shared
one is an error when the fixture ends.
"""

# ruff: noqa: E402
import os

os.environ.setdefault("NUMBA_NUM_THREADS", "1")  # read when numba is imported: tiny loops

import sys
from tempfile import TemporaryDirectory

from loopback_hub import LoopbackHub

# The Hub client reads its environment when it is imported. From here on this process and those it
# starts can reach no other Hub than an empty one on 127.0.0.1, and see no token, cache or offline
# switch (make sets one) of the machine.
assert "huggingface_hub" not in sys.modules
HUB = LoopbackHub()
HF_HOME = TemporaryDirectory(prefix="hf-home-")
HUB.start()
for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))]:
    del os.environ[name]
os.environ |= {
    "HF_ENDPOINT": HUB.url,
    "HF_HOME": HF_HOME.name,
    "HF_HUB_OFFLINE": "0",
    "HF_HUB_DISABLE_XET": "1",  # the loopback Hub has plain LFS only
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "no_proxy": "127.0.0.1",
}

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tiny_models import (
    KINDS,
    MODES,
    UNSUPPORTED,
    UNSUPPORTED_HOOKED,
    save_tiny_model,
    tiny_model,
    tiny_text_dataset,
    tiny_tokens,
    tiny_unsupported,
)
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge

torch.set_num_threads(
    int(os.environ.get("OMP_NUM_THREADS", "1"))
)  # tiny tensors: twice as fast as with 2

Model = TransformerBridge | HookedTransformer

FAST_KIND = "llama"
"""Rotary embeddings and grouped keys: the kind that exercises most."""
FAST_MODE = "bridge"

_UNSUPPORTED = [(name, "bridge") for name in UNSUPPORTED] + [
    (name, "hooked") for name in UNSUPPORTED_HOOKED
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what goes beyond the kind and host of the fast tests, by its parameters."""
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        for value in params.values():
            names = value if isinstance(value, tuple) else (value,)
            if any(_is_beyond_fast(name) for name in names):
                item.add_marker("matrix")


def _is_beyond_fast(name: object) -> bool:
    """Whether a parameter is another kind of model, or another mode, than the fast tests use."""
    if not isinstance(name, str):
        return False
    kind = name.removesuffix("_bridge")
    is_other_kind = kind in KINDS and kind != FAST_KIND
    is_other_mode = name in MODES and name != FAST_MODE
    return is_other_kind or is_other_mode


def pytest_unconfigure() -> None:
    HUB.close()
    HF_HOME.cleanup()


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """The Hub of the session, empty, with two users.

    `owner` (token hf_owner) writes in org too; `stranger` has the token hf_stranger.
    """
    HUB.reset()
    HUB.add_user("hf_owner", "owner", orgs=["org"])
    HUB.add_user("hf_stranger", "stranger")
    yield HUB
    HUB.start()
    HUB.reset()


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    """An empty folder for `cache_dir`."""
    path = tmp_path / "hub"
    path.mkdir()
    return path


@pytest.fixture
def hub_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The client's waits between its attempts in seconds, noted here instead of slept."""
    waits: list[float] = []
    for module in ("utils._http", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", SimpleNamespace(sleep=waits.append))
    return waits


@pytest.fixture
def waits(
    hub_waits: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> list[float]:
    """Seconds between our own attempts, noted instead of slept; so are the client's."""
    ours: list[float] = []
    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=ours.append))
    return ours


@pytest.fixture(scope="session")
def gpt2_bridge() -> Iterator[Model]:
    yield from _shared("gpt2", "bridge")


@pytest.fixture(scope="session")
def neox_bridge() -> Iterator[Model]:
    yield from _shared("neox", "bridge")


@pytest.fixture(scope="session")
def llama_bridge() -> Iterator[Model]:
    yield from _shared("llama", "bridge")


@pytest.fixture(scope="session", params=KINDS)
def any_bridge(request: pytest.FixtureRequest) -> Iterator[Model]:
    """Every kind as a plain bridge."""
    yield from _shared(request.param, "bridge")


@pytest.fixture(
    scope="session", params=[(kind, mode) for kind in KINDS for mode in MODES], ids="-".join
)
def any_model(request: pytest.FixtureRequest) -> Iterator[Model]:
    """Every kind in every mode."""
    yield from _shared(*request.param)


@pytest.fixture(
    scope="session",
    params=_UNSUPPORTED,
    ids="-".join,
)
def unsupported_model(request: pytest.FixtureRequest) -> Model:
    """Every model the package refuses; `request.node.callspec.id` of the test names the feature."""
    return tiny_unsupported(*request.param)


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `gpt2_bridge` as a Hugging Face folder."""
    return save_tiny_model("gpt2", tmp_path_factory.mktemp("learned-positions"))


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `llama_bridge` as a Hugging Face folder."""
    return save_tiny_model("llama", tmp_path_factory.mktemp("grouped-keys"))


@pytest.fixture(scope="session")
def text_dataset() -> Dataset:
    """About 18,000 tokens of text."""
    return tiny_text_dataset(64)


@pytest.fixture
def tokens() -> Tensor:
    """[batch 3, pos 17]."""
    return tiny_tokens(3, 17)


def _shared(
    kind: str,
    mode: str,
) -> Iterator[Model]:
    model = tiny_model(kind, mode)
    logits, hook_names = _probe(model)
    yield model
    logits_after, hook_names_after = _probe(model)
    assert hook_names_after == hook_names, (
        f"a test changed the hook points of the shared model {kind}, {mode}"
    )
    assert torch.equal(logits_after, logits), f"a test changed the shared model {kind}, {mode}"


@torch.no_grad()
def _probe(model: Model) -> tuple[Tensor, dict[str, str | None]]:
    return model(tiny_tokens(2, 7)), {key: point.name for key, point in model.hook_dict.items()}
