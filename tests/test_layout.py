"""Guards the layout: code in top-level folders that installs below bpt_rl and shadows nothing."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAPPED = ("agents", "datasets", "configs")
VAGUE_NAMES = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
# Installation instructions of one machine, which no other could follow.
MACHINE_BOUND = re.compile(r"/home/\w|/Users/\w|/root/|index-url|find-links|trusted-host|@ file:")


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def checkout_files() -> list[Path]:
    """Returns the files of the checkout that git tracks or would track, links not followed."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    return [
        ROOT / name for name in names if name and (ROOT / name).is_file() and not (ROOT / name).is_symlink()
    ]


def run_python(source: str, *, cwd: Path, path: list[Path]) -> str:
    """Returns what a fresh interpreter prints, with `path` in front of its sys.path."""
    preamble = f"import sys; sys.path[:0] = {[str(entry) for entry in path]!r}\n"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    result = subprocess.run(
        [sys.executable, "-I", "-c", preamble + source],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("folder", MAPPED)
def test_mapped_folder_is_flat_and_has_no_init(folder: str) -> None:
    entries = [entry for entry in (ROOT / folder).iterdir() if entry.name != "__pycache__"]
    assert [entry.name for entry in entries if entry.is_dir()] == []
    # With one, the repository root on sys.path would shadow an installed package of that name.
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("folder", MAPPED)
def test_link_into_the_package_is_relative(folder: str) -> None:
    link = ROOT / "bpt_rl" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..") / folder


def test_listed_packages_are_the_folders() -> None:
    settings = project()["tool"]["setuptools"]
    rooms = {f"bpt_rl.{path.parent.name}" for path in (ROOT / "bpt_rl").glob("*/__init__.py")}
    assert set(settings["packages"]) == {"bpt_rl", *rooms, *(f"bpt_rl.{folder}" for folder in MAPPED)}
    assert settings["package-dir"] == {f"bpt_rl.{folder}": folder for folder in MAPPED}


def test_installed_package_of_the_same_name_is_not_shadowed(tmp_path: Path) -> None:
    for name in MAPPED:
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text("OWNER = 'another project'\n")
    source = "import agents, configs, datasets\nprint(agents.OWNER, configs.OWNER, datasets.OWNER, sep=', ')"
    # The root comes first, as it does for `python -m pytest` and for a script beside the folders.
    printed = run_python(source, cwd=ROOT, path=[ROOT, tmp_path / "site"])
    assert printed == ", ".join(["another project"] * 3)


def test_mapped_modules_import_below_the_package(tmp_path: Path) -> None:
    source = (
        "import importlib.resources, bpt_rl.agents.base, bpt_rl.datasets.exorl\n"
        "print(importlib.resources.files('bpt_rl.configs').is_dir(), {'agents', 'datasets'} & {*sys.modules})"
    )
    assert run_python(source, cwd=tmp_path, path=[]) == "True set()"


def test_importing_the_package_imports_nothing_else(tmp_path: Path) -> None:
    source = "before = {*sys.modules}\nimport bpt_rl\nprint({*sys.modules} - before, bpt_rl.__version__)"
    assert run_python(source, cwd=tmp_path, path=[ROOT]).startswith("{'bpt_rl'} 0.")


def test_wheel_and_sdist_hold_the_code_once(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("build")
    checkout, out = tmp_path / "checkout", tmp_path / "out"
    checkout.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    for folder in ("bpt_rl", *MAPPED):
        shutil.copytree(
            ROOT / folder, checkout / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    (checkout / "configs" / "probe.toml").touch()
    (checkout / "build" / "lib" / "datasets").mkdir(parents=True)
    (checkout / "build" / "lib" / "datasets" / "stale.py").touch()
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(checkout)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)

    wheel = zipfile.ZipFile(next(out.glob("*.whl"))).namelist()
    code = [path for path in checkout.rglob("*.py") if "build" not in path.relative_to(checkout).parts]
    below = {
        (Path("bpt_rl") / p if p.parts[0] in MAPPED else p) for p in (c.relative_to(checkout) for c in code)
    }
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {"bpt_rl"}
    assert sorted(name for name in wheel if name.endswith(".py")) == sorted(map(str, below))
    assert {"bpt_rl/py.typed", "bpt_rl/configs/probe.toml"} <= set(wheel)

    with tarfile.open(next(out.glob("*.tar.gz"))) as sdist:
        packed = Counter("/".join(name.split("/")[1:]) for name in sdist.getnames())
    assert [name for name in packed if name.startswith(tuple(f"bpt_rl/{folder}/" for folder in MAPPED))] == []
    assert {"agents/base.py", "configs/probe.toml"} <= set(packed)
    assert not {name for name in packed if "stale" in name}


def test_code_files_are_short_and_named_for_what_they_hold() -> None:
    code = [path for path in checkout_files() if path.suffix == ".py"]
    too_long = {str(p.relative_to(ROOT)): n for p in code if (n := len(p.read_text().splitlines())) > 400}
    assert too_long == {}
    assert [str(path.relative_to(ROOT)) for path in code if path.name in VAGUE_NAMES] == []


def test_files_speak_of_no_single_machine() -> None:
    places = [ROOT, ROOT.parent, Path.home(), Path(sys.base_prefix), Path(sysconfig.get_path("purelib"))]
    shared = [Path(name) for name in ("/", "/tmp", "/home", "/usr", "/usr/local")]
    here = [re.escape(str(place)) + r"\b" for place in places if place not in shared]
    pattern = re.compile("|".join([MACHINE_BOUND.pattern, *here]))
    found = []
    for path in checkout_files():
        # This file holds the pattern itself.
        if path.suffix in (".png", ".npz", ".h5") or path == Path(__file__).resolve():
            continue
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in pattern.finditer(path.read_text())]
    assert found == []
