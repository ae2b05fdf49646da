"""Every example runs, small, as its first lines say, and shows what it promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

SHOWN = {
    "demo.py": ["feature_map", "rebuilt from features", "supporting pairs", "output/demo.html"],
    "demo_train.py": ["trained 512 + 512 features"],
    "quick_look.py": ["pattern KL", "how many heads a pair serves", "head 0: query"],
    "explain_prompt.py": ["supporting pairs", "terms add up to", "attribution.json"],
    "ioi.py": ["logit difference"],
    "patch_and_steer.py": ["pairs doubled", "these pairs alone"],
    "train_your_own.py": ["pattern KL", "holds 5,000 pairs"],
    "train_with_stock_runner.py": [],
    "train_small_gpt2.py": ["held-out loss"],
    "sample_text.py": [],
}
"""What each prints with --smoke; the demos are short as they are."""


def test_every_example_is_listed():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SHOWN)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_examples_run(name, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "140"}
    command = [
        sys.executable,
        str(EXAMPLES / name),
        *(["--smoke"] if not name.startswith("demo") else []),
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
    for piece in SHOWN[name]:
        assert piece in done.stdout
