"""Time and memory of building a store from a walker archive of ExoRL's full size, against the floor.

    python benchmarks/build_archive.py --out results/build_archive.json

Makes a zip of 10,000 episodes of 1,000 steps in ExoRL's layout (`--distinct` of them recorded, then repeated under
other names: inflating and relabelling a copy takes as long), builds it with three tasks through the command line,
and deletes everything. The floor is what zlib alone needs for the same bytes on as many cores.
"""

import argparse
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bpt_rl.collect_config import CollectConfig
from bpt_rl.datasets import store_format
from bpt_rl.datasets.episode_source import EpisodeSource
from bpt_rl.envs import features, rewards
from bpt_rl.run.collect import collect

TASKS = ("walker_stand", "walker_walk", "walker_run")


def make_archive(path: Path, folder: Path, num_episodes: int, distinct: int) -> None:
    config = CollectConfig(task="walker_run", num_steps=1000 * distinct, out=str(folder))
    episodes = [file.read_bytes() for file in sorted(collect(config).iterdir())]
    path.parent.mkdir(parents=True)
    # As `zip -r` does: each npz, itself a deflated zip, is deflated once more.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for i in range(num_episodes):
            archive.writestr(f"buffer/episode_{i:06d}_1000.npz", episodes[i % distinct])


def resident_bytes(pid: int) -> int:
    """Largest resident memory of a process and of those that it started, so far."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields["Pid"]) == pid or int(fields["PPid"]) == pid:
            total += 1024 * int(fields.get("VmHWM", "0 kB").split()[0])
    return total


def build(archive: Path, out: Path) -> tuple[float, int]:
    """Returns the seconds of `bpt-rl data build`, and the peak resident bytes of all its processes together."""
    command = [sys.executable, "-m", "bpt_rl", "data", "build", "--source", str(archive), "--out", str(out)]
    began = time.perf_counter()
    process = subprocess.Popen([*command, "--tasks", *TASKS])
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.25):
            peak[0] = max(peak[0], resident_bytes(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = process.wait()
    seconds = time.perf_counter() - began
    stop.set()
    watcher.join()
    if status:
        raise SystemExit(f"`data build` must succeed; it ended with {status}.")
    return seconds, peak[0]


def median_ms(function: Callable[[], Any], repeats: int = 15) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def inflate_alone(archive: Path, name: str) -> Callable[[], Any]:
    """Returns a call that inflates what lies in both zips, and does nothing else."""
    with zipfile.ZipFile(archive) as file:
        info = file.getinfo(name)
        content = file.read(name)
    outer = _deflated(archive.open("rb"), info)
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        inner = [_deflated(io.BytesIO(content), member) for member in file.infolist()]
    return lambda: [zlib.decompress(data, -15) for data in (outer, *inner)]


def _deflated(file: Any, info: zipfile.ZipInfo) -> bytes:
    file.seek(info.header_offset + 26)
    name_size, extra_size = (int.from_bytes(file.read(2), "little") for _ in range(2))
    file.seek(info.header_offset + 30 + name_size + extra_size)
    return bytes(file.read(info.compress_size))


def stages(archive: Path) -> dict[str, float]:
    """Returns the milliseconds that each stage takes of one episode on one core."""
    with EpisodeSource.open(archive) as source:
        name = source.names[0]
        episode = source.read(name)
        measured = features.physical_features("walker", episode.physics)
        arrays = (measured, episode.observation, episode.action)
        columns = {name: np.asarray(getattr(episode, name)) for name in ("observation", "action", "physics")}
        return {
            "zlib alone": median_ms(inflate_alone(archive, name)),
            "read, inflate and check": median_ms(lambda: source.read(name)),
            "features": median_ms(lambda: features.physical_features("walker", episode.physics)),
            "rewards of three tasks": median_ms(
                lambda: [rewards.reward_from_features(task, *arrays) for task in TASKS]
            ),
            "digest": median_ms(lambda: store_format.episode_digest(columns)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--distinct", type=int, default=200)
    parser.add_argument("--folder", default=None, help="where to work; needs 12 GB")
    parser.add_argument("--out", default=None, help="JSON file to write")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        archive = root / "walker" / "random.zip"
        make_archive(archive, root / "episodes", options.episodes, options.distinct)
        cores = len(os.sched_getaffinity(0))
        seconds, peak = build(archive, root / "store.h5")
        each = stages(archive)
        measured = sum(value for name, value in each.items() if name != "zlib alone")
        found = {
            "episodes": options.episodes,
            "distinct": options.distinct,
            "archive_bytes": archive.stat().st_size,
            "store_bytes": (root / "store.h5").stat().st_size,
            "cores": cores,
            "build_seconds": seconds,
            "floor_seconds": each["zlib alone"] * options.episodes / 1e3 / cores,
            "rest_seconds": seconds - measured * options.episodes / 1e3 / cores,
            "peak_resident_bytes": peak,
            "milliseconds_an_episode_and_core": each,
            "machine": platform.processor() or platform.machine(),
        }
    finally:
        shutil.rmtree(root)
    print(
        f"{found['archive_bytes'] / 1e9:.2f} GB zip -> {found['store_bytes'] / 1e9:.2f} GB store, {cores} cores: "
        f"{seconds:.0f} s, {seconds / found['floor_seconds']:.2f} times zlib alone; "
        f"peak resident {peak / 2**30:.2f} GiB"
    )
    for name, value in each.items():
        print(
            f"  {name:<26}{value:6.2f} ms an episode, {value * options.episodes / 1e3 / cores:6.1f} s in all"
        )
    print(f"  {'writing, moments, starting':<28}{'':24}{found['rest_seconds']:6.1f} s in all")
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
