"""The pass behind `collect_activations`, beside the encoding of the same rows alone.

    python -m benchmarks.activations --cache FOLDER --rows 800     rows of a cache of layer inputs
    python -m benchmarks.activations                               text that comes with the package, run through the model

Prints tokens, seconds, their ratio, and how far memory grew during the pass.
"""

import argparse
import os
import time
from itertools import islice
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import sae_lens_qk as qk
from benchmarks.peak_memory import PeakMemory
from sae_lens_qk.statistics.activations import RowBatches, cache_batches, collect_activations
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.host.layer import layer_inputs
from sae_lens_qk.text import token_rows
from sae_lens_qk.inputs import InputCache

CONTEXT = 256


def measure(d: BilinearQKDictionary, batches: RowBatches, n_top: int = 10) -> dict[str, Any]:
    """One run of each, after a batch that makes the compiler work."""
    collect_activations(d, list(islice(batches, 1)), n_top, progress=False)
    encoding = _seconds_of_encoding(d, batches)
    with PeakMemory() as memory:
        start = time.perf_counter()
        made = collect_activations(d, batches, n_top)
        seconds = time.perf_counter() - start
    return {
        "tokens": made.n_tokens,
        "pairs": len(made.pairs),
        "instances": int(made.sums.pairs.count.sum()),
        "seconds": seconds,
        "encoding_seconds": encoding,
        "ratio": seconds / encoding,
        "memory_bytes": memory.grown,
    }


@torch.no_grad()
def _seconds_of_encoding(d: BilinearQKDictionary, batches: RowBatches) -> float:
    start = time.perf_counter()
    for _, x in batches:
        for row in x:
            d.encode_query(row[None])
            d.encode_key(row[None])
    return time.perf_counter() - start


def _text_batches(d: BilinearQKDictionary, n_rows: int) -> RowBatches:
    """Inputs are computed before the clock runs."""
    model = qk.load_model(d)
    tokens = token_rows(model, "", "text", n_rows, CONTEXT)
    x = torch.cat([layer_inputs(model, d.cfg.layer, part) for part in tokens.split(8)])
    return RowBatches(tokens.numpy(), lambda rows: x[rows], batch_size=8)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dictionary", default="smollm2-135m-instruct-L23", help="name or folder")
    parser.add_argument("--cache", help="folder of an input cache of the dictionary's layer")
    parser.add_argument("--rows", type=int, default=128)
    options = parser.parse_args()
    d = BilinearQKDictionary.from_pretrained(options.dictionary)
    batches = (
        cache_batches(InputCache(options.cache), options.rows)
        if options.cache
        else _text_batches(d, options.rows)
    )
    made = measure(d, batches)
    print(
        f"{made['tokens']:,} tokens, {made['pairs']:,} kept pairs, {made['instances']:.3g} instances"
    )
    print(
        f"{made['seconds']:.1f} s for the pass, {made['encoding_seconds']:.1f} s for encoding alone: {made['ratio']:.2f}"
    )
    print(f"{made['memory_bytes'] / 2**20:,.0f} MiB more memory at its peak")


if __name__ == "__main__":
    main()
