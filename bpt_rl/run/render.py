"""Renders an episode as a GIF: plays it here, draws it in a process of its own.

dm_control settles on an OpenGL backend when it is first imported, and raises there if the backend is missing.
So the episode is played without graphics, its simulator states are written to a file, and
`python -m bpt_rl.run.render STATES OUT` draws them under one backend after the other until one works.
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

from bpt_rl.agents.base import Policy
from bpt_rl.envs import tasks

BACKENDS = ("egl", "osmesa")
"""OpenGL without a display, tried in this order unless MUJOCO_GL names one."""
MAX_BYTES = 1_500_000
MAX_FRAMES = 100
HOW_TO_RENDER = (
    "Install Debian's libegl1 and libgl1-mesa-dri (apt-get install libegl1 libgl1-mesa-dri), "
    "set MUJOCO_GL=egl and evaluate again."
)
_CAMERAS = {"quadruped": 2}
"""The camera that follows the body, where it is not the first."""
_TIMEOUT = 300.0
"""Seconds that one backend may take; software rendering needs about ten."""


def render_episode(
    policy: Policy,
    task: str,
    *,
    seed: int,
    action_repeat: int,
    return_to_go: float,
    path: Path,
    num_steps: int = 1000,
    size: tuple[int, int] = (240, 320),
    backends: Sequence[str] = (),
) -> str:
    """Plays one episode, writes it as a GIF below 1.5 MB and returns a sentence that says what came of it.

    Args:
      policy: Acts in a single environment.
      task: Like "walker_run".
      seed: Of the environment.
      action_repeat: Control steps an action is held for, as in training.
      return_to_go: Return asked of the episode, unscaled; NaN for a policy that asks for none.
      path: GIF to write; its folder is made if need be. Left alone if nothing can be drawn.
      num_steps: Agent steps after which to stop, if the episode has not ended.
      size: Height and width in pixels.
      backends: Values of MUJOCO_GL to try; none means the environment's own, then `BACKENDS`.
    """
    if importlib.util.find_spec("PIL") is None:
        return "No episode was rendered: Pillow is missing. Install the extra: pip install 'bpt-rl[video]'."
    states, total, seconds = _play(policy, task, seed, action_repeat, return_to_go, num_steps)
    chosen = np.unique(np.linspace(0, len(states) - 1, min(len(states), MAX_FRAMES)).round().astype(np.int64))
    named = os.environ.get("MUJOCO_GL")
    tried = tuple(backends) or tuple(dict.fromkeys((named, *BACKENDS) if named else BACKENDS))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        file, drawn = Path(folder) / "states.npz", Path(folder) / "episode.gif"
        milliseconds = 1000 * seconds / len(chosen)
        np.savez(file, states=states[chosen], task=task, seed=seed, size=size, milliseconds=milliseconds)
        for backend in tried:
            if _draw_elsewhere(file, drawn, backend):
                data = drawn.read_bytes()
                path.write_bytes(data)
                return (
                    f"Rendered one episode of {task} with return {total:.1f} to {path.name} "
                    f"({len(data) / 1000:.0f} kB, drawn with {backend})."
                )
    return (
        f"No episode was rendered: of the OpenGL backends {', '.join(tried)} none works here. {HOW_TO_RENDER}"
    )


def _play(
    policy: Policy, task: str, seed: int, action_repeat: int, return_to_go: float, num_steps: int
) -> tuple[Float[np.ndarray, "T1 P"], float, float]:
    environment = tasks.make(task, seed, action_repeat)
    time_step = environment.reset()
    carry = policy.start(1)
    states, total = [environment.physics.get_state()], 0.0
    for _ in range(num_steps):
        observation = np.asarray(time_step.observation, np.float32)[None]
        carry, action = policy.act(carry, observation, np.array([return_to_go - total], np.float32))
        time_step = environment.step(np.asarray(action)[0])
        total += float(time_step.reward)
        states.append(environment.physics.get_state())
        carry = policy.observe(carry, np.array([time_step.reward], np.float32), np.array([time_step.last()]))
        if time_step.last():
            break
    return np.stack(states), total, float(environment.physics.time())


def _draw_elsewhere(states: Path, out: Path, backend: str) -> bool:
    command = [sys.executable, "-m", "bpt_rl.run.render", str(states), str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "PYOPENGL_PLATFORM"}
    environment["MUJOCO_GL"] = backend
    try:
        subprocess.run(command, env=environment, capture_output=True, timeout=_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return False
    # A backend may still fail at exit, with the GIF safely written: the file decides, not the exit status.
    return out.is_file()


def draw(states: Path, out: Path) -> None:
    """Draws the simulator states of a file as a GIF, with the backend that MUJOCO_GL names."""
    with np.load(states) as file:
        values = dict(file)
    height, width = map(int, values["size"])
    task = str(values["task"])
    camera = _CAMERAS.get(tasks.domain_of(task), 0)
    environment = tasks.make(task, int(values["seed"]))
    environment.reset()
    frames = []
    for state in values["states"]:
        with environment.physics.reset_context():
            environment.physics.set_state(state)
        frames.append(environment.physics.render(height=height, width=width, camera_id=camera))
    _write_gif(frames, float(values["milliseconds"]), out)


def _write_gif(frames: Sequence[UInt8[np.ndarray, "height width 3"]], milliseconds: float, out: Path) -> None:
    from PIL import Image

    images = [
        Image.fromarray(frame).quantize(colors=64, method=Image.Quantize.FASTOCTREE) for frame in frames
    ]
    temporary = out.with_suffix(".part")
    options: dict[str, Any] = {"format": "GIF", "save_all": True, "loop": 0, "optimize": True}
    while True:
        # Browsers play frames shorter than 20 ms at a tenth of a second.
        duration = max(20, round(milliseconds))
        images[0].save(temporary, append_images=images[1:], duration=duration, **options)
        if temporary.stat().st_size < MAX_BYTES or len(images) < 4:
            break
        images, milliseconds = images[::2], 2 * milliseconds
    temporary.replace(out)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
