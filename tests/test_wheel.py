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
PRETRAINED, PACKAGE = ROOT / "pretrained", ROOT / "sae_lens_qk"
REGISTRY = yaml.safe_load((PRETRAINED / "registry.yaml").read_text())
SHIPPED = [name for name, entry in REGISTRY.items() if entry["status"] == "shipped"]
MEGABYTE = 1_000_000
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")

pytestmark = pytest.mark.slow


def run(*command: str | Path, **options) -> str:
    """Standard output of a command that succeeds."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        **options,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the checkout with the hatchling of this environment (dev extra)."""
    folder = tmp_path_factory.mktemp("wheel")
    run(*PIP, "wheel", ROOT, "--no-deps", "--no-index", "--no-build-isolation", "-w", folder)
    (made,) = folder.glob("sae_lens_qk-*-py3-none-any.whl")
    return made


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def content(wheel) -> dict[str, str]:
    """SHA-256 sums of its files by name."""
    with ZipFile(wheel) as file:
        return {name: sha256(file.read(name)) for name in file.namelist()}


def content_of(folder: Path) -> dict[str, str]:
    files = (
        path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    )
    return {path.relative_to(folder).as_posix(): sha256(path.read_bytes()) for path in files}


class Installed:
    """The wheel in a folder of its own, found before the checkout; no Hub, nothing cached."""

    def __init__(self, wheel: Path, folder: Path):
        self.site, self.hf_home, self.elsewhere = (
            folder / name for name in ("site", "hf-home", "elsewhere")
        )
        self.hf_home.mkdir()
        self.elsewhere.mkdir()
        run(*PIP, "install", "--no-deps", "--no-index", "--target", self.site, wheel)

    def python(self, *arguments: str) -> str:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "HF_", "SAE_LENS_QK"))
        }
        here = {"PYTHONPATH": str(self.site), "HF_HOME": str(self.hf_home), "HF_HUB_OFFLINE": "1"}
        return run(sys.executable, *arguments, cwd=self.elsewhere, env=inherited | here)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Installed:
    return Installed(wheel, tmp_path_factory.mktemp("installed"))


# What is in it


def test_the_wheel_holds_registry_recipes_and_shipped_dictionaries(content):
    prefix = "sae_lens_qk/_shipped/"
    shipped = {
        name.removeprefix(prefix): data for name, data in content.items() if name.startswith(prefix)
    }
    assert shipped == content_of(PRETRAINED)
    assert {
        "registry.yaml",
        "recipes/gpt2-small-L10.yaml",
        "models/gpt2-3m/model.safetensors",
    } < set(shipped)
    for name, entry in REGISTRY.items():
        assert f"recipes/{entry.get('recipe', f'{name}.yaml')}" in shipped
    assert SHIPPED
    for name in SHIPPED:
        documents = {"metrics.json", "runner_cfg.json", "README.md", "SHA256SUMS"}
        files = {file.split("/")[1] for file in shipped if file.startswith(f"{name}/")}
        assert files == {"cfg.json", "sae_weights.safetensors", *documents}
        assert sum(path.stat().st_size for path in (PRETRAINED / name).iterdir()) < 10 * MEGABYTE


def test_the_wheel_holds_the_package_its_template_and_text_and_nothing_else(content):
    others = {
        name: data for name, data in content.items() if not name.startswith("sae_lens_qk/_shipped/")
    }
    (licence,) = (
        data for name, data in others.items() if name.endswith(".dist-info/licenses/LICENSE")
    )
    assert licence == sha256((ROOT / "LICENSE").read_bytes())
    package = {
        name.removeprefix("sae_lens_qk/"): data
        for name, data in others.items()
        if ".dist-info/" not in name
    }
    assert package == content_of(PACKAGE)
    assert {
        "__main__.py",
        "py.typed",
        "pretrained/card.md.j2",
        "data/smollm2_sample.parquet",
    } < set(package)


# Installed


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_dictionaries_load_verified(installed, name):
    script = (
        "import json, sys, sae_lens_qk as qk\n"
        "d = qk.BilinearQKDictionary.from_pretrained(sys.argv[1], verify='strict')\n"
        "told = {'file': qk.__file__, 'cfg': d.cfg.to_dict(), 'n_pairs': len(d.feature_map), 'metrics': d.metrics}\n"
        "print(json.dumps(told))"
    )
    told = json.loads(installed.python("-c", script, name).splitlines()[-1])
    assert Path(told["file"]).is_relative_to(installed.site)
    stored = json.loads((PRETRAINED / name / "cfg.json").read_text())
    assert told["cfg"] == {
        **told["cfg"],
        **stored,
        "dtype": "float32",
    }  # newer fields have defaults
    assert told["n_pairs"] == stored["n_pairs"] > 0
    assert told["metrics"] == json.loads((PRETRAINED / name / "metrics.json").read_text())
    assert not list(installed.hf_home.rglob("models--*"))


def test_list_prints_every_name(installed):
    """Whole, as a pipe has no width that could cut them off, and with the command for what is not published."""
    lines = [line.split() for line in installed.python("-m", "sae_lens_qk", "list").splitlines()]
    for name, entry in REGISTRY.items():
        assert sum(words[:1] == [name] and words[-1] == entry["status"] for words in lines) == 1
        command = f"python -m sae_lens_qk train --config {name}".split()
        assert any(words[-len(command) :] == command for words in lines) == (
            entry["status"] == "unpublished"
        )


def test_recipes_are_found_by_name(installed):
    assert not (installed.elsewhere / "pretrained").exists()
    recipe = yaml.safe_load((PRETRAINED / "recipes" / "gpt2-small-L10.yaml").read_text())
    shown = " ".join(
        installed.python(
            "-m", "sae_lens_qk", "train", "--config", "gpt2-small-L10", "--help"
        ).split()
    )
    assert f"Layer whose attention is decomposed. (default: {recipe['layer']})" in shown
    assert f"Pairs kept, at most. (default: {recipe['mask']['n_pairs']})" in shown
    assert recipe["layer"] == 10
