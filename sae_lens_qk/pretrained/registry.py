"""The registry: which dictionaries have a name, where they are, and the recipe that trains them."""

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
"""Environment variable: a registry file of your own, whose entries come on top of the package's."""

HEADLINE_METRICS = ("pattern_kl", "ce_recovered", "logit_kl_recovered")
_COLUMNS = (
    "name",
    "model",
    "layer",
    "status",
    "d_query",
    "d_key",
    "n_pairs",
    *HEADLINE_METRICS,
    "repo",
    "revision",
    "command",
)
_PLACE = {
    "repo": r"[^/]+/[^/]+",
    "folder": r".+",
    "revision": r"[0-9a-f]{40}",
    "sha256": r"[0-9a-f]{64}",
}
"""What a published entry must state, and in which form."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of `registry.yaml`.

    Args:
        status: shipped (the weights come with the package), published (on the Hub) or unpublished
            (they exist nowhere).
        recipe: file with the config that trains it, relative to the registry's `recipes` folder.
        repo, folder, revision: where on the Hub, with the full commit hash; required when
            published.
        sha256: of the SHA256SUMS file there, required when published.
        metrics: of a published dictionary, shown without downloading it.
    Raises:
        ValueError: an unknown status, a published entry without its place, commit hash or sum, or
            metrics that are not numbers by the names of the table.
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
                f"Registry entry {self.name}: status must be one of {get_args(Status)}, "
                f"got {self.status!r}."
            )
        if self.status == "published":
            self._check_place()
        # a YAML file may hold anything here
        is_mapping = isinstance(self.metrics, dict)
        if not is_mapping or not all(
            name in HEADLINE_METRICS and isinstance(value, int | float)
            for name, value in self.metrics.items()
        ):
            raise ValueError(
                f"Registry entry {self.name}: metrics must map some of {HEADLINE_METRICS} to "
                f"numbers, got {self.metrics!r}."
            )

    def _check_place(self) -> None:
        for name, form in _PLACE.items():
            value = getattr(self, name)
            if not re.fullmatch(form, str(value or "")):
                raise ValueError(
                    f"Registry entry {self.name} is published: {name} must match {form}, "
                    f"got {value!r}."
                )

    @property
    def command(self) -> str:
        """What trains it."""
        # by its name where the command line finds it by that
        name = self.recipe.stem
        config = name if recipe_file(name) == self.recipe else self.recipe
        return f"python -m sae_lens_qk train --config {shlex.quote(str(config))}"


def recipe_file(recipe: str | Path) -> Path:
    """A config file as it is, else the recipe of that name that comes with the package."""
    shipped = shipped_folder() / "recipes" / f"{recipe}.yaml"
    # a file of one's own comes first, even under the name of a recipe
    if shipped.is_file() and not Path(recipe).is_file():
        return shipped
    return Path(recipe)


def registry() -> dict[str, Entry]:
    """All entries by name; those of `$SAE_LENS_QK_REGISTRY` come on top.

    Raises:
        ValueError: a malformed registry file, a shipped entry in another than the package's, or an
            unpublished one without its recipe.
    """
    entries = _read_registry(shipped_folder() / "registry.yaml")
    if file := os.environ.get(REGISTRY_VARIABLE):
        entries |= _read_registry(Path(file))
    return entries


def _read_registry(file: Path) -> dict[str, Entry]:
    try:
        content = yaml.safe_load(file.read_text()) or {}
        is_mapping = isinstance(content, dict)
        if not is_mapping or not all(isinstance(values, dict) for values in content.values()):
            raise TypeError("it must map names to entries such as {status: unpublished}")
        entries = {}
        for name, values in content.items():
            # an absolute path stays what it is
            recipe = file.parent / "recipes" / values.get("recipe", f"{name}.yaml")
            # a field that no entry has is a TypeError
            entries[name] = Entry(**{**values, "name": name, "recipe": recipe})
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(
            f"There is no registry file {file}: ${REGISTRY_VARIABLE} must name a YAML file."
        ) from error
    except (yaml.YAMLError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is not a registry of dictionaries ({reason}).") from error
    for entry in entries.values():
        if entry.status == "shipped" and file.parent != shipped_folder():
            raise ValueError(
                f"{file} calls {entry.name} shipped: only the package ships; publish it, or load "
                "its folder."
            )
        if entry.status == "unpublished" and not entry.recipe.is_file():
            raise ValueError(
                f"{file} names {entry.name}, unpublished, and there is no recipe {entry.recipe}."
            )
    return entries


def pretrained_dictionaries() -> pd.DataFrame:
    """The registry as a table, one dictionary per row; needs no network.

    Returns:
        name, model, layer, status; d_query, d_key, n_pairs (unless shipped, as the recipe asks for;
        a published entry may have none); pattern_kl in nats, ce_recovered and logit_kl_recovered
        with the feature map patched in (NaN: not measured); repo, revision; and command, which
        trains it.
    """
    rows = [_row(entry) for entry in registry().values()]
    table = pd.DataFrame(rows, columns=list(_COLUMNS))
    # nullable integers: a published entry without a recipe has no sizes
    sizes = ("layer", "d_query", "d_key", "n_pairs")
    return table.astype(dict.fromkeys(sizes, "Int64"))


def _row(entry: Entry) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": entry.name,
        "status": entry.status,
        "repo": entry.repo,
        "revision": entry.revision,
    }
    # somebody may publish without the recipe
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
    metrics = entry.metrics
    if entry.status == "shipped":
        # what is in the folder counts, not what the recipe asks for
        folder = shipped_folder() / entry.name
        config = json.loads((folder / CONFIG).read_text())
        row |= {name: config[name] for name in ("d_query", "d_key", "n_pairs")}
        metrics = {}
        if (folder / METRICS).is_file():
            evaluation = json.loads((folder / METRICS).read_text())
            metrics = headline_metrics(evaluation)
    return row | {name: metrics.get(name, float("nan")) for name in HEADLINE_METRICS}


def headline_metrics(metrics: dict[str, Any]) -> dict[str, float]:
    """A table row's metrics out of what `evaluate` measured.

    With the feature map, else with the transcoders; another program's, or damaged ones, are left
    out.
    """
    headline: dict[str, float] = {}
    for name in HEADLINE_METRICS:
        with suppress(KeyError, TypeError, AttributeError, ValueError):
            sources = metrics["sources"]
            source = sources.get("feature_map") or sources["transcoders"]
            headline[name] = float(source[name]["value"])
    return headline
