"""The rules of DESIGN that a syntax tree can check: one direction of imports, short files, no shadowed package."""

import ast
import importlib.util
import tomllib
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "distill": {"distill"},
    "stages": {"distill", "stages"},
    "eval": {"distill", "eval"},
    "scripts": {"distill", "stages", "eval", "scripts"},
}
LONGEST = 400
SOURCES = sorted(path for top in MAY_IMPORT for path in (CHECKOUT / top).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names of this project's modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in MAY_IMPORT}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_imports_run_one_way(path):
    top = path.relative_to(CHECKOUT).parts[0]
    allowed = MAY_IMPORT[top]
    if path == CHECKOUT / "stages" / "run.py":
        allowed = allowed | {"eval"}  # it evaluates after every stage and writes the report
    assert {name.split(".")[0] for name in imported(path)} <= allowed


@pytest.mark.parametrize("path", sorted((CHECKOUT / "stages").glob("*.py")), ids=lambda path: path.name)
def test_no_stage_imports_another(path):
    if path.name not in ("run.py", "select.py"):  # which carry stages out
        others = {name for name in imported(path) if name.startswith("stages.")}
        assert not [name for name in others if name.split(".")[1] != "command"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_a_file_is_one_concept(path):
    assert len(path.read_text().splitlines()) <= LONGEST


@pytest.mark.parametrize("top", ["stages", "eval", "scripts"])
def test_no_program_shadows_an_installed_package(top):
    for path in (CHECKOUT / top).glob("*.py"):
        spec = importlib.util.find_spec(path.stem) if path.stem != "__init__" else None
        origin = getattr(spec, "origin", None) or ""
        assert "site-packages" not in origin, f"{path} hides {origin}"


def test_only_the_library_is_packaged():
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["packages"]["find"]["include"] == ["distill", "distill.*"]
