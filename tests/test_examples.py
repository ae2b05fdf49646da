"""Every example runs, small, as its first lines say, and shows what it promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"

PIECES = {
    "demo.py": ["feature_map", "rebuilt from features", "supporting pairs", "output/demo.html"],
    "demo_train.py": ["trained 512 + 512 features"],
    "quick_look.py": ["pattern KL", "how many heads a pair serves", "head 0: query"],
    "explain_prompt.py": ["supporting pairs", "terms add up to", "attribution.json"],
    "ioi": ["logit difference"],
    "patch_and_steer.py": ["pairs doubled", "these pairs alone"],
    "train_your_own.py": ["pattern KL", "holds 5,000 pairs"],
    "train_with_stock_runner.py": [],
    "train_small_gpt2.py": ["held-out loss"],
    "sample_text.py": [],
}
"""What each prints, with --smoke where it is not short anyway."""
SHORT = ("demo.py", "demo_train.py")


def test_every_example_is_listed():
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    packages = {path.parent.name for path in EXAMPLES.glob("*/__main__.py")}
    assert scripts | packages == set(PIECES)


@pytest.mark.slow
@pytest.mark.parametrize("name", PIECES)
def test_examples_run(name, tmp_path):
    script = [str(EXAMPLES / name)] if name.endswith(".py") else ["-m", f"examples.{name}"]
    command = [sys.executable, *script]
    if name not in SHORT:
        command.append("--smoke")
    settings = {"HF_HUB_OFFLINE": "1", "COLUMNS": "140", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip()
    for piece in PIECES[name]:
        assert piece in run.stdout
