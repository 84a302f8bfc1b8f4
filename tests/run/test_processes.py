"""Several real processes that train one run together, started as users start them."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from bpt_rl import config_toml
from bpt_rl.mesh_config import MeshConfig
from bpt_rl.run.records import RunFolder
from bpt_rl.run.train import train

pytestmark = pytest.mark.skipif(
    os.environ["JAX_PLATFORMS"] != "cpu", reason="its devices are a CPU's virtual ones"
)

MODEL = {
    "layout": "fused",
    "num_heads": 2,
    "implementation": "blockwise",
    "activations": "recompute",
    "dropout": 0.0,
    "batch_size": 4,
}
TOGETHER = 60
"""Seconds for what takes ten on a quiet machine."""


@contextlib.contextmanager
def two_processes(path, *, own=("", "")):
    """Yields two processes of two devices each that train a configuration file; each has options of its own."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        meeting = f"--mesh.coordinator localhost:{found.getsockname()[1]} --mesh.num-processes 2"
    flags = re.sub(r"(device_count)=\d+", r"\1=2", os.environ["XLA_FLAGS"])
    command = [sys.executable, "-m", "bpt_rl", "train", str(path), *meeting.split()]
    processes = [
        subprocess.Popen(
            [*command, "--mesh.process-id", str(i), *options.split()],
            env=os.environ | {"XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, options in enumerate(own)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def outcomes(processes):
    """Returns exit status and standard error of each."""
    errors = [process.communicate(timeout=TOGETHER)[1] for process in processes]
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


@pytest.fixture
def write(tiny, tmp_path):
    """Returns the configuration file of a run of two rows and two parts of each."""

    def written(name, **changes):
        config = tiny(tmp_path / name, **MODEL, mesh=MeshConfig(fsdp=2, context=2), **changes)
        path = tmp_path / f"{name}.toml"
        path.write_text(config_toml.to_toml(config))
        return path, config

    return written


def test_two_processes_train_what_one_does_and_either_goes_on_from_the_other(write, read_state):
    _, alone = write("alone", num_steps=4)
    train(alone)
    path, config = write("together", num_steps=4)
    with two_processes(path) as processes:
        for status, error in outcomes(processes):
            assert status == 0, error
    folder, expected = RunFolder(Path(config.run)), RunFolder(Path(alone.run))
    assert folder.config() == config
    assert folder.versions()["processes"] == 2

    def compare():
        for name in ("loss", "gradient_norm", "parameter_norm", "tokens"):
            values = [[line[name] for line in each.metrics()] for each in (folder, expected)]
            # Float32 sums in another order, four updates one after another.
            np.testing.assert_allclose(*values, rtol=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
            read_state(folder).params,
            read_state(expected).params,
        )

    compare()
    # One process goes on from what two have left.
    shutil.rmtree(folder.checkpoints_path / "4")
    train(config)
    compare()


@pytest.mark.parametrize(
    ("own", "sentences"),
    [
        ("--data.store {folder}/nowhere.h5", ("Process 1 of 2 cannot train: {own}", "{folder}/nowhere.h5")),
        ("--seed 7", ("{own}", "got seed 0 in process 0 and 7 in process 1")),
    ],
)
def test_what_one_process_cannot_do_all_refuse(own, sentences, write, tmp_path):
    path, config = write("refused")
    with two_processes(path, own=("", own.format(folder=tmp_path))) as processes:
        (status, error), (own_status, own_error) = outcomes(processes)
    assert (status, own_status) == (2, 2)
    sentence, own_sentence = (text.splitlines()[-1].removeprefix("bpt-rl: ") for text in (error, own_error))
    assert sentence == sentences[0].format(own=own_sentence)
    assert sentences[1].format(folder=tmp_path) in own_sentence
    assert not Path(config.run).exists()


def test_one_interrupted_process_ends_the_others(write):
    path, config = write("interrupted", num_steps=100_000, checkpoint_every=100_000)
    metrics = RunFolder(Path(config.run)).metrics_path
    with two_processes(path) as processes:
        give_up = time.monotonic() + TOGETHER
        while not (metrics.is_file() and metrics.stat().st_size):
            assert time.monotonic() < give_up and processes[0].poll() is None
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGINT)
        (status, error), (own_status, own_error) = outcomes(processes)
    assert (status, own_status) == (2, 130)
    assert "bpt-rl: interrupted." in own_error
    assert "bpt-rl: process 1 of 2 has ended: KeyboardInterrupt" in error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coordinator": "here:1"}, "got mesh.coordinator 'here:1', mesh.num_processes 1"),
        ({"num_processes": 2, "context": 2}, "got mesh.coordinator '', mesh.num_processes 2"),
        ({"coordinator": "auto", "num_processes": 2, "context": 2}, "'auto' alone"),
        ({"coordinator": "here:1", "num_processes": 2, "process_id": 2}, "and mesh.process_id 2"),
        ({"coordinator": "here", "num_processes": 2, "context": 2}, "must be HOST:PORT"),
        ({"coordinator": "here:1", "num_processes": 2, "context": 3}, "got 3 devices for 2"),
    ],
)
def test_processes_that_cannot_meet_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MeshConfig(**settings)
