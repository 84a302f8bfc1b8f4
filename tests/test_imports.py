"""Holds every module to the order of the rooms, by reading its syntax tree."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    "types": 0,
    "ablate_config": 0,
    "config": 0,
    "config_toml": 0,
    "bench_config": 0,
    "collect_config": 0,
    "config_checks": 0,
    "td_config": 0,
    "mesh_config": 0,
    "expected_return_config": 0,
    "envs": 1,
    "datasets": 2,
    "nn": 3,
    "agents": 4,
    "run": 5,
    "command": 6,
    "data_verbs": 6,
    "bench_verbs": 6,
    "cli": 6,
    "__main__": 6,
}
FOLDERS = {"bpt_rl": "bpt_rl", "agents": "bpt_rl.agents", "datasets": "bpt_rl.datasets"}
SIMULATORS = {"dm_control", "mujoco"}
IMPORTERS = ("importlib.import_module", "import_module", "__import__")
BARE = {"agents", "datasets", "configs"}
PRIVATE = {("bpt_rl.nn.cudnn_block", "jax._src.cudnn.fused_attention_stablehlo")}
"""What JAX has no public call for: its module says why, and finds out whether the names are as it knows them."""


def package_files() -> dict[str, Path]:
    """Returns the file of every module by the name it is imported as; links are not followed."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT / folder)
            if folder == "bpt_rl" and inner.parts[0] in ("agents", "datasets", "configs"):
                continue
            parts = [package, *inner.with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def other_files() -> list[Path]:
    return sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])


def imported_names(module: str, tree: ast.AST, is_package: bool) -> Iterator[str]:
    """Yields each imported name in full; of `from a import b` that is `a.b`, module or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parents = node.level - is_package
                anchor = module.split(".")[: -parents or None]
                source = ".".join([*anchor, *([source] if source else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in IMPORTERS:
            yield from (
                str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant)
            )


def room_of(name: str) -> str | None:
    """Returns the room of a module of this package; None for the package itself and for data."""
    parts = name.split(".")
    return parts[1] if parts[0] == "bpt_rl" and len(parts) > 1 and parts[1] in ROOMS else None


def is_private_jax(name: str) -> bool:
    parts = name.split(".")
    if parts[0] == "jaxlib" or name.startswith(("jax.lib.xla_bridge", "jax.lib.xla_client")):
        return True
    return parts[0] == "jax" and any(part.startswith("_") and not part.startswith("__") for part in parts)


def complaints_anywhere(module: str, tree: ast.AST, is_package: bool = False) -> Iterator[str]:
    """Yields what no file may do, tests and benchmarks included."""
    for name in imported_names(module, tree, is_package):
        if name.split(".")[0] in BARE:
            yield f"{module} imports {name} by its bare name"
        if is_private_jax(name) and (module, name) not in PRIVATE:
            yield f"{module} imports the private {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private_jax(ast.unparse(node)):
            yield f"{module} uses the private {ast.unparse(node)}"


def complaints(module: str, source: str, is_package: bool = False) -> list[str]:
    """Returns how a module of the package breaks the order of the rooms; empty if it does not."""
    tree = ast.parse(source)
    found = list(complaints_anywhere(module, tree, is_package))
    own = room_of(module)
    for name in imported_names(module, tree, is_package):
        room = room_of(name)
        if own and room and ROOMS[room] > ROOMS[own]:
            found.append(f"{module} (room {ROOMS[own]}) imports {name} (room {ROOMS[room]})")
        if name.split(".")[0] in SIMULATORS and own != "envs":
            found.append(f"{module} imports {name}; only bpt_rl.envs may")
        if own == "agents" and room == "agents":
            importer, imported = module.split(".")[2:3], name.split(".")[2:3]
            if importer != ["registry"] and imported not in (["base"], importer):
                found.append(f"{module} imports {name}; agents never import each other")
    return found


@pytest.mark.parametrize("module", package_files())
def test_module_keeps_to_the_order_of_the_rooms(module: str) -> None:
    path = package_files()[module]
    assert complaints(module, path.read_text(), path.name == "__init__.py") == []


@pytest.mark.parametrize("path", other_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_and_benchmarks_use_public_names_only(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    assert list(complaints_anywhere(name, ast.parse(path.read_text()))) == []


def test_every_module_lies_in_a_room() -> None:
    strays = [name for name in package_files() if name != "bpt_rl" and room_of(name) is None]
    assert strays == []


def test_the_walk_finds_each_mapped_folder() -> None:
    assert {"bpt_rl.config", "bpt_rl.envs", "bpt_rl.nn", "bpt_rl.run.records", "bpt_rl.agents.base"} <= set(
        package_files()
    )


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("bpt_rl.types", "from bpt_rl import envs", "room 0.*room 1"),
        ("bpt_rl.config", "import bpt_rl.run.records", "room 0.*room 5"),
        ("bpt_rl.envs.tasks", "from bpt_rl.datasets import exorl", "room 1.*room 2"),
        ("bpt_rl.datasets.store", "from bpt_rl.nn.attention import dot_product_attention", "room 2.*room 3"),
        ("bpt_rl.datasets.store", "from ..nn import attention", "room 2.*room 3"),
        ("bpt_rl.nn.cache", "def f():\n    from bpt_rl.agents import base", "room 3.*room 4"),
        (
            "bpt_rl.nn.cache",
            "importlib.import_module('bpt_rl.agents.base')",
            "room 3.*room 4",
        ),
        ("bpt_rl.agents.dt", "from bpt_rl.run import train", "room 4.*room 5"),
        ("bpt_rl.run.train", "from bpt_rl import cli", "room 5.*room 6"),
        ("bpt_rl.agents.dt", "from bpt_rl.agents import at", "never import each other"),
        ("bpt_rl.agents.dt", "from . import at", "never import each other"),
        ("bpt_rl.agents.base", "import bpt_rl.agents.at", "never import each other"),
        ("bpt_rl.run.rollout", "from dm_control import suite", "only bpt_rl.envs"),
        ("bpt_rl.datasets.relabel", "import mujoco", "only bpt_rl.envs"),
        ("bpt_rl.run.train", "import datasets", "bare name"),
        ("bpt_rl.run.train", "from agents.base import Agent", "bare name"),
        ("bpt_rl.nn.attention", "from jax._src import core", "private"),
        ("bpt_rl.nn.attention", "from jax.lib import xla_bridge", "private"),
        ("bpt_rl.nn.attention", "import jaxlib.xla_client", "private"),
        ("bpt_rl.nn.attention", "import jax\njax._src.config.update", "private"),
    ],
)
def test_the_checker_catches(module: str, source: str, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        assert complaints(module, source) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("bpt_rl.envs.tasks", "from dm_control import suite\nimport mujoco"),
        (
            "bpt_rl.agents.at",
            "from bpt_rl.agents import base\nfrom . import base\nimport jax.numpy as jnp",
        ),
        ("bpt_rl.agents.registry", "from bpt_rl.agents import at, bc, dt"),
        ("bpt_rl.run.train", "from bpt_rl import types\nimport bpt_rl\njax.__version__"),
        ("bpt_rl.cli", "from bpt_rl.run import train\nfrom bpt_rl.datasets import exorl"),
    ],
)
def test_the_checker_allows(module: str, source: str) -> None:
    assert complaints(module, source) == []
