import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from bpt_rl import config_toml
from bpt_rl.agents.registry import make_explorer
from bpt_rl.collect_config import CollectConfig, ExplorationConfig
from bpt_rl.datasets import exorl
from bpt_rl.run.collect import collect
from bpt_rl.run.exploration_step import ExplorationStep
from bpt_rl.run.explore import mean_metrics

TINY = ExplorationConfig(
    num_environments=2,
    steps_per_update=20,
    first_steps=100,
    batch_size=4,
    hidden_dim=8,
    # More than one round and less than two: parts of an episode are forgotten.
    replay_steps=3000,
)
ROUND_STEPS = 2000
KILLED_AT = ROUND_STEPS + 120
SCRIPT = """
import os, signal, sys
from bpt_rl import config_toml
from bpt_rl.collect_config import CollectConfig
from bpt_rl.run import explore
from bpt_rl.run.collect import collect

def die(done, total, note):
    if done >= int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    explore.CHECKPOINT_STEPS = 1
    collect(config_toml.load(CollectConfig, sys.argv[1]), die)
"""


def config_of(out, **changes):
    values = {
        "task": "cartpole_swingup",
        "algorithm": "diayn",
        "num_steps": 2 * ROUND_STEPS,
        "num_workers": 1,
    }
    return CollectConfig(out=str(out), exploration=TINY, **(values | changes))


def contents(buffer):
    return {path.name: path.read_bytes() for path in buffer.iterdir()}


def metrics(buffer):
    lines = map(json.loads, (buffer.parent / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if "per_second" not in k} for line in lines]


@pytest.fixture(scope="module")
def explored(tmp_path_factory):
    """Two rounds, never interrupted."""
    return collect(config_of(tmp_path_factory.mktemp("explored")))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU adds up in an order of its own")
def test_a_killed_collection_goes_on_to_the_bytes_of_an_uninterrupted_one(explored, tmp_path):
    collecting = tmp_path / "collect.py"
    collecting.write_text(SCRIPT)
    config = tmp_path / "given.toml"
    # Two processes of simulators, where the reference has one.
    config.write_text(config_toml.to_toml(config_of(tmp_path, num_workers=2)))
    killed = subprocess.run([sys.executable, collecting, config, str(KILLED_AT)], check=False)
    assert killed.returncode == -9
    buffer = tmp_path / "cartpole" / "diayn" / "buffer"
    assert len(contents(buffer)) == 2
    # As if a later round had been written, but not its checkpoint.
    (buffer / "episode_000009_1000.npz").write_bytes(b"of another run")
    progress = []
    assert collect(config_of(tmp_path), lambda done, total, note: progress.append((done, total))) == buffer
    assert progress[0] == (ROUND_STEPS, 2 * ROUND_STEPS)
    assert progress[-1] == (2 * ROUND_STEPS, 2 * ROUND_STEPS)
    assert contents(buffer) == contents(explored)
    assert metrics(buffer) == metrics(explored)


def test_a_finished_collection_is_left_alone_and_must_be_whole(explored):
    before = contents(explored)
    config = config_of(explored.parents[2])
    collect(dataclasses.replace(config, num_steps=10))
    assert contents(explored) == before
    (explored / "episode_000001_1000.npz").rename(explored / "elsewhere")
    with pytest.raises(ValueError, match=r"on the first 4 episodes; .*episode_000001_1000.npz is missing"):
        collect(config)
    (explored / "elsewhere").rename(explored / "episode_000001_1000.npz")


def test_actions_are_uniform_at_first_and_then_follow_the_skill(explored):
    for name, episode in exorl.iterate_episodes(explored):
        skill = episode.extras["skill"]
        assert (np.sort(skill, axis=1)[:, -2:] == [0, 1]).all()
        blocks = skill[1:].reshape(-1, 50, skill.shape[1])
        assert (blocks == blocks[:, :1]).all()
        assert len(np.unique(blocks[:, 0], axis=0)) > 5
        spread = np.std(episode.action[1:51])
        if name < "episode_000002":
            # Uniform in [-1, 1], five standard errors.
            assert abs(spread - np.sqrt(1 / 3)) < 5 * 0.4 / np.sqrt(50)
        else:
            assert spread < 0.45


def test_metrics_tell_of_every_round(explored):
    lines = metrics(explored)
    assert [line["step"] for line in lines] == [2000, 4000]
    assert [line["updates"] for line in lines] == [95, 195]
    returns = [episode.reward.sum() for _, episode in exorl.iterate_episodes(explored)]
    np.testing.assert_allclose(
        [line["task_return"] for line in lines], np.reshape(returns, (2, 2)).mean(axis=1)
    )
    assert all(np.isfinite(line["critic_loss"]) and line["actor_loss"] for line in lines)


def test_learning_that_diverges_is_not_recorded_on():
    lines = [{"critic_loss": 1.0, "value": 2.0}, {"critic_loss": 3.0, "value": 0.0}]
    assert mean_metrics(lines) == {"critic_loss": 2.0, "value": 1.0}
    assert mean_metrics([]) == {}
    with pytest.raises(FloatingPointError, match=r"must stay finite; got value nan\. Lower"):
        mean_metrics([*lines, {"critic_loss": 0.0, "value": np.nan}])


@pytest.mark.parametrize(("environments", "steps_per_update"), [(4, 2.0), (2, 6.0), (3, 1.5)])
def test_updates_are_counted_as_they_are_made(environments, steps_per_update):
    config = dataclasses.replace(
        TINY, num_environments=environments, steps_per_update=steps_per_update, first_steps=17
    )
    step = ExplorationStep(config, make_explorer("rnd", config, 3, 1), sizes=(3, 1, 50), seed=0)
    made = 0
    for number in range(100):
        assert step.num_updates_before(number) == made
        made += step.learns_at(number) * config.updates_at_once
    # All but those before the first.
    assert abs(made - (100 * environments - 17) / steps_per_update) <= max(1, config.updates_at_once)
    # n steps are needed even where updates may begin at once.
    eager = dataclasses.replace(config, first_steps=1)
    step = ExplorationStep(eager, make_explorer("rnd", eager, 3, 1), sizes=(3, 1, 50), seed=0)
    assert not any(step.learns_at(number) for number in range(3))


def test_what_does_not_fit_an_explorer_is_refused(cli, explored, tmp_path):
    line = f"data collect cartpole --algorithm rnd --out {tmp_path}"
    assert "got cartpole and walker_run" in cli.refuse(f"{line} --task walker_run")
    assert "takes one domain at most; got cartpole walker" in cli.refuse("data collect cartpole walker")
    assert "raise replay_steps" in cli.refuse(f"{line} --exploration.replay-steps 100")
    assert not list(tmp_path.rglob("*.npz"))
    with pytest.raises(ValueError, match="acts at every control step; got action_repeat 2"):
        config_of(tmp_path, action_repeat=2)
    with pytest.raises(ValueError, match=r"num_environments must be a multiple of .*; got 5 and 2\.0"):
        ExplorationConfig(num_environments=5)
    with pytest.raises(ValueError, match=r"with exploration\.noise = 0\.2, and 0\.3 is asked for"):
        collect(
            dataclasses.replace(
                config_of(explored.parents[2]), exploration=dataclasses.replace(TINY, noise=0.3)
            )
        )
