"""ARCHITECTURE.md's promise: imports point downward only, and `import moe3d` is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moe3d

PACKAGE = Path(moe3d.__file__).parent

# From the bottom to the top: a module may import those before it (and, inside a folder, its own neighbours).
# ``cli`` and ``__main__`` are the top; ``__init__`` gathers the public names of what is light.
LAYERS = [
    "_version", "_startup", "_checkout", "atomic", "kernels", "_native", "_build", "eager", "position", "ops",
    "sharpen", "functional", "nn", "integrations", "geometry", "models", "export", "data", "losses", "evaluation",
    "reconstruct", "viz", "training", "benchmark", "cli", "__main__",
]  # fmt: skip
# Stricter than the order: what stands beside the head must not know it, and the head must not know them.
ALLOWED = {
    "eager": set(),
    "position": {"eager"},
    "ops": {"kernels", "_build", "_native", "eager", "position"},
    "sharpen": {"ops"},
    "functional": {"ops"},
    "nn": {"functional", "ops", "sharpen"},
    "integrations": {"atomic", "eager", "functional", "nn", "ops", "position"},
    "models": {"atomic", "geometry", "integrations", "ops", "position"},
    "export": {"atomic", "ops"},
    "geometry": set(),
    "data": {"geometry"},
    "evaluation": {"atomic", "data", "geometry"},
}
# Inside ops, in the same sense; backends stand between what they compute with and the registry that knows them.
OPS_BASE = ["types", "activations", "mixture", "backend"]
OPS_TOP = ["dispatch", "schema"]
HEAVY = ["triton", "scipy", "skimage", "PIL", "trimesh", "safetensors", "matplotlib", "tqdm", "h5py", "cv2"]
LOADED = f"""
import sys, torch
with_torch = set(sys.modules)  # PyTorch itself may load some of them
import moe3d
print(*sorted((set(sys.modules) - with_torch) & set({HEAVY!r})))
"""


def component(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path) -> set[str]:
    """What a file imports from the package, anywhere in it, as absolute names ("moe3d.ops.types.MoEOutput")."""
    package = ["moe3d", *path.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "moe3d"}


def sources() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in LAYERS, f"{own} has no layer yet: say in this test and in ARCHITECTURE.md what it may import"
    below = ALLOWED.get(own, set(LAYERS[: LAYERS.index(own)]))
    # The package itself stands for its light public names, which the layers above the models may use.
    public = {"__init__", "__version__"} if LAYERS.index(own) > LAYERS.index("models") else set()
    public |= {name for name in vars(moe3d) if name not in LAYERS} if public else set()
    wrong = {name for name in imports(path) if component(name) not in {own, *below, *public}}
    assert not wrong, f"{own} must not import {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").glob("*.py")), ids=lambda p: p.name)
def test_imports_inside_the_operation_point_downward(path):
    backends = sorted(p.stem for p in path.parent.glob("*.py") if p.stem not in (*OPS_BASE, *OPS_TOP, "__init__"))
    order = [*OPS_BASE, *backends, *OPS_TOP]
    if path.stem == "__init__":
        assert not imports(path)
        return
    allowed = set(order[: order.index(path.stem)])
    if path.stem in OPS_BASE[:2]:
        allowed = set()  # plain data and pure functions
    wrong = {name for name in imports(path) if component(name) == "ops" and name.split(".")[2] not in allowed}
    assert not wrong, f"ops/{path.name} must not import {', '.join(sorted(wrong))}"


def test_importing_the_package_is_light():
    """Heavier libraries load where they are used; an ``import moe3d`` costs what PyTorch costs."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED], capture_output=True, text=True, cwd=PACKAGE.parent, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_the_public_names():
    names = {name for name in vars(moe3d) if not name.startswith("_")}
    assert names >= {
        "MoEHead", "MoEOutput", "backends", "load_head", "load_mini", "moe_head", "patch", "patch_da3", "patch_vggt",
        "save_head", "unpatch", "unpatch_da3", "unpatch_vggt",
    }  # fmt: skip
    assert all(getattr(moe3d, name).__doc__ for name in names)
