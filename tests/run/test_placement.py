"""Where a run's state lies, what its layers keep, and what is said where memory runs out."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from bpt_rl.cli import main
from bpt_rl.config import OptimizerConfig
from bpt_rl.datasets import capacity
from bpt_rl.run import train_chains
from bpt_rl.run.devices import Device, this_device
from bpt_rl.run.out_of_memory import MemoryWatch, OutOfMemoryError
from bpt_rl.run.plan import Rows, plan_step, size
from bpt_rl.run.records import RunFolder
from bpt_rl.run.step import compile_step, placed_state
from bpt_rl.run.train import train


class InterruptionError(Exception):
    pass


def interrupt_at(stop):
    def report(step, total, values):
        if step == stop:
            raise InterruptionError

    return report


class LinearAgent:
    """Linear regression of the action on the observation: compiles in no time."""

    def init(self, key):
        return {"layer": {"kernel": jax.random.normal(key, (3, 2)), "bias": jax.numpy.ones(2)}}

    def loss(self, params, batch, key):
        predicted = batch.observation @ params["layer"]["kernel"] + params["layer"]["bias"]
        loss = jax.numpy.square(predicted - batch.action).mean()
        return loss, {"loss": loss}

    def policy(self, params, *, num_episodes=1, clear_context=False, sample_seed=None):
        raise NotImplementedError


def test_the_state_lies_in_the_host_between_steps_and_steps_give_the_same_bits(
    assert_same_bits, micro_batches
):
    batch, key, history = micro_batches(), jax.random.key(0), {}
    for place in ("device", "host"):
        config = OptimizerConfig(num_steps=9, warmup_steps=2, learning_rate=0.1, place=place)
        step = compile_step(LinearAgent(), config, batch, key)
        state, metrics = placed_state(LinearAgent(), config, seed=0), []
        for _ in range(3):
            before = state
            state, told = step(state, batch, key)
            metrics.append(told)
            # What a step is given is gone, so that no second copy is ever held.
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
        history[place] = (state, metrics)
        arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
        # Parameters and two moments of both kernel and bias.
        assert [leaf.sharding.memory_kind for leaf in arrays] == 6 * [
            "pinned_host" if place == "host" else "device"
        ]
        assert len(step.programs) == (3 if place == "host" else 1)
    assert_same_bits(history["host"], history["device"])


def test_a_run_may_change_what_it_keeps_and_where_and_ends_within_rounding(
    tiny, trained, tmp_path, read_state
):
    with pytest.raises(InterruptionError):
        train(tiny(tmp_path / "at", activations="recompute"), interrupt_at(3))
    folder = train(tiny(tmp_path / "at", activations="offload", **{"optimizer.place": "host"}))
    # Steps of the rate 0.01 move parameters of about 0.3; float32 rounds gradients in the seventh digit.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5),
        read_state(folder),
        read_state(trained),
    )


def test_auto_takes_what_the_run_began_with_and_ends_with_the_same_bits(
    tiny, trained, tmp_path, read_state, assert_same_bits
):
    with pytest.raises(InterruptionError):
        train(tiny(tmp_path / "at"), interrupt_at(3))
    announced = []
    folder = train(tiny(tmp_path / "at", activations="auto"), announce=announced.append)
    # A new run without a plan would recompute.
    assert announced[1] == "Activations: keep, as the run began."
    assert folder.versions()["activations"] == {"activations": "keep", "reason": "as the run began"}
    assert folder.config().model.activations == "auto"
    assert_same_bits(read_state(folder), read_state(trained))


def test_auto_is_planned_for_the_rows_of_the_store_and_announced(tiny, tmp_path, monkeypatch):
    room = capacity.Capacity(accelerator=None, host=8 * capacity.GIB + 5)
    monkeypatch.setattr(capacity, "measure", lambda: room)
    said = r"Activations: keep, \d\.\d MiB of 8\.0 GiB planned\."

    def stop(line):
        if line.startswith("Activations"):
            raise InterruptionError(line)

    with pytest.raises(InterruptionError, match=said):
        train(tiny(tmp_path / "at", activations="auto", implementation="blockwise"), announce=stop)


def test_a_step_far_beyond_the_device_is_refused_before_anything_is_written(
    tiny, store_path, tmp_path, capsys
):
    line = (
        f"train at_small --run {tmp_path / 'at'} --data.store {store_path} --data.task cartpole_swingup "
        "--data.num-trajectories 2 --data.batch-size 1 --data.context-length 400000000 --model.embed-dim 16 "
        "--model.num-heads 1 --model.num-layers 1 --model.implementation blockwise"
    )
    assert main(line.split()) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(
        r"train at ...\nbpt-rl: A training step must fit its device; by the plan one with activations recompute takes "
        r"\d+\.\d GiB, and cpu has \d+\.\d GiB\. Ways out: \(a\) Rows of at most [\d,]+ tokens .*\.\n",
        err,
    ), err
    assert not (tmp_path / "at").exists()


def test_a_step_that_runs_out_of_memory_ends_in_a_sentence_and_leaves_the_checkpoints(
    tiny, trained, store_path, tmp_path, capsys
):
    # The matrix of so many tokens in float32 takes a terabyte. The rest is as in `tiny`, whose parts are compiled.
    line = (
        f"train at_small --run {tmp_path / 'at'} --data.store {store_path} --data.task cartpole_swingup "
        "--data.num-trajectories 2 --data.batch-size 1 --data.context-length 500000 --model.embed-dim 16 "
        "--model.num-heads 1 --model.num-layers 1 --model.activations keep --model.implementation reference "
        "--model.activation relu --optimizer.num-steps 3 --optimizer.warmup-steps 0"
    )
    assert main(line.split()) == 2
    err = capsys.readouterr().err
    assert re.search(
        r"bpt-rl: A training step must fit its device; cpu with \d+\.\d GiB ran out of memory in step 1 "
        r"\(RESOURCE_EXHAUSTED: Out of memory allocating \d+ bytes\.\), and there is no plan: .* got implementation "
        r"'reference'\. .* Ways out: \(a\) .* \(b\) .* \(c\) .*\. Checkpoints stay\.\n",
        err,
    ), err
    assert "Traceback" not in err


def test_auto_takes_less_after_memory_ran_out_and_goes_on_from_the_checkpoint(tiny, tmp_path, monkeypatch):
    """The step runs out of the CPU's memory, truly, after the checkpoint of step 2, while layers keep so much."""

    def greedy(run, level):
        def compiled(*args, **kwargs):
            step, calls = compile_step(*args, **kwargs), []
            is_greedy = RunFolder(run).versions()["activations"]["activations"] == level

            def call(*inputs):
                calls.append(inputs)
                return jax.numpy.zeros(2**45) if is_greedy and len(calls) == 3 else step(*inputs)

            return call

        monkeypatch.setattr(train_chains, "compile_step", compiled)

    config = tiny(tmp_path / "at", activations="auto", implementation="blockwise")
    greedy(tmp_path / "at", "keep")
    with pytest.raises(
        OutOfMemoryError, match=r"Checkpoints stay\. The same command again takes save_attention\."
    ):
        train(config)
    announced, steps = [], []
    folder = train(config, lambda step, *_: steps.append(step), announce=announced.append)
    said = r"Activations: save_attention, \S+ \w+ of \S+ \w+ planned; memory ran out with keep\."
    assert re.fullmatch(said, announced[1]), announced[1]
    assert steps == [3, 4, 5, 6]
    assert folder.exhausted() == ["keep"]
    # What was asked for by name is not changed.
    greedy(tmp_path / "named", "save_attention")
    named = tiny(tmp_path / "named", activations="save_attention", implementation="blockwise")
    with pytest.raises(OutOfMemoryError, match=r"Checkpoints stay\.$"):
        train(named)
    assert not (tmp_path / "named" / "out_of_memory.json").exists()


