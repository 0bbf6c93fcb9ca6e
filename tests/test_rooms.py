"""The package's order: imports point down the list of rooms, and only the command line prints."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorasmith

ROOMS = (
    "cli",
    "__init__",
    "demonstration",
    "mixing",
    "extracting",
    "merging",
    "pulling",
    "delivery",
    "streaming",
    "pushing",
    "card",
    "mixreport",
    "mixfile",
    "adapterfile",
    "recompression",
    "mixture",
    "wholes",
    "execution",
    "tuning",
    "planning",
    "binding",
    "layout",
    "assembly",
    "difference",
    "structure",
    "recipe",
    "sidefiles",
    "arguments",
    "combining",
    "crosstalk",
    "rows",
    "sketching",
    "lowrank",
    "placing",
    "naming",
    "sources",
    "formats",
    "reports",
    "adapter",
    "deltas",
    "checkpoint",
    "hub",
    "folders",
    "rounding",
    "records",
    "growingfile",
    "weightfile",
    "picklefile",
    "safefile",
    "gitnames",
    "jsonfile",
    "dtypes",
    "errors",
)
"""From the top down; a new module must be given its place here."""

PACKAGE = Path(lorasmith.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(file.relative_to(PACKAGE)) for file in FILES]

every_file = pytest.mark.parametrize("file", FILES, ids=NAMES)


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only type checkers see."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for child in node.orelse:
            yield from at_run_time(child)
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from at_run_time(child)


def imported(file: Path) -> Iterator[str]:
    """Full names of what a file imports, inside functions too."""
    for node in at_run_time(parsed(file)):
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            yield from (f"{node.module}.{one.name}" for one in node.names)


def rooms_imported(file: Path) -> set[str]:
    """The version is the package's own name for itself and belongs to no room."""
    names = (name.split(".") for name in imported(file) if name != "lorasmith.__version__")
    found = {name[1] if len(name) > 1 else "__init__" for name in names if name[0] == "lorasmith"}
    return {name if name in ROOMS else "__init__" for name in found}


@every_file
def test_every_file_has_its_room(file: Path) -> None:
    assert room_of(file) in ROOMS


def test_every_room_is_there() -> None:
    assert {room_of(file) for file in FILES} == set(ROOMS)


@every_file
def test_imports_point_down_the_list(file: Path) -> None:
    below = ROOMS[ROOMS.index(room_of(file)) :]
    assert rooms_imported(file) <= set(below)


@every_file
def test_only_the_command_line_prints_prompts_or_exits(file: Path) -> None:
    speaks = {
        ast.unparse(node.func)
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("print", "input", "exit", "quit", "sys.exit", "os._exit", "warnings.warn")
    }
    speaks |= {name for name in imported(file) if name.split(".")[0] in ("click", "tqdm", "logging", "warnings")}
    speaks |= {name for name in ("sys.stdout", "sys.stderr") if name in file.read_text(encoding="utf-8")}
    assert not speaks or room_of(file) == "cli"


@every_file
def test_nothing_heavy_is_imported_with_a_module(file: Path) -> None:
    top = [node for node in parsed(file).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {one.name for node in top if isinstance(node, ast.Import) for one in node.names}
    names |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
    heavy = {"torch", "numpy", "safetensors", "tqdm", "huggingface_hub", "httpx2"}
    assert not {name.split(".")[0] for name in names} & heavy


@every_file
def test_no_module_is_named_like_something_else(file: Path) -> None:
    stem = file.parent.name if file.stem == "__init__" else file.stem
    assert stem not in sys.stdlib_module_names
    assert stem not in ("utils", "util", "helpers", "common", "base", "core", "misc", "manager")
    assert "manager" not in stem
    assert room_of(file) == "cli" or stem not in lorasmith.__all__


@every_file
def test_public_functions_and_classes_say_what_they_are(file: Path) -> None:
    tree = parsed(file)
    assert ast.get_docstring(tree), "the module itself"
    public = [
        node
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_")
    ]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def test_the_public_names_are_the_same_in_all_three_lists() -> None:
    tree = parsed(PACKAGE / "__init__.py")
    block = next(node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    typed = {(node.module, one.name) for node in block.body if isinstance(node, ast.ImportFrom) for one in node.names}
    fetched = {(module, name) for module, names in lorasmith._HOME.items() for name in names}
    assert typed == fetched
    assert sorted([*(name for _, name in fetched), "__version__"]) == sorted(lorasmith.__all__)
    for module, name in fetched:
        assert getattr(lorasmith, name) is getattr(sys.modules[module], name)
    assert dir(lorasmith) == sorted(lorasmith.__all__)


def test_every_error_is_public_drawn_and_a_built_in_one_too() -> None:
    from lorasmith import errors

    ours = {one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.LorasmithError)}
    assert {one.__name__ for one in ours} <= set(lorasmith.__all__)
    for one in ours - {errors.LorasmithError}:
        assert one.__mro__[1] is errors.LorasmithError
        builtin = one.__mro__[2]
        assert builtin.__module__ == "builtins"
        assert any(
            one.__name__ in line and f"({builtin.__name__})" in line for line in (errors.__doc__ or "").splitlines()
        ), f"{one.__name__} ({builtin.__name__}) is not drawn in the docstring"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="mrege"):
        lorasmith.mrege  # noqa: B018
