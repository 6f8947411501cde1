"""The rules that keep the package readable: a module imports only from lower floors, and files have one name."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module imports only from strictly lower floors. Where one file of a floor may use another, they are listed apart.
FLOORS: list[set[str]] = [
    {"errors", "version"},
    {"config"},
    {
        "allocate",
        "packing",
        "grid",
        "hessian",
        "activation_rows",
        "activations",
        "batches",
        "data",
        "manifest",
        "shards",
        "live_bytes",
        "freed_memory",
        "formats",
        "kernels.heuristics",
        "kernels.counters",
        "kernels.rows_triton",
        "kernels.read_triton",
        "kernels.unpack_triton",
    },
    {
        "report",
        "factor",
        "solution",
        "target",
        "kernels.columns_triton",
        "kernels.reference",
        "kernels.linear_triton",
        "kernels.dequantize_triton",
        "kernels.candidates",
        "kernels.tuned",
        "kernels.timing",
        "formats.words",
        "formats.directory",
    },
    {"kernels.launch", "kernels.cpu"},
    {"kernels.launch_grouped"},
    {"kernels.self_check"},
    {"kernels.cuda"},
    {"kernels.grouped"},
    {"formats.grouped", "ops", "kernels.columns", "passes.size_conditions"},
    {
        "passes.records",
        "passes.calibration_mode",
        "passes.stand_in",
        "passes.known_values",
        "passes.functional",
        "passes.explain",
        "passes.transformers_help",
        "group_tensor",
        "formats.gptq",
        "formats.compressed_tensors",
    },
    {"solver", "refine", "passes.products", "passes.weight_views"},
    {"passes.token_rows", "passes.eager_products", "passes.residual_stream"},
    {
        "tensor",
        "architecture",
        "preflight",
        "solve_group",
        "passes.capture",
        "passes.canonicalize",
        "passes.find_linears",
        "passes.follow_original",
        "passes.reach_all_experts",
        "passes.choose_weights",
        "passes.fused_sets",
        "passes.schedule",
        "passes.observe",
        "passes.calibrate",
        "passes.expected_harm",
        "passes.padding",
        "passes.rewrite",
    },
    {"passes.survey", "forwards", "fuse", "tune", "weights", "stored", "solve_bytes", "formats.packed_weight"},
    {"formats.gptq_config", "formats.compressed_tensors_config", "formats.native"},
    {"formats.recognize", "formats.export", "output", "model_card"},
    {"writer", "source", "prepare", "formats.gptq_export", "formats.compressed_tensors_export"},
    {"formats.write"},
    {"run", "simulate"},
    {"replay", "memory", "speed"},
    {"planning", "precision"},
    {"quantize", "checkpoint", "evaluate"},
    {"stream", "convert"},
    {"integrations", "integrations.on_import", "integrations.torchao", "integrations.hf_quantizer"},
    {"integrations.transformers"},
    {"tiny_lm.corpus"},
    {"demo"},
    {"", "cli"},
    {"__main__", "tiny_lm.train"},
]
FLOOR_OF = {module: number for number, floor in enumerate(FLOORS) for module in floor}


def sources() -> dict[str, Path]:
    """Module name below gptq_ao → file."""
    found = {}
    for folder, prefix in (
        ("gptq_ao", ""),
        ("passes", "passes."),
        ("kernels", "kernels."),
        ("examples/tiny_lm", "tiny_lm."),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT / folder)
            if folder == "gptq_ao" and relative.parts[0] in ("passes", "kernels", "tiny_lm"):
                continue  # reached through a link
            name = ".".join(relative.with_suffix("").parts)
            found[prefix + name.removesuffix("__init__").removesuffix(".")] = path
    return found


def imports(tree: ast.AST) -> Iterator[str]:
    """Names below gptq_ao that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (
                a.name.removeprefix("gptq_ao").removeprefix(".")
                for a in node.names
                if a.name.split(".")[0] == "gptq_ao"
            )
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gptq_ao":
            module = (node.module or "").removeprefix("gptq_ao").removeprefix(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".removeprefix(".")
                yield inner if inner in FLOOR_OF else module


def violations(name: str, source: str) -> list[str]:
    return [
        f"{name or 'gptq_ao'} imports {used or 'gptq_ao'}"
        for used in imports(ast.parse(source))
        if FLOOR_OF[used] >= FLOOR_OF[name]
    ]


def test_every_file_has_a_floor() -> None:
    assert set(sources()) == set(FLOOR_OF)


@pytest.mark.parametrize("name", sorted(FLOOR_OF))
def test_a_module_imports_only_from_lower_floors(name: str) -> None:
    assert violations(name, sources()[name].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "from gptq_ao.quantize import quantize_",
        "import gptq_ao.passes.schedule",
        "def f():\n  from gptq_ao import tensor",
    ],
)
def test_a_violation_is_seen(line: str) -> None:
    assert violations("passes.observe", line)


def test_no_file_imports_by_a_short_name() -> None:
    """`passes.x` and `gptq_ao.passes.x` would be two modules, with two classes of each name."""
    short = {"passes", "kernels", "tiny_lm"}
    for path in [*ROOT.glob("*/**/*.py")]:
        if any(part.startswith(".venv") for part in path.parts):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not short & {n.split(".")[0] for n in names}, path


@pytest.mark.parametrize("folder", ["passes", "kernels", "examples/tiny_lm"])
def test_linked_folders_are_no_packages_of_their_own(folder: str) -> None:
    """An `__init__.py` in kernels/ would shadow Hugging Face's distribution of that name and break transformers."""
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()
    assert (ROOT / "gptq_ao" / Path(folder).name).resolve() == (ROOT / folder).resolve()


def test_files_stay_short() -> None:
    long = {name: lines for name, path in sources().items() if (lines := len(path.read_text().splitlines())) > 400}
    assert not long
