"""Do skills come to rest in poses? Of datasets of walker, or of another body whose root has three coordinates.

    python benchmarks/skill_poses.py data/exorl/walker/random data/exorl/walker/diayn

prints a line of JSON for each third of a dataset's episodes: the share of states in which no coordinate moves faster
than 0.5 a second; and where a skill is recorded, the mean joint speed in the first 30 and the last 20 steps of its 50,
and the variance of poses in those last steps between skills over that within a skill.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from bpt_rl.agents.diayn import SKILL_STEPS
from bpt_rl.datasets import exorl

REST, LATE, ROOT = 0.5, 30, 3


def describe(episodes):
    velocity = np.stack([episode.physics[:, episode.physics.shape[1] // 2 :] for episode in episodes])
    pose = np.stack([episode.physics[:, : episode.physics.shape[1] // 2] for episode in episodes])[..., ROOT:]
    found = {"at_rest": float((np.abs(velocity).max(axis=-1) < REST).mean())}
    if "skill" not in episodes[0].extras:
        return found
    skill = np.stack([episode.extras["skill"] for episode in episodes]).argmax(axis=-1)
    is_late = np.arange(skill.shape[1]) % SKILL_STEPS >= LATE
    speed = np.abs(velocity[..., ROOT:])
    poses, skills = pose[:, is_late].reshape(-1, pose.shape[-1]), skill[:, is_late].ravel()
    groups = [poses[skills == k] for k in np.unique(skills)]
    between = np.var([group.mean(axis=0) for group in groups], axis=0).mean()
    within = np.mean([group.var(axis=0) for group in groups])
    return found | {
        "joint_speed_early": float(speed[:, ~is_late].mean()),
        "joint_speed_late": float(speed[:, is_late].mean()),
        "pose_variance_between_over_within": float(between / within),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("datasets", nargs="+", type=Path)
    for folder in parser.parse_args().datasets:
        files = sorted((folder / "buffer").glob("*.npz"))
        for third, some in zip(("first", "second", "last"), np.array_split(np.array(files), 3), strict=True):
            values = describe([exorl.read_episode(path) for path in some])
            rounded = {name: round(value, 3) for name, value in values.items()}
            print(json.dumps({"dataset": str(folder), "third": third, **rounded}))


if __name__ == "__main__":
    main()
