"""What features and kept pairs fire on: densities, strengths, strongest contexts, co-occurrence, in one pass over data.

The term of a kept pair in the scores of its head at query i and key j <= i is

    term[i,j] = m query_acts[i,a] key_acts[j,b] M[a,b,h](i-j)

The constant feature (index d_query, d_key) fires with activation 1 at every position; pairs with it are pairs like others.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_qk.statistics.sums import EncodedRow, FeatureSums, RowAdder, Sums
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.host.support import Model
from sae_lens_qk.host.layer import layer_inputs
from sae_lens_qk.stored_form import digest
from sae_lens_qk.inputs import InputCache

logger = logging.getLogger("sae_lens_qk")

Side = Literal["query", "key"]
Batch = tuple[Tensor, Tensor]
"""Tokens [batch, pos], and x [batch, pos, d_model]: the layer's input."""

ALWAYS_ON = 0.9
"""A feature that fires on a larger share of tokens stands for the mean."""

_STATE, _FEATURES, _PAIRS = "activations.safetensors", "features.parquet", "pairs.parquet"
_ROWS_AT_ONCE = 64


class FeatureContext(NamedTuple):
    row: int
    pos: int
    value: float


class PairContext(NamedTuple):
    row: int
    query_pos: int
    key_pos: int
    value: float
    """The pair's term in the score."""


