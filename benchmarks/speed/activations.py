"""The pass behind `collect_activations`, next to the encoding of the same rows alone.

    python -m benchmarks.speed.activations --cache FOLDER --rows 800   rows of a cache of inputs
    python -m benchmarks.speed.activations    the package's own text, run through the model

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
from benchmarks.speed.peak_memory import PeakMemory
from sae_lens_qk.host.layer import AttentionLayer
from sae_lens_qk.inputs import InputCache, RowBatches, cache_batches

CONTEXT = 256


def measure(
    d: qk.BilinearQKDictionary,
    batches: RowBatches,
    n_top: int = 10,
) -> dict[str, Any]:
    """One run of each, after a batch that makes the compiler work."""
    qk.collect_activations(d, list(islice(batches, 1)), n_top, progress=False)
    encoding_seconds = _encoding_seconds(d, batches)
    with PeakMemory() as memory:
        start = time.perf_counter()
        activations = qk.collect_activations(d, batches, n_top)
        seconds = time.perf_counter() - start
    return {
        "tokens": activations.n_tokens,
        "pairs": len(activations.pairs),
        "instances": int(activations.sums.pairs.count.sum()),
        "seconds": seconds,
        "encoding_seconds": encoding_seconds,
        "ratio": seconds / encoding_seconds,
        "memory_bytes": memory.grown,
    }


@torch.no_grad()
def _encoding_seconds(
    d: qk.BilinearQKDictionary,
    batches: RowBatches,
) -> float:
    start = time.perf_counter()
    for _, x in batches:
        for row in x:
            d.features(row[None])
    return time.perf_counter() - start


def _text_batches(
    d: qk.BilinearQKDictionary,
    n_rows: int,
) -> RowBatches:
    """Inputs are computed before the clock runs."""
    model = qk.load_model(d)
    layer = AttentionLayer(model, d.cfg.layer)
    tokens = qk.token_rows(model, "", "text", n_rows, CONTEXT)
    x = torch.cat([layer.inputs(batch) for batch in tokens.split(8)])
    return RowBatches(tokens.numpy(), lambda rows: x[rows], batch_size=8)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dictionary", default="smollm2-135m-instruct-L23", help="name or folder")
    parser.add_argument("--cache", help="folder of an input cache of the dictionary's layer")
    parser.add_argument("--rows", type=int, default=128)
    options = parser.parse_args()
    d = qk.BilinearQKDictionary.from_pretrained(options.dictionary)
    if options.cache:
        batches = cache_batches(InputCache(options.cache), options.rows)
    else:
        batches = _text_batches(d, options.rows)
    metrics = measure(d, batches)
    print(
        f"{metrics['tokens']:,} tokens, {metrics['pairs']:,} pairs of the map, "
        f"{metrics['instances']:.3g} instances"
    )
    print(
        f"{metrics['seconds']:.1f} s for the pass, {metrics['encoding_seconds']:.1f} s for "
        f"encoding alone: {metrics['ratio']:.2f}"
    )
    print(f"{metrics['memory_bytes'] / 2**20:,.0f} MiB more memory at its peak")


if __name__ == "__main__":
    main()
