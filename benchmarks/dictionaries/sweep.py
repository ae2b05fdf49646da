"""Step 1 at many settings on the same tokens: pattern KL, L0 and live features of each.

    QK_CORPUS=... python -m benchmarks.dictionaries.sweep smollm2-135m-instruct-L23 \
        --set training_tokens=1024000 --vary lr=1e-3,4e-3,8e-3 sae.d=1200,2400,4800 \
        --output output/sweeps/width

Each dictionary is saved in a folder of its own, where `benchmarks.dictionaries.page --frontier`
finds it; `sweep.jsonl` next to them keeps the metrics, and combinations that stand in it are not
trained again. `sae.d` sets d_query and d_key.
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
from benchmarks.show import count, number
from sae_lens_qk.host.layer import AttentionLayer
from sae_lens_qk.host.models import load_model
from sae_lens_qk.host.support import Model
from sae_lens_qk.pretrained.registry import recipe_file
from sae_lens_qk.tables import markdown_table
from sae_lens_qk.weights import QKWeights

_BATCH_ROWS = 8
_SHORTHANDS = {"sae.d": ("sae.d_query", "sae.d_key")}
_TEXT_SETTINGS = ("input_cache_path", "sae.activation")


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


def main(argv: list[str] | None = None) -> pd.DataFrame:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_arguments(Arguments, dest="sweep")
    args: Arguments = parser.parse_args(argv).sweep
    recipe = yaml.safe_load(recipe_file(args.recipe).read_text())
    model = load_model(recipe["model_name"])
    records = earlier_records(args.output)
    for name, changes in combinations(args.vary, args.set):
        if name in records:
            continue
        cfg = changed_config(recipe, changes, args.output / name)
        records[name] = {"name": name, **changes, **train_and_measure(cfg, model, args)}
        with (args.output / "sweep.jsonl").open("a") as file:
            file.write(json.dumps(records[name]) + "\n")
    results = pd.DataFrame(records.values())
    (args.output / "sweep.md").write_text(render(results))
    return results


def train_and_measure(
    cfg: qk.BilinearQKRunnerConfig, model: Model, args: Arguments
) -> dict[str, Any]:
    start = time.perf_counter()
    runner = qk.BilinearQKTrainingRunner(cfg, override_model=model)
    dictionary = runner.run()
    seconds = time.perf_counter() - start
    tokens = qk.token_rows(model, args.text, cfg.text_column, args.n_rows, cfg.context_size)
    layer = AttentionLayer(model, runner.cfg.layer)
    x = torch.cat([layer.inputs(batch) for batch in tokens.split(_BATCH_ROWS)])
    training_inputs = runner.fill_input_cache().batches(_BATCH_ROWS, seed=0)
    return {
        **pattern_metrics(dictionary, layer.qk_weights, x),
        **live_features(dictionary, training_inputs, args.live_rows // _BATCH_ROWS),
        "seconds": round(seconds),
    }


def combinations(
    vary: list[str],
    always: list[str],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and changes of every combination, the first of `vary` slowest."""
    fixed = {}
    for setting in always:
        name, value = setting.split("=", 1)
        fixed[name] = yaml.safe_load(value)
    choices = []
    for setting in vary:
        name, values = setting.split("=", 1)
        choices.append([(name, value) for value in values.split(",")])
    for combination in itertools.product(*choices):
        label = "_".join(f"{name}={value}" for name, value in combination)
        changes = {name: yaml.safe_load(value) for name, value in combination}
        yield label or "as_it_is", fixed | changes


def changed_config(
    recipe: Mapping[str, Any], changes: Mapping[str, Any], folder: Path
) -> qk.BilinearQKRunnerConfig:
    """The recipe's step 1 with the changes, saved in `folder`; numbers such as 1e-3 may be text."""
    config = {**recipe, "sae": dict(recipe.get("sae", {})), "mask": {"training_tokens": 0}}
    config |= {"output_path": str(folder), "checkpoint_path": None}
    config["input_cache_path"] = config.get("input_cache_path") or str(folder.parent / "inputs")
    for name, value in changes.items():
        if isinstance(value, str) and name not in _TEXT_SETTINGS:
            value = float(value)
        for setting in _SHORTHANDS.get(name, (name,)):
            block, _, key = setting.rpartition(".")
            target = config[block] if block else config
            target[key] = value
    return qk.BilinearQKRunnerConfig.from_dict(config)


@torch.no_grad()
def pattern_metrics(
    d: qk.BilinearQKDictionary,
    weights: QKWeights,
    x: Tensor,
) -> dict[str, float]:
    """Pattern KL of the saved form, as `evaluate` defines it, and L0."""
    kls = []
    l0_query = []
    l0_key = []
    for batch in x.split(_BATCH_ROWS):
        features = d.features(batch)
        true = d.spec.log_pattern(d.spec.scores(weights.queries(batch), weights.keys(batch)))
        rebuilt = d.spec.log_pattern(d.scores(features))
        kls.append(d.spec.kl(true, rebuilt)[..., 1:].mean(dim=(1, 2)))
        l0_query.append((features.query > 0).sum(dim=-1).float())
        l0_key.append((features.key > 0).sum(dim=-1).float())
    return {
        "pattern_kl": float(torch.cat(kls).mean()),
        "l0_query": float(torch.cat(l0_query).mean()),
        "l0_key": float(torch.cat(l0_key).mean()),
    }


@torch.no_grad()
def live_features(
    d: qk.BilinearQKDictionary, batches: Iterator[Tensor], n_batches: int
) -> dict[str, int]:
    live_query = torch.zeros(d.cfg.d_query, dtype=torch.bool)
    live_key = torch.zeros(d.cfg.d_key, dtype=torch.bool)
    for x in itertools.islice(batches, n_batches):
        live_query |= (d.encode_query(x) > 0).any(dim=0)
        live_key |= (d.encode_key(x) > 0).any(dim=0)
    return {"live_query": int(live_query.sum()), "live_key": int(live_key.sum())}


def earlier_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Metrics that stand in the folder, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "sweep.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    records = [json.loads(line) for line in lines]
    return {record["name"]: record for record in records}


def render(results: pd.DataFrame) -> str:
    header = ["setting", "pattern KL", "L0 query", "L0 key", "live query", "live key", "seconds"]
    rows = []
    for result in results.to_dict("records"):
        row = [result["name"], number(result["pattern_kl"], 4)]
        row += [number(result[name], 1) for name in ("l0_query", "l0_key")]
        row += [count(result[name]) for name in ("live_query", "live_key", "seconds")]
        rows.append(row)
    return "\n".join([*markdown_table(header, rows), ""])


if __name__ == "__main__":
    print(render(main()))
