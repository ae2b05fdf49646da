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
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_lens_qk.attention import SIDES, AttentionSpec, Side
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.explain.terms import AttentionRow
from sae_lens_qk.host.layer import AttentionLayer
from sae_lens_qk.host.models import cache_folder
from sae_lens_qk.host.support import Model
from sae_lens_qk.statistics.activations import ALWAYS_ON
from sae_lens_qk.stored_form import digest
from sae_lens_qk.text import token_rows
from sae_lens_qk.weights import QKWeights

logger = logging.getLogger("sae_lens_qk")

CONTROLS = ("other", "matched", "rescaled")
"""Kinds of control removals; see `control_removals`."""


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
        rows: Iterable[Float[Tensor, "pos d_model"]],
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
                moments = _Moments(acts, x)
            moments.add(acts.double(), x.double())
        if moments is None:
            raise ValueError(
                "FeatureDirections.fit needs at least one row of layer inputs, got none."
            )
        return cls(*(tensor.float() for tensor in moments.solution(ridge)))

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
        self, x: Float[Tensor, "pos d_model"], acts: Float[Tensor, "pos d"]
    ) -> Float[Tensor, "pos d_model"]:
        """What the fit leaves of x."""
        return x - self.mean - acts @ self.directions


class _Moments:
    """Sums over tokens from which least squares is solved, in float64."""

    def __init__(self, acts: Float[Tensor, "pos d"], x: Float[Tensor, "pos d_model"]):
        d = acts.shape[1]
        d_model = x.shape[1]
        double = {"dtype": torch.float64, "device": acts.device}
        self.n_tokens = 0
        self.gram = torch.zeros(d, d, **double)
        self.cross = torch.zeros(d, d_model, **double)
        self.act_sums = torch.zeros(d, **double)
        self.x_sum = torch.zeros(d_model, **double)
        self.n_fired = torch.zeros(d, **double)

    def add(self, acts: Float[Tensor, "pos d"], x: Float[Tensor, "pos d_model"]) -> None:
        firing = (acts != 0).any(dim=0).nonzero()[:, 0]
        acts = acts[:, firing]  # few of all features: the products stay small
        self.gram[firing[:, None], firing] += acts.T @ acts
        self.cross[firing] += acts.T @ x
        self.act_sums[firing] += acts.sum(dim=0)
        self.n_fired[firing] += (acts != 0).double().sum(dim=0)
        self.x_sum += x.sum(dim=0)
        self.n_tokens += len(x)

    def solution(self, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
        """mean, directions and rates of `FeatureDirections`."""
        penalty = ridge * self.gram.diagonal() / self.n_fired.clamp(min=1)
        penalty[self.n_fired == 0] = 1.0
        act_sums = self.act_sums[:, None]
        centred_gram = self.gram - act_sums * self.act_sums / self.n_tokens
        centred_gram.diagonal().add_(penalty)
        centred_cross = self.cross - act_sums * self.x_sum / self.n_tokens
        directions = torch.linalg.solve(centred_gram, centred_cross)
        mean = (self.x_sum - self.act_sums @ directions) / self.n_tokens
        return mean, directions, self.n_fired / self.n_tokens


class Directions(NamedTuple):
    """What the features of either side contribute to the layer's input."""

    query: FeatureDirections
    key: FeatureDirections

    @classmethod
    def fit(
        cls, dictionary: BilinearQKDictionary, rows: Sequence[Float[Tensor, "pos d_model"]]
    ) -> "Directions":
        """See `FeatureDirections.fit`; rows other than those to be explained."""
        return cls(
            query=FeatureDirections.fit(dictionary.encode_query, rows),
            key=FeatureDirections.fit(dictionary.encode_key, rows),
        )

    @classmethod
    def from_own_text(
        cls, dictionary: BilinearQKDictionary, model: Model, n_rows: int = 96, n_pos: int = 256
    ) -> "Directions":
        """Fitted on rows of the text that comes with the package, stored in its cache folder.

        Half a minute on two cores for SmolLM2, once per dictionary.

        Args:
            n_rows: how many.
            n_pos: length of a row, or the model's context if that is shorter.
        """
        n_pos = min(n_pos, model.cfg.n_ctx)
        # directions depend on the transcoders alone
        weights = {
            name: tensor
            for name, tensor in dictionary.state_dict().items()
            if not name.startswith("feature_map.")
        }
        name = f"{digest(weights)[:24]}-{n_rows}x{n_pos}.safetensors"
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
        inputs = torch.cat([layer.inputs(batch) for batch in tokens.split(8)])
        directions = cls.fit(dictionary, list(inputs.to(dictionary.device, dictionary.dtype)))
        directions._save(path)
        return directions

    @classmethod
    def _load(cls, path: os.PathLike[str], device: torch.device) -> "Directions":
        tensors = load_file(path, device=str(device))
        fits = [
            FeatureDirections(*(tensors[f"{side}.{name}"] for name in FeatureDirections._fields))
            for side in SIDES
        ]
        return cls(*fits)

    def _save(self, path) -> None:
        """Written apart and moved: readers find the whole file or none."""
        tensors = {
            f"{side}.{name}": tensor.contiguous()
            for side, fit in self._asdict().items()
            for name, tensor in fit._asdict().items()
        }
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
        self, weights: QKWeights, spec: AttentionSpec, x: Float[Tensor, "pos d_model"], head: int
    ):
        self._weights = weights
        self._spec = spec
        self._head = head
        positions = torch.arange(len(x), device=x.device)
        self._query = self._queries(x[-1:], positions[-1:])  # [1, d_head]
        self._keys = self._rotated_keys(x, positions)  # [pos, d_head]
        scores = (self._query @ self._keys.T)[0]
        super().__init__(spec, head, len(x) - 1, scores)

    def edited(
        self, side: Side, key_pos: int, x: Float[Tensor, "n d_model"]
    ) -> Float[Tensor, "n pos"]:
        """The row with each of n other inputs at the query, or at one key."""
        position = self.query_pos if side == "query" else key_pos
        positions = torch.full((len(x),), position, device=x.device)
        if side == "query":
            return self._queries(x, positions) @ self._keys.T
        scores = self.scores.repeat(len(x), 1)
        scores[:, key_pos] = self._rotated_keys(x, positions) @ self._query[0]
        return scores

    def _queries(self, x: Tensor, positions: Tensor) -> Float[Tensor, "n d_head"]:
        queries = self._weights.queries(x)[:, self._head] * self._spec.scale
        return self._spec.rotate(queries[None, :, None], positions)[0, :, 0]

    def _rotated_keys(self, x: Tensor, positions: Tensor) -> Float[Tensor, "n d_head"]:
        keys = self._weights.keys(x)[:, self._head // self._spec.heads_per_kv]
        return self._spec.rotate(keys[None, :, None], positions)[0, :, 0]


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
        self, row: ScoreRow, factors: Float[Tensor, "removal n"]
    ) -> Float[Tensor, "removal pos"]:
        """Scores of the edited x, after each removal."""
        return row.edited(self.side, self.key_pos, self.x - factors @ self.components)

    def predict(
        self, row: ScoreRow, factors: Float[Tensor, "removal n"]
    ) -> Float[Tensor, "removal pos"]:
        """Scores as the dictionary predicts them, after each removal."""
        return row.scores - factors @ self.rows


