"""The rooms of the package and the arrows between them: who may import whom."""

import ast
from collections import Counter, defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"dfad": ROOT / "dfad", "dfad_kernels": ROOT / "kernels" / "dfad_kernels"}

SCRIPT = "__main__"
"""Calls any command by its name."""

COMMANDS = {path.stem for path in (ROOT / "dfad").glob("*.py") if '__name__ == "__main__"' in path.read_text()}
COMMANDS.remove(SCRIPT)

GROUND = {
    "copies",
    "environment",
    "errors",
    "files",
    "metrics",
    "modes",
    "ranks",
    "seeds",
    "terminal",
    "trees",
    "validation",
}
"""One small idea each; they know no room."""

ARROWS = {
    "config": set(),
    "presets": {"config", "data"},
    "functional": {"dfad_kernels"},
    "losses": {"dfad_kernels", "functional"},
    "models": {"engine"},
    "engine": {"config", "dfad_kernels", "dfad_kernels.cpu"},
    "runs": {"config", "models"},
    "distillation": {"config", "dfad_kernels", "engine", "functional", "losses", "models", "runs"},
    "data": {"models"},
    "delivery": {"models", "runs"},
    "supervised": {"config", "data", "engine", "models", "runs"},
    "assembly": {"config", "data", "distillation", "engine", "models", "runs", "supervised"},
    "inspection": {"config", "distillation", "engine", "models"},
    "experiments": {"assembly", "config", "data", "distillation", "engine", "models", "presets", "runs", "supervised"},
    "cli": {"runs"},
    SCRIPT: {"cli"},
    "dfad": {"config", "distillation", "models"},
    "dfad_kernels": {"dfad_kernels.cpu", "dfad_kernels.gpu"},
    "dfad_kernels.cpu": {"dfad_kernels"},
    "dfad_kernels.gpu": {"dfad_kernels"},
}
"""Rooms that each room may import, besides the ground floor; a command may import everything but other commands."""


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere, by their full names; without those only for types."""
    names = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    for_types = {id(inner) for node in typing for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else str(node.module) for name in full}
    return names


def room(module: str) -> str:
    package, *rest = module.split(".")
    if package == "dfad_kernels":
        return f"{package}.{rest[0]}" if rest and (PACKAGES[package] / rest[0]).is_dir() else package
    return rest[0] if rest else package


ROOMS = defaultdict(set)
for name, path in MODULES.items():
    ROOMS[room(name)] |= {room(found) for found in imports(path) if found in MODULES} - {room(name)}


def test_the_commands_are_those_that_are_documented():
    assert {"train", "teacher", "evaluate", "reproduce"} <= COMMANDS
    assert not COMMANDS & (set(ARROWS) | GROUND)


@pytest.mark.parametrize("name", sorted(ROOMS))
def test_a_room_imports_what_it_may(name):
    allowed = set(ARROWS) if name in COMMANDS else ARROWS.get(name, set())
    assert name in ARROWS or name in GROUND or name in COMMANDS, "a new room: say above what it may import"
    assert ROOMS[name] <= allowed | GROUND


def test_there_is_no_circle_of_rooms():
    graph = {name: {other for other in others if "dfad_kernels" not in other} for name, others in ROOMS.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def test_there_is_no_circle_of_modules():
    graph = {name: imports(path) & set(MODULES) for name, path in MODULES.items()}
    list(TopologicalSorter(graph).static_order())


def reachable(start: str) -> set[str]:
    found, left = set(), [start]
    while left:
        for other in ROOMS[left.pop()] - found:
            found.add(other)
            left.append(other)
    return found


def test_distilling_cannot_reach_data_nor_the_parser_of_flags():
    assert not reachable("distillation") & {"data", "cli", "supervised", "assembly", *COMMANDS}


def test_kernels_know_nothing_of_what_uses_them():
    assert not reachable("dfad_kernels") & (set(ARROWS) - {name for name in ARROWS if name.startswith("dfad_kernels")})


@pytest.mark.parametrize(
    ("package", "importers"),
    [
        ("triton", "dfad_kernels.gpu"),
        ("tyro", "dfad.cli"),
        ("nvidia", "dfad.data.dali"),
        ("transformers", "dfad.delivery"),
        ("onnxruntime", "dfad.delivery.onnx"),
        ("torchao", "dfad.delivery.int8"),
    ],
)
def test_a_package_of_one_kind_of_machine_or_use_has_one_importer(package, importers):
    found = {name for name, path in MODULES.items() if any(i.split(".")[0] == package for i in imports(path))}
    assert found
    assert all(name == importers or name.startswith(f"{importers}.") for name in found), found


@pytest.mark.parametrize("folder", ["bench", "tools"])
def test_nobody_imports_a_command(folder):
    commands = {f"dfad.{name}" for name in COMMANDS}
    for path in [*MODULES.values(), *(ROOT / folder).rglob("*.py")]:
        assert not imports(path) & commands, path


def private_names(path: Path) -> set[str]:
    """What a file takes of PyTorch that is private: modules, and attributes that are not this project's own."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {name for name in imports(path) if name.startswith("torch.") and "._" in name}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "sys"):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            found |= {str(name.value) for name in node.args[1:2] if isinstance(name, ast.Constant)}
    private = {name for name in found if "._" in name or (name.startswith("_") and not name.startswith("__"))}
    return private - OWN - {"_asdict", "_fields"}  # public ones of named tuples


def own_names() -> set[str]:
    """Private names that the project defines."""
    found = set()
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found |= {node.attr} if ast.unparse(node.value) == "self" else set()
    return found - {"_parameters", "_buffers", "_modules", "_apply"}


OWN = own_names()


def test_private_interfaces_of_pytorch_stand_in_guarded_files():
    """Each in one that names the versions it was checked with, which a test of its own compares with the installed
    one."""
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    used = {name: private_names(path) for name, path in MODULES.items() if private_names(path)}
    for name, names in used.items():
        module = name.rpartition(".")[2]
        assert "CHECKED_WITH" in MODULES[name].read_text(encoding="utf-8"), (name, names)
        assert f"from {name} import CHECKED_WITH" in tests or f"{module}.CHECKED_WITH" in tests, name
    owners = Counter(private for names in used.values() for private in names)
    assert {private for private, count in owners.items() if count > 1} <= {"_C"}
    assert "_compiled_call_impl" in owners
    for folder in ("bench", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            assert private_names(path) <= {"_benchmarksession"}, path  # pytest-benchmark's
