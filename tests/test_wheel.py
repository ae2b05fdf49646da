"""The wheel holds all that ships, and works outside the repository, without a network."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PRETRAINED = ROOT / "pretrained"
PACKAGE = ROOT / "sae_lens_qk"
REGISTRY = yaml.safe_load((PRETRAINED / "registry.yaml").read_text())
SHIPPED = [name for name, entry in REGISTRY.items() if entry["status"] == "shipped"]
DICTIONARY_FILES = {
    "cfg.json",
    "sae_weights.safetensors",
    "metrics.json",
    "runner_cfg.json",
    "README.md",
    "SHA256SUMS",
}
MEGABYTE = 1_000_000
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")

pytestmark = pytest.mark.slow


def run(*command: str | Path, **options) -> str:
    """Standard output of a command that succeeds."""
    process = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        **options,
    )
    assert process.returncode == 0, f"{process.stdout[-2000:]}\n{process.stderr[-3000:]}"
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the checkout with the hatchling of this environment (dev extra)."""
    folder = tmp_path_factory.mktemp("wheel")
    run(*PIP, "wheel", ROOT, "--no-deps", "--no-index", "--no-build-isolation", "-w", folder)
    (path,) = folder.glob("sae_lens_qk-*-py3-none-any.whl")
    return path


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def content(wheel) -> dict[str, str]:
    """SHA-256 sums of its files by name."""
    with ZipFile(wheel) as file:
        return {name: sha256(file.read(name)) for name in file.namelist()}


def folder_content(folder: Path) -> dict[str, str]:
    sums = {}
    for path in folder.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            name = path.relative_to(folder).as_posix()
            sums[name] = sha256(path.read_bytes())
    return sums


def below(
    content: dict[str, str],
    folder: str,
) -> dict[str, str]:
    """What lies in a folder, by its name there."""
    return {
        name.removeprefix(folder): data for name, data in content.items() if name.startswith(folder)
    }


class Installed:
    """The wheel in a folder of its own, found before the checkout; no Hub, nothing cached."""

    def __init__(
        self,
        wheel: Path,
        folder: Path,
    ):
        self.site = folder / "site"
        self.hf_home = folder / "hf-home"
        self.elsewhere = folder / "elsewhere"
        self.hf_home.mkdir()
        self.elsewhere.mkdir()
        run(*PIP, "install", "--no-deps", "--no-index", "--target", self.site, wheel)

    def python(self, *arguments: str) -> str:
        variables = {
            "PYTHONPATH": str(self.site),
            "HF_HOME": str(self.hf_home),
            "HF_HUB_OFFLINE": "1",
        }
        for name, value in os.environ.items():
            if not name.startswith(("PYTHON", "HF_", "SAE_LENS_QK")):
                variables[name] = value
        return run(sys.executable, *arguments, cwd=self.elsewhere, env=variables)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Installed:
    return Installed(wheel, tmp_path_factory.mktemp("installed"))


# What is in it


def test_the_wheel_holds_registry_recipes_and_shipped_dictionaries(content):
    shipped = below(content, "sae_lens_qk/_shipped/")
    assert shipped == folder_content(PRETRAINED)
    assert "registry.yaml" in shipped
    assert "models/gpt2-3m/model.safetensors" in shipped
    for name, entry in REGISTRY.items():
        assert f"recipes/{entry.get('recipe', f'{name}.yaml')}" in shipped
    assert SHIPPED
    for name in SHIPPED:
        assert set(below(shipped, f"{name}/")) == DICTIONARY_FILES
        sizes = [path.stat().st_size for path in (PRETRAINED / name).iterdir()]
        assert sum(sizes) < 10 * MEGABYTE


def test_the_wheel_holds_the_package_its_template_and_text_and_nothing_else(content):
    licences = [name for name in content if name.endswith(".dist-info/licenses/LICENSE")]
    assert [content[name] for name in licences] == [sha256((ROOT / "LICENSE").read_bytes())]
    package = below(content, "sae_lens_qk/")
    code = {name: data for name, data in package.items() if not name.startswith("_shipped/")}
    assert code == folder_content(PACKAGE)
    for name in ("__main__.py", "py.typed", "pretrained/card.md.j2", "data/smollm2_sample.parquet"):
        assert name in code
    others = [name for name in content if not name.startswith("sae_lens_qk/")]
    assert all(".dist-info/" in name for name in others)


# Installed


SCRIPT = """
import json
import sys

import sae_lens_qk as qk

d = qk.BilinearQKDictionary.from_pretrained(sys.argv[1], verify="strict")
facts = {
    "file": qk.__file__,
    "cfg": d.cfg.to_dict(),
    "n_pairs": len(d.feature_map),
    "metrics": d.metrics,
}
print(json.dumps(facts))
"""


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_dictionaries_load_verified(installed, name):
    facts = json.loads(installed.python("-c", SCRIPT, name).splitlines()[-1])
    assert Path(facts["file"]).is_relative_to(installed.site)
    cfg = json.loads((PRETRAINED / name / "cfg.json").read_text())
    # newer fields have defaults, and the host's metadata are filled in
    for field in cfg.keys() - {"dtype", "metadata"}:
        assert facts["cfg"][field] == cfg[field]
    assert facts["cfg"]["metadata"]["model_name"] == cfg["model_name"]
    assert facts["cfg"]["dtype"] == "float32"
    assert facts["n_pairs"] == cfg["n_pairs"] > 0
    assert facts["metrics"] == json.loads((PRETRAINED / name / "metrics.json").read_text())
    assert not list(installed.hf_home.rglob("models--*"))


def test_list_prints_every_name(installed):
    """Whole, as a pipe cuts nothing off; what is not published, with its command."""
    text = installed.python("-m", "sae_lens_qk", "list")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for name, entry in REGISTRY.items():
        status = entry["status"]
        rows = [line for line in lines if line.startswith(f"{name} ") and line.endswith(status)]
        assert len(rows) == 1
        command = f"python -m sae_lens_qk train --config {name}"
        is_named = any(line.endswith(command) for line in lines)
        assert is_named == (status == "unpublished")


def test_recipes_are_found_by_name(installed):
    assert not (installed.elsewhere / "pretrained").exists()
    recipe = yaml.safe_load((PRETRAINED / "recipes" / "gpt2-small-L10.yaml").read_text())
    text = installed.python("-m", "sae_lens_qk", "train", "--config", "gpt2-small-L10", "--help")
    page = " ".join(text.split())
    assert f"Layer whose attention is decomposed. (default: {recipe['layer']})" in page
    assert f"Pairs left at the end, at most. (default: {recipe['mask']['n_pairs']})" in page
    assert recipe["layer"] == 10