def best_first(values: Float[Tensor, " n"], positive: bool = False) -> Int[Tensor, " best"]:
    """Indices of the values, largest first; positive: of those above zero alone."""
    order = values.argsort(descending=True, stable=True)
    return order[: int((values > 0).sum())] if positive else order


def best_pairs(values: Float[Tensor, "a b"], positive: bool = False) -> Int[Tensor, "pair 2"]:
    """The same of (a, b)."""
    order = best_first(values.flatten(), positive)
    return torch.stack(torch.unravel_index(order, values.shape), dim=1)


def top_features(order: Int[Tensor, " best"], k: int, n: int) -> Bool[Tensor, " n"]:
    """The distinct features, among n, within the first k of a list such as a column of pairs."""
    mask = torch.zeros(n, dtype=torch.bool, device=order.device)
    mask[order[:k]] = True
    return mask


def control_removals(
    site: RemovalSite, top: Bool[Tensor, " n"], generator: torch.Generator
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
    sample = outside[torch.randperm(len(outside), generator=generator)[:n_top]]
    sizes = site.sizes
    sample_mask = torch.zeros_like(sizes).index_fill(0, sample, 1.0)
    if len(outside) >= n_top:
        controls["other"] = sample_mask
        matched = _nearest(sizes[top].sort(descending=True).values, sizes[outside])
        controls["matched"] = torch.zeros_like(sizes).index_fill(0, outside[matched], 1.0)
    sample_size = (sample_mask @ site.components).norm()
    if sample_size > 0:
        top_size = (top.to(sizes.dtype) @ site.components).norm()
        controls["rescaled"] = sample_mask * top_size / sample_size
    return controls


def _nearest(sizes: Float[Tensor, " top"], others: Float[Tensor, " n"]) -> list[int]:
    """For each size in turn the nearest of the others that no earlier one has."""
    matched: list[int] = []
    for size in sizes:
        distance = (others - size).abs()
        distance[matched] = torch.inf
        matched.append(int(distance.argmin()))
    return matched
