"""Step 1 at many settings on the same tokens: pattern KL, L0 and live features of every combination.

    QK_CORPUS=... python -m benchmarks.sweep smollm2-135m-instruct-L23 --set training_tokens=1024000 \
        --vary lr=1e-3,4e-3,8e-3 sae.d=1200,2400,4800 --output output/sweeps/width

Each dictionary is saved in a folder of its own, where `benchmarks.dictionary_page --frontier` finds it; `sweep.jsonl` beside
them keeps the figures, and combinations that stand in it are not trained again. `sae.d` sets d_query and d_key.
"""

import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pandas as pd
import torch
import yaml
from simple_parsing import ArgumentParser
from simple_parsing.helpers import field, list_field
from torch import Tensor

import sae_lens_qk as qk
from benchmarks.quality.tables import count, number, table
from sae_lens_qk.weights import QKWeights
from sae_lens_qk.host.layer import layer_inputs
from sae_lens_qk.host.models import load_model
from sae_lens_qk.pretrained.registry import recipe_file
from sae_lens_qk.text import token_rows
from sae_lens_qk.training.losses import TruePattern
from sae_lens_qk.training.runner import BilinearQKTrainingRunner

_BATCH = 8
_SIZES = {"sae.d": ("sae.d_query", "sae.d_key")}


@dataclass
class Arguments:
    """Train the transcoders of a recipe at many settings."""

    recipe: str = field(positional=True)
    """Name of a recipe, or a config file."""
    vary: list[str] = list_field()
    """NAME=VALUE,VALUE,... each; every combination is trained."""
    set: list[str] = list_field()
    """NAME=VALUE for all of them."""
    text: str = "$QK_CORPUS/validation.parquet"
    n_rows: int = 64
    """Rows of the text on which the pattern KL is measured."""
    live_rows: int = 1000
    """Rows of training inputs in which a live feature fires at least once."""
    output: Path = Path("output/sweep")


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_arguments(Arguments, dest="sweep")
    args: Arguments = parser.parse_args(arguments).sweep
    recipe = yaml.safe_load(recipe_file(args.recipe).read_text())
    model, held_out, found = load_model(recipe["model_name"]), None, kept(args.output)
    for name, changes in combinations(args.vary, args.set):
        if name in found:
            continue
        start = time.perf_counter()
        runner = BilinearQKTrainingRunner(
            configured(recipe, changes, args.output / name), override_model=model
        )
        dictionary = runner.run()
        seconds = time.perf_counter() - start
        if held_out is None:
            tokens = token_rows(
                model, args.text, runner.cfg.text_column, args.n_rows, runner.cfg.context_size
            )
            held_out = torch.cat(
                [layer_inputs(model, runner.cfg.layer, some) for some in tokens.split(_BATCH)]
            )
        figures = measured(dictionary, runner.weights, held_out)
        live = live_features(
            dictionary, runner.fill_input_cache().batches(_BATCH, seed=0), args.live_rows // _BATCH
        )
        found[name] = {"name": name, **changes, **figures, **live, "seconds": round(seconds)}
        with (args.output / "sweep.jsonl").open("a") as file:
            file.write(json.dumps(found[name]) + "\n")
    results = pd.DataFrame(found.values())
    (args.output / "sweep.md").write_text(rendered(results))
    return results


def combinations(vary: list[str], always: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and changes of every combination, the first of `vary` slowest."""
    fixed = {name: yaml.safe_load(value) for name, value in (text.split("=", 1) for text in always)}
    names, values = (
        [text.split("=", 1)[0] for text in vary],
        [text.split("=", 1)[1].split(",") for text in vary],
    )
    for chosen in itertools.product(*values):
        name = (
            "_".join(f"{key}={value}" for key, value in zip(names, chosen, strict=True))
            or "as_it_is"
        )
        yield (
            name,
            fixed | {key: yaml.safe_load(value) for key, value in zip(names, chosen, strict=True)},
        )


def configured(
    recipe: Mapping[str, Any], changes: Mapping[str, Any], folder: Path
) -> qk.BilinearQKRunnerConfig:
    """The recipe's step 1 with the changes, saved in `folder`; numbers such as 1e-3 may be text."""
    config = {**recipe, "sae": dict(recipe.get("sae", {})), "mask": {"training_tokens": 0}}
    config |= {"output_path": str(folder), "checkpoint_path": None}
    config["input_cache_path"] = config.get("input_cache_path") or str(folder.parent / "inputs")
    for name, value in changes.items():
        value = (
            float(value)
            if isinstance(value, str) and name not in ("input_cache_path", "sae.activation")
            else value
        )
        for full in _SIZES.get(name, (name,)):
            block, _, key = full.rpartition(".")
            (config[block] if block else config)[key] = value
    return qk.BilinearQKRunnerConfig.from_dict(config)


@torch.no_grad()
def measured(d: qk.BilinearQKDictionary, weights: QKWeights, x: Tensor) -> dict[str, float]:
    """Pattern KL of the saved form, as `evaluate` defines it, and L0."""
    kl, l0 = [], []
    for batch in x.split(_BATCH):
        true = TruePattern.of(weights.queries(batch), weights.keys(batch), d.spec)
        kl.append(true.kl(d.scores(batch, "transcoders"))[..., 1:].mean(dim=(1, 2)))
        l0.append(
            torch.stack(
                [
                    (acts > 0).sum(-1).float().mean()
                    for acts in (d.encode_query(batch), d.encode_key(batch))
                ]
            )
        )
    query, key = torch.stack(l0).mean(dim=0).tolist()
    return {"pattern_kl": float(torch.cat(kl).mean()), "l0_query": query, "l0_key": key}


@torch.no_grad()
def live_features(
    d: qk.BilinearQKDictionary, batches: Iterator[Tensor], n_batches: int
) -> dict[str, int]:
    fired = [torch.zeros(size, dtype=torch.bool) for size in (d.cfg.d_query, d.cfg.d_key)]
    for x in itertools.islice(batches, n_batches):
        for seen, acts in zip(fired, (d.encode_query(x), d.encode_key(x)), strict=True):
            seen |= (acts > 0).any(dim=0)
    return dict(zip(("live_query", "live_key"), (int(seen.sum()) for seen in fired), strict=True))


def kept(folder: Path) -> dict[str, dict[str, Any]]:
    """Figures that stand in the folder, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "sweep.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return {record["name"]: record for record in map(json.loads, lines)}


def rendered(results: pd.DataFrame) -> str:
    header = ["setting", "pattern KL", "L0 query", "L0 key", "live query", "live key", "seconds"]
    rows = [
        [
            row["name"],
            number(row["pattern_kl"], 4),
            number(row["l0_query"], 1),
            number(row["l0_key"], 1),
        ]
        + [count(row[name]) for name in ("live_query", "live_key", "seconds")]
        for row in results.to_dict("records")
    ]
    return "\n".join([*table(header, rows), ""])


if __name__ == "__main__":
    print(rendered(main()))
