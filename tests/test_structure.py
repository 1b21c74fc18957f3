"""The package's shape: one direction of imports, and a size that one person can read."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
ORDER = """errors random_keys fused_layers late_gradients attention_units fused_attention uvit attach
data diffusion pipeline checkpoint posthoc trainer sampling evaluation""".split()


def modules() -> dict[str, Path]:
    return {path.stem: path for path in (ROOT / "uvit_dia").glob("*.py") if path.stem != "__init__"}


def test_a_module_imports_only_modules_above_it():
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("uvit_dia"):
                found = (
                    [alias.name for alias in node.names] if node.module == "uvit_dia" else [node.module[9:]]
                )
                for imported in found:
                    assert ORDER.index(imported) < ORDER.index(name), f"{name} imports {imported}"


def test_the_package_stays_under_3000_lines():
    assert sum(len(path.read_text().splitlines()) for path in modules().values()) < 3000


def test_only_scripts_print_to_people_or_exit():
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("sys.exit", "exit"):
                raise AssertionError(f"{name} exits")
