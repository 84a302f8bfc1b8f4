"""Films of episodes, as GIF or MP4: simulator states, drawn in a process of its own.

dm_control settles on an OpenGL backend when it is first imported, and raises there if the backend is missing. So the
states of an episode are written to a file, and `python -m bpt_rl.run.film STATES OUT` draws them under one backend
after the other until one works.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from bpt_rl.envs import tasks

BACKENDS = ("egl", "osmesa")
"""OpenGL without a display, tried in this order unless MUJOCO_GL names one."""
MAX_BYTES = 1_500_000
MAX_FRAMES = 100
"""Of a GIF, which pages hold whole."""
FRAMES_PER_SECOND = 25
"""Of an MP4."""
WRITERS = {".gif": "PIL", ".mp4": "imageio_ffmpeg"}
"""File types, and the package that writes each."""
_CAMERAS = {"quadruped": 2}
"""The camera that follows the body, where it is not the first."""
_TIMEOUT = 300.0
"""Seconds that one backend may take; software rendering of a GIF needs about ten."""


class FilmError(OSError):
    """Nothing can be drawn on this machine; the message says what to install."""


def write_film(
    path: Path,
    task: str,
    physics: Float[np.ndarray, "T1 P"],
    *,
    action_repeat: int = 1,
    size: tuple[int, int] = (240, 320),
    backends: Sequence[str] = (),
) -> None:
    """Writes an episode as a film that lasts as long as the episode did.

    A GIF has at most `MAX_FRAMES` frames and 1.5 MB, an MP4 25 frames a second.

    Args:
      path: Ends in .gif or .mp4. Its folder is made if need be; a file there is replaced once the film is drawn.
      task: Like "walker_run".
      physics: States, float64, one each `action_repeat` control steps.
      action_repeat: Control steps from one state to the next.
      size: Height and width in pixels.
      backends: Values of MUJOCO_GL to try; none means the environment's own, then `BACKENDS`.

    Raises:
      ValueError: If the file has another suffix, or the states do not fit the task.
      FilmError: If a package or every OpenGL backend is missing.
    """
    _check(path, task, physics, size)
    named = os.environ.get("MUJOCO_GL")
    tried = tuple(backends) or tuple(dict.fromkeys((named, *BACKENDS) if named else BACKENDS))
    path.parent.mkdir(parents=True, exist_ok=True)
    reason = "none was tried"
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        states, drawn = Path(folder) / "states.npz", Path(folder) / f"film{path.suffix}"
        np.savez(states, physics=physics, task=task, action_repeat=action_repeat, size=size)
        for backend in tried:
            reason = _draw_elsewhere(states, drawn, backend)
            # A backend may still fail at exit, with the film safely written: the file decides.
            if drawn.is_file():
                drawn.replace(path)
                return
    raise FilmError(
        f"A film needs an OpenGL library without a display; of the backends {', '.join(tried)} none works here (the "
        f"last: {reason}). Install Debian's libegl1 and libgl1-mesa-dri (apt-get install libegl1 libgl1-mesa-dri) and "
        "set MUJOCO_GL=egl."
    )


def _check(path: Path, task: str, physics: Float[np.ndarray, "T1 P"], size: tuple[int, int]) -> None:
    if path.suffix not in WRITERS:
        raise ValueError(
            f"A film must be a file that ends in {' or '.join(WRITERS)}; got {path.name}. Name it so."
        )
    physics_dim = tasks.DOMAINS[tasks.domain_of(task)].physics_dim
    if physics.shape[1] != physics_dim or not len(physics):
        raise ValueError(
            f"An episode of {task} must have states of {physics_dim} numbers; got an array of shape {physics.shape}. "
            "Name the task that it was recorded under."
        )
    if min(size) < 16 or any(length % 2 for length in size):
        raise ValueError(
            f"Height and width of a film must be even and at least 16; got {size[0]} and {size[1]}. 240 and 320 are "
            "usual."
        )
    if importlib.util.find_spec(WRITERS[path.suffix]) is None:
        raise FilmError(
            f"A film that ends in {path.suffix} is written by the package {WRITERS[path.suffix]}, which is not "
            "installed. Install the extra: pip install 'bpt-rl[video]'."
        )


def _draw_elsewhere(states: Path, out: Path, backend: str) -> str:
    """Returns the last words of the process that draws, if it fails."""
    command = [sys.executable, "-m", "bpt_rl.run.film", str(states), str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "PYOPENGL_PLATFORM"}
    environment["MUJOCO_GL"] = backend
    try:
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no film after {_TIMEOUT:.0f} s"
    return (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1]


def draw(states: Path, out: Path) -> None:
    """Draws the simulator states of a file as a film, with the backend that MUJOCO_GL names."""
    with np.load(states) as file:
        values = dict(file)
    physics, task = values["physics"], str(values["task"])
    height, width = map(int, values["size"])
    camera = _CAMERAS.get(tasks.domain_of(task), 0)
    environment = tasks.make(task, 0, int(values["action_repeat"]))
    environment.reset()
    seconds = (len(physics) - 1) * environment.seconds_per_step
    most = MAX_FRAMES if out.suffix == ".gif" else round(seconds * FRAMES_PER_SECOND) + 1
    num_frames = min(len(physics), most)
    chosen = np.linspace(0, len(physics) - 1, num_frames).round().astype(np.int64)
    frames = []
    for state in physics[chosen]:
        with environment.physics.reset_context():
            environment.physics.set_state(state)
        frames.append(environment.physics.render(height=height, width=width, camera_id=camera))
    temporary = out.with_name(f"part{out.suffix}")
    _write(frames, max(seconds, 0.1) / num_frames, temporary)
    temporary.replace(out)


def _write(frames: Sequence[UInt8[np.ndarray, "height width 3"]], seconds_each: float, out: Path) -> None:
    if out.suffix == ".gif":
        _write_gif(frames, seconds_each, out)
    else:
        _write_mp4(frames, seconds_each, out)


def _write_gif(frames: Sequence[UInt8[np.ndarray, "height width 3"]], seconds_each: float, out: Path) -> None:
    from PIL import Image

    images = [
        Image.fromarray(frame).quantize(colors=64, method=Image.Quantize.FASTOCTREE) for frame in frames
    ]
    options: dict[str, Any] = {"format": "GIF", "save_all": True, "loop": 0, "optimize": True}
    while True:
        # A GIF counts in hundredths of a second, and browsers play frames of one of them at a tenth of a second.
        duration = 10 * max(2, round(100 * seconds_each))
        images[0].save(out, append_images=images[1:], duration=duration, **options)
        if out.stat().st_size < MAX_BYTES or len(images) < 4:
            return
        images, seconds_each = images[::2], 2 * seconds_each


def _write_mp4(frames: Sequence[UInt8[np.ndarray, "height width 3"]], seconds_each: float, out: Path) -> None:
    import imageio_ffmpeg

    height, width, _ = frames[0].shape
    # Blocks of two, not of 16: the picture keeps its size.
    writer = imageio_ffmpeg.write_frames(
        out, (width, height), fps=1 / seconds_each, codec="libx264", macro_block_size=2
    )
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