@pytest.mark.parametrize(
    ("changes", "num_rows", "ways"),
    [
        (
            {"activations": "keep", "num_layers": 8},
            8,
            r'\(a\) model\.activations = "save_attention" takes \d+\.\d GiB by the plan\. '
            r"\(b\) Rows of at most [\d,]+ tokens hold data\.num_trajectories = \d+, of 50 steps each\. "
            r"\(c\) At most \d of 8 rows at a time: data\.batch_size = \d with optimizer\.accumulation = \d\.",
        ),
        (
            {"activations": "recompute"},
            1,
            r"\(a\) Rows of at most [\d,]+ tokens hold data\.num_trajectories = \d+, of 50 steps each\. "
            r"\(b\) A smaller model \(model\.embed_dim, model\.num_layers\)\.",
        ),
    ],
)
def test_out_of_memory_names_the_plan_and_ways_out(changes, num_rows, ways, tiny, trained, tmp_path):
    rows = Rows(
        statistics=trained.statistics(), num_rows=num_rows, context_length=10**6, is_one_chain_a_row=True
    )
    config = tiny(tmp_path, implementation="blockwise", batch_size=num_rows, **changes)
    device = Device(name="cpu", memory=8 * capacity.GIB, is_host=True)
    level = plan_step(config, rows, device).level(config.model.activations)
    # Planned to fit, but for a wrong plan.
    watch = MemoryWatch(
        config=config, rows=rows, device=dataclasses.replace(device, memory=level.memory.device)
    )
    with pytest.raises(OutOfMemoryError) as caught, watch.over("making the parameters"):
        jax.numpy.zeros(2**45)
    total = re.escape(size(level.memory.device))
    said = (
        r"A training step must fit its device; cpu with "
        rf"{total} ran out of memory making the parameters \(RESOURCE_EXHAUSTED: .*\), with activations "
        rf"{level.activations}, which takes {total} by the plan\. Ways out: {ways} "
        r"Checkpoints stay\."
    )
    assert re.fullmatch(said, str(caught.value)), caught.value
    # The plan was wrong once: a tenth is left free, of memory that grows with tokens.
    tokens = re.search(r"Rows of at most ([\d,]+) tokens", str(caught.value)).group(1).replace(",", "")
    assert 800_000 < int(tokens) < 900_001


def test_other_errors_of_the_device_are_left_as_they_are(tiny, trained, tmp_path):
    rows = Rows(statistics=trained.statistics(), num_rows=1, context_length=100, is_one_chain_a_row=True)
    watch = MemoryWatch(config=tiny(tmp_path), rows=rows, device=this_device())

    def fail(x):
        raise ZeroDivisionError

    with pytest.raises(jax.errors.JaxRuntimeError, match="ZeroDivisionError"), watch.over("in step 1"):
        jax.block_until_ready(jax.jit(lambda x: jax.pure_callback(fail, x, x))(jax.numpy.ones(3)))
    first = OutOfMemoryError("once")
    with pytest.raises(OutOfMemoryError) as caught, watch.over("by step 2"):
        raise first
    assert caught.value is first
