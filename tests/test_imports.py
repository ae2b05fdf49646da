"""Who imports whom: every module of the package only what stands above it, the host libraries only where agreed."""

import ast
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "sae_lens_qk"

ORDER = (
    ("attention", "kernels", "refusals"),
    ("pair_scores",),
    ("feature_map",),
    ("config",),
    ("models",),
    ("host",),
    ("text", "stored_form"),
    ("dictionary",),
    ("storage",),
    ("pretrained.checksums", "pretrained.errors"),
    ("pretrained.registry", "pretrained.hub"),
    ("pretrained.card",),
    ("pretrained.folder", "pretrained.loading"),
    ("pretrained.push",),
    ("patching",),
    ("evals",),
    ("training.transcode", "training.initialization"),
    ("training.losses",),
    ("training.cache",),
    ("training.transcoders",),
    ("training.candidates",),
    ("training.mask",),
    ("training.runner",),
    ("analysis.causal",),
    ("analysis.show", "analysis.activation_kernels"),
    ("analysis.prompt", "analysis.activation_sums"),
    ("analysis.check", "analysis.activations", "analysis.figures", "analysis.ioi_prompts"),
    ("analysis.attribution", "analysis.heads", "analysis.ioi_scan"),
    ("analysis.ioi",),
    ("dashboard.data", "dashboard.head_tables"),
    ("dashboard.report",),
    ("__main__",),
)
"""docs/architecture.md: modules of one row do not import each other."""

LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
FACADES = (
    "__init__",
    "training.__init__",
    "pretrained.__init__",
    "analysis.__init__",
    "dashboard.__init__",
)

IMPORTED_IN_FUNCTIONS = {
    ("dictionary", "storage"),
    ("dictionary", "patching"),
    ("dictionary", "pretrained.folder"),
    ("dictionary", "pretrained.loading"),
    ("dictionary", "pretrained.push"),
    *(
        ("__main__", name)
        for name in (
            "analysis.attribution",
            "analysis.prompt",
            "analysis.show",
            "analysis.activations",
            "dashboard.data",
            "dashboard.head_tables",
            "dashboard.report",
            "host",
        )
    ),
    ("__main__", "config"),
    ("__main__", "training.runner"),
    ("__main__", "dictionary"),
    ("__main__", "evals"),
    ("__main__", "models"),
    ("__main__", "pretrained.folder"),
    ("__main__", "pretrained.push"),
    ("__main__", "pretrained.registry"),
    ("__main__", "text"),
}
"""Delegations of the dictionary to what stands below it, and what the command line loads once it knows the command."""

FOR_TYPES_ONLY = {("models", "dictionary")}

TRANSFORMER_LENS = {"host", "models"}
SAE_LENS = {
    "config",
    "text",
    "dictionary",
    "pretrained.loading",
    "training.cache",
    "training.losses",
    "training.transcode",
    "training.transcoders",
    "training.mask",
    "training.runner",
}


class Import(NamedTuple):
    module: str
    imports: str
    line: int
    in_function: bool
    for_types: bool


def source(name: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{name.replace('.', '/')}.py").read_text())


def modules() -> list[str]:
    paths = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    return sorted(".".join(path.parts) for path in paths)


def imports_of(module: str) -> list[Import]:
    """Absolute names of all that a module imports."""
    found: list[Import] = []

    def visit(node: ast.AST, in_function: bool, for_types: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(
                Import(module, alias.name, node.lineno, in_function, for_types)
                for alias in node.names
            )
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} has a relative import"
            names = [node.module or ""]
            if node.module in (
                "sae_lens_qk",
                "sae_lens_qk.training",
                "sae_lens_qk.pretrained",
                "sae_lens_qk.analysis",
            ):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            found.extend(
                Import(module, name, node.lineno, in_function, for_types) for name in names
            )
        function = in_function or isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
        )
        types = for_types or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        )
        for child in ast.iter_child_nodes(node):
            visit(child, function, types)

    visit(source(module), False, False)
    return found


def own_imports(module: str) -> list[Import]:
    return [found for found in imports_of(module) if found.imports.split(".")[0] == "sae_lens_qk"]


def short(found: Import) -> str:
    return found.imports.removeprefix("sae_lens_qk").removeprefix(".")


def test_every_module_has_its_place():
    assert set(modules()) == {*LEVEL, *FACADES}
    assert sum(len(own_imports(module)) for module in modules()) > 40  # the search finds imports


@pytest.mark.parametrize("module", LEVEL)
def test_modules_import_only_what_stands_above_them(module):
    for found in own_imports(module):
        name = short(found)
        where = f"{module}.py:{found.line} imports {name or 'the package itself'}"
        assert name in LEVEL, where
        if found.for_types:
            assert (module, name) in FOR_TYPES_ONLY, where
        elif found.in_function:
            assert (module, name) in IMPORTED_IN_FUNCTIONS, where
        else:
            assert LEVEL[name] < LEVEL[module], where


def test_the_exceptions_are_in_use():
    found = [found for module in LEVEL for found in own_imports(module)]
    assert {(f.module, short(f)) for f in found if f.in_function} == IMPORTED_IN_FUNCTIONS
    assert {(f.module, short(f)) for f in found if f.for_types} == FOR_TYPES_ONLY


def test_nothing_imports_the_facade():
    for module in modules():
        assert not [
            found for found in own_imports(module) if short(found) in ("", "training", "__init__")
        ]


def test_the_hosts_are_imported_where_agreed():
    users: dict[str, set[str]] = {"transformer_lens": set(), "sae_lens": set()}
    for module in modules():
        for found in imports_of(module):
            users.setdefault(found.imports.split(".")[0], set()).add(module)
    assert users["transformer_lens"] == TRANSFORMER_LENS
    assert users["sae_lens"] == SAE_LENS
    assert users["torch"] >= {"attention", "host"}


def test_the_kernels_and_the_attention_are_pure():
    assert {found.imports for found in imports_of("kernels")} == {"numba", "numpy"}
    assert {found.imports for found in imports_of("attention")} == {
        "dataclasses",
        "typing",
        "torch",
        "jaxtyping",
    }


def calls(module: str) -> list[tuple[str, int]]:
    nodes = (node for node in ast.walk(source(module)) if isinstance(node, ast.Call))
    return [(ast.unparse(node.func), node.lineno) for node in nodes]


@pytest.mark.parametrize("module", [*LEVEL, *FACADES])
def test_libraries_do_not_print(module):
    printed = [line for name, line in calls(module) if name in ("print", "sys.stdout.write")]
    assert bool(printed) == (module == "__main__"), f"{module}.py prints in lines {printed}"


@pytest.mark.parametrize("module", [*LEVEL, *FACADES])
def test_the_hosts_are_not_patched(module):
    """No setattr, and no assignment to an attribute of anything imported."""
    assert not [
        line
        for name, line in calls(module)
        if name in ("setattr", "delattr", "object.__setattr__", "setitem")
    ]
    tree = source(module)
    imported = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Attribute):
                base = ast.unparse(target).split(".")[0]
                assert base not in imported, (
                    f"{module}.py:{target.lineno} assigns to {ast.unparse(target)}"
                )


@pytest.mark.parametrize("module", [*LEVEL, *FACADES])
def test_nothing_is_swallowed(module):
    """No bare except, and no postponed annotations where jaxtyping reads them."""
    handlers = [node for node in ast.walk(source(module)) if isinstance(node, ast.ExceptHandler)]
    assert not [node.lineno for node in handlers if node.type is None]
    assert "__future__" not in {found.imports for found in imports_of(module)}
