"""Environment of the tests. It must be set before anything imports jax or bpt_rl."""

import contextlib
import importlib.metadata
import io
import os
import shlex
import signal
from pathlib import Path

import jaxtyping
import pytest

# A shell starts background jobs deaf to Ctrl-C, and the processes that tests start and interrupt would be so too.
signal.signal(signal.SIGINT, signal.default_int_handler)

CACHE = Path(__file__).resolve().parent.parent / ".pytest_cache" / "jax"

# BPT_RL_TEST_PLATFORM=cuda runs the tests on a GPU; left out, they use the CPU wherever they run.
os.environ["JAX_PLATFORMS"] = os.environ.get("BPT_RL_TEST_PLATFORM", "cpu")
if os.environ["JAX_PLATFORMS"] == "cuda":
    # Otherwise a GPU rounds the operands of float32 products to 10 bits, and only tests of bfloat16 mean such rounding.
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
# Eight virtual CPU devices, so that sharding is tested without accelerators.
FLAGS = {"xla_force_host_platform_device_count": "8"}
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Compiling small programs is most of what the tests do, and optimising them most of that.
    FLAGS["xla_backend_optimization_level"] = "0"
    # There is one process a core already.
    FLAGS["xla_cpu_parallel_codegen_split_count"] = "1"
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        # XLA's older code generator is quicker again; later versions have the new one alone.
        FLAGS["xla_cpu_use_fusion_emitters"] = "false"
given = os.environ.get("XLA_FLAGS", "")
missing = [f"--{name}={value}" for name, value in FLAGS.items() if name not in given]
os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()
# Compiled programs are kept between runs and shared with the processes that tests start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
os.environ.setdefault("MPLBACKEND", "agg")

# Every annotation of the package is checked at run time, shapes included. As for mypy, an int will do where a
# float is asked for.
jaxtyping.install_import_hook("bpt_rl", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


class CommandLine:
    """`bpt-rl` as users call it, in this process."""

    def run(self, line):
        """Returns exit status, standard output and standard error."""
        # Not above: the checks and the environment come first.
        from bpt_rl.cli import main

        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main(shlex.split(line))
            except SystemExit as error:
                status = error.code
        return status, out.getvalue(), err.getvalue()

    def succeed(self, line):
        """Returns standard output."""
        status, out, err = self.run(line)
        assert status == 0, err
        return out

    def refuse(self, line):
        """Returns the one sentence with which a command line is refused."""
        status, out, err = self.run(line)
        sentences = [text for text in err.splitlines() if text.startswith("bpt-rl: ")]
        assert (status, out, len(sentences), "Traceback" in err) == (2, "", 1, False), err
        return sentences[0].removeprefix("bpt-rl: ")


def pytest_runtest_setup(item):
    import jax

    for marker in item.iter_markers("devices"):
        if jax.device_count() < marker.args[0]:
            pytest.skip(
                f"needs {marker.args[0]} devices, and there are {jax.device_count()}; on a CPU they are virtual"
            )


@pytest.fixture(scope="session")
def cli():
    return CommandLine()
