"""The registry: which dictionaries have a name, where their weights are, and the recipe that trains them."""

import json
import os
import re
import shlex
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
import yaml

from sae_lens_qk.host.models import shipped_folder
from sae_lens_qk.pretrained.checksums import CONFIG, METRICS
from sae_lens_qk.run_config import BilinearQKRunnerConfig

Status = Literal["shipped", "published", "unpublished"]

REGISTRY_VARIABLE = "SAE_LENS_QK_REGISTRY"
"""Environment variable: a registry file of your own, whose entries come on top of those of the package."""

_FIGURES = ("pattern_kl", "ce_recovered", "logit_kl_recovered")
_COLUMNS = (
    "name",
    "model",
    "layer",
    "status",
    "d_query",
    "d_key",
    "n_pairs",
    *_FIGURES,
    "repo",
    "revision",
    "command",
)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of `registry.yaml`.

    Args:
        status: shipped (the weights come with the package), published (on the Hub) or unpublished (they exist nowhere).
        recipe: file with the config that trains it, relative to the registry's `recipes` folder.
        repo, folder, revision: where on the Hub, with the full commit hash; required when published.
        sha256: of the SHA256SUMS file there, required when published.
        metrics: figures of a published dictionary, shown without downloading it.
    Raises:
        ValueError: an unknown status, a published entry without its place, commit hash or sum, or metrics that are not
            numbers by the names of the table.
    """

    name: str
    status: Status
    recipe: Path
    repo: str | None = None
    folder: str | None = None
    revision: str | None = None
    sha256: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        if self.status not in get_args(Status):
            raise ValueError(
                f"Registry entry {self.name}: status must be one of {get_args(Status)}, got {self.status!r}."
            )
        if self.status == "published":
            for wanted, value, form in (
                ("repo", self.repo, r"[^/]+/[^/]+"),
                ("folder", self.folder, r".+"),
                ("revision", self.revision, r"[0-9a-f]{40}"),
                ("sha256", self.sha256, r"[0-9a-f]{64}"),
            ):
                if not re.fullmatch(form, str(value or "")):
                    raise ValueError(
                        f"Registry entry {self.name} is published: {wanted} must match {form}, got {value!r}."
                    )
        known = isinstance(self.metrics, dict) and self.metrics.keys() <= set(_FIGURES)
        if not known or not all(isinstance(value, int | float) for value in self.metrics.values()):
            raise ValueError(
                f"Registry entry {self.name}: metrics must map some of {_FIGURES} to numbers, got {self.metrics!r}."
            )

    @property
    def command(self) -> str:
        """What trains it."""
        config = self.recipe.stem if self.recipe == recipe_file(self.recipe.stem) else self.recipe
        return f"python -m sae_lens_qk train --config {shlex.quote(str(config))}"


def recipe_file(recipe: str | Path) -> Path:
    """A config file as it is, else the recipe of that name that comes with the package."""
    shipped = shipped_folder() / "recipes" / f"{recipe}.yaml"
    return shipped if shipped.is_file() and not Path(recipe).is_file() else Path(recipe)


def registry() -> dict[str, Entry]:
    """All entries by name; those of `$SAE_LENS_QK_REGISTRY` come on top.

    Raises:
        ValueError: a malformed registry file, a shipped entry in another than the package's, or an unpublished one without
            its recipe.
    """
    files = [shipped_folder() / "registry.yaml"]
    if own := os.environ.get(REGISTRY_VARIABLE):
        files.append(Path(own))
    entries = {}
    for file in files:
        entries.update(_read_registry(file))
    return entries


def _read_registry(file: Path) -> dict[str, Entry]:
    try:
        listed = yaml.safe_load(file.read_text()) or {}
        if not isinstance(listed, dict) or not all(
            isinstance(values, dict) for values in listed.values()
        ):
            raise TypeError("it must map names to entries such as {status: unpublished}")
        entries = {
            name: Entry(
                **{
                    **values,
                    "name": name,
                    "recipe": file.parent / "recipes" / values.get("recipe", f"{name}.yaml"),
                }
            )
            for name, values in listed.items()
        }
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(
            f"There is no registry file {file}: ${REGISTRY_VARIABLE} must name a YAML file."
        ) from error
    except (yaml.YAMLError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is not a registry of dictionaries ({' '.join(str(error).split())})."
        ) from error
    for entry in entries.values():
        if entry.status == "shipped" and file.parent != shipped_folder():
            raise ValueError(
                f"{file} calls {entry.name} shipped: only the package ships; publish it, or load its folder."
            )
        if entry.status == "unpublished" and not entry.recipe.is_file():
            raise ValueError(
                f"{file} names {entry.name}, unpublished, and there is no recipe {entry.recipe}."
            )
    return entries


def pretrained_dictionaries() -> pd.DataFrame:
    """The registry as a table, one dictionary a row; needs no network.

    Returns:
        name, model, layer, status; d_query, d_key, n_pairs (unless shipped, as the recipe asks for; a published entry may
        have none); pattern_kl in nats, ce_recovered and logit_kl_recovered with the feature map patched in (NaN: not
        measured); repo, revision; and command, which trains it.
    """
    table = pd.DataFrame([_row(entry) for entry in registry().values()], columns=list(_COLUMNS))
    return table.astype(dict.fromkeys(("layer", "d_query", "d_key", "n_pairs"), "Int64"))


def _row(entry: Entry) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": entry.name,
        "status": entry.status,
        "repo": entry.repo,
        "revision": entry.revision,
    }
    if entry.status != "published" or entry.recipe.is_file():
        recipe = BilinearQKRunnerConfig.from_file(entry.recipe)
        row |= {
            "model": recipe.model_name,
            "layer": recipe.layer,
            "command": entry.command,
            "d_query": recipe.sae.d_query,
            "d_key": recipe.sae.d_key,
            "n_pairs": recipe.mask.n_pairs,
        }
    figures = entry.metrics
    if entry.status == "shipped":
        folder = shipped_folder() / entry.name
        config = json.loads((folder / CONFIG).read_text())
        row |= {name: config[name] for name in ("d_query", "d_key", "n_pairs")}
        figures = (
            headline_figures(json.loads((folder / METRICS).read_text()))
            if (folder / METRICS).is_file()
            else {}
        )
    return row | {name: figures.get(name, float("nan")) for name in _FIGURES}


def headline_figures(metrics: dict[str, Any]) -> dict[str, float]:
    """The figures of a table row out of what `evaluate` measured: with the feature map, else with the transcoders."""
    figures: dict[str, float] = {}
    for name in _FIGURES:
        with suppress(
            KeyError, TypeError, AttributeError, ValueError
        ):  # figures of another program, or damaged
            sources = metrics["sources"]
            figures[name] = float(
                (sources.get("feature_map") or sources["transcoders"])[name]["value"]
            )
    return figures
