"""What features and kept pairs fire on: rates, strengths, contexts, co-occurrence, in one pass.

The term of a kept pair in the scores of its head at query i and allowed key j is

    term[i,j] = m query_acts[i,a] key_acts[j,b] M[a,b,h](i-j)

The constant feature (index d_query, d_key) fires with activation 1 at every position; pairs with it
are pairs like others.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from operator import index as whole_number
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex, TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm.auto import tqdm

from sae_lens_qk.attention import SIDES, AttentionSpec, Side
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.inputs import Batch, RowBatches
from sae_lens_qk.statistics.sums import EncodedRow, FeatureSums, PairSums, RowAdder, Sums
from sae_lens_qk.stored_form import digest

ALWAYS_ON = 0.9
"""A feature that fires on a larger share of tokens stands for the mean."""

_STATE = "activations.safetensors"
_FEATURES = "features.parquet"
_PAIRS = "pairs.parquet"
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


_Context = TypeVar("_Context", FeatureContext, PairContext)


@dataclass(eq=False, repr=False)
class ActivationStatistics:
    """What `collect_activations` returns; contexts point into `tokens`.

    Attributes:
        tokens: int32 [row, pos], every row of text.
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
            side ("query" or "key"), feature, density (share of tokens on which it fires), mean
            (activation where it fires) and max; NaN where it never fires.
        """
        frames = []
        for side in SIDES:
            sums = self._feature_sums(side)
            frame = pd.DataFrame({"feature": range(len(sums.count))})
            frame.insert(0, "side", side)
            frame["density"] = sums.count / self.n_tokens
            frame["mean"] = _mean(sums)
            frame["max"] = _where_firing(sums, sums.top_value[:, 0])
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """Kept pairs, in the order of `d.feature_map.indices`.

        Returns:
            query_feature, key_feature, head, co_occurrence (share of (query, allowed key) positions
            where both features fire), mean (term where both fire), max, min; NaN where they never
            do.
        """
        sums = self.sums.pairs
        n_rows, n_pos = self.tokens.shape
        spec = AttentionSpec.from_dict(self.identity["attention"])
        frame = pd.DataFrame(self.indices, columns=["query_feature", "key_feature", "head"])
        frame["co_occurrence"] = sums.count / (n_rows * spec.n_allowed(n_pos))
        frame["mean"] = _mean(sums)
        frame["max"] = _where_firing(sums, sums.highest)
        frame["min"] = _where_firing(sums, sums.lowest)
        return frame

    def feature_contexts(
        self,
        side: Side,
        feature: SupportsIndex,
    ) -> list[FeatureContext]:
        """Where a feature is strongest, at most once per row, strongest first.

        Of equals the earlier comes first.

        Raises:
            ValueError: no such feature.
        """
        sums, number = self._feature(side, feature)
        return list(_contexts(FeatureContext, sums, number))

    def pair_contexts(self, pair_number: SupportsIndex) -> list[PairContext]:
        """Where a pair's term is largest in magnitude, at most once per row, largest first.

        Args:
            pair_number: row of the pair in `pairs` and in `d.feature_map.indices`.
        Raises:
            ValueError: no such pair.
        """
        sums = self.sums.pairs
        number = whole_number(pair_number)
        if not 0 <= number < len(sums.count):
            raise ValueError(
                f"Pairs have numbers 0 to {len(sums.count) - 1}, their rows in `pairs`; "
                f"got {number}."
            )
        return list(_contexts(PairContext, sums, number))

    def feature_co_occurrence(
        self, side: Side, feature: SupportsIndex, n: int = 10
    ) -> pd.DataFrame:
        """The n features of the same side that fire most often together with one.

        Returns:
            feature, count (tokens on which both fire), share (of the tokens on which the given one
            fires); of equals the first.
        Raises:
            ValueError: no such feature, or the dictionary is so wide that this was not counted.
        """
        sums, number = self._feature(side, feature)
        if not sums.co_firing.size:
            raise ValueError(
                f"Co-occurrence of {len(sums.count)} features per side was not counted, the table "
                "would be too large: drop the dead ones first (d.compact)."
            )
        # [d]
        counts = sums.co_firing[number] + sums.co_firing[:, number]  # one of both is the upper half
        partners = np.argsort(-counts, kind="stable")[:n]
        frame = pd.DataFrame({"feature": partners, "count": counts[partners]})
        n_fired = max(sums.count[number], 1)
        frame["share"] = frame["count"] / n_fired
        return frame.query("count > 0")

    def window(
        self,
        row: int,
        pos: int,
        before: int = 12,
        after: int = 6,
    ) -> tuple[Int[np.ndarray, " token"], int]:
        """Tokens of a row around a position, and the index of that position among them.

        Raises:
            ValueError: no such row or position.
        """
        n_rows, n_pos = self.tokens.shape
        if not (0 <= row < n_rows and 0 <= pos < n_pos):
            raise ValueError(
                f"The statistics are of {n_rows} rows of {n_pos} tokens: there is no row {row}, "
                f"position {pos}."
            )
        first = max(0, pos - before)
        tokens = self.tokens[row, first : pos + after + 1]
        return tokens, pos - first

    def _feature_sums(self, side: Side) -> FeatureSums:
        if side not in SIDES:
            raise ValueError(f"side must be 'query' or 'key', got {side!r}.")
        return self.sums.query if side == "query" else self.sums.key

    def _feature(
        self,
        side: Side,
        feature: SupportsIndex,
    ) -> tuple[FeatureSums, int]:
        """Sums of the side, and the feature's number, checked."""
        sums = self._feature_sums(side)
        number = whole_number(feature)
        n_features = len(sums.count)
        if not 0 <= number < n_features:
            raise ValueError(
                f"{side} features have numbers 0 to {n_features - 1} ({n_features} is the "
                f"constant, which fires everywhere), got {number}."
            )
        return sums, number

    def save(self, folder: str | Path) -> None:
        """Write everything as safetensors and, for other tools, `features` and `pairs` as parquet.

        The safetensors file is the old one or the new one at any time.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = self.sums.to_arrays()
        arrays |= {"tokens": self.tokens, "indices": self.indices}
        metadata = {"identity": json.dumps(self.identity)}
        unfinished = folder / f"{_STATE}.unfinished"
        save_file(arrays, unfinished, metadata)
        # readers find the old file or the new one
        unfinished.replace(folder / _STATE)
        self.features.to_parquet(folder / _FEATURES)
        self.pairs.to_parquet(folder / _PAIRS)

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
            sums = Sums.from_arrays(arrays)
            return cls(arrays["tokens"], arrays["indices"], sums, identity)
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"{path} does not hold activation statistics, or is damaged ({error})."
            ) from error


@torch.no_grad()
def collect_activations(
    d: BilinearQKDictionary,
    batches: Iterable[Batch],
    n_top: int = 10,
    folder: str | Path | None = None,
    progress: bool = True,
) -> ActivationStatistics:
    """Statistics of all features and kept pairs in one pass over rows of text.

    Neither the batch size nor the number of threads changes the result. Memory, besides the
    dictionary, one batch and 4 bytes per token: about 50 + 16 n_top bytes per pair; a table of m M,
    4 n_pos bytes per pair (4 without rotary embeddings) but at most 256 MiB, twice that while it is
    computed (one that does not fit is computed in parts, again for every 64 rows); 4 (d_query^2 +
    d_key^2) bytes for the co-occurrence of features, which is not counted where that exceeds 1 GiB.

    Args:
        batches: (tokens [batch, pos], x [batch, pos, d_model]) with x the layer's input, for full,
            unpadded sequences of one length: `cache_batches`, `model_batches`, any iterable.
        n_top: contexts kept per feature and pair.
        folder: where the result is saved, as by `ActivationStatistics.save`; one that lies there
            already, of this dictionary and these rows, is read instead of running the pass again.
    Raises:
        ValueError: no rows, rows of several lengths, features that are not finite numbers >= 0; or
            the folder belongs to another dictionary or map, another n_top or other rows.
    """
    if n_top < 1:
        raise ValueError(f"n_top must be at least 1, got {n_top}.")
    identity = _identity(d, n_top)
    if folder is not None and (Path(folder) / _STATE).exists():
        return _saved_statistics(folder, identity, batches)
    indices = d.feature_map.indices.cpu().numpy()
    sums = Sums.zeros(d, n_top)
    adder = RowAdder(d, sums)
    token_rows: list[np.ndarray] = []
    rows = _encoded_rows(d, batches)
    n_rows = len(batches.tokens) if isinstance(batches, RowBatches) else None
    # without a length the bar counts up
    bar = tqdm(rows, "Activations", n_rows, unit="row", disable=not progress)
    counted_rows = iter(bar)
    # some rows at a time: compiled loops run over many at once
    while chunk := list(islice(counted_rows, _ROWS_AT_ONCE)):
        adder.add(len(token_rows), chunk)
        token_rows += [row.tokens for row in chunk]
    if not token_rows:
        raise ValueError("There are no rows to collect statistics from: `batches` is empty.")
    all_tokens = np.stack(token_rows)
    statistics = ActivationStatistics(all_tokens, indices.astype(np.int32), sums, identity)
    if folder is not None:
        statistics.save(folder)
    return statistics


def _mean(sums: FeatureSums | PairSums) -> pd.Series:
    """Where something fires; 0 / 0 is missing."""
    return pd.Series(sums.total) / sums.count


def _where_firing(
    sums: FeatureSums | PairSums,
    values: np.ndarray,
) -> pd.Series:
    return pd.Series(values).where(sums.count > 0)


def _contexts(
    context: Callable[..., _Context],
    sums: FeatureSums | PairSums,
    number: int,
) -> Iterator[_Context]:
    """The strongest ones of a feature or pair."""
    positions = sums.top_position[number].tolist()
    values = sums.top_value[number].tolist()
    for position, value in zip(positions, values, strict=True):
        if position[0] >= 0:  # fewer rows than contexts
            yield context(*position, value)


def _saved_statistics(
    folder: str | Path,
    identity: dict[str, Any],
    batches: Iterable[Batch],
) -> ActivationStatistics:
    """The statistics in a folder, if they are those of this pass."""
    statistics = ActivationStatistics.load(folder)
    saved = statistics.identity
    different = []
    for name, value in identity.items():
        if saved.get(name) != value:
            different.append(name)
    # which rows other batches hold is not known before the pass
    rows = batches.tokens if isinstance(batches, RowBatches) else np.empty(0)
    if not different and not np.array_equal(rows, statistics.tokens):
        different = ["rows"]
    if different:
        raise ValueError(
            f"{folder} holds the statistics of another pass ({', '.join(different)} differ): give "
            "another folder, or delete this one to start anew."
        )
    return statistics


def transcoders_digest(d: BilinearQKDictionary) -> str:
    """Of both transcoders' tensors, whatever the feature map."""
    query = d.query.state_dict(prefix="query.")
    key = d.key.state_dict(prefix="key.")
    return digest(query | key)


