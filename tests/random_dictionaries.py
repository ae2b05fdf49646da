"""Dictionaries of random weights that belong to no model, with more than 256 features per side."""

import torch
from torch import Tensor

import sae_lens_qk as qk

SPEC = qk.AttentionSpec(
    6,
    3,
    d_head=10,
    d_model=13,
    scale=0.4,
    rotary_inv_freq=(1.0, 0.3, 0.02),
)
D_QUERY = 307  # above 256, which bfloat16 cannot hold
D_KEY = 311
N_PAIRS = 1009
SOURCES = ("transcoders", "feature_map")


def random_dictionary(
    half: str = "jumprelu_transcoder",
    spec: qk.AttentionSpec = SPEC,
    d_query: int = D_QUERY,
    d_key: int = D_KEY,
    n_pairs: int = N_PAIRS,
    **cfg,
) -> qk.BilinearQKDictionary:
    """Every parameter random, thresholds positive, and a `random_map` of `n_pairs`."""
    config = qk.BilinearQKConfig(
        d_in=spec.d_model,
        d_query=d_query,
        d_key=d_key,
        half_architecture=half,
        attention=spec.to_dict(),
        model_name="tiny",
        **cfg,
    )
    dictionary = qk.BilinearQKDictionary(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    scales = {"W_enc": spec.d_model**-0.5, "W_dec": 0.1}
    for full_name, parameter in dictionary.named_parameters():
        name = full_name.split(".")[1]
        noise = torch.randn(parameter.shape, generator=generator)
        if name == "threshold":
            parameter.copy_(0.2 + noise.abs())
        else:
            parameter.copy_(scales.get(name, 0.3) * noise)
    if n_pairs:
        feature_map = random_map(d_query, d_key, spec.n_heads, n_pairs, generator)
        dictionary.set_feature_map(feature_map)
    return dictionary


def random_map(
    d_query: int, d_key: int, n_heads: int, n_pairs: int, generator: torch.Generator
) -> qk.SparseFeatureMap:
    """Random pairs, five with each constant among them; every second one is not measured."""
    n_constant = 5
    n_feature_pairs = n_pairs - 2 * n_constant
    codes = torch.randperm(d_query * d_key * n_heads, generator=generator)[:n_feature_pairs]
    features = codes // n_heads
    pairs = torch.stack([features // d_key, features % d_key, codes % n_heads], dim=1)
    constant_pairs = [(d_query, 3 * i, i % 3) for i in range(n_constant)]
    constant_pairs += [(5 * i, d_key, i % 3) for i in range(n_constant)]
    pairs = torch.cat([torch.tensor(constant_pairs), pairs])
    pairs = pairs[torch.randperm(n_pairs, generator=generator)]
    weights = torch.rand(n_pairs, generator=generator)
    uniform = torch.rand(n_pairs, 3, generator=generator)
    importance = 10 ** (-6 * uniform[:, 0])  # 1e-6 to 1
    effect = 4 * uniform[:, 1] - 2
    co_occurrence = 10 ** (-6 * uniform[:, 2])
    statistics = torch.stack([importance, effect, co_occurrence], dim=1)
    statistics[::2] = 0
    return qk.SparseFeatureMap(pairs, weights, d_query, d_key, n_heads, statistics)


def random_x(spec: qk.AttentionSpec = SPEC) -> Tensor:
    """[batch 2, pos 11, d_model]."""
    return torch.randn(2, 11, spec.d_model, generator=torch.Generator().manual_seed(1))


def is_in_step(
    d: qk.BilinearQKDictionary,
    dtype: torch.dtype,
    device: str = "cpu",
) -> bool:
    """Weights, modules and configs all name the same dtype and device."""
    tensors = d.state_dict().values()
    weights_agree = all(
        tensor.dtype == dtype for tensor in tensors if tensor.is_floating_point()
    ) and all(tensor.device.type == device for tensor in tensors)
    name = str(dtype).removeprefix("torch.")
    modules_agree = all(
        (module.dtype, module.device.type, module.cfg.dtype, module.cfg.device)
        == (dtype, device, name, device)
        for module in (d, d.query, d.key)
    )
    return weights_agree and modules_agree
