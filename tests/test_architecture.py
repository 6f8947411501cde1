"""The rules that keep the package readable: rooms stand on rooms, no files go in a circle, and files have one name."""

import ast
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = {"passes": "passes", "kernels": "kernels", "tiny_lm": "examples/tiny_lm"}

# A room is a folder or a file of gptq_ao. It imports only from rows above its own; rooms of the last may meet.
ROWS: list[set[str]] = [
    {"adapter", "errors", "recipe", "version"},
    {"presentation"},
    {"config", "data", "distributed", "progress", "report", "codes"},
    {"kernels"},
    {"tensor", "solver", "calibration", "model"},
    {"passes", "checkpoint"},
    {"journal", "evaluate"},
    {"quality"},
    {"planning", "inference"},
    {"pipeline"},
    {"diagnosis", "integrations", "training", "demo", "cli", "public", "", "__main__", "tiny_lm"},
]
ROW_OF = {room: number for number, row in enumerate(ROWS) for room in row}
# Where a room has folders, those are used by the files beside them, and use only these of them.
SHARED = {"passes": {"records", "size_conditions"}, "kernels": {"packed", "reference"}}
# Packages that take long to import or may be missing, and where a file may import them at its top. (The script that
# trains the embedded model is never imported.)
HOME_OF = {"triton": ("kernels.triton.", "kernels.gluon."), "transformers": ("integrations.", "tiny_lm.train")}


@cache
def sources() -> dict[str, Path]:
    """Module name below gptq_ao → file."""
    found = {}
    for folder, prefix in [("gptq_ao", ""), *((path, f"{link}.") for link, path in LINKED.items())]:
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT / folder)
            if folder == "gptq_ao" and relative.parts[0] in LINKED:
                continue  # reached through a link
            name = ".".join(relative.with_suffix("").parts)
            found[prefix + name.removesuffix("__init__").removesuffix(".")] = path
    return found


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(sources()[name].read_text(encoding="utf-8"))


def room_of(name: str) -> str:
    return name.split(".")[0]


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules below gptq_ao that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(a.name, "") for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "", a.name) for a in node.names]
        else:
            continue
        for module, name in names:
            if module.split(".")[0] == "gptq_ao":
                inner = f"{module}.{name}".rstrip(".").removeprefix("gptq_ao").removeprefix(".")
                yield inner if inner in sources() else module.removeprefix("gptq_ao").removeprefix(".")


def below_their_row(name: str, tree: ast.AST) -> list[str]:
    """Imports from another room that is not in a row above."""
    last = len(ROWS) - 1
    return [
        f"{name or 'gptq_ao'} imports {used or 'gptq_ao'}"
        for used in imports(tree)
        if room_of(used) != room_of(name)
        and ROW_OF[room_of(used)] >= ROW_OF[room_of(name)]
        and ROW_OF[room_of(name)] != last
    ]


def beside(name: str, tree: ast.AST) -> list[str]:
    """Imports, by a file in a folder of a room, of files beside that folder which are not shared; and of passes."""
    room, *inner = name.split(".")
    if room not in SHARED or (len(inner) == 1 and room != "passes"):
        return []
    used = (u.split(".") for u in imports(tree))
    return [
        f"{name} imports {'.'.join(u)}"
        for u in used
        if u[0] == room and len(u) == 2 and u[1] not in SHARED[room] and inner[0] not in SHARED[room]
    ]


def at_the_top(tree: ast.Module, package: str) -> bool:
    """Whether a package is imported when the file is: by a statement that is in no function, nor for type checkers."""
    nodes: list[ast.AST] = [*tree.body]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import) and any(a.name.split(".")[0] == package for a in node.names):
            return True
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            return True
        checked = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if not checked and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return False


def test_every_room_has_a_row() -> None:
    assert {room_of(name) for name in sources()} == set(ROW_OF)


def test_rooms_stand_on_rooms() -> None:
    assert [v for name in sources() for v in below_their_row(name, tree_of(name))] == []


def test_no_files_go_in_a_circle() -> None:
    """Imports inside of functions counted: a circle that is only broken by when things run is one all the same."""
    graph = {name: set(imports(tree_of(name))) - {name} for name in sources()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        pytest.fail(" → ".join(e.args[1]))


def test_a_folder_of_a_room_knows_little_of_what_is_beside_it() -> None:
    assert [v for name in sources() for v in beside(name, tree_of(name))] == []


@pytest.mark.parametrize("package", sorted(HOME_OF))
def test_a_slow_package_is_imported_in_one_room_only(package: str) -> None:
    importing = [name for name in sources() if at_the_top(tree_of(name), package)]
    assert [name for name in importing if not name.startswith(HOME_OF[package])] == []
    assert importing


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("passes.observe", "from gptq_ao.pipeline.quantize import quantize_"),
        ("passes.observe", "import gptq_ao.passes.schedule"),
        ("passes.products.table", "from gptq_ao.passes.capture import capture"),
        ("passes.observe", "def f():\n  from gptq_ao import checkpoint"),
        ("kernels.triton.launch", "from gptq_ao.kernels import cuda"),
        ("solver.solve", "from gptq_ao.tensor import GroupTensor"),
        ("evaluate", "from gptq_ao import plan"),
    ],
)
def test_a_violation_is_seen(name: str, line: str) -> None:
    tree = ast.parse(line)
    assert below_their_row(name, tree) or beside(name, tree)


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ("import triton.language as tl", True),
        ("try:\n  from triton import jit\nexcept ImportError:\n  pass", True),
        ("class A:\n  import triton", True),
        ("def f():\n  import triton", False),
        ("if TYPE_CHECKING:\n  import triton", False),
        ("from gptq_ao.kernels import triton", False),
    ],
)
def test_an_import_at_the_top_is_seen(line: str, seen: bool) -> None:
    assert at_the_top(ast.parse(line), "triton") == seen


def test_no_file_imports_by_a_short_name() -> None:
    """`passes.x` and `gptq_ao.passes.x` would be two modules, with two classes of each name."""
    for path in [*ROOT.glob("*/**/*.py")]:
        if any(part.startswith(".venv") for part in path.parts):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not set(LINKED) & {n.split(".")[0] for n in names}, path


@pytest.mark.parametrize("link", sorted(LINKED))
def test_linked_folders_are_no_packages_of_their_own(link: str) -> None:
    """An `__init__.py` in kernels/ would shadow Hugging Face's distribution of that name and break transformers."""
    folder = ROOT / LINKED[link]
    assert folder.is_dir()
    assert not list(folder.rglob("__init__.py"))
    assert (ROOT / "gptq_ao" / link).resolve() == folder.resolve()


def test_every_folder_is_in_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT).as_posix() for path in sources().values()}
    where = {package: package.replace(".", "/") for package in settings["packages"]} | settings["package-dir"]
    assert {where[package] for package in settings["packages"]} == folders
    assert len(settings["packages"]) == len(folders)


def test_examples_are_read_at_one_glance() -> None:
    folder = ROOT / "examples"
    paths = [*folder.glob("*.py"), *(folder / "training").glob("*.py")]
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert len(lines) >= 15
    assert {name: n for name, n in lines.items() if n >= 60} == {}


def test_files_and_folders_stay_short() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in sources().items()}
    assert {name: n for name, n in lines.items() if n > 400} == {}
    folders = {path.parent for path in sources().values()}
    assert {f: n for f in folders if (n := len(list(f.glob("*.py")))) > 16} == {}
