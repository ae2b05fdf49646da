"""A memory-mapped float16 cache of one layer's attention inputs, filled once and read by both training steps.

SAELens's own activation cache cannot take a bridge and forgets its read position, so `SAETrainer` is fed from here
when a cache folder is configured. One folder holds

    inputs.f16     [n_rows, context_size, d_in]  float16, the tensor that W_Q and W_K multiply
    tokens.i32     [n_rows, context_size]        int32
    cache.json     what the rows are (model, layer, hook, data) and how many of them are written

Filling resumes where it stopped: tokens are drawn again without a forward pass up to the rows already written.
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

Batch = tuple[Tensor, Tensor]
"""Tokens [batch, pos], and x [batch, pos, d_model]: the layer's input."""

_INPUTS, _TOKENS, _INFO = "inputs.f16", "tokens.i32", "cache.json"


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
        shape = (self.n_rows, self.context_size)
        self.tokens = np.memmap(folder / _TOKENS, dtype=np.int32, mode="r", shape=shape)
        self.inputs = np.memmap(
            folder / _INPUTS, dtype=np.float16, mode="r", shape=(*shape, self.d_in)
        )

    def rows(self, index: np.ndarray | slice) -> Float[Tensor, "batch pos d_model"]:
        """Float32 copies of the given rows."""
        return torch.from_numpy(np.asarray(self.inputs[index], dtype=np.float32))

    def batches(self, n_rows: int, *, seed: int, start_step: int = 0) -> "CachedBatches":
        """Endless batches of `n_rows` whole rows, reshuffled every epoch; `start_step` resumes exactly."""
        return CachedBatches(self, n_rows, seed=seed, start_step=start_step)


class CachedBatches(Iterator[Float[Tensor, "tokens d_model"]]):
    """SAELens data provider over an `InputCache`: batch t depends only on (seed, t), so resuming is a number."""

    def __init__(self, cache: InputCache, n_rows: int, *, seed: int, start_step: int = 0):
        if n_rows > cache.n_rows:
            raise ValueError(
                f"A batch of {n_rows} rows was asked of a cache that holds {cache.n_rows}: "
                "use a smaller train_batch_size_tokens or a longer dataset."
            )
        self.cache, self.n_rows, self.seed, self.step = cache, n_rows, seed, start_step
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __next__(self) -> Float[Tensor, "tokens d_model"]:
        epoch, batch = divmod(self.step, self.cache.n_rows // self.n_rows)
        if epoch != self._epoch:
            self._epoch, self._order = (
                epoch,
                np.random.default_rng((self.seed, epoch)).permutation(self.cache.n_rows),
            )
        index = np.sort(
            self._order[batch * self.n_rows : (batch + 1) * self.n_rows]
        )  # sorted: nearly sequential reads
        self.step += 1
        return self.cache.rows(index).flatten(0, 1)


@torch.no_grad()
def fill_cache(
    store: ActivationsStore, folder: str | Path, n_rows: int, identity: dict[str, Any]
) -> InputCache:
    """Fill (or go on filling) a cache up to `n_rows` rows of the store's hook; at the end of the dataset it stops.

    Args:
        store: SAELens store in sequence order; its `store_batch_size_prompts` is the size of a forward pass.
        folder: where the cache lives or will live.
        n_rows: rows wanted; a cache that already holds as many is opened untouched.
        identity: what the rows are; must hold `context_size` and `d_in`. Compared with an existing cache's.
    Raises:
        ValueError: the folder caches something else, or the dataset gives not a single row.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    info = {"identity": identity, "n_rows": 0, "complete": False}
    if (folder / _INFO).exists():
        info = json.loads((folder / _INFO).read_text())
        different = [
            key
            for key in info["identity"] | identity
            if info["identity"].get(key) != identity.get(key)
        ]
        if different:
            was = {key: info["identity"].get(key) for key in different}
            now = {key: identity.get(key) for key in different}
            raise ValueError(
                f"{folder} caches other inputs: it has {was}, this run needs {now}. Use another folder."
            )
    if info["n_rows"] >= n_rows or info["complete"]:
        return InputCache(folder)

    with (
        open(folder / _INPUTS, "ab") as inputs_file,
        open(folder / _TOKENS, "ab") as tokens_file,
        tqdm(
            total=n_rows, initial=info["n_rows"], desc="Caching layer inputs", unit="row"
        ) as progress,
    ):
        inputs_file.truncate(info["n_rows"] * identity["context_size"] * identity["d_in"] * 2)
        tokens_file.truncate(info["n_rows"] * identity["context_size"] * 4)
        _take_rows(store, info["n_rows"])
        while info["n_rows"] < n_rows and not info["complete"]:
            wanted = min(store.store_batch_size_prompts, n_rows - info["n_rows"])
            rows = _take_rows(store, wanted)
            info["complete"] = len(rows) < wanted
            if rows:
                tokens = torch.stack(rows)
                inputs = store.get_activations(tokens)
                inputs_file.write(inputs.to(torch.float16).cpu().numpy().tobytes())
                tokens_file.write(tokens.to(torch.int32).cpu().numpy().tobytes())
                inputs_file.flush()
                tokens_file.flush()
                info["n_rows"] += len(rows)
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


def _take_rows(store: ActivationsStore, n_rows: int) -> list[Tensor]:
    """The next rows of tokens, fewer at the end of the dataset."""
    rows: list[Tensor] = []
    try:
        while len(rows) < n_rows:
            rows.append(store.get_batch_tokens(batch_size=1, raise_at_epoch_end=True)[0])
    except StopIteration:
        logger.info("dataset exhausted")
    return rows


@dataclass(frozen=True)
class RowBatches:
    """Batches (tokens, x) computed when asked for.

    Args:
        tokens: of all rows.
        inputs: gives the layer's input of a slice of them.
    """

    tokens: Int[np.ndarray, "row pos"]
    inputs: Callable[[slice], Float[Tensor, "batch pos d_model"]]
    batch_size: int

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.tokens), self.batch_size):
            rows = slice(start, min(start + self.batch_size, len(self.tokens)))
            yield torch.from_numpy(np.array(self.tokens[rows])), self.inputs(rows)


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
    model: Model, layer: SupportsIndex, tokens: Int[Tensor, "row pos"], batch_size: int = 8
) -> RowBatches:
    """Rows of tokens with the input of a layer; the model runs up to it, a batch at a time."""
    attention = AttentionLayer(model, layer)
    all_tokens = tokens.cpu().numpy().astype(np.int32)
    return RowBatches(all_tokens, lambda rows: attention.inputs(tokens[rows]), batch_size)