@dataclass(eq=False, repr=False)
class ActivationStatistics:
    """What `collect_activations` found; contexts point into `tokens`.

    Attributes:
        tokens: int32 [row, pos], every row seen.
        indices: [pair, 3], those of `d.feature_map`: a pair's number is its row there.
        sums: what all else is derived from.
        identity: of which dictionary, with how many contexts.
    """

    tokens: np.ndarray
    indices: np.ndarray
    sums: Sums
    identity: dict[str, Any]

    @property
    def n_tokens(self) -> int:
        return self.tokens.size

    @cached_property
    def features(self) -> pd.DataFrame:
        """Features of both sides.

        Returns:
            side ("query" or "key"), feature, density (share of tokens on which it fires), mean (activation where it
            fires) and max; NaN where it never fires.
        """
        frames = []
        for side, sums in (("query", self.sums.query), ("key", self.sums.key)):
            fired = sums.count > 0
            frame = pd.DataFrame(
                {
                    "side": side,
                    "feature": np.arange(len(fired)),
                    "density": sums.count / self.n_tokens,
                }
            )
            frame["mean"] = np.where(fired, sums.total / np.maximum(sums.count, 1), np.nan)
            frame["max"] = np.where(fired, sums.top_value[:, 0], np.nan)
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """Kept pairs, in the order of `d.feature_map.indices`.

        Returns:
            query_feature, key_feature, head, co_occurrence (share of (query, allowed key) positions where both features
            fire), mean (term where both fire), max, min; NaN where they never do.
        """
        sums, (n_rows, n_pos) = self.sums.pairs, self.tokens.shape
        fired = sums.count > 0
        frame = pd.DataFrame(self.indices, columns=["query_feature", "key_feature", "head"])
        frame["co_occurrence"] = sums.count / (n_rows * n_pos * (n_pos + 1) // 2)
        frame["mean"] = np.where(fired, sums.total / np.maximum(sums.count, 1), np.nan)
        frame["max"], frame["min"] = (
            np.where(fired, extreme, np.nan) for extreme in (sums.highest, sums.lowest)
        )
        return frame

    def feature_contexts(self, side: Side, feature: int) -> list[FeatureContext]:
        """Where a feature is strongest, at most one context a row, strongest first; of equals the earlier."""
        sums = self._side(side, feature)
        found = zip(sums.top_place[feature].tolist(), sums.top_value[feature].tolist(), strict=True)
        return [FeatureContext(row, pos, value) for (row, pos), value in found if row >= 0]

    def pair_contexts(self, pair_number: int) -> list[PairContext]:
        """Where a pair's term is largest in magnitude, at most one context a row, largest first; of equals the earlier.

        Args:
            pair_number: row of the pair in `pairs` and in `d.feature_map.indices`.
        """
        sums = self.sums.pairs
        if not 0 <= pair_number < len(sums.count):
            raise ValueError(
                f"Pairs have numbers 0 to {len(sums.count) - 1}, their rows in `pairs`; got {pair_number}."
            )
        found = zip(
            sums.top_place[pair_number].tolist(), sums.top_value[pair_number].tolist(), strict=True
        )
        return [PairContext(row, i, j, value) for (row, i, j), value in found if row >= 0]

    def feature_co_occurrence(self, side: Side, feature: int, n: int = 10) -> pd.DataFrame:
        """The n features of the same side that fire most often together with one; of equals the first.

        Returns:
            feature, count (tokens on which both fire), share (of the tokens on which the given one fires).
        Raises:
            ValueError: no such feature, or the dictionary is so wide that this was not counted.
        """
        sums = self._side(side, feature)
        if not sums.together.size:
            raise ValueError(
                f"Co-occurrence of {len(sums.count)} features a side was not counted, the table would be too large: drop "
                "the dead ones first (d.compact)."
            )
        counts = sums.together[feature] + sums.together[:, feature]
        best = np.argsort(-counts, kind="stable")[:n]
        best = best[counts[best] > 0]
        return pd.DataFrame(
            {
                "feature": best,
                "count": counts[best],
                "share": counts[best] / max(sums.count[feature], 1),
            }
        )

    def window(
        self, row: int, pos: int, before: int = 12, after: int = 6
    ) -> tuple[Int[np.ndarray, " token"], int]:
        """Tokens of a row around a position, and the index of that position among them."""
        n_rows, n_pos = self.tokens.shape
        if not (0 <= row < n_rows and 0 <= pos < n_pos):
            raise ValueError(
                f"{n_rows} rows of {n_pos} tokens were seen, there is no row {row}, position {pos}."
            )
        first = max(0, pos - before)
        return self.tokens[row, first : pos + after + 1], pos - first

    def _side(self, side: Side, feature: int) -> FeatureSums:
        if side not in ("query", "key"):
            raise ValueError(f"side must be 'query' or 'key', got {side!r}.")
        sums = self.sums.query if side == "query" else self.sums.key
        if not 0 <= feature < len(sums.count):
            raise ValueError(
                f"{side} features have numbers 0 to {len(sums.count) - 1} ({len(sums.count)} is the constant, which fires "
                f"everywhere), got {feature}."
            )
        return sums

    def save(self, folder: str | Path) -> None:
        """Write everything as safetensors and, for other tools, `features` and `pairs` as parquet."""
        self.save_state(folder)
        self.features.to_parquet(Path(folder) / _FEATURES)
        self.pairs.to_parquet(Path(folder) / _PAIRS)

    def save_state(self, folder: str | Path) -> None:
        """Write the safetensors file alone, which is what `load` reads: it is the old one or the new one at any time."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {"tokens": self.tokens, "indices": self.indices, **self.sums.to_arrays()}
        unfinished = folder / f"{_STATE}.unfinished"
        save_file(arrays, unfinished, metadata={"identity": json.dumps(self.identity)})
        unfinished.replace(folder / _STATE)

    @classmethod
    def load(cls, folder: str | Path) -> "ActivationStatistics":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is nothing.
            ValueError: the file is damaged, or holds something else.
        """
        path = Path(folder) / _STATE
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no activation statistics ({_STATE} is missing)."
            )
        try:
            with safe_open(path, framework="np") as file:
                identity = json.loads((file.metadata() or {})["identity"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(arrays["tokens"], arrays["indices"], Sums.from_arrays(arrays), identity)
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"{path} does not hold activation statistics, or is damaged ({error})."
            ) from error


@dataclass(frozen=True)
class RowBatches:
    """Batches (tokens, x) that are made when asked for, from any row on.

    Args:
        tokens: of all rows.
        inputs: gives the layer's input of a slice of them.
    """

    tokens: Int[np.ndarray, "row pos"]
    inputs: Callable[[slice], Float[Tensor, "batch pos d_model"]]
    batch_size: int

    def __iter__(self) -> Iterator[Batch]:
        return self.since(0)

    def since(self, first: int) -> Iterator[Batch]:
        """Rows from `first` on, in the batches they are always in: a model's rounding may depend on its batch."""
        for start in range(first - first % self.batch_size, len(self.tokens), self.batch_size):
            rows = slice(start, min(start + self.batch_size, len(self.tokens)))
            seen = max(first - start, 0)
            yield torch.from_numpy(np.array(self.tokens[rows]))[seen:], self.inputs(rows)[seen:]


def cache_batches(cache: InputCache, n_rows: int | None = None, batch_size: int = 8) -> RowBatches:
    """The first n rows of a cache of layer inputs; default: all.

    Raises:
        ValueError: the cache has fewer.
    """
    if n_rows is not None and not 0 < n_rows <= cache.n_rows:
        raise ValueError(
            f"n_rows must be 1 to {cache.n_rows}, the rows of the cache, got {n_rows}."
        )
    return RowBatches(cache.tokens[:n_rows], cache.rows, batch_size)


def model_batches(
    model: Model, layer: int, tokens: Int[Tensor, "row pos"], batch_size: int = 8
) -> RowBatches:
    """Rows of tokens with the input of a layer, for which the model runs up to this layer, a batch at a time."""
    return RowBatches(
        tokens.cpu().numpy(), lambda rows: layer_inputs(model, layer, tokens[rows]), batch_size
    )


@torch.no_grad()
def collect_activations(
    d: BilinearQKDictionary,
    batches: Iterable[Batch],
    n_top: int = 10,
    folder: str | Path | None = None,
    progress: bool = True,
    save_every: int = 1024,
) -> ActivationStatistics:
    """Statistics of all features and kept pairs in one pass over rows of text.

    Neither the batch size nor the number of threads changes the result. Memory, beside the dictionary, one batch and 4
    bytes a token: about 50 + 16 n_top bytes a pair; a table of m M, 4 n_pos bytes a pair (4 without rotary embeddings) but
    at most 256 MiB, twice that while it is made (one that does not fit is made in parts, again for every 64 rows);
    4 (d_query^2 + d_key^2) bytes for the co-occurrence of features, which is not counted where that exceeds 1 GiB.

    Args:
        batches: (tokens [batch, pos], x [batch, pos, d_model]) with x the layer's input, for full, unpadded sequences of
            one length: `cache_batches`, `model_batches` or any other iterable.
        n_top: contexts kept of each feature and pair.
        folder: where the state is saved every `save_every` rows and at the end, as by `ActivationStatistics.save`. The
            state of an interrupted pass is continued, with the result of an uninterrupted one. `batches` must give the rows
            already seen again; `cache_batches` and `model_batches` do not compute them again.
    Raises:
        ValueError: no rows, rows of several lengths, features that are not finite numbers >= 0; or the folder belongs to
            another dictionary or map, another n_top or other rows.
    """
    if n_top < 1 or save_every < 1:
        raise ValueError(f"n_top and save_every must be at least 1, got {n_top} and {save_every}.")
    made = _state_in(folder, d, n_top)
    adder, n_saved = RowAdder(d, made.sums), len(made.tokens)
    rows = (EncodedRow.of(d, tokens, x) for tokens, x in _unseen_rows(batches, made.tokens))
    n_tokens = batches.tokens.size if isinstance(batches, RowBatches) else None
    with tqdm(
        total=n_tokens,
        initial=made.n_tokens,
        desc="Activations",
        unit="token",
        disable=not progress,
    ) as bar:
        while chunk := list(islice(rows, min(_ROWS_AT_ONCE, save_every))):
            adder.add(len(made.tokens), chunk)
            seen = [made.tokens] if made.n_tokens else []
            made.tokens = np.concatenate([*seen, np.stack([row.tokens for row in chunk])])
            bar.update(made.n_tokens - bar.n)
            if folder is not None and len(made.tokens) - n_saved >= save_every:
                made.save_state(folder)
                n_saved = len(made.tokens)
    if not made.n_tokens:
        raise ValueError("There are no rows to collect statistics from: `batches` is empty.")
    if folder is not None:
        made.save(folder)
    return made


def _state_in(
    folder: str | Path | None, d: BilinearQKDictionary, n_top: int
) -> ActivationStatistics:
    """The state saved there, or an empty one."""
    identity = _identity(d, n_top)
    if folder is not None and (Path(folder) / _STATE).exists():
        made = ActivationStatistics.load(folder)
        different = [name for name in identity if made.identity.get(name) != identity[name]]
        if different:
            raise ValueError(
                f"{folder} holds the statistics of another pass ({', '.join(different)} differ): give another folder, or "
                "delete this one to start anew."
            )
        logger.info(
            "%s holds the statistics of %d rows: going on from there", folder, len(made.tokens)
        )
        return made
    indices = d.feature_map.indices.cpu().numpy().astype(np.int32)
    sums = Sums.zeros(d.cfg.d_query, d.cfg.d_key, len(indices), n_top)
    return ActivationStatistics(np.zeros((0, 0), np.int32), indices, sums, identity)


def _identity(d: BilinearQKDictionary, n_top: int) -> dict[str, Any]:
    of_map = {name: getattr(d.feature_map, name) for name in ("indices", "weights")}
    of_halves = {
        name: tensor
        for name, tensor in d.state_dict().items()
        if not name.startswith("feature_map.")
    }
    return {
        "model fingerprint": list(d.cfg.fingerprint),
        "attention": d.spec.to_dict(),
        "transcoders": digest(of_halves),
        "feature map": digest(of_map),
        "n_top": n_top,
    }


def _unseen_rows(batches: Iterable[Batch], seen: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Tokens and inputs of each row after those already seen, which must come first and be the same."""
    at, n_pos = 0, seen.shape[1]
    other = ValueError(
        f"The folder belongs to a pass over other rows: its {len(seen)} must come first in `batches`, unchanged. "
        "Give another folder, or delete this one to start anew."
    )
    if isinstance(batches, RowBatches) and len(seen):
        if not np.array_equal(batches.tokens[: len(seen)], seen):
            raise other
        at, batches = len(seen), batches.since(len(seen))
    for tokens, x in batches:
        n_pos = n_pos or tokens.shape[-1]
        if tokens.ndim != 2 or x.shape[:-1] != tokens.shape or tokens.shape[1] != n_pos:
            raise ValueError(
                f"Batches are tokens [batch, pos] and x [batch, pos, d_model], here with {n_pos} positions, got "
                f"{list(tokens.shape)} and {list(x.shape)}."
            )
        for row_tokens, row_x in zip(tokens.cpu().numpy().astype(np.int32), x, strict=True):
            at += 1
            if at > len(seen):
                yield row_tokens, row_x
            elif not np.array_equal(row_tokens, seen[at - 1]):
                raise other
    if at < len(seen):
        raise other
