"""Size on disk and time to load of a dictionary as large as the post's, and what rounding costs.

    python -m benchmarks.speed.storage [DICTIONARY]

The post's is GPT-2's layer 10. The first table needs nothing. The dense form is what the authors
store: both transcoders and the whole mask in float32. With a dictionary (a name or a float32
folder) the second table is `qk.rounding_loss` on 8 rows of 256 tokens of the sample text.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sae_lens_qk as qk
from benchmarks.speed.measure import step_times
from benchmarks.speed.sizes import FULL
from sae_lens_qk.host.layer import AttentionLayer

N_PAIRS = 30_000
D_MODEL = 768


class PostSized(NamedTuple):
    """Random weights at the post's sizes; all pairs are between live features."""

    dictionary: qk.BilinearQKDictionary
    live_query: Tensor
    """Bool [d_query]."""
    live_key: Tensor


def post_sized() -> PostSized:
    spec = qk.AttentionSpec(FULL.n_heads, FULL.n_heads, FULL.d_head, D_MODEL, FULL.d_head**-0.5)
    cfg = qk.BilinearQKConfig(
        d_in=D_MODEL,
        d_query=FULL.d,
        d_key=FULL.d,
        attention=spec.to_dict(),
        model_name="gpt2-small",
        layer=10,
        hook_name="blocks.10.attn.hook_in",
        fingerprint=torch.randn(2 * D_MODEL).tolist(),
    )
    dictionary = qk.BilinearQKDictionary(cfg).requires_grad_(False)
    n_query, n_key = FULL.live
    live_query = torch.randperm(FULL.d)[:n_query].sort().values
    live_key = torch.randperm(FULL.d)[:n_key].sort().values
    codes = torch.randperm(n_query * n_key * FULL.n_heads)[:N_PAIRS]
    a, b, head = torch.unravel_index(codes, (n_query, n_key, FULL.n_heads))
    pairs = torch.stack([live_query[a], live_key[b], head], dim=1)
    weights = torch.rand(N_PAIRS)
    pair_statistics = torch.rand(N_PAIRS, 3) + 0.1
    feature_map = qk.SparseFeatureMap(pairs, weights, FULL.d, FULL.d, FULL.n_heads, pair_statistics)
    dictionary.set_feature_map(feature_map)
    no_features = torch.zeros(FULL.d, dtype=torch.bool)
    return PostSized(
        dictionary,
        no_features.index_fill(0, live_query, True),
        no_features.index_fill(0, live_key, True),
    )


def read_tensors(path: Path) -> list[Tensor]:
    """load_file maps the file, cloning reads it."""
    return [tensor.clone() for tensor in load_file(path).values()]


def table_row(
    form: str,
    folder: Path,
    load: Callable[[], Any],
) -> dict[str, Any]:
    """Size of a folder in MB, and the median of five loads."""
    n_bytes = sum(path.stat().st_size for path in folder.iterdir())
    seconds = statistics.median(step_times(load, 5))
    return {"form": form, "MB": n_bytes / 1e6, "load and verify (s)": seconds}


def sizes_on_disk(scratch: Path) -> pd.DataFrame:
    dictionary, live_query, live_key = post_sized()
    dense = {
        name: tensor
        for name, tensor in dictionary.state_dict().items()
        if not name.startswith("feature_map")
    }
    dense["mask"] = dictionary.feature_map.to_dense()[: FULL.d, : FULL.d].contiguous()
    file = scratch / "dense" / "all.safetensors"
    file.parent.mkdir()
    save_file(dense, file)
    label = "dense mask, float32 (the authors' form)"
    rows = [table_row(label, file.parent, partial(read_tensors, file))]
    compacted = dictionary.compact(live_query, live_key)
    forms = {
        "float32": dictionary,
        "compacted, float32": compacted,
        "compacted, float16": compacted,
    }
    for form, d in forms.items():
        folder = scratch / form
        d.to(getattr(torch, form.split()[-1])).save_model(folder)
        load = partial(qk.BilinearQKDictionary.from_pretrained, str(folder), verify="strict")
        rows.append(table_row(form, folder, load))
    table = pd.DataFrame(rows)
    table["of dense"] = table["MB"] / table["MB"][0]
    return table.set_index("form")


def main(names: list[str]) -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        print(
            f"{FULL.live} live of {FULL.d} features per side, {N_PAIRS:,} pairs, "
            f"{FULL.n_heads} heads, d_model {D_MODEL}\n"
        )
        print(sizes_on_disk(Path(scratch)).to_markdown(floatfmt=".3g"))
    for name in names:
        dictionary = qk.BilinearQKDictionary.from_pretrained(name)
        model = qk.load_model(dictionary)
        tokens = qk.token_rows(model, "", "text", 8, 256)
        x = AttentionLayer(model, dictionary.cfg.layer).inputs(tokens)
        losses = qk.rounding_loss(dictionary, x).reset_index()
        print(f"\n{name}\n\n{losses.to_markdown(index=False, floatfmt='.3g')}")


if __name__ == "__main__":
    main(sys.argv[1:])
