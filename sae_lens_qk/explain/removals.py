"""Are the feature pairs named for one attention weight its reason? Features are removed from the model's own x to see.

With head h, query i, key j and P the model's own pattern:

    removal at key j     x_j loses sum_f act_f d_f, for key j only: entry j of row i of the scores changes
    removal at query i   x_i loses it as a query: the whole row i changes
    measured             scores from the edited x through W_Q and W_K; no decoder takes part
    predicted            the model's scores minus all terms of the removed features at that place
    score drop           (s - s')[j] - sum_j' P[j'] (s - s')[j']      P drop   P[j] - P'[j]      tv   half the L1 distance

A dictionary has no decoder into x, so d_f is fitted on data (`FeatureDirections`), for every kind of dictionary alike.
"""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_lens_qk.attention import AttentionSpec, rotate
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.feature_map import SparseFeatureMap
from sae_lens_qk.host.support import Model
from sae_lens_qk.weights import QKWeights
from sae_lens_qk.host.layer import layer_inputs
from sae_lens_qk.host.models import cache_folder
from sae_lens_qk.scoring.entries import with_constant
from sae_lens_qk.stored_form import digest
from sae_lens_qk.text import token_rows

logger = logging.getLogger("sae_lens_qk")

Side = Literal["query", "key"]
SIDES: tuple[Side, Side] = ("query", "key")

ALWAYS_ON = 0.9
"""A feature that fires on a larger share of tokens stands for the mean: it is neither removed nor a control."""


class FeatureDirections(NamedTuple):
    """What each feature of one side contributes to the layer's input: x ~ mean + sum_f act_f directions[f]."""

    mean: Float[Tensor, " d_model"]
    directions: Float[Tensor, "d d_model"]
    """Zero for features that never fired in the fit."""
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
        """Least squares in float64, with an intercept; every feature is shrunk by `ridge` typical firings at zero.

        Args:
            encode: x [pos, d_model] -> acts [pos, d] of one side.
            rows: layer inputs, other ones than those to be explained.
            ridge: penalty on |d_f|^2 in units of the mean squared activation of f where it fires.
        Raises:
            ValueError: no rows.
        """
        n, gram, cross, sums, x_sum, fired = 0, *(torch.empty(0),) * 5
        for x in rows:
            acts, x = encode(x).double(), x.double()
            if not n:
                d, d_model = acts.shape[1], x.shape[1]
                gram, cross = acts.new_zeros(d, d), acts.new_zeros(d, d_model)
                sums, fired, x_sum = acts.new_zeros(d), acts.new_zeros(d), acts.new_zeros(d_model)
            live = (acts != 0).any(dim=0).nonzero()[:, 0]
            some = acts[:, live]
            gram[live[:, None], live] += some.T @ some
            cross[live] += some.T @ x
            sums[live] += some.sum(dim=0)
            fired[live] += (some != 0).double().sum(dim=0)
            x_sum, n = x_sum + x.sum(dim=0), n + len(x)
        if not n:
            raise ValueError(
                "FeatureDirections.fit needs at least one row of layer inputs, got none."
            )
        penalty = ridge * gram.diagonal() / fired.clamp(min=1)
        penalty[fired == 0] = 1.0
        centred = gram - sums[:, None] * sums / n
        centred.diagonal().add_(penalty)
        directions = torch.linalg.solve(centred, cross - sums[:, None] * x_sum / n)
        mean = (x_sum - sums @ directions) / n
        return cls(mean.float(), directions.float(), (fired / n).float())

    @property
    def usable(self) -> Bool[Tensor, " d"]:
        """Features that can be removed or serve as controls: they fired in the fit, and are not always on."""
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
            *(
                FeatureDirections.fit(encode, rows)
                for encode in (dictionary.encode_query, dictionary.encode_key)
            )
        )

    @classmethod
    def from_own_text(
        cls, dictionary: BilinearQKDictionary, model: Model, n_rows: int = 96, n_pos: int = 256
    ) -> "Directions":
        """Fitted on rows of the text that comes with the package, and kept in its cache folder.

        Half a minute on two cores for SmolLM2, once a dictionary.
        """
        of_halves = {
            name: t
            for name, t in dictionary.state_dict().items()
            if not name.startswith("feature_map.")
        }
        file = (
            cache_folder() / "directions" / f"{digest(of_halves)[:24]}-{n_rows}x{n_pos}.safetensors"
        )
        if file.is_file():
            stored = load_file(file, device=str(dictionary.device))
            sides = (
                [stored[f"{side}.{name}"] for name in FeatureDirections._fields]
                for side in cls._fields
            )
            return cls(*(FeatureDirections(*tensors) for tensors in sides))
        logger.info(
            "fitting where features lie in the layer's input, on %d tokens; kept in %s",
            n_rows * n_pos,
            file,
        )
        tokens = token_rows(model, "", "text", n_rows, n_pos)
        inputs = [layer_inputs(model, dictionary.cfg.layer, batch) for batch in tokens.split(8)]
        made = cls.fit(dictionary, list(torch.cat(inputs).to(dictionary.device, dictionary.dtype)))
        tensors = {
            f"{side}.{name}": t
            for side, fit in made._asdict().items()
            for name, t in fit._asdict().items()
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished)
        unfinished.replace(file)
        return made


