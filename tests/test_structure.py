"""The floor plan: who may import whom, what a bare import costs, and rules for every source file."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# They use the library, never the other way round.
PROGRAMS = ("benchmarks", "docs", "examples", "paper_repro", "tests")
MAX_LINES = 400

# What comes later may import what comes earlier, directly or through others, never the reverse.
SPINE = (
    "qlora.kernels.formats",
    "qlora.kernels.reference",
    "qlora.kernels.reference_adamw",
    "qlora.kernels.ops",
    "qlora.quantized",
    "qlora.functional",
    "qlora.modules",
    "qlora.convert",
    "qlora.adapters",
    "qlora.merging",
    "qlora.train",
    "qlora.__main__",
)
WITHOUT_TRITON = ("formats", "checks", "reference", "reference_adamw", "cpu", "cpu_adamw", "ops")

# Source files whose tests are not in the test file of the same name.
TESTED_BY = {
    "kernels/checks.py": "test_ops.py",
    "kernels/cpu_adamw.py": "test_adamw.py",
    "kernels/decode.py": "test_nf4.py",
    "kernels/fused_linear.py": "test_linear.py",
    "kernels/many_tokens.py": "test_linear.py",
    "qlora/__init__.py": "test_structure.py",
    "qlora/__main__.py": "test_cli.py",
    "qlora/adapter.py": "test_adapters.py",
    "qlora/adapter_checks.py": "test_adapter_files.py",
    "qlora/adapter_settings.py": "test_adapter_files.py",
    "qlora/batching.py": "test_data.py",
    "qlora/commands.py": "test_cli.py",
    "qlora/evaluation.py": "test_train.py",
    "qlora/flags.py": "test_cli.py",
    "qlora/fingerprint.py": "test_adapter_files.py",
    "qlora/folder_config.py": "test_model_folders.py",
    "qlora/generate.py": "test_cli.py",
    "qlora/placing.py": "test_loading.py",
    "qlora/model_parts.py": "test_modules.py",
    "qlora/originals.py": "test_merging.py",
    "qlora/pretrained.py": "test_cli.py",
    "qlora/progress.py": "test_train.py",
    "qlora/recipe.py": "test_train.py",
    "qlora/records.py": "test_data.py",
    "qlora/report.py": "test_convert.py",
    "qlora/targets.py": "test_convert.py",
    "qlora/tensor_names.py": "test_loading.py",
}


def library() -> list[Path]:
    """The source files of qlora and qlora.kernels."""
    return sorted([*ROOT.glob("kernels/*.py"), *ROOT.glob("qlora/*.py")])


def everything() -> list[Path]:
    """All Python files that belong to the repository."""
    folders = ("kernels", "qlora", *PROGRAMS)
    nested = [path for folder in folders for path in ROOT.glob(f"{folder}/**/*.py")]
    return sorted({path.resolve() for path in (*ROOT.glob("*.py"), *nested)})


def module_name(path: Path) -> str:
    package = "qlora.kernels" if path.parent.name == "kernels" else "qlora"
    return package if path.stem == "__init__" else f"{package}.{path.stem}"


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path) -> set[str]:
    """Full names of what a file imports, within functions too; `from a import b` gives a and a.b.

    Relative imports stay within a package; only the programs have them.
    """
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def top_level(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


@cache
def reachable(module: str) -> frozenset[str]:
    """The library's modules that a module imports, directly or through others."""
    paths = {module_name(path): path for path in library()}
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        found = imported(paths[waiting.pop()]) & paths.keys() - seen - {"qlora"}
        seen |= found
        waiting += found
    return frozenset(seen)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


# --- Imports ----------------------------------------------------------------------------------------


def test_the_kernels_know_nothing_of_the_layers_above() -> None:
    for path in ROOT.glob("kernels/*.py"):
        ours = {n for n in imported(path) if n.startswith("qlora.")}
        assert all(n.startswith("qlora.kernels") for n in ours), f"{name(path)} imports {ours}"


def test_imports_go_one_way() -> None:
    for position, module in enumerate(SPINE):
        later = reachable(module) & set(SPINE[position + 1 :])
        assert not later, f"{module} imports {later}"


def test_there_is_no_circle() -> None:
    for module in map(module_name, library()):
        assert module not in reachable(module)


def test_the_library_imports_its_modules_and_not_its_face() -> None:
    """From `qlora` itself, or relatively: the tests above would not see what is imported."""
    for path in library():
        froms = [node for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom)]
        assert not any(node.level for node in froms), f"{name(path)} imports relatively"
        attributes = {n for n in imported(path) if re.fullmatch(r"qlora\.[A-Z]\w*", n)}
        assert not attributes, f"{name(path)} imports {attributes}"


