"""Are the features named for an attention weight its reason? Remove them from the model's own x.

With head h, query i, key j and P the model's own pattern:

    removal at key j     x_j loses sum_f act_f d_f, for key j only: entry j of row i changes
    removal at query i   x_i loses it as a query: the whole row i changes
    measured             scores of the edited x through W_Q and W_K; no decoder takes part
    predicted            the model's scores minus all terms of the removed features there

A dictionary has no decoder into x, so d_f is fitted on data (`FeatureDirections`), for every kind
of dictionary alike. What an edit does to the row is `terms.Change`.
"""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from sae_lens_qk.attention import SIDES, AttentionSpec, Side
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.explain.terms import AttentionRow, Rows, rotate
from sae_lens_qk.host.layer import AttentionLayer
from sae_lens_qk.host.models import cache_folder
from sae_lens_qk.host.support import Model
from sae_lens_qk.statistics.activations import ALWAYS_ON, transcoders_digest
from sae_lens_qk.text import token_rows
from sae_lens_qk.weights import QKWeights

logger = logging.getLogger("sae_lens_qk")

CONTROLS = ("other", "matched", "rescaled")
"""Kinds of control removals; see `control_removals`."""


_Acts = Float[Tensor, "pos d"]
_Inputs = Float[Tensor, "pos d_model"]
Factors = Float[Tensor, "removal n"]
Order = Int[Tensor, " best"]


class FeatureDirections(NamedTuple):
    """Where the features of one side lie in the layer's input: x ~ mean + sum_f act_f d_f."""

    mean: Float[Tensor, " d_model"]
    directions: Float[Tensor, "d d_model"]
    """d_f; zero for features that never fired in the fit."""
    rates: Float[Tensor, " d"]
    """Share of the fit's tokens on which each feature fired."""

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        encode: Callable[[Tensor], Tensor],
        rows: Iterable[_Inputs],
        ridge: float = 1.0,
    ) -> "FeatureDirections":
        """Least squares in float64, with an intercept; `ridge` typical firings at zero shrink d_f.

        Args:
            encode: x [pos, d_model] -> acts [pos, d] of one side.
            rows: layer inputs, other ones than those to be explained.
            ridge: penalty on |d_f|^2 in units of the mean squared activation of f where it fires.
        Raises:
            ValueError: no rows.
        """
        moments = None
        for x in rows:
            acts = encode(x)
            if moments is None:
                sizes = (acts.shape[1], x.shape[1])
                moments = _Moments(*sizes, x.device)
            moments.add(acts.double(), x.double())
        if moments is None:
            raise ValueError(
                "FeatureDirections.fit needs at least one row of layer inputs, got none."
            )
        return cls(*map(Tensor.float, moments.solution(ridge)))

    @property
    def usable(self) -> Bool[Tensor, " d"]:
        """Features that may be removed or serve as controls: firing in the fit, not always on."""
        return (self.rates > 0) & (self.rates <= ALWAYS_ON)

    def components(
        self, acts: Float[Tensor, " d"], features: Int[Tensor, " n"]
    ) -> Float[Tensor, "n d_model"]:
        """act_f d_f of each of the given features."""
        return acts[features, None] * self.directions[features]

    def residual(
        self,
        x: _Inputs,
        acts: _Acts,
    ) -> _Inputs:
        """What the fit leaves of x."""
        return x - self.mean - acts @ self.directions


