"""Prints constraints.txt: the newest releases that install under each Python named, merged.

Run it from the repository root, with the supported interpreters in ascending order:

    python3 .ci/constraints.py python3.11 python3.12 python3.13 > new.txt && mv new.txt constraints.txt
"""

import subprocess
import sys
import tempfile
from pathlib import Path

HEADER = """\
# What CI installs and tests: every package of `.[dev,video,minari,ray]` on Linux x86-64, for each supported Python.
# Written by .ci/constraints.py, which says how to run it; edit pyproject.toml instead of this file.
"""


def frozen(interpreter: str) -> tuple[str, dict[str, str]]:
    """Returns an interpreter's version and the release of each package that a fresh install gets."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
        python = str(Path(folder) / "bin" / "python")
        pip = [python, "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", "--upgrade", "pip"], check=True, stdout=sys.stderr)
        subprocess.run([*pip, "install", "--quiet", ".[dev,video,minari,ray]"], check=True, stdout=sys.stderr)
        subprocess.run([*pip, "install", "--quiet", "--no-deps", "dm_control"], check=True, stdout=sys.stderr)
        command = [*pip, "freeze", "--exclude", "bpt-rl", "--exclude", "setuptools"]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        version = "import sys; print('%d.%d' % sys.version_info[:2])"
        name = subprocess.run(
            [python, "-c", version], check=True, capture_output=True, text=True
        ).stdout.strip()
    pairs = (line.split("==") for line in listing.splitlines() if "==" in line)
    return name, {package.lower().replace("_", "-"): release for package, release in pairs}


def pins(package: str, pythons: list[str], releases: list[str | None]) -> list[str]:
    """Returns one line for each run of Pythons that get the same release."""
    lines = []
    start = 0
    for end in range(1, len(pythons) + 1):
        if end < len(pythons) and releases[end] == releases[start]:
            continue
        bounds = [f"python_version >= '{pythons[start]}'"] if start else []
        bounds += [f"python_version < '{pythons[end]}'"] if end < len(pythons) else []
        if releases[start] is not None:
            lines.append(f"{package}=={releases[start]}" + (f"; {' and '.join(bounds)}" if bounds else ""))
        start = end
    return lines


def main() -> None:
    """Freezes each interpreter's install and prints the merged pins."""
    versions = [frozen(interpreter) for interpreter in sys.argv[1:]]
    pythons = [name for name, _ in versions]
    print(HEADER, end="")
    for package in sorted(set().union(*(listing for _, listing in versions))):
        releases = [listing.get(package) for _, listing in versions]
        print("\n".join(pins(package, pythons, releases)))


if __name__ == "__main__":
    main()
