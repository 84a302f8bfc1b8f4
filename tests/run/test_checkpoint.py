import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bpt_rl import config_toml
from bpt_rl.agents.registry import make_agent
from bpt_rl.run.checkpoint import Checkpoints
from bpt_rl.run.records import RunFolder
from bpt_rl.run.step import init_state, make_optimizer
from bpt_rl.run.train import train

TEMPORARY = ".orbax-checkpoint-tmp"
"""Part of the name of a folder that Orbax is still writing."""


def state_of(config, statistics):
    return init_state(make_agent(config, statistics), make_optimizer(config.optimizer), config.seed)


def test_every_leaf_comes_back_as_it_was_saved(tiny, trained, tmp_path, assert_same_bits):
    fresh = state_of(tiny(tmp_path), trained.statistics())
    generator = np.random.default_rng(0)
    state = jax.tree.map(lambda x: jnp.asarray(generator.normal(size=x.shape) * 50, x.dtype), fresh)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32"}
    with Checkpoints(tmp_path / "checkpoints") as saved:
        assert saved.latest_step is None
        saved.save(3, state)
        assert saved.latest_step == 3
    with Checkpoints(tmp_path / "checkpoints") as saved:
        restored = saved.restore(saved.latest_step, jax.eval_shape(lambda: fresh))
    assert type(restored) is type(state)
    assert_same_bits(restored, state)


def test_what_a_template_has_as_numpy_never_comes_to_a_device(tmp_path):
    saved_values = {"read": jnp.arange(3.0), "unread": jnp.arange(4)}
    with Checkpoints(tmp_path) as saved:
        saved.save(1, saved_values)
        template = jax.eval_shape(lambda: saved_values) | {"unread": np.broadcast_to(np.int32(0), 4)}
        restored = saved.restore(1, template)
    assert isinstance(restored["read"], jax.Array)
    assert type(restored["unread"]) is np.ndarray
    jax.tree.map(np.testing.assert_array_equal, restored, saved_values)


def test_only_the_newest_stay(tmp_path):
    with Checkpoints(tmp_path, keep=2) as saved:
        for step in (1, 2, 5, 9):
            saved.save(step, {"x": jnp.full(2, step)})
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [5, 9]
    with Checkpoints(tmp_path, keep=2) as saved:
        np.testing.assert_array_equal(saved.restore(5, {"x": jnp.zeros(2, int)})["x"], [5, 5])
        with pytest.raises(FileNotFoundError, match=r"there is none of step 1 in .* Steps there: 5, 9\."):
            saved.restore(1, {"x": jnp.zeros(2, int)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 32}, r"params/embed_action/bias is \(16,\) in step 6 of .* and \(32,\) in the"),
        ({"num_layers": 2}, r"params/transformer/blocks/\S+ is \(1, .* and \(2, "),
        ({"layout": "return_state_action"}, r"params/embed_reward/bias is \(16,\) .* and absent in the"),
        ({"episode_embedding": 4}, r"params/embed_episode/embedding is absent in .* and \(4, 16\) in the"),
        ({"agent": "bc"}, r"params/embed_action/bias is \(16,\) .* and absent in the"),
    ],
)
def test_another_architecture_is_refused_naming_a_parameter_and_both_shapes(tiny, trained, changes, message):
    other = jax.eval_shape(lambda: state_of(tiny(trained.path, **changes), trained.statistics()))
    with (
        Checkpoints(trained.checkpoints_path) as saved,
        pytest.raises(ValueError, match=f"must match the configured architecture; {message}"),
    ):
        saved.restore(6, other)


def start_and_kill_while_saving(command, checkpoints):
    """Returns the step that was being written when SIGKILL came, or None if it was just complete."""
    known = set(checkpoints.glob("*"))
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        written = 0
        # Not the first save of the process: the newest checkpoint should then be one of its own.
        while written < 2 and time.monotonic() < deadline and process.poll() is None:
            fresh = set(checkpoints.glob(f"*{TEMPORARY}*")) - known
            known |= fresh
            written += len(fresh)
        assert process.poll() is None, process.stderr.read().decode()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    left = [path.name for path in checkpoints.glob(f"*{TEMPORARY}*")]
    return int(left[0].split(".")[0]) if left else None


def test_kill_9_while_saving_leaves_the_checkpoint_before_and_the_same_result(
    tiny, tmp_path, read_state, assert_same_bits
):
    # Wide enough that writing 40 MB takes some tenths of a second.
    changes = {"agent": "bc", "embed_dim": 1024, "num_layers": 4, "num_steps": 12}
    config = tiny(tmp_path / "killed", checkpoint_every=1, **changes)
    expected = read_state(train(tiny(tmp_path / "whole", checkpoint_every=12, **changes)))
    path, checkpoints = tmp_path / "config.toml", tmp_path / "killed" / "checkpoints"
    path.write_text(config_toml.to_toml(config))
    command = [sys.executable, "-m", "bpt_rl", "train", str(path)]
    attempts = (start_and_kill_while_saving(command, checkpoints) for _ in range(4))
    step = next((step for step in attempts if step), None)
    assert step, "no kill came while a checkpoint was being written"
    with Checkpoints(checkpoints) as saved:
        assert 1 <= saved.latest_step == step - 1
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"Run: {config.run}\n")
    folder = RunFolder(tmp_path / "killed")
    assert_same_bits(read_state(folder), expected)
    assert [line["step"] for line in folder.metrics()] == list(range(1, 13))
    assert not list(checkpoints.glob(f"*{TEMPORARY}*"))


def test_ctrl_c_while_saving_waits_until_the_checkpoint_is_complete(tmp_path):
    script = tmp_path / "save.py"
    script.write_text(
        "import os, signal, sys, threading, pathlib, numpy as np\n"
        "from bpt_rl.run.checkpoint import Checkpoints\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "def interrupt():\n"
        "    while not list(folder.glob('*orbax-checkpoint-tmp*')): pass\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "with Checkpoints(folder) as saved:\n"
        "    threading.Thread(target=interrupt, daemon=True).start()\n"
        "    try:\n"
        "        saved.save(1, {'a': np.ones((500, 500), np.float32)})\n"
        "    except KeyboardInterrupt:\n"
        "        print('interrupted', saved.latest_step)\n"
    )
    command = [sys.executable, str(script), str(tmp_path / "checkpoints")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "interrupted 1"), done.stderr
