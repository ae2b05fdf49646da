"""Text for training and evaluation: Hub datasets, local files, and the package's own sample."""

import os
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset, load_dataset
from jaxtyping import Int
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

from sae_lens_qk.host.support import Model

_TOKEN_COLUMNS = ("tokens", "input_ids")
"""Columns that SAELens's store takes for token ids."""


def load_text(
    path: str,
    text_column: str,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """A dataset of one column: token ids, or texts in `text`.

    Args:
        path: name on the Hub, or a local .parquet file or folder; environment variables in it are
            expanded.
        text_column: the column to read, unless there is one with token ids.
    Raises:
        ValueError: no path, an unset variable in it, or no such column.
    """
    expanded = os.path.expandvars(path)
    if not expanded:
        raise ValueError("There is no training text: set dataset_path, or pass override_dataset.")
    if "$" in expanded:
        raise ValueError(f"dataset_path {path} names an environment variable that is not set.")
    local = Path(expanded)
    if local.suffix == ".parquet":
        if not local.is_file():
            raise ValueError(f"There is no file {local} (dataset_path).")
        dataset = Dataset.from_parquet(str(local))
    else:
        dataset = load_dataset(expanded, split="train", streaming=streaming)
    assert isinstance(dataset, Dataset | IterableDataset)
    columns = dataset.column_names or []
    # token ids before text: they need no tokenizer
    for column in (*_TOKEN_COLUMNS, text_column):
        if column in columns:
            break
    else:
        raise ValueError(
            f"{expanded} has the columns {columns[:5]}, not {text_column!r}: set text_column."
        )
    dataset = dataset.select_columns([column])
    return dataset.rename_column(column, "text") if column == text_column != "text" else dataset


def text_sample() -> Dataset:
    """About 200k tokens of text sampled from the embedded model itself, a document per row.

    Column `text`. Made by `examples/sample_text.py`; lets demo and tests run without other text.
    """
    path = Path(__file__).parent / "data" / "smollm2_sample.parquet"
    return Dataset.from_parquet(str(path))  # type: ignore[return-value]


def token_rows(
    model: Model, dataset_path: str, text_column: str, n_rows: int, context_size: int
) -> Int[Tensor, "row pos"]:
    """Rows of tokens as training sees them: BOS first, documents joined by BOS.

    Args:
        dataset_path: see `load_text`; empty: the sample that comes with the package.
        n_rows: at most; fewer when the text ends.
    Returns:
        [row, context_size].
    Raises:
        ValueError: the text gives fewer than two rows.
    """
    dataset = load_text(dataset_path, text_column) if dataset_path else text_sample()
    # the store is asked for tokens alone: what concerns activations is never used
    store = ActivationsStore(
        model=model,  # type: ignore[arg-type]  # a bridge serves as well
        dataset=dataset,
        streaming=False,
        hook_name="",
        hook_head_index=None,
        context_size=context_size,
        d_in=1,
        n_batches_in_buffer=1,
        total_training_tokens=1,
        store_batch_size_prompts=1,
        train_batch_size_tokens=1,
        prepend_bos=True,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
    )
    rows: list[Tensor] = []
    while len(rows) < n_rows:
        try:
            batch = store.get_batch_tokens(batch_size=1, raise_at_epoch_end=True)
        except (StopIteration, RuntimeError):
            break
        rows.append(batch[0])
    if len(rows) < 2:
        raise ValueError(
            f"the text gives {len(rows)} rows of {context_size} tokens, evaluation needs at least 2"
        )
    return torch.stack(rows)
