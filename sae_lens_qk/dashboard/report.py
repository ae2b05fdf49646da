"""Static HTML report: one self-contained file that works from disk, offline, without a server."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sae_lens_qk.statistics.activations import ActivationStatistics
from sae_lens_qk.explain.prompt import Prompt
from sae_lens_qk.dashboard.data import Inputs, ReportLimits, Words, report_data
from sae_lens_qk.dictionary import BilinearQKDictionary

CHARTS = "vendor/chart.umd.min.js"
SCRIPTS = (
    "dom.js",
    "store.js",
    "tables.js",
    "charts.js",
    "texts.js",
    "prompt.js",
    "views.js",
    "search.js",
    "main.js",
)
"""In one script element, in this order: they share their names."""

_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def write_report(
    path: str | Path,
    d: BilinearQKDictionary,
    statistics: ActivationStatistics,
    prompts: Sequence[Prompt] = (),
    *,
    words: Words,
    title: str | None = None,
    limits: ReportLimits = ReportLimits(),  # noqa: B008  # frozen
    inputs: Inputs | None = None,
    tables: Mapping[str, pd.DataFrame] | None = None,
) -> Path:
    """Write what a dictionary has found as one HTML file: prompts, features, pairs and heads.

    Args:
        path: of the file; its folder is made.
        statistics: of the texts the contexts are taken from, collected with this dictionary.
        prompts: to be explained, of at most 128 tokens each.
        words: token ids -> one string each, e.g. `lambda ids: tokenizer.batch_decode([[i] for i in ids])`.
        title: default: the model's name and the layer.
        limits: how much of the dictionary the file holds.
        inputs: rows of tokens -> the layer's input, e.g. `lambda rows: host.layer_inputs(model, layer, rows)`: contexts
            then show the activations of all their tokens; without it only that of the strongest.
        tables: further tables for the first page, by title.
    Returns:
        The path.
    Raises:
        ValueError: no feature map, or statistics or prompts of another dictionary.
    """
    title = title or f"{d.cfg.model_name}, layer {d.cfg.layer}"
    html = render(report_data(d, statistics, prompts, words, title, limits, inputs, tables))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        html, encoding="utf-8", newline="\n"
    )  # the hashes of the policy are of these very bytes
    return path


def render(data: Mapping[str, Any]) -> str:
    """The page that shows `report_data`."""
    loader = PackageLoader("sae_lens_qk.dashboard")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def source(name: str) -> str:
        return loader.get_source(environment, name)[0]

    own = "\n".join(source(name) for name in SCRIPTS)
    scripts = [source(CHARTS), f'(() => {{\n"use strict";\n{own}\n}})();']
    style = source("report.css")
    return environment.get_template("report.html.jinja").render(
        title=data["overview"]["title"],
        policy=content_policy(scripts, style),
        style=Markup(style),
        scripts=[Markup(script) for script in scripts],
        sections={name: json_for_script(section) for name, section in data.items()},
        n_prompts=len(data["prompts"]),
    )


def content_policy(scripts: Sequence[str], style: str) -> str:
    """A Content-Security-Policy under which nothing but these scripts and this style runs, and nothing is fetched."""

    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(source(script) for script in scripts)}",
            f"style-src {source(style)}",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
        ]
    )


def json_for_script(value: Any) -> Markup:
    """JSON that can stand in a script element: ASCII, without a character that HTML could read as markup."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.translate(_ESCAPES))
