"""The attention of one layer as pure functions: AttentionSpec -> scores -> pattern.

Axis names, used in annotations, einops strings, docstrings and tests alike:

    batch                 sequences                        pos_q, pos_k, pos   query, key, any position
    head, kv_head         query heads, key heads           d_model, d_head     residual width, head size
    d_query, d_key        number of query / key features   pair                kept (query feature, key feature, head)

`query_acts [batch, pos_q, d_query]` and `key_acts` are sparse features; `queries`, `keys [batch, pos, head, d_head]` are
dense vectors; `scores [batch, head, pos_q, pos_k]` are scaled and unmasked, `masked_scores` hold -inf at future keys,
`log_pattern` and `pattern` come after the softmax.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class AttentionSpec:
    """All that a layer's pattern needs beside queries and keys; flat numbers, so that it travels as JSON.

    Args:
        n_heads: query heads.
        n_kv_heads: key heads; query head h reads key head `h // (n_heads // n_kv_heads)`.
        d_head: head size.
        d_model: width of the layer's input.
        scale: factor on the scores (usually d_head ** -0.5).
        rotary_inv_freq: inverse frequencies of the rotary embedding, in radians per position, one for each pair of the
            first `2 * len` dimensions of a head in rotate-half order; empty for models with learned positions.
    Raises:
        ValueError: sizes that do not fit together.
    """

    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    scale: float
    rotary_inv_freq: tuple[float, ...] = ()

    def __post_init__(self):
        for name in ("n_heads", "n_kv_heads", "d_head", "d_model"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads must be a multiple of n_kv_heads, got {self.n_heads} and {self.n_kv_heads}."
            )
        if self.rotary_dim > self.d_head:
            raise ValueError(
                f"rotary_inv_freq covers {self.rotary_dim} dimensions of a head of {self.d_head}."
            )

    @property
    def rotary_dim(self) -> int:
        """Number of leading head dimensions that rotate."""
        return 2 * len(self.rotary_inv_freq)

    @property
    def heads_per_kv(self) -> int:
        return self.n_heads // self.n_kv_heads

    @property
    def d_queries(self) -> int:
        """Width of the flattened queries, n_heads * d_head."""
        return self.n_heads * self.d_head

    @property
    def d_keys(self) -> int:
        """Width of the flattened keys, n_kv_heads * d_head."""
        return self.n_kv_heads * self.d_head

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AttentionSpec":
        """Inverse of `to_dict` (JSON turns the tuple into a list)."""
        return cls(**{**values, "rotary_inv_freq": tuple(values["rotary_inv_freq"])})

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rotary_inv_freq": list(self.rotary_inv_freq)}

    def split_queries(
        self, flat: Float[Tensor, "*batch d_queries"]
    ) -> Float[Tensor, "*batch head d_head"]:
        return flat.unflatten(-1, (self.n_heads, self.d_head))

    def split_keys(
        self, flat: Float[Tensor, "*batch d_keys"]
    ) -> Float[Tensor, "*batch kv_head d_head"]:
        return flat.unflatten(-1, (self.n_kv_heads, self.d_head))


def rotary_cos_sin(
    spec: AttentionSpec, positions: Tensor, dtype: torch.dtype
) -> tuple[Float[Tensor, "pos freq"], Float[Tensor, "pos freq"]]:
    """cos and sin of position * inverse frequency, at least in float32 (half precision is off by 0.35 rad at 255)."""
    dtype = torch.promote_types(dtype, torch.float32)
    inv_freq = torch.tensor(spec.rotary_inv_freq, dtype=dtype, device=positions.device)
    angles = positions.to(dtype)[:, None] * inv_freq
    return angles.cos(), angles.sin()


def rotate(
    vectors: Float[Tensor, "batch pos heads d_head"],
    spec: AttentionSpec,
    positions: Tensor | None = None,
) -> Float[Tensor, "batch pos heads d_head"]:
    """R_pos v at positions 0, 1, ... or as given: rotate-half on the first `rotary_dim` dimensions."""
    if not spec.rotary_dim:
        return vectors
    if positions is None:
        positions = torch.arange(vectors.shape[1], device=vectors.device)
    cos, sin = rotary_cos_sin(spec, positions, vectors.dtype)
    cos, sin = (torch.cat([part, part], dim=-1)[:, None] for part in (cos, sin))
    turning, passing = vectors[..., : spec.rotary_dim], vectors[..., spec.rotary_dim :]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, passing], dim=-1)


def attention_scores(
    queries: Float[Tensor, "batch pos_q head d_head"],
    keys: Float[Tensor, "batch pos_k kv_head d_head"],
    spec: AttentionSpec,
) -> Float[Tensor, "batch head pos_q pos_k"]:
    """scores[h,i,j] = scale * <R_i q[i,h], R_j k[j,g(h)]>, unmasked, for full sequences from position 0.

    Computed in at least float32, whatever the inputs are.
    """
    batch, pos_q, _, _ = queries.shape
    pos_k = keys.shape[1]
    dtype = torch.promote_types(queries.dtype, torch.float32)
    queries, keys = queries.to(dtype), keys.to(dtype)
    # one matrix product per key head: its query heads are stacked along the position axis
    q = (
        rotate(queries, spec)
        .unflatten(2, (spec.n_kv_heads, spec.heads_per_kv))
        .permute(0, 2, 3, 1, 4)
    )
    k = rotate(keys, spec).permute(0, 2, 3, 1)
    stacked = q.reshape(batch, spec.n_kv_heads, spec.heads_per_kv * pos_q, spec.d_head) * spec.scale
    return (stacked @ k).reshape(batch, spec.n_heads, pos_q, pos_k)


def allowed_keys(n_pos: int, device: torch.device | str = "cpu") -> Tensor:
    """Bool [pos_q, pos_k], True where key <= query."""
    return torch.ones(n_pos, n_pos, dtype=torch.bool, device=device).tril()


def mask_scores(
    scores: Float[Tensor, "batch head pos_q pos_k"],
) -> Float[Tensor, "batch head pos_q pos_k"]:
    """-inf at future keys (the authors' code fills with +1e-9 and so leaves them probability)."""
    return scores.masked_fill(~allowed_keys(scores.shape[-1], scores.device), -torch.inf)


def log_pattern(
    scores: Float[Tensor, "batch head pos_q pos_k"],
) -> Float[Tensor, "batch head pos_q pos_k"]:
    """log softmax over the allowed keys, at least in float32."""
    at_least_float32 = torch.promote_types(scores.dtype, torch.float32)
    return mask_scores(scores.to(at_least_float32)).log_softmax(dim=-1)


def pattern_from_scores(
    scores: Float[Tensor, "batch head pos_q pos_k"],
) -> Float[Tensor, "batch head pos_q pos_k"]:
    """softmax over the allowed keys, at least in float32; rows sum to 1."""
    return log_pattern(scores).exp()


def pattern_kl(
    log_pattern_true: Float[Tensor, "batch head pos_q pos_k"],
    log_pattern_other: Float[Tensor, "batch head pos_q pos_k"],
) -> Float[Tensor, "batch head pos_q"]:
    """KL(P || P') in nats of each attention row: sum over allowed keys of P (log P - log P')."""
    allowed = allowed_keys(log_pattern_true.shape[-1], log_pattern_true.device)
    difference = (log_pattern_true - log_pattern_other).masked_fill(
        ~allowed, 0.0
    )  # -inf minus -inf is NaN
    return (log_pattern_true.exp() * difference).sum(dim=-1)
