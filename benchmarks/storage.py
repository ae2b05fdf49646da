"""Size on disk and time to load, of a dictionary as large as the post's GPT-2 layer 10, and what rounding costs.

python benchmarks/storage.py [DICTIONARY]

The first table needs nothing. The dense form is what the authors store: both transcoders and the whole mask in float32. With
a dictionary (a name or a float32 folder) the second table is `qk.rounding_loss` on 8 rows of 256 tokens of the sample text.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from sizes import FULL

import sae_lens_qk as qk
from sae_lens_qk.host.layer import layer_inputs
from sae_lens_qk.text import token_rows

N_PAIRS = 30_000
D_MODEL = 768


def post_sized() -> tuple[qk.BilinearQKDictionary, torch.Tensor, torch.Tensor]:
    """Random weights at the post's sizes, and which features of each side are live; all pairs are between live ones."""
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
    live = [torch.randperm(FULL.d)[:n].sort().values for n in FULL.live]
    codes = torch.randperm(len(live[0]) * len(live[1]) * FULL.n_heads)[:N_PAIRS]
    query, rest = codes // (len(live[1]) * FULL.n_heads), codes % (len(live[1]) * FULL.n_heads)
    pairs = torch.stack([live[0][query], live[1][rest // FULL.n_heads], rest % FULL.n_heads], dim=1)
    sizes = FULL.d, FULL.d, FULL.n_heads
    dictionary.set_feature_map(
        qk.SparseFeatureMap(pairs, torch.rand(N_PAIRS), *sizes, torch.rand(N_PAIRS, 3) + 0.1)
    )
    masks = [torch.zeros(FULL.d, dtype=torch.bool).index_fill(0, rows, True) for rows in live]
    return dictionary, masks[0], masks[1]


def read(path: Path) -> list[torch.Tensor]:
    return [
        tensor.clone() for tensor in load_file(path).values()
    ]  # load_file maps the file, cloning reads it


def folder_size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e6


def seconds(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[2]


def sizes_on_disk(scratch: Path) -> pd.DataFrame:
    dictionary, live_query, live_key = post_sized()
    dense = {
        name: tensor
        for name, tensor in dictionary.state_dict().items()
        if not name.startswith("feature_map")
    }
    dense["mask"] = dictionary.feature_map.restrict().to_dense()[: FULL.d, : FULL.d].contiguous()
    (scratch / "dense").mkdir()
    save_file(dense, scratch / "dense" / "all.safetensors")
    rows = [
        (
            "dense mask, float32 (the authors' form)",
            scratch / "dense",
            lambda: read(scratch / "dense/all.safetensors"),
        )
    ]
    compacted = dictionary.compact(live_query, live_key)
    for label, made in (
        ("float32", dictionary),
        ("compacted, float32", compacted),
        ("compacted, float16", compacted),
    ):
        folder = scratch / label
        made.to(getattr(torch, label.split()[-1])).save_model(folder)
        rows.append(
            (
                label,
                folder,
                lambda folder=folder: qk.BilinearQKDictionary.from_pretrained(
                    str(folder), verify="strict"
                ),
            )
        )
    table = pd.DataFrame(
        [
            {"form": label, "MB": folder_size(at), "load and verify (s)": seconds(load)}
            for label, at, load in rows
        ]
    )
    table["of dense"] = table["MB"] / table["MB"][0]
    return table.set_index("form")


def main(names: list[str]) -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        print(
            f"{FULL.live} live of {FULL.d} features a side, {N_PAIRS:,} pairs, {FULL.n_heads} heads, d_model {D_MODEL}\n"
        )
        print(sizes_on_disk(Path(scratch)).to_markdown(floatfmt=".3g"))
    for name in names:
        dictionary = qk.BilinearQKDictionary.from_pretrained(name)
        model = qk.load_model(dictionary)
        x = layer_inputs(model, dictionary.cfg.layer, token_rows(model, "", "text", 8, 256))
        print(
            f"\n{name}\n\n{qk.rounding_loss(dictionary, x).reset_index().to_markdown(index=False, floatfmt='.3g')}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