@pytest.mark.parametrize("stem", WITHOUT_TRITON)
def test_triton_stays_behind_the_door(stem: str) -> None:
    path = ROOT / "kernels" / f"{stem}.py"
    assert "triton" not in top_level(imported(path))
    for module in reachable(f"qlora.kernels.{stem}"):
        assert module.removeprefix("qlora.kernels.") in WITHOUT_TRITON


def test_the_thin_layer_knows_no_triton() -> None:
    for path in ROOT.glob("qlora/*.py"):
        assert "triton" not in top_level(imported(path)), name(path)


def test_programs_are_not_imported_by_the_library() -> None:
    for path in library():
        found = top_level(imported(path)) & set(PROGRAMS)
        assert not found, f"{name(path)} imports {found}"


def test_nobody_imports_kernels_from_the_top() -> None:
    """PyPI has another package of that name, which transformers imports where it finds one."""
    for path in everything():
        assert "kernels" not in top_level(imported(path)), name(path)


def test_kernels_is_a_package_of_qlora_alone() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = ROOT / "qlora" / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == "../kernels"


def test_a_bare_import_needs_torch_and_numpy_alone(tmp_path: Path) -> None:
    code = (
        "import sys, numpy, torch;"
        "before = set(sys.modules);"
        "import qlora;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(*sorted(new - set(sys.stdlib_module_names)))"
    )
    result = run(sys.executable, "-c", code, cwd=tmp_path)
    assert result.stdout.split() == ["qlora"], result.stderr


def test_the_face_is_complete() -> None:
    """`__init__` is a table of contents: imports and `__all__`, which lists each of them."""
    body = tree(ROOT / "qlora" / "__init__.py").body
    docstring, *imports, contents = body
    assert isinstance(docstring, ast.Expr)
    assert all(isinstance(node, ast.ImportFrom) for node in imports)
    names = {alias.name for node in imports for alias in node.names}
    assert isinstance(contents, ast.Assign)
    assert set(ast.literal_eval(contents.value)) == names
    assert names == {
        *("QLoRAConfig", "quantize_model", "load_quantized", "QuantizationReport"),
        *("QLoRALinear", "LoRALinear", "qlora_linear"),
        *("QuantizedTensor", "quantize_4bit", "dequantize_4bit", "register_format"),
        *("add_adapter", "combine_adapters", "delete_adapter", "adapter_names", "adapter_bytes"),
        *("set_adapter", "use_adapter", "active_adapters", "disable_adapters", "enable_adapters"),
        *("save_adapter", "load_adapter", "merge", "requantize"),
        *("PagedAdamW", "loraplus_groups"),
    }


# --- Every source file ------------------------------------------------------------------------------


def test_files_are_short() -> None:
    for path in library():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= MAX_LINES, f"{name(path)} has {lines} lines"


def test_input_is_not_checked_by_assert() -> None:
    """`python -O` takes assert statements out."""
    for path in library():
        found = [node.lineno for node in ast.walk(tree(path)) if isinstance(node, ast.Assert)]
        assert not found, f"{name(path)}, lines {found}"


def calls(path: Path) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def test_nothing_is_pickled() -> None:
    """A pickle runs what its author wrote: tensors go to safetensors, the rest to JSON."""
    for path in library():
        assert not imported(path) & {"pickle", "shelve", "marshal", "dill", "joblib"}, name(path)
        assert not {"torch.save", "torch.load"} & set(calls(path)), name(path)


def test_modules_classes_and_kernels_are_documented() -> None:
    for path in library():
        assert ast.get_docstring(tree(path)), name(path)
        for node in tree(path).body:
            is_class = isinstance(node, ast.ClassDef) and not node.name.startswith("_")
            is_kernel = isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
            if is_class or is_kernel:
                assert ast.get_docstring(node), f"{name(path)}:{node.lineno}: {node.name}"


def test_every_source_file_has_a_test_file() -> None:
    for path in library():
        expected = f"test_{path.stem.strip('_')}.py"
        own = ROOT / "tests" / expected
        other = TESTED_BY.get(name(path))
        assert (own.exists()) != (other is not None), f"{name(path)}: tests/{expected} or TESTED_BY"
        assert other is None or (ROOT / "tests" / other).exists()
    assert TESTED_BY.keys() <= {name(path) for path in library()}


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")], ids=["check", "format"])
def test_style(arguments: tuple[str, ...]) -> None:
    """As `make lint` does, over all that is in the repository."""
    result = run(sys.executable, "-m", "ruff", *arguments, ".")
    assert result.returncode == 0, result.stdout + result.stderr
