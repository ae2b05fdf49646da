"""Documents: the results page is what its generator prints, links and commands lead somewhere."""

import re
from pathlib import Path

import pytest

from benchmarks import results_page
from benchmarks.results_page import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
METRICS = list((ROOT / "pretrained").glob("*/metrics.json"))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
MODULE = re.compile(r"python -m ([\w.]+)")
SCRIPT = re.compile(r"python ((?:examples|benchmarks)/[\w/.]+)")
EXTERNAL_MODULES = {"pytest"}


def document_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(params=DOCUMENTS, ids=document_name)
def document(request) -> Path:
    return request.param


def anchors(path: Path) -> set[str]:
    """Of the headings of a Markdown file, as GitHub makes them."""
    names = set()
    for title in re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", title.lower())
        names.add(words.replace(" ", "-"))
    return names


def module_exists(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__main__.py").exists()


# The results page


def test_results_page_is_what_its_generator_prints():
    page = (ROOT / "docs" / "results.md").read_text()
    assert page == results_page.render(), "run python -m benchmarks.results_page > docs/results.md"


def test_results_page_is_short():
    assert len(results_page.render().splitlines()) <= 150


def test_results_page_names_every_shipped_dictionary():
    page = results_page.render()
    assert METRICS
    for path in METRICS:
        assert f"[{path.parent.name}](" in page


def test_metrics_next_to_the_weights_are_those_of_the_page():
    for path in METRICS:
        page = results_page.dictionary_page(path.parent.name)
        metrics = results_page.load_json(path)
        for source in ("transcoders", "feature_map"):
            expected = page["evaluation"]["sources"][source]["pattern_kl"]
            assert metrics["sources"][source]["pattern_kl"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "limit", "met"),
    [
        (9, 10, True),
        (11, 10, False),
        ([3, 11], 10, False),
        ([3, 11], [2, 12], False),
        ([2, 11], [2, 12], True),
        ({"low": 1, "high": 3}, 2, False),
        (5, None, None),
    ],
)
def test_single_measurements_are_held_to_their_limits(value, limit, met):
    row = {"value": value}
    if limit is not None:
        row["at_most"] = limit
    assert results_page.within(row) is met


# Links and commands


def test_links_lead_to_files_and_headings(document):
    for target in LINK.findall(document.read_text()):
        if "://" in target:  # other sites: the tests have no network
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), target


def test_commands_name_modules_and_scripts_that_exist(document):
    text = document.read_text()
    modules = set(MODULE.findall(text))
    for name in modules - EXTERNAL_MODULES:
        assert module_exists(name), name
    for name in SCRIPT.findall(text):
        assert (ROOT / name).exists(), name