class _Moments:
    """Sums over tokens from which least squares is solved; one more feature, always 1: the mean."""

    def __init__(
        self,
        d: int,
        d_model: int,
        device: torch.device,
    ):
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.gram = zeros(d + 1, d + 1)  # sum of acts^T acts
        self.cross = zeros(d + 1, d_model)  # sum of acts^T x
        self.n_fired = zeros(d + 1)

    def add(
        self,
        acts: _Acts,
        x: _Inputs,
    ) -> None:
        acts = pad(acts, (0, 1), value=1.0)
        fires = acts != 0
        firing = fires.any(dim=0).nonzero()[:, 0]
        acts = acts[:, firing]  # few of all features: the products stay small
        self.gram[firing[:, None], firing] += acts.T @ acts
        self.cross[firing] += acts.T @ x
        self.n_fired += fires.sum(dim=0)

    def solution(self, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
        """mean, directions and rates of `FeatureDirections`."""
        # mean square where a feature fires: the scale of features does not matter
        mean_squares = self.gram.diagonal() / self.n_fired.clamp(min=1)
        penalty = ridge * mean_squares
        penalty[self.n_fired == 0] = 1.0  # any: it makes the matrix regular
        penalty[-1] = 0.0
        matrix = self.gram + penalty.diag()
        directions = torch.linalg.solve(matrix, self.cross)  # [d + 1, d_model]
        rates = self.n_fired / self.n_fired[-1]
        return directions[-1], directions[:-1], rates[:-1]


class Directions(NamedTuple):
    """What the features of either side contribute to the layer's input."""

    query: FeatureDirections
    key: FeatureDirections

    @classmethod
    def fit(
        cls,
        dictionary: BilinearQKDictionary,
        rows: Sequence[_Inputs],
    ) -> "Directions":
        """See `FeatureDirections.fit`; rows other than those to be explained."""
        return cls(
            query=FeatureDirections.fit(dictionary.encode_query, rows),
            key=FeatureDirections.fit(dictionary.encode_key, rows),
        )

    @classmethod
    def from_own_text(
        cls,
        dictionary: BilinearQKDictionary,
        model: Model,
        n_rows: int = 96,
        n_pos: int = 256,
    ) -> "Directions":
        """Fitted on rows of the text that comes with the package, stored in its cache folder.

        Half a minute on two cores for SmolLM2, once per dictionary.

        Args:
            n_rows: how many.
            n_pos: length of a row, or the model's context if that is shorter.
        """
        n_pos = min(n_pos, model.cfg.n_ctx)
        # directions depend on the transcoders alone
        name = f"{transcoders_digest(dictionary)[:24]}-{n_rows}x{n_pos}.safetensors"
        path = cache_folder() / "directions" / name
        if path.is_file():
            return cls._load(path, dictionary.device)
        logger.info(
            "fitting where features lie in the layer's input, on %d tokens; stored in %s",
            n_rows * n_pos,
            path,
        )
        tokens = token_rows(model, "", "text", n_rows, n_pos)
        layer = AttentionLayer(model, dictionary.cfg.layer)
        batches = [layer.inputs(batch) for batch in tokens.split(8)]
        inputs = torch.cat(batches).to(dictionary.device, dictionary.dtype)
        directions = cls.fit(dictionary, list(inputs))
        directions._save(path)
        return directions

    @classmethod
    def _load(
        cls,
        path: Path,
        device: torch.device,
    ) -> "Directions":
        tensors = load_file(path, device=str(device))
        fits = []
        for side in SIDES:
            fields = [tensors[f"{side}.{name}"] for name in FeatureDirections._fields]
            fits.append(FeatureDirections(*fields))
        return cls(*fits)

    def _save(self, path: Path) -> None:
        """Written apart and moved: readers find the whole file or none."""
        tensors = {}
        for side, fit in zip(SIDES, self, strict=True):
            for name, tensor in fit._asdict().items():
                tensors[f"{side}.{name}"] = tensor.contiguous()
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        save_file(tensors, unfinished)
        unfinished.replace(path)


class ScoreRow(AttentionRow):
    """One row of the model's own scores, to be measured again with x edited at its query or a key.

    Args:
        weights: of the layer.
        x: the layer's input up to and including the query.
    """

    def __init__(
        self,
        weights: QKWeights,
        spec: AttentionSpec,
        x: _Inputs,
        head: int,
    ):
        self._weights = weights
        self.spec = spec
        self.head = head
        positions = torch.arange(len(x), device=x.device)
        last = slice(-1, None)
        self._query = self._queries(x[last], positions[last])  # [1, d_head]
        self._keys = self._rotated_keys(x, positions)  # [pos, d_head]
        scores = self._query @ self._keys.T  # [1, pos]
        super().__init__(spec, head, len(x) - 1, *scores)

    def edited(
        self,
        side: Side,
        key_pos: int,
        x: Float[Tensor, "n d_model"],
    ) -> Rows:
        """The row with each of n other inputs at the query, or at one key."""
        position = self.query_pos if side == "query" else key_pos
        n = len(x)
        positions = torch.full((n,), position, device=x.device)
        if side == "query":
            return self._queries(x, positions) @ self._keys.T
        rows = self.scores.repeat(n, 1)
        keys = self._rotated_keys(x, positions)
        rows[:, key_pos] = keys @ self._query[0]
        return rows

    def _queries(
        self,
        x: Tensor,
        positions: Tensor,
    ) -> Tensor:
        """[n, d_head], rotated and scaled."""
        queries = self._weights.queries(x)[:, self.head]
        return rotate(self.spec, queries * self.spec.scale, positions)

    def _rotated_keys(
        self,
        x: Tensor,
        positions: Tensor,
    ) -> Tensor:
        """[n, d_head]"""
        kv_head = self.head // self.spec.heads_per_kv
        keys = self._weights.keys(x)[:, kv_head]
        return rotate(self.spec, keys, positions)


class RemovalSite(NamedTuple):
    """What can be removed at a query or key: n features, their parts of x, their predicted terms.

    A removal is a vector of n factors on them, zeros for the features that stay.
    """

    side: Side
    key_pos: int
    x: Float[Tensor, " d_model"]
    """The layer's input at the site: the query, or the key at `key_pos`."""
    components: Float[Tensor, "n d_model"]
    rows: Float[Tensor, "n pos"]

    @property
    def sizes(self) -> Float[Tensor, " n"]:
        return self.components.norm(dim=1)

    def measure(
        self,
        row: ScoreRow,
        factors: Factors,
    ) -> Rows:
        """Scores of the edited x, after each removal."""
        inputs = self.x - factors @ self.components  # [removal, d_model]
        return row.edited(self.side, self.key_pos, inputs)

    def predict(
        self,
        row: ScoreRow,
        factors: Factors,
    ) -> Rows:
        """Scores as the dictionary predicts them, after each removal."""
        return row.scores - factors @ self.rows


def best_first(
    values: Float[Tensor, " n"],
    positive: bool = False,
) -> Order:
    """Indices of the values, largest first; positive: of those above zero alone."""
    order = values.argsort(descending=True, stable=True)
    if positive:
        order = order[values[order] > 0]
    return order


def best_pairs(
    values: Float[Tensor, "a b"],
    positive: bool = False,
) -> Int[Tensor, "pair 2"]:
    """The same of (a, b)."""
    order = best_first(values.flatten(), positive)
    return torch.stack(torch.unravel_index(order, values.shape), dim=1)


def top_features(
    order: Order,
    k: int,
    n: int,
) -> Bool[Tensor, " n"]:
    """The distinct features, among n, within the first k of a list such as a column of pairs."""
    mask = torch.zeros(n, dtype=torch.bool, device=order.device)
    mask[order[:k]] = True
    return mask


def control_removals(
    site: RemovalSite,
    top: Bool[Tensor, " n"],
    generator: torch.Generator,
) -> dict[str, Float[Tensor, " n"]]:
    """Removals of features that fire at the same site and are not among the top ones.

    Returns:
        Those of `CONTROLS` that exist:
        other: as many, at random; matched: as many, each the one nearest in size to a top feature,
        largest first; rescaled: as many or all there are, at random, their joint component scaled
        to the size of the top ones'.
    """
    outside = (~top).nonzero()[:, 0]
    n_top = int(top.sum())
    controls: dict[str, Tensor] = {}
    if not len(outside) or not n_top:
        return controls
    sizes = site.sizes
    stays = torch.zeros_like(sizes)
    shuffled = torch.randperm(len(outside), generator=generator)
    sample = stays.index_fill(0, outside[shuffled[:n_top]], 1.0)
    if len(outside) >= n_top:
        controls["other"] = sample
        largest_first = sizes[top].sort(descending=True).values
        matched = _nearest(largest_first, sizes[outside])
        controls["matched"] = stays.index_fill(0, outside[matched], 1.0)
    sample_size = (sample @ site.components).norm()
    if sample_size > 0:
        top_size = (top.to(sizes.dtype) @ site.components).norm()
        controls["rescaled"] = sample * top_size / sample_size
    return controls


def _nearest(
    sizes: Float[Tensor, " top"],
    others: Float[Tensor, " n"],
) -> list[int]:
    """For each size in turn the nearest of the others that no earlier one has."""
    matched: list[int] = []
    for size in sizes:
        distance = (others - size).abs()
        distance[matched] = torch.inf
        matched.append(int(distance.argmin()))
    return matched
