"""Random tiny models, a tokenizer and texts for the tests: by seed, in memory, no network.

The sizes of a kind differ from each other, so that a swapped axis fails; every parameter is
random, norm gains and biases included, and scores reach a few units, so that a forgotten bias, gain
or scale shows.
"""

import random
import string
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, processors
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.loading_from_pretrained import (
    get_pretrained_model_config,
    get_pretrained_state_dict,
)
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

KINDS = ("gpt2", "neox", "llama")
MODES = ("bridge", "bridge_compatibility", "hooked", "hooked_processed")
UNSUPPORTED = ("qk_norm", "softcap", "sliding_window", "alibi", "scaled_rotary", "inert")
UNSUPPORTED_HOOKED = ("qk_norm", "softcap", "sliding_window", "alibi", "scaled_rotary")

N_LAYERS = 2
N_CTX = 128
WINDOW = 5
"""Keys a query sees in `tiny_unsupported("sliding_window")`."""

_SPECIAL_TOKENS = {
    "pad_token": "<pad>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
}
_CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n", "\t"]
D_VOCAB = len(_SPECIAL_TOKENS) + len(_CHARACTERS)
"""101: four special tokens, then one token per printable ASCII character, newline and tab."""

_COMMON: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "architectures": [],  # filled in by the builder: both hosts read it
}
_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 20,  # not n_heads * d_head = 24; must be a multiple of n_heads
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 37,
    "max_position_embeddings": N_CTX,
    "tie_word_embeddings": False,
}


def tiny_model(
    kind: str, mode: str = "bridge", seed: int = 0
) -> TransformerBridge | HookedTransformer:
    """A frozen random model in eval mode.

    | kind | heads | key heads | d_head | d_model | rotary_dim | biases |
    |---|---|---|---|---|---|---|
    | gpt2 | 3 | 3 | 8 | 24 | 0 (learned positions) | yes |
    | neox | 3 | 3 | 16 | 48 | 4 | yes |
    | llama | 4 | 2 | 6 | 20 | 6 | no |

    Args:
        kind: one of `KINDS`.
        mode: one of `MODES`, as `model_mode` names them. Modes of equal kind and seed compute the
            same function.
        seed: of the weights.
    """
    hf_model = tiny_hf_model(kind, seed)
    if mode in ("bridge", "bridge_compatibility"):
        model = _bridge(hf_model)
        if mode == "bridge_compatibility":
            model.enable_compatibility_mode()
    elif mode in ("hooked", "hooked_processed"):
        model = _hooked(hf_model, processed=mode == "hooked_processed")
    else:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}.")
    return model.requires_grad_(False).eval()


def tiny_hf_model(
    kind: str,
    seed: int = 0,
) -> PreTrainedModel:
    """The Hugging Face model with the weights of `tiny_model(kind, ..., seed)`, eager attention."""
    return _randomised(_config(kind), seed)


def tiny_unsupported(
    name: str, mode: str = "bridge", seed: int = 0
) -> TransformerBridge | HookedTransformer:
    """A frozen random model with one feature the package refuses.

    Args:
        name: one of `UNSUPPORTED`; inert is a bridge whose pattern hook does nothing (OPT).
        mode: bridge, or hooked for the names in `UNSUPPORTED_HOOKED`.
        seed: of the weights.
    """
    if mode == "bridge":
        model = _bridge(_randomised(_unsupported_config(name), seed))
    elif mode == "hooked":
        model = _unsupported_hooked(name, seed)
    else:
        raise ValueError(f"mode must be bridge or hooked, got {mode!r}.")
    return model.requires_grad_(False).eval()


def save_tiny_model(
    kind: str,
    folder: Path | str,
    seed: int = 0,
) -> Path:
    """Write config.json, safetensors and tokenizer of a tiny model, as `load_model` reads them.

    The folder's path must not contain "llama" or "gemma": HookedTransformer takes these names for
    architectures.
    """
    folder = Path(folder)
    tiny_hf_model(kind, seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per ASCII character, for any English prompt; prepends <bos> as Llama's does."""
    tokens = [*_SPECIAL_TOKENS.values(), *_CHARACTERS]
    tokenizer = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>")
    )
    tokenizer.decoder = decoders.Fuse()
    bos = [("<bos>", tokens.index("<bos>"))]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=bos
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **_SPECIAL_TOKENS,
        add_bos_token=True,  # or transformer_lens reloads the tokenizer from name_or_path
        name_or_path="tiny",
        clean_up_tokenization_spaces=False,
    )