class ScoreRow:
    """One row of the model's own scores, and what becomes of it when x is edited at its query or at one key.

    Args:
        x: the layer's input up to and including the query.
    """

    def __init__(
        self, weights: QKWeights, spec: AttentionSpec, x: Float[Tensor, "pos d_model"], head: int
    ):
        self._weights, self._spec, self._head = weights, spec, head
        self._positions = torch.arange(len(x), device=x.device)
        self._query = self._queries(x[-1:])
        self._keys = self._keys_of(x, self._positions)
        self.scores: Float[Tensor, " pos"] = (self._query @ self._keys.T)[0]
        self.pattern: Float[Tensor, " pos"] = self.scores.softmax(dim=-1)

    def edited(
        self, side: Side, key_pos: int, x: Float[Tensor, "n d_model"]
    ) -> Float[Tensor, "n pos"]:
        """The row with each of n other inputs at the query, or at one key."""
        if side == "query":
            return self._queries(x) @ self._keys.T
        scores = self.scores.repeat(len(x), 1)
        scores[:, key_pos] = (
            self._keys_of(x, self._positions[key_pos].expand(len(x))) @ self._query[0]
        )
        return scores

    def _queries(self, x: Tensor) -> Tensor:
        vectors = self._weights.queries(x)[:, self._head] * self._spec.scale
        return _rotated(vectors, self._spec, self._positions[-1].expand(len(x)))

    def _keys_of(self, x: Tensor, positions: Tensor) -> Tensor:
        return _rotated(
            self._weights.keys(x)[:, self._head // self._spec.heads_per_kv], self._spec, positions
        )


class Errors(NamedTuple):
    """What reconstruction misses of one head: q - q_hat at the query, k - k_hat at the keys up to it."""

    query: Float[Tensor, " d_head"]
    keys: Float[Tensor, "pos d_head"]


class ScoreTerms(NamedTuple):
    """Every term of a dictionary in one row of scores: c = query_act key_act M(i - j), the constants included.

    A feature not active at the query has no row, one not active at a key no column there. Rows and columns are sorted by
    feature, at each key; d_query and d_key stand for the constants, d_query + 1 and d_key + 1 for the errors, if given.
    """

    query_features: Int[Tensor, " a"]
    key_features: Int[Tensor, " entry"]
    key_positions: Int[Tensor, " entry"]
    terms: Float[Tensor, "a entry"]
    n_pos: int

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        dictionary: BilinearQKDictionary,
        query_acts: Float[Tensor, " d_query"],
        key_acts: Float[Tensor, "pos d_key"],
        head: int,
        kept: SparseFeatureMap | None = None,
        errors: Errors | None = None,
    ) -> "ScoreTerms":
        """Terms of the last position's query.

        Args:
            query_acts: at the query.
            key_acts: at all keys up to it.
            kept: count the pairs of this map alone, times their weights; default: every pair, weight 1.
            errors: makes the sum of all terms the model's own score.
        """
        spec = dictionary.spec
        query_acts, key_acts = (
            with_constant(query_acts[None, None])[0, 0],
            with_constant(key_acts[None])[0],
        )
        W_Q, W_K = (
            W[:, at]
            for W, at in zip(dictionary.decoders, (head, head // spec.heads_per_kv), strict=True)
        )
        a, (at, b) = query_acts.nonzero()[:, 0], key_acts.nonzero().unbind(dim=1)
        queries, keys = W_Q[a] * query_acts[a, None], W_K[b] * key_acts[at, b][:, None]
        if errors is not None:
            a, queries = (
                torch.cat([a, a.new_tensor([len(W_Q)])]),
                torch.cat([queries, errors.query[None]]),
            )
            at, b = (
                torch.cat([at, torch.arange(len(key_acts))]),
                torch.cat([b, b.new_full((len(key_acts),), len(W_K))]),
            )
            order = at.argsort(stable=True)
            at, b, keys = at[order], b[order], torch.cat([keys, errors.keys])[order]
        terms = (
            _rotated(queries * spec.scale, spec, at[-1].expand(len(a))) @ _rotated(keys, spec, at).T
        )
        made = cls(a, b, at, terms, len(key_acts))
        return made if kept is None else made._replace(terms=terms * made.weights(kept, head))

    def weights(self, kept: SparseFeatureMap, head: int) -> Float[Tensor, "a entry"]:
        """m of each term's pair in a map, 0 where it is not listed; 1 for constant x constant, 0 for the errors."""
        distinct, number = self.key_features.unique(return_inverse=True)
        pairs = torch.cartesian_prod(self.query_features, distinct, distinct.new_tensor([head]))
        found = kept.find(pairs)
        weights = kept.weights[found.clamp(min=0)].to(self.terms.dtype) * (found >= 0)
        weights[(pairs[:, 0] == kept.d_query) & (pairs[:, 1] == kept.d_key)] = 1.0
        return weights.view(len(self.query_features), -1)[:, number]

    def effects(self, pattern: Float[Tensor, " pos"]) -> Float[Tensor, "a entry"]:
        """Pattern effect of each term's pair on the key where the term is; see `pattern_effect`."""
        distinct, number = self.key_features.unique(return_inverse=True)
        mean = self.terms.new_zeros(len(self.terms), len(distinct))
        mean = mean.index_add(1, number, self.terms * pattern[self.key_positions])
        return self.terms - mean[:, number]

    def row_effects(self, pattern: Float[Tensor, " pos"], key_pos: int) -> Float[Tensor, " a"]:
        """Pattern effect of all terms of each query feature, whatever they meet."""
        return pattern_effect(self.rows("query", key_pos, self.query_features), pattern, key_pos)

    @property
    def scores(self) -> Float[Tensor, " pos"]:
        """Sum of all terms: the dictionary's row of scores."""
        return self.terms.new_zeros(self.n_pos).index_add(
            0, self.key_positions, self.terms.sum(dim=0)
        )

    def active(self, side: Side, key_pos: int, usable: Bool[Tensor, " d"]) -> Int[Tensor, " n"]:
        """Usable features active at the query, or at this key."""
        features = (
            self.query_features
            if side == "query"
            else self.key_features[self.key_positions == key_pos]
        )
        return features[
            torch.nn.functional.pad(usable, (0, 2))[features]
        ]  # neither constants nor errors

    def rows(self, side: Side, key_pos: int, features: Int[Tensor, " n"]) -> Float[Tensor, "n pos"]:
        """For each feature active at the query, or at this key: the sum of all its terms there, in the whole row."""
        rows = self.terms.new_zeros(len(features), self.n_pos)
        if side == "query":
            of_features = self.terms[torch.searchsorted(self.query_features, features)]
            return rows.index_add(1, self.key_positions, of_features)
        here = (self.key_positions == key_pos).nonzero()[:, 0]
        rows[:, key_pos] = self.terms[
            :, here[torch.searchsorted(self.key_features[here], features)]
        ].sum(dim=0)
        return rows

    def pairs(
        self, query_features: Int[Tensor, " a"], key_features: Int[Tensor, " b"]
    ) -> Float[Tensor, "a b pos"]:
        """c of each pair in the whole row, wherever its key feature is active; both lists sorted."""
        rows = self.terms.new_zeros(len(query_features), len(key_features), self.n_pos)
        listed = torch.isin(self.key_features, key_features).nonzero()[:, 0]
        b, at = (
            torch.searchsorted(key_features, self.key_features[listed]),
            self.key_positions[listed],
        )
        rows[:, b, at] = self.terms[torch.searchsorted(self.query_features, query_features)][
            :, listed
        ]
        return rows


def pattern_effect(
    rows: Float[Tensor, "*n pos"], pattern: Float[Tensor, " pos"], key_pos: int
) -> Float[Tensor, "*n"]:
    """c[j] - sum_j' P[j'] c[j'], the derivative of log P[j] along the term."""
    return rows[..., key_pos] - (rows * pattern).sum(dim=-1)


class Change(NamedTuple):
    """What n edits of a row of scores do; see the module."""

    tv: Float[Tensor, " n"]
    weight_drop: Float[Tensor, " n"]
    score_drop: Float[Tensor, " n"]

    @classmethod
    def of(
        cls, scores: Float[Tensor, " pos"], edited: Float[Tensor, "n pos"], key_pos: int
    ) -> "Change":
        clean, pattern = scores.softmax(dim=-1), edited.softmax(dim=-1)
        return cls(
            (pattern - clean).abs().sum(dim=-1) / 2,
            clean[key_pos] - pattern[:, key_pos],
            pattern_effect(scores - edited, clean, key_pos),
        )


class Place(NamedTuple):
    """What can be removed at a query or key: n features, their parts of x, and their predicted terms.

    A removal is a vector of n factors on them, zeros for the features that stay.
    """

    components: Float[Tensor, "n d_model"]
    rows: Float[Tensor, "n pos"]

    @property
    def sizes(self) -> Float[Tensor, " n"]:
        return self.components.norm(dim=1)

    def remove(
        self,
        row: ScoreRow,
        x: Float[Tensor, " d_model"],
        side: Side,
        key_pos: int,
        factors: Float[Tensor, "removal n"],
    ) -> tuple[Float[Tensor, "removal pos"], Float[Tensor, "removal pos"]]:
        """Measured and predicted scores after each removal; x: the input at the place."""
        return row.edited(
            side, key_pos, x - factors @ self.components
        ), row.scores - factors @ self.rows


def best_first(values: Float[Tensor, " n"], positive: bool = False) -> Int[Tensor, " listed"]:
    """Numbers of the values, largest first; positive: of those above zero alone."""
    order = values.argsort(descending=True, stable=True)
    return order[: int((values > 0).sum())] if positive else order


def best_pairs(values: Float[Tensor, "a b"], positive: bool = False) -> Int[Tensor, "pair 2"]:
    """The same of (a, b)."""
    listed = best_first(values.flatten(), positive)
    return torch.stack(torch.unravel_index(listed, values.shape), dim=1)


def top_features(listed: Int[Tensor, " listed"], k: int, n: int) -> Bool[Tensor, " n"]:
    """The distinct features among the first k of a list, such as one column of `best_pairs`, among n."""
    chosen = torch.zeros(n, dtype=torch.bool, device=listed.device)
    chosen[listed[:k]] = True
    return chosen


CONTROLS = ("other", "matched", "rescaled")


def control_removals(
    place: Place, top: Bool[Tensor, " n"], generator: torch.Generator
) -> dict[str, Float[Tensor, " n"]]:
    """Removals of features active at the same place and outside the top ones.

    Returns:
        Those of `CONTROLS` that exist:
        other: as many, at random; matched: as many, each the one nearest in size to a top feature, largest first;
        rescaled: as many or all there are, at random, their joint component scaled to the size of the top ones'.
    """
    outside, n_top = (~top).nonzero()[:, 0], int(top.sum())
    made: dict[str, Tensor] = {}
    if not len(outside) or not n_top:
        return made
    drawn = outside[torch.randperm(len(outside), generator=generator)[:n_top]]
    sizes = place.sizes
    if len(outside) >= n_top:
        made["other"] = _indicator(drawn, sizes)
        distance = (sizes[top].sort(descending=True).values[:, None] - sizes[outside]).abs()
        matched = []
        for row in distance:
            row[matched] = torch.inf
            matched.append(int(row.argmin()))
        made["matched"] = _indicator(outside[matched], sizes)
    joint = _indicator(drawn, sizes)
    size = (joint @ place.components).norm()
    if size > 0:
        made["rescaled"] = joint * (top.to(sizes.dtype) @ place.components).norm() / size
    return made


def _indicator(chosen: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).index_fill(0, chosen, 1.0)


def _rotated(vectors: Tensor, spec: AttentionSpec, positions: Tensor) -> Tensor:
    return rotate(vectors[None, :, None], spec, positions)[0, :, 0]
