"""The attention of one layer as an object: AttentionSpec -> scores -> logits -> pattern.

Axis names, used in annotations, einops strings, docstrings and tests alike:

    batch            sequences                 pos_q, pos_k, pos   query, key, any position
    head, kv_head    query heads, key heads    d_model, d_head     residual width, head size
    d_query, d_key   number of query / key features
    pair             kept (query feature, key feature, head)

`query_acts [batch, pos_q, d_query]` and `key_acts` are sparse features; `queries`, `keys [batch,
pos, head, d_head]` are dense vectors; `scores [batch, head, pos_q, pos_k]` are scaled, uncapped and
unmasked; `logits` are what enters the softmax (softcap, bias, -inf at keys that are not allowed);
`log_pattern` and `pattern` come after it.

Whoever needs a mask, a softmax or a divergence asks the spec: no other file knows which keys a
query may attend to. To add a variant of attention, add its field and its equation here.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

Side = Literal["query", "key"]
SIDES: tuple[Side, Side] = ("query", "key")

_NUMBERS_PER_HEAD = ("sinks", "alibi_slopes")
_LISTS = ("rotary_inv_freq", *_NUMBERS_PER_HEAD)
_VARIANTS = ("window", "softcap", *_NUMBERS_PER_HEAD)  # left out of the JSON where there is none


@dataclass(frozen=True)
class AttentionSpec:
    """All that a layer's pattern needs besides queries and keys; flat numbers that travel as JSON.

    With s the scaled scores of head h, query i and key j, in the order of the computation:

        scores     s = scale <R_i q[i,h], R_j k[j,g(h)]>
        softcap    s <- softcap tanh(s / softcap)
        bias       s <- s + alibi_slopes[h] (j - i)
        mask       s <- -inf unless i - window < j <= i
        pattern    P[j] = exp(s[j]) / (sum over allowed j' of exp(s[j']) + exp(sinks[h]))

    Args:
        n_heads: query heads.
        n_kv_heads: key heads; query head h reads key head `h // (n_heads // n_kv_heads)`.
        d_head: head size.
        d_model: width of the layer's input.
        scale: factor on the scores (usually d_head ** -0.5).
        rotary_inv_freq: inverse frequencies of the rotary embedding, in radians per position, one
            per pair of the first `2 * len` dimensions of a head in rotate-half order; empty for
            models without rotary embeddings.
        window: number of keys that a query sees, itself included; None: all before it.
        softcap: bound on the absolute score; None: no bound.
        sinks: a logit per head that takes part in the softmax and belongs to no key; empty: none.
        alibi_slopes: slope per head of a bias linear in the offset; empty: none.
    Raises:
        ValueError: sizes that do not fit together.
    """

    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    scale: float
    rotary_inv_freq: tuple[float, ...] = ()
    window: int | None = None
    softcap: float | None = None
    sinks: tuple[float, ...] = ()
    alibi_slopes: tuple[float, ...] = ()

    def __post_init__(self):
        for name in ("n_heads", "n_kv_heads", "d_head", "d_model"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                "n_heads must be a multiple of n_kv_heads, "
                f"got {self.n_heads} and {self.n_kv_heads}."
            )
        if self.rotary_dim > self.d_head:
            raise ValueError(
                f"rotary_inv_freq covers {self.rotary_dim} dimensions of a head of {self.d_head}."
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 key, got {self.window}.")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be positive, got {self.softcap}.")
        for name in _NUMBERS_PER_HEAD:
            numbers = getattr(self, name)
            if numbers and len(numbers) != self.n_heads:
                raise ValueError(f"{name} must have a number per head, got {len(numbers)}.")

    # Sizes

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

    @property
    def is_plain(self) -> bool:
        """Causal softmax of the scores and nothing else: no window, cap, bias or sink."""
        uncapped = self.window is None and self.softcap is None
        return uncapped and not self.sinks and not self.alibi_slopes

    # JSON

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AttentionSpec":
        """Inverse of `to_dict` (JSON turns tuples into lists)."""
        spec_values = dict(values)
        for name in _LISTS:
            spec_values[name] = tuple(values.get(name, ()))
        return cls(**spec_values)

    def to_dict(self) -> dict[str, Any]:
        """Flat JSON values; what plain rotary attention does not have is left out."""
        values = asdict(self)
        values["rotary_inv_freq"] = list(self.rotary_inv_freq)
        for name in _VARIANTS:
            if values[name] in (None, ()):
                del values[name]
            elif name in _LISTS:
                values[name] = list(values[name])
        return values

    # Vectors and scores

    def split_queries(
        self, flat: Float[Tensor, "*batch d_queries"]
    ) -> Float[Tensor, "*batch head d_head"]:
        return flat.unflatten(-1, (self.n_heads, self.d_head))

    def split_keys(
        self, flat: Float[Tensor, "*batch d_keys"]
    ) -> Float[Tensor, "*batch kv_head d_head"]:
        return flat.unflatten(-1, (self.n_kv_heads, self.d_head))

    def cos_sin(
        self, positions: Tensor, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "pos freq"], Float[Tensor, "pos freq"]]:
        """cos and sin of position * inverse frequency, in float32 at least.

        In half precision an angle is off by 0.35 rad at position 255.
        """
        dtype = torch.promote_types(dtype, torch.float32)
        inv_freq = torch.tensor(self.rotary_inv_freq, dtype=dtype, device=positions.device)
        angles = positions.to(dtype)[:, None] * inv_freq
        return angles.cos(), angles.sin()

    def rotate(
        self, vectors: Float[Tensor, "batch pos heads d_head"], positions: Tensor | None = None
    ) -> Float[Tensor, "batch pos heads d_head"]:
        """R_pos v at positions 0, 1, ... or as given: rotate-half on the first `rotary_dim`."""
        if not self.rotary_dim:
            return vectors
        if positions is None:
            positions = torch.arange(vectors.shape[1], device=vectors.device)
        cos, sin = self.cos_sin(positions, vectors.dtype)  # [pos, freq]
        cos = cos.repeat(1, 2)[:, None]  # [pos, 1, rotary_dim]
        sin = sin.repeat(1, 2)[:, None]
        turning = vectors[..., : self.rotary_dim]
        passing = vectors[..., self.rotary_dim :]
        first, second = turning.chunk(2, dim=-1)
        quarter_turn = torch.cat([-second, first], dim=-1)
        turned = turning * cos + quarter_turn * sin
        return torch.cat([turned, passing], dim=-1)

    def scores(
        self,
        queries: Float[Tensor, "batch pos_q head d_head"],
        keys: Float[Tensor, "batch pos_k kv_head d_head"],
    ) -> Float[Tensor, "batch head pos_q pos_k"]:
        """scores[h,i,j] = scale <R_i q[i,h], R_j k[j,g(h)]>, uncapped and unmasked.

        For full sequences from position 0; in float32 at least, whatever the inputs are.
        """
        dtype = torch.promote_types(queries.dtype, torch.float32)
        rotated_queries = self.rotate(queries.to(dtype))
        rotated_keys = self.rotate(keys.to(dtype))
        return self.dot(rotated_queries, rotated_keys)

    def dot(
        self,
        queries: Float[Tensor, "batch pos_q head d_head"],
        keys: Float[Tensor, "batch pos_k kv_head d_head"],
    ) -> Float[Tensor, "batch head pos_q pos_k"]:
        """`scores` of vectors that are rotated already."""
        batch, pos_q, _, _ = queries.shape
        pos_k = keys.shape[1]
        # One matrix product per key head: its query heads are stacked along the position axis.
        heads_first = queries.transpose(1, 2)  # [batch, head, pos_q, d_head]
        stacked = heads_first.reshape(batch, self.n_kv_heads, -1, self.d_head)
        stacked = stacked * self.scale  # before the product: fewer entries than the scores
        columns = keys.permute(0, 2, 3, 1)  # [batch, kv_head, d_head, pos_k]
        scores = stacked @ columns
        return scores.reshape(batch, self.n_heads, pos_q, pos_k)

    # Which keys a query may attend to

    def allowed(
        self,
        query_pos: Any,
        key_pos: Any,
    ) -> Any:
        """True where the key may be attended to: i - window < j <= i. Integers or broadcasting."""
        causal = key_pos <= query_pos
        if self.window is None:
            return causal
        return causal & (key_pos > query_pos - self.window)

    def allowed_mask(
        self, n_pos: int, device: torch.device | str = "cpu"
    ) -> Bool[Tensor, "pos_q pos_k"]:
        """`allowed` for every query and key of a sequence."""
        positions = torch.arange(n_pos, device=device)
        return self.allowed(positions[:, None], positions)

    def first_keys(self, n_pos: int) -> np.ndarray:
        """int64 [pos_q], the first allowed key of each query; the last one is the query itself.

        What the compiled loops take.
        """
        positions = np.arange(n_pos, dtype=np.int64)
        if self.window is None:
            return np.zeros_like(positions)
        return np.maximum(positions - self.window + 1, 0)

    def n_offsets(self, n_pos: int) -> int:
        """Number of offsets i - j = 0, 1, ... at which a key may be attended to."""
        return n_pos if self.window is None else min(n_pos, self.window)

    def n_allowed(self, n_pos: int) -> int:
        """Number of (query, allowed key) in a sequence."""
        n_keys = np.arange(n_pos) - self.first_keys(n_pos) + 1  # [pos_q]
        return int(n_keys.sum())

    # From scores to the pattern

    def capped(self, scores: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """softcap tanh(s / softcap), or the scores themselves."""
        if self.softcap is None:
            return scores
        return self.softcap * torch.tanh(scores / self.softcap)

    def masked_logits(
        self, scores: Float[Tensor, "batch head pos_q pos_k"]
    ) -> Float[Tensor, "batch head pos_q pos_k"]:
        """What enters the softmax: capped, biased, -inf at keys that are not allowed."""
        logits = self.capped(scores)
        n_pos = scores.shape[-1]
        if self.alibi_slopes:
            positions = torch.arange(n_pos, device=scores.device)
            slopes = scores.new_tensor(self.alibi_slopes)[:, None, None]  # [head, 1, 1]
            logits = logits + slopes * (positions - positions[:, None])
        forbidden = ~self.allowed_mask(n_pos, scores.device)
        return logits.masked_fill(forbidden, -torch.inf)

    def log_pattern(
        self, scores: Float[Tensor, "batch head pos_q pos_k"]
    ) -> Float[Tensor, "batch head pos_q pos_k"]:
        """log softmax of the logits over the allowed keys and the sink, in float32 at least."""
        dtype = torch.promote_types(scores.dtype, torch.float32)
        logits = self.masked_logits(scores.to(dtype))
        if not self.sinks:
            return logits.log_softmax(dim=-1)
        sinks = logits.new_tensor(self.sinks)[:, None, None]  # [head, 1, 1]
        sinks = sinks.expand(*logits.shape[:-1], 1)
        logits_and_sink = torch.cat([logits, sinks], dim=-1)
        log_shares = logits_and_sink.log_softmax(dim=-1)
        return log_shares[..., :-1]

    def pattern(
        self, scores: Float[Tensor, "batch head pos_q pos_k"]
    ) -> Float[Tensor, "batch head pos_q pos_k"]:
        """Attention pattern, in float32 at least; rows sum to 1, less what the sink takes."""
        return self.log_pattern(scores).exp()

    def row_pattern(
        self, scores: Float[Tensor, "*rows key"], head: int, query_pos: int
    ) -> Float[Tensor, "*rows key"]:
        """Pattern of single rows of scores, over the keys 0 to `query_pos`.

        Args:
            head: whose bias and sink apply.
            query_pos: position of the query.
        """
        logits = self.capped(scores)
        keys = torch.arange(query_pos + 1, device=scores.device)
        if self.alibi_slopes:
            offsets = (keys - query_pos).to(logits.dtype)
            logits = logits + self.alibi_slopes[head] * offsets
        if self.window is not None:
            forbidden = ~self.allowed(query_pos, keys)
            logits = logits.masked_fill(forbidden, -torch.inf)
        if not self.sinks:
            return logits.softmax(dim=-1)
        sink = torch.full_like(logits[..., :1], self.sinks[head])
        logits_and_sink = torch.cat([logits, sink], dim=-1)
        shares = logits_and_sink.softmax(dim=-1)
        return shares[..., :-1]

    def kl(
        self,
        log_pattern_true: Float[Tensor, "batch head pos_q pos_k"],
        log_pattern_other: Float[Tensor, "batch head pos_q pos_k"],
    ) -> Float[Tensor, "batch head pos_q"]:
        """KL(P || P') of each attention row in nats: sum of P (log P - log P').

        The sum runs over the allowed keys and, where there is one, the sink.
        """
        allowed = self.allowed_mask(log_pattern_true.shape[-1], log_pattern_true.device)
        # -inf minus -inf is NaN: keys that are not allowed count as no difference
        difference = (log_pattern_true - log_pattern_other).masked_fill(~allowed, 0.0)
        pattern = log_pattern_true.exp()
        divergence = (pattern * difference).sum(dim=-1)
        if not self.sinks:
            return divergence
        sink = _remainder(pattern)
        other_sink = _remainder(log_pattern_other.exp())
        return divergence + sink * (sink.log() - other_sink.log())


def _remainder(pattern: Float[Tensor, "*rows key"]) -> Float[Tensor, "*rows"]:
    """What a row leaves to the sink, at least the rounding error of a sum of 1.

    Below that a smaller bound would add the logarithm of noise to the divergence.
    """
    rounding_error = torch.finfo(pattern.dtype).eps
    remainder = 1.0 - pattern.sum(dim=-1)
    return remainder.clamp(min=rounding_error)
