"""The inputs of one layer, row by row: computed by a model, or read from a float16 cache on disk.

Training reads the cache, filled once and read by both steps: SAELens's own activation cache cannot
take a bridge and forgets its read position. One folder holds

    inputs.f16     [n_rows, context_size, d_in]  float16, the tensor that W_Q and W_K multiply
    tokens.i32     [n_rows, context_size]        int32
    cache.json     what the rows are (model, layer, hook, data) and how many of them are written

Filling resumes where it stopped: tokens are drawn again without a forward pass up to the rows
already written.
"""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float, Int
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_qk.host.layer import AttentionLayer
from sae_lens_qk.host.support import Model

logger = logging.getLogger("sae_lens_qk")

_INPUTS = "inputs.f16"
_TOKENS = "tokens.i32"
_INFO = "cache.json"

Batch = tuple[Tensor, Tensor]
"""tokens [batch, pos] and x [batch, pos, d_model], the layer's input."""


class InputCache:
    """Rows of cached layer inputs, opened read-only.

    Args:
        folder: a folder written by `fill_cache`.
    Raises:
        FileNotFoundError: the folder holds no cache.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        if not (folder / _INFO).exists():
            raise FileNotFoundError(
                f"{folder} holds no input cache ({_INFO} is missing): fill it with fill_cache."
            )
        info = json.loads((folder / _INFO).read_text())
        self.identity: dict[str, Any] = info["identity"]
        self.n_rows: int = info["n_rows"]
        self.context_size: int = self.identity["context_size"]
        self.d_in: int = self.identity["d_in"]
        tokens_shape = (self.n_rows, self.context_size)
        inputs_shape = (*tokens_shape, self.d_in)
        # Mapped, not read: a cache may be larger than memory.
        tokens_path = folder / _TOKENS
        inputs_path = folder / _INPUTS
        self.tokens = np.memmap(tokens_path, np.int32, mode="r", shape=tokens_shape)
        self.inputs = np.memmap(inputs_path, np.float16, mode="r", shape=inputs_shape)

    def rows(self, index: np.ndarray | slice) -> Float[Tensor, "batch pos d_model"]:
        """Float32 copies of the given rows."""
        rows = np.asarray(self.inputs[index], dtype=np.float32)
        return torch.from_numpy(rows)

    def batches(
        self,
        n_rows: int,
        *,
        seed: int,
        start_step: int = 0,
    ) -> "CachedBatches":
        """Endless batches of `n_rows` whole rows, reshuffled every epoch.

        Args:
            seed: of the order of the rows.
            start_step: number of the first batch; a run resumes exactly.
        """
        return CachedBatches(self, n_rows, seed=seed, start_step=start_step)


class CachedBatches(Iterator[Float[Tensor, "tokens d_model"]]):
    """SAELens data provider over an `InputCache`.

    Batch t depends only on (seed, t), so resuming is a number.
    """

    def __init__(
        self,
        cache: InputCache,
        n_rows: int,
        *,
        seed: int,
        start_step: int = 0,
    ):
        if n_rows > cache.n_rows:
            raise ValueError(
                f"A batch of {n_rows} rows was asked of a cache that holds {cache.n_rows}: "
                "use a smaller train_batch_size_tokens or a longer dataset."
            )
        self.cache = cache
        self.n_rows = n_rows
        self.seed = seed
        self.step = start_step
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def __next__(self) -> Float[Tensor, "tokens d_model"]:
        # a last part of an epoch that is smaller than a batch is left out
        epoch, batch = divmod(self.step, self.cache.n_rows // self.n_rows)
        if epoch != self._epoch:
            generator = np.random.default_rng((self.seed, epoch))
            self._order = generator.permutation(self.cache.n_rows)
            self._epoch = epoch
        start = batch * self.n_rows
        rows = self._order[start : start + self.n_rows]
        self.step += 1
        # sorted, so that reads from disk are nearly sequential
        x = self.cache.rows(np.sort(rows))  # [n_rows, pos, d_model]
        return x.flatten(0, 1)


@dataclass
class RowBatches:
    """Batches (tokens, x) of all rows, computed when iterated over, as often as that happens.

    Args:
        tokens: of all rows.
        inputs: gives the layer's input of a slice of the rows.
        batch_size: rows per batch.
    """

    tokens: Int[np.ndarray, "row pos"]
    inputs: Callable[[slice], Float[Tensor, "batch pos d_model"]]
    batch_size: int

    def __iter__(self) -> Iterator[Batch]:
        n_rows = len(self.tokens)
        for start in range(0, n_rows, self.batch_size):
            rows = slice(start, min(start + self.batch_size, n_rows))
            # copied: torch tensors cannot be read-only, as a memory map is
            tokens = np.array(self.tokens[rows])
            yield torch.from_numpy(tokens), self.inputs(rows)


def cache_batches(
    cache: InputCache,
    n_rows: int | None = None,
    batch_size: int = 8,
) -> RowBatches:
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
    model: Model, layer: SupportsIndex, tokens: Int[Tensor, "row pos"], batch_size: int = 8
) -> RowBatches:
    """Rows of tokens with the input of a layer; the model runs up to it, batch by batch."""
    attention = AttentionLayer(model, layer)
    all_tokens = tokens.cpu().numpy()
    return RowBatches(all_tokens, lambda rows: attention.inputs(tokens[rows]), batch_size)


@torch.no_grad()
def fill_cache(
    store: ActivationsStore, folder: str | Path, n_rows: int, identity: dict[str, Any]
) -> InputCache:
    """Fill (or go on filling) a cache up to `n_rows` rows; at the end of the dataset it stops.

    Args:
        store: SAELens store in sequence order; its `store_batch_size_prompts` is the size of a
            forward pass.
        folder: where the cache lives or will live.
        n_rows: rows wanted; a cache that already holds as many is opened untouched.
        identity: what the rows are; must hold `context_size` and `d_in`. Compared with an existing
            cache's.
    Raises:
        ValueError: the folder caches something else, or the dataset gives not a single row.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    info = {"identity": identity, "n_rows": 0, "complete": False}
    if (folder / _INFO).exists():
        info = json.loads((folder / _INFO).read_text())
        _check_identity(folder, info["identity"], identity)
    if info["n_rows"] >= n_rows or info["complete"]:
        return InputCache(folder)

    progress = tqdm(
        total=n_rows,
        initial=info["n_rows"],
        desc="Caching layer inputs",
        unit="row",
    )
    n_positions = info["n_rows"] * identity["context_size"]
    n_numbers = n_positions * identity["d_in"]
    with (
        open(folder / _INPUTS, "ab") as inputs_file,
        open(folder / _TOKENS, "ab") as tokens_file,
        progress,
    ):
        # an interrupted write may have left part of a batch behind
        inputs_file.truncate(n_numbers * np.dtype(np.float16).itemsize)
        tokens_file.truncate(n_positions * np.dtype(np.int32).itemsize)
        # rows already cached: their tokens are drawn and dropped
        _next_rows(store, info["n_rows"])
        while info["n_rows"] < n_rows and not info["complete"]:
            batch_size = min(store.store_batch_size_prompts, n_rows - info["n_rows"])
            rows = _next_rows(store, batch_size)
            info["complete"] = len(rows) < batch_size
            if rows:
                tokens = torch.stack(rows)
                inputs = store.get_activations(tokens)
                cached_inputs = inputs.to(torch.float16).cpu().numpy()
                cached_tokens = tokens.to(torch.int32).cpu().numpy()
                inputs_file.write(cached_inputs.tobytes())
                tokens_file.write(cached_tokens.tobytes())
                inputs_file.flush()
                tokens_file.flush()
                info["n_rows"] += len(rows)
            # last, so that it never promises rows that are not on disk
            (folder / _INFO).write_text(json.dumps(info))
            progress.update(len(rows))
    if info["n_rows"] == 0:
        raise ValueError(
            f"The dataset is shorter than one row of {identity['context_size']} tokens."
        )
    if info["complete"]:
        logger.warning(
            "the dataset ended after %d of %d rows; training repeats them", info["n_rows"], n_rows
        )
    return InputCache(folder)


def _check_identity(
    folder: Path,
    cached: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    all_names = cached | expected
    names = [name for name in all_names if cached.get(name) != expected.get(name)]
    if names:
        was = {name: cached.get(name) for name in names}
        now = {name: expected.get(name) for name in names}
        raise ValueError(
            f"{folder} caches other inputs: it has {was}, this run needs {now}. Use another folder."
        )


def _next_rows(
    store: ActivationsStore,
    n_rows: int,
) -> list[Tensor]:
    """The next rows of tokens, fewer at the end of the dataset."""
    rows: list[Tensor] = []
    try:
        while len(rows) < n_rows:
            rows.append(store.get_batch_tokens(batch_size=1, raise_at_epoch_end=True)[0])
    except StopIteration:
        logger.info("dataset exhausted")
    return rows