def _identity(
    d: BilinearQKDictionary,
    n_top: int,
) -> dict[str, Any]:
    """What the statistics depend on besides the rows."""
    pairs = {"indices": d.feature_map.indices, "weights": d.feature_map.weights}
    return {
        "model fingerprint": list(d.cfg.fingerprint),
        "attention": d.spec.to_dict(),
        "transcoders": transcoders_digest(d),
        "feature map": digest(pairs),
        "n_top": n_top,
    }


def _encoded_rows(
    d: BilinearQKDictionary,
    batches: Iterable[Batch],
) -> Iterator[EncodedRow]:
    """Each row of the batches, all of one length."""
    n_pos = None
    for tokens, x in batches:
        # the first batch says how long rows are
        n_pos = n_pos or tokens.shape[-1]
        is_batch = tokens.ndim == 2 and x.shape[:-1] == tokens.shape
        if not is_batch or tokens.shape[1] != n_pos:
            raise ValueError(
                f"Batches are tokens [batch, pos] and x [batch, pos, d_model], here with {n_pos} "
                f"positions, got {list(tokens.shape)} and {list(x.shape)}."
            )
        numbers = tokens.cpu().numpy().astype(np.int32)
        for row_tokens, row_x in zip(numbers, x, strict=True):
            yield EncodedRow.encode(d, row_tokens, row_x)
