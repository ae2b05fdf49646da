"""The HTML file: template, script, style and data in one, under a policy that admits no more."""

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

SCRIPTS = (
    "dom.js",
    "store.js",
    "tables.js",
    "charts.js",
    "texts.js",
    "explanation.js",
    "prompt.js",
    "views.js",
    "search.js",
    "main.js",
)
"""In one script element, in this order: they share their names."""

_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def write_page(
    path: str | Path,
    data: Mapping[str, Any],
) -> Path:
    """Write the page that shows `report_data`; the folder of the path is created."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the hashes of the policy are of these very bytes: no other line ends
    path.write_text(render(data), encoding="utf-8", newline="\n")
    return path


def render(data: Mapping[str, Any]) -> str:
    """The page as text."""
    loader = PackageLoader("sae_lens_qk.dashboard")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sources = [loader.get_source(environment, name)[0] for name in SCRIPTS]
    code = "\n".join(sources)
    script = f'(() => {{\n"use strict";\n{code}\n}})();'
    style = loader.get_source(environment, "report.css")[0]
    return environment.get_template("report.html.jinja").render(
        title=data["overview"]["title"],
        policy=content_policy(script, style),
        style=Markup(style),
        script=Markup(script),
        sections={name: json_for_script(section) for name, section in data.items()},
        n_prompts=len(data["prompts"]),
    )


def content_policy(
    script: str,
    style: str,
) -> str:
    """A Content-Security-Policy: this script and this style run, and nothing is fetched."""
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hash_source(script)}",
            f"style-src {_hash_source(style)}",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
        ]
    )


def _hash_source(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def json_for_script(value: Any) -> Markup:
    """JSON for a script element: ASCII, without a character that HTML could read as markup."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.translate(_ESCAPES))
