"""Who imports whom: docs/architecture.md's table of modules, held against the code."""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sae_lens_qk"
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()

LOADS_LAZILY = "__main__"
"""The one module that imports in functions: a command loads what it needs once it is known."""


class Import(NamedTuple):
    module: str
    line: int
    target: str
    is_in_function: bool


def table_rows(heading: str) -> list[list[str]]:
    """First cell of each row of the table under a heading: the names in backticks."""
    section = ARCHITECTURE.split(f"## {heading}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE)
    return [re.findall(r"`([\w.]+)`", cell) for cell in cells]


ORDER = table_rows("Modules")
LEVELS = {name: level for level, names in enumerate(ORDER) for name in names}


def module_names() -> list[str]:
    paths = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    return sorted(".".join(path.parts) for path in paths)


def syntax_tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())


def imports_of(module: str) -> list[Import]:
    """Every import statement, `from package import module` by the module's full name."""
    imports: list[Import] = []

    def visit(
        node: ast.AST,
        is_in_function: bool,
    ) -> None:
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} has a relative import"
            targets = [_full_name(node.module or "", alias.name) for alias in node.names]
        for target in targets:
            imports.append(Import(module, node.lineno, target, is_in_function))
        enters_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, is_in_function or enters_function)

    visit(syntax_tree(module), False)
    return imports


def _full_name(
    module: str,
    name: str,
) -> str:
    """`sae_lens_qk.training.kernels` for `from sae_lens_qk.training import kernels`."""
    path = ROOT.joinpath(*module.split("."), name)
    is_module = path.with_suffix(".py").is_file()
    return f"{module}.{name}" if is_module else module


def own_imports(module: str) -> list[Import]:
    return [found for found in imports_of(module) if _is_own(found.target)]


def _is_own(target: str) -> bool:
    return target.split(".")[0] == "sae_lens_qk"


def own_name(target: str) -> str:
    return target.removeprefix("sae_lens_qk").removeprefix(".")


MODULES = module_names()
FACADES = [name for name in MODULES if name.endswith("__init__")]


def test_every_module_stands_in_the_table_once():
    names = [name for row in ORDER for name in row]
    assert sorted(names) == sorted(set(MODULES) - set(FACADES))
    assert len(names) > 30  # the table was found


def test_modules_import_only_what_stands_above_them():
    upward = []
    for module in LEVELS:
        for found in own_imports(module):
            name = own_name(found.target)
            if LEVELS.get(name, len(ORDER)) >= LEVELS[module]:
                upward.append(f"{module}.py:{found.line} imports {name or 'the package itself'}")
    assert not upward
    assert sum(len(own_imports(module)) for module in LEVELS) > 100  # the search finds imports


def test_imports_stand_at_the_top():
    for module in MODULES:
        hidden = [found for found in own_imports(module) if found.is_in_function]
        assert not hidden or module == LOADS_LAZILY, hidden


def test_the_hosts_are_imported_where_the_table_says():
    users: dict[str, set[str]] = {}
    for module in MODULES:
        for found in imports_of(module):
            users.setdefault(found.target.split(".")[0], set()).add(module)
    expected = {name: set(row[1:]) for row in table_rows("Hosts") for name in row[:1]}
    assert users["transformer_lens"] == expected["transformer_lens"]
    assert users["sae_lens"] == expected["sae_lens"]


@pytest.mark.parametrize("module", [name for name in MODULES if name.endswith("kernels")])
def test_kernels_are_pure(module):
    libraries = {
        found.target.split(".")[0] for found in imports_of(module) if not _is_own(found.target)
    }
    assert libraries <= {"numba", "numpy", "typing"}


def calls(module: str) -> list[tuple[str, int]]:
    nodes = (node for node in ast.walk(syntax_tree(module)) if isinstance(node, ast.Call))
    return [(ast.unparse(node.func), node.lineno) for node in nodes]


def test_the_library_does_not_print():
    for module in MODULES:
        lines = [line for name, line in calls(module) if name in ("print", "sys.stdout.write")]
        assert not lines or module == "__main__", f"{module}.py prints in lines {lines}"


def test_the_hosts_are_not_patched():
    """No setattr, and no assignment to an attribute of anything imported."""
    for module in MODULES:
        patching = ("setattr", "delattr", "object.__setattr__", "setitem")
        assert not [line for name, line in calls(module) if name in patching], module
        imported = _imported_names(module)
        for node in ast.walk(syntax_tree(module)):
            for target in _assigned(node):
                if isinstance(target, ast.Attribute):
                    base = ast.unparse(target).split(".")[0]
                    assert base not in imported, f"{module}.py:{target.lineno}"


def _imported_names(module: str) -> set[str]:
    names = set()
    for node in ast.walk(syntax_tree(module)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                names.add((alias.asname or alias.name).split(".")[0])
    return names


def _assigned(node: ast.AST) -> list[ast.AST | None]:
    if isinstance(node, ast.Assign):
        return list(node.targets)
    return [getattr(node, "target", None)]


def test_nothing_is_swallowed():
    """No bare except, and no postponed annotations where jaxtyping reads them."""
    for module in MODULES:
        nodes = ast.walk(syntax_tree(module))
        handlers = [node for node in nodes if isinstance(node, ast.ExceptHandler)]
        assert not [node.lineno for node in handlers if node.type is None], module
        assert "__future__" not in {found.target for found in imports_of(module)}


def test_no_caller_assumes_a_causal_softmax():
    """Masks, softmaxes over keys and `j <= i` belong to the spec and to the compiled loops."""
    for module in MODULES:
        if module == "attention":
            continue
        for name, line in calls(module):
            attribute = name.rsplit(".", 1)[-1]
            assert attribute not in ("tril", "triu", "tril_", "softmax"), f"{module}.py:{line}"