def tiny_tokens(
    batch: int,
    pos: int,
    seed: int = 0,
) -> Tensor:
    """Random character tokens [batch, pos], no special tokens among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(_SPECIAL_TOKENS), D_VOCAB, (batch, pos), generator=generator)


def tiny_text_dataset(
    n_docs: int,
    seed: int = 0,
) -> Dataset:
    """Documents of 200 to 300 characters (= tokens) of made-up words, in a column "text"."""
    rng = random.Random(seed)
    syllables = [consonant + vowel for consonant in string.ascii_lowercase for vowel in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(50)]
    return Dataset.from_dict(
        {"text": [" ".join(rng.choices(words, k=60))[:300] + "." for _ in range(n_docs)]}
    )


def _config(kind: str) -> PreTrainedConfig:
    match kind:
        case "gpt2":
            config = GPT2Config(
                n_layer=N_LAYERS, n_head=3, n_embd=24, n_inner=96, n_positions=N_CTX, **_COMMON
            )
            config.n_ctx = N_CTX  # read by HookedTransformer, no longer written by transformers
        case "neox":  # HookedTransformer ignores a rope_theta other than 10000 here
            config = GPTNeoXConfig(
                hidden_size=48,
                num_hidden_layers=N_LAYERS,
                num_attention_heads=3,
                intermediate_size=37,
                max_position_embeddings=N_CTX,
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.25,
                },
                **_COMMON,
            )
        case "llama":
            rope = {
                "rope_type": "default",
                "rope_theta": 100.0,
            }  # short periods, so that positions matter
            config = LlamaConfig(**_LLAMA_LIKE, **_COMMON, rope_parameters=rope)
        case _:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}.")
    return config


def _unsupported_config(name: str) -> PreTrainedConfig:
    match name:
        case "qk_norm":
            return Qwen3Config(**_LLAMA_LIKE, **_COMMON)
        case "softcap":
            return Gemma2Config(
                **_LLAMA_LIKE, **_COMMON, query_pre_attn_scalar=6, attn_logit_softcapping=5.0
            )
        case "sliding_window":
            return MistralConfig(**_LLAMA_LIKE, **_COMMON, sliding_window=WINDOW)
        case "alibi":
            return BloomConfig(hidden_size=24, n_layer=N_LAYERS, n_head=3, **_COMMON)
        case "scaled_rotary":
            rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
            return LlamaConfig(**_LLAMA_LIKE, **_COMMON, rope_parameters=rope)
        case "inert":
            return OPTConfig(
                hidden_size=24,
                word_embed_proj_dim=24,
                num_hidden_layers=N_LAYERS,
                num_attention_heads=3,
                ffn_dim=37,
                max_position_embeddings=N_CTX,
                **_COMMON,
            )
        case _:
            raise ValueError(f"name must be one of {UNSUPPORTED}, got {name!r}.")


@torch.no_grad()
def _randomised(
    config: PreTrainedConfig,
    seed: int,
) -> PreTrainedModel:
    """A model whose matrices keep the scale of their input, with gains near 1 and biases near 0."""
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        )
    generator = torch.Generator().manual_seed(seed)
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)
    }
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in embeddings:
                parameter.copy_(noise)
            elif parameter.ndim == 2:
                fan_in = getattr(
                    module, "in_features", parameter.shape[0]
                )  # Conv1D of GPT-2 is [in, out]
                parameter.copy_(noise * fan_in**-0.5)
            else:
                parameter.copy_(0.2 * noise if name == "bias" else 1.0 + 0.3 * noise)
    model.config.architectures = [type(model).__name__]
    return model.eval()


def _bridge(hf_model: PreTrainedModel) -> TransformerBridge:
    return TransformerBridge.boot_transformers(
        "tiny", hf_model=hf_model, tokenizer=tiny_tokenizer(), device="cpu"
    )


def _hooked(
    hf_model: PreTrainedModel,
    processed: bool,
) -> HookedTransformer:
    """HookedTransformer as `from_pretrained` makes it, or `from_pretrained_no_processing`."""
    with tempfile.TemporaryDirectory(prefix="tiny-") as folder:
        hf_model.config.save_pretrained(folder)
        cfg = get_pretrained_model_config(folder, fold_ln=processed, device="cpu")
        head_dim = getattr(hf_model.config, "head_dim", cfg.d_head)
        if head_dim != cfg.d_head:  # the loader assumes d_model / n_heads
            head_sizes = {"d_head": head_dim, "rotary_dim": head_dim, "attn_scale": -1.0}
            cfg = HookedTransformerConfig.from_dict({**cfg.to_dict(), **head_sizes})
        state = get_pretrained_state_dict(folder, cfg, hf_model)
    model = HookedTransformer(cfg, tokenizer=tiny_tokenizer(), move_to_device=False)
    model.load_and_process_state_dict(
        state,
        fold_ln=processed,
        center_writing_weights=processed,
        center_unembed=processed,
        fold_value_biases=processed,
    )
    return model


def _unsupported_hooked(
    name: str,
    seed: int,
) -> HookedTransformer:
    rotary = {"positional_embedding_type": "rotary", "rotary_dim": 6}
    features: dict[str, dict[str, Any]] = {
        "qk_norm": {**rotary, "use_qk_norm": True},
        "softcap": {**rotary, "attn_scores_soft_cap": 5.0},
        "sliding_window": {
            **rotary,
            "use_local_attn": True,
            "window_size": WINDOW,
            "attn_types": ["local"] * N_LAYERS,
        },
        "alibi": {"positional_embedding_type": "alibi"},
        "scaled_rotary": {
            **rotary,
            "use_NTK_by_parts_rope": True,
            "NTK_original_ctx_len": N_CTX // 4,
        },
    }
    if name not in features:
        raise ValueError(f"name must be one of {UNSUPPORTED_HOOKED}, got {name!r}.")
    sizes = {
        "n_layers": N_LAYERS,
        "n_heads": 4,
        "d_head": 6,
        "d_model": 20,
        "d_mlp": 37,
        "n_ctx": N_CTX,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cfg = HookedTransformerConfig.from_dict(
            {**sizes, **features[name], "d_vocab": D_VOCAB, "act_fn": "gelu", "device": "cpu"}
        )
        return HookedTransformer(cfg, tokenizer=tiny_tokenizer(), move_to_device=False)
