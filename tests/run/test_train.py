import functools
import importlib.util
import math
import shutil

import jax
import numpy as np
import optax
import pytest

from bpt_rl.agents.registry import make_agent
from bpt_rl.config import BuildConfig, OptimizerConfig
from bpt_rl.datasets import capacity
from bpt_rl.datasets.build import build_store
from bpt_rl.datasets.sampling import ChainSampler
from bpt_rl.datasets.store import Store
from bpt_rl.run.checkpoint import Checkpoints
from bpt_rl.run.ledger import Ledger
from bpt_rl.run.open_runs import OpenRun
from bpt_rl.run.out_of_memory import MemoryWatch
from bpt_rl.run.step import init_state, make_optimizer, make_schedule, train_step
from bpt_rl.run.train import train
from bpt_rl.types import PackedBatch

STEPS = OptimizerConfig(num_steps=8, warmup_steps=2, learning_rate=0.1, weight_decay=0.3, clip_norm=5.0)


class InterruptionError(Exception):
    pass


class LinearAgent:
    """Linear regression of the action on the observation: small enough for gradients by hand."""

    def init(self, key):
        return {"layer": {"kernel": jax.random.normal(key, (3, 2)), "bias": jax.numpy.ones(2)}}

    def loss(self, params, batch, key):
        predicted = batch.observation @ params["layer"]["kernel"] + params["layer"]["bias"]
        per_step = jax.numpy.square(predicted - batch.action).sum(axis=-1)
        loss = (per_step * batch.loss_mask).sum() / batch.loss_mask.sum()
        return loss, {"loss": loss}

    def policy(self, params, *, num_episodes=1, clear_context=False, sample_seed=None):
        raise NotImplementedError


def linear_batch(scale):
    generator = np.random.default_rng(0)
    zeros = np.zeros((1, 2, 5), np.float32)
    return PackedBatch(
        observation=scale * generator.normal(size=(1, 2, 5, 3)).astype(np.float32),
        action=scale * generator.normal(size=(1, 2, 5, 2)).astype(np.float32),
        reward=zeros,
        return_to_go=zeros,
        completion=zeros,
        step=zeros.astype(int),
        episode=zeros.astype(int),
        segment_ids=zeros.astype(int) + 1,
        loss_mask=np.array([[[1, 1, 1, 0, 1], [1, 0, 0, 0, 0]]], np.float32),
    )


def plain_rate(config, step):
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    share = (step - config.warmup_steps) / (config.num_steps - config.warmup_steps)
    end = config.learning_rate * config.final_learning_rate
    return end + (config.learning_rate - end) * (1 + math.cos(math.pi * share)) / 2


def plain_gradient(params, batch):
    mask = batch.loss_mask[0].astype(np.float64)[..., None]
    x = batch.observation[0].astype(np.float64)
    error = 2 * mask * (x @ params["kernel"] + params["bias"] - batch.action[0]) / mask.sum()
    return {"kernel": np.einsum("bti,bto->io", x, error), "bias": error.sum(axis=(0, 1))}


def plain_adamw(config, params, batches):
    """Returns parameters and gradient norms by step, in float64."""
    first = {name: np.zeros_like(values) for name, values in params.items()}
    second, history, norms = dict(first), [], []
    for step, batch in enumerate(batches):
        gradient = plain_gradient(params, batch)
        norms.append(math.sqrt(sum((g**2).sum() for g in gradient.values())))
        for name, g in gradient.items():
            g = g * min(1, config.clip_norm / norms[-1])
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g**2
            mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.95 ** (step + 1))
            decay = config.weight_decay * params[name] if name == "kernel" else 0
            update = mean / (np.sqrt(square) + 1e-8) + decay
            params = params | {name: params[name] - plain_rate(config, step) * update}
        history.append(params)
    return history, norms


def test_steps_equal_plain_adamw_with_clipping_schedule_and_decay_of_kernels():
    agent, optimizer = LinearAgent(), make_optimizer(STEPS)
    state = init_state(agent, optimizer, seed=0)
    start = {name: np.asarray(leaf, np.float64) for name, leaf in state.params["layer"].items()}
    batches = [linear_batch(scale) for scale in (1.0, 0.05, 1.0, 2.0)]
    expected, norms = plain_adamw(STEPS, start, batches)
    assert min(norms) < STEPS.clip_norm < max(norms)
    for step, batch in enumerate(batches):
        state, metrics = train_step(agent, optimizer, state, batch, jax.random.key(0))
        # float32 against float64; parameters are about 1.
        np.testing.assert_allclose(float(metrics["gradient_norm"]), norms[step], rtol=1e-6)
        for name, values in expected[step].items():
            np.testing.assert_allclose(state.params["layer"][name], values, rtol=0, atol=1e-6)
    assert int(state.step) == 4


def test_learning_rate_rises_to_the_peak_and_falls_to_the_final_fraction():
    schedule = make_schedule(STEPS)
    rates = [float(schedule(step)) for step in range(9)]
    np.testing.assert_allclose(rates, [plain_rate(STEPS, step) for step in range(9)], rtol=1e-6)
    np.testing.assert_allclose([rates[0], rates[1], rates[2], rates[8]], [0, 0.05, 0.1, 0.01], atol=1e-8)
    at_once = make_schedule(OptimizerConfig(num_steps=4, warmup_steps=0, learning_rate=0.1))
    np.testing.assert_allclose(float(at_once(0)), 0.1, rtol=1e-6)


def test_micro_batches_of_unequal_loss_masks_equal_one_batch_of_all(tiny, store_path, tmp_path):
    config = tiny(tmp_path, agent="bc", batch_size=6)
    with Store.open(store_path) as store:
        batch = ChainSampler(store, config.data, config.model.layout, seed=0).batch(0)
        agent = make_agent(config, store.statistics(config.data.task))
    mask = batch.loss_mask.copy()
    mask[1, :70] = mask[4] = 0
    batch = batch._replace(loss_mask=mask)
    # Plain gradient descent with rate 1: parameters move by the gradient itself.
    optimizer, key = optax.sgd(1.0), jax.random.key(0)
    stacked = [PackedBatch(*(x.reshape(k, 6 // k, *x.shape[1:]) for x in batch)) for k in (1, 2, 3)]
    start, step = (
        init_state(agent, optimizer, seed=0),
        jax.jit(functools.partial(train_step, agent, optimizer)),
    )
    (whole, expected), *others = (step(start, micro, key) for micro in stacked)
    for state, metrics in others:
        for name, value in metrics.items():
            # Sums of float32 in another order.
            np.testing.assert_allclose(float(value), float(expected[name]), rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, whole.params)


def interrupt_at(stop):
    def report(step, total, values):
        assert (total, math.isfinite(values["loss"])) == (6, True)
        if step == stop:
            raise InterruptionError

    return report


def without_clock(folder):
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in folder.metrics()]


def test_an_interrupted_run_ends_like_an_uninterrupted_one_bit_for_bit_wherever_its_episodes_lie(
    tiny, trained, tmp_path, read_state, assert_same_bits
):
    # Before the first checkpoint; after that of step 2; after that of step 4.
    for place, stop in (("auto", 1), ("stream", 3), ("host", 5)):
        with pytest.raises(InterruptionError):
            train(tiny(tmp_path / "at", place=place), interrupt_at(stop))
    with (tmp_path / "at" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # A line that a crash cut short.
    seen, announced = [], []
    folder = train(
        tiny(tmp_path / "at", place="accelerator"),
        lambda step, total, values: seen.append(step),
        announce=announced.append,
    )
    assert seen == [5, 6]
    assert_same_bits(read_state(folder), read_state(trained))
    assert [line["step"] for line in folder.metrics()] == [1, 2, 3, 4, 5, 6]
    assert without_clock(folder) == without_clock(trained)
    kept = folder.versions()["data"]
    # Six episodes of 51 rows of 5 observations, 1 action, 1 reward and its sum, 4 bytes each.
    assert (kept["place"], kept["num_bytes"]) == ("accelerator", 6 * 51 * 8 * 4)
    assert announced == [
        "Episodes are kept in place accelerator: asked for; episodes of 0.00934 MiB.",
        "Activations: keep, asked for.",
    ]


def test_a_step_that_leaves_no_room_is_waited_for_before_the_next_batch_is_made(
    tiny, trained, tmp_path, monkeypatch, read_state, assert_same_bits
):
    happened, gather, wait = [], ChainSampler.gather, jax.block_until_ready

    def gathered(sampler, plan):
        happened.append("batch")
        return gather(sampler, plan)

    def waited(values):
        happened.append("wait")
        return wait(values)

    monkeypatch.setattr(MemoryWatch, "is_tight", True)
    monkeypatch.setattr(ChainSampler, "gather", gathered)
    monkeypatch.setattr(jax, "block_until_ready", waited)
    folder = train(tiny(tmp_path / "at", place="accelerator"))
    assert happened == ["batch", "wait"] * 6
    assert_same_bits(read_state(folder), read_state(trained))
    assert without_clock(folder) == without_clock(trained)


def test_accumulated_runs_go_on_with_the_next_batches(tiny, tmp_path, read_state, assert_same_bits):
    for name in ("whole", "parts"):
        config = tiny(tmp_path / name, agent="bc", accumulation=2, num_steps=3, warmup_steps=0, batch_size=1)
        if name == "parts":
            with pytest.raises(InterruptionError):
                train(config, lambda step, total, values: interrupt_at(3)(step, 6, values))
        folder = train(config)
        if name == "whole":
            whole = folder
    assert_same_bits(read_state(folder), read_state(whole))


def test_a_finished_run_is_left_as_it_is(tiny, trained):
    before = {p: p.stat().st_mtime_ns for p in trained.checkpoints_path.rglob("*")}
    lines = trained.metrics_path.read_bytes()
    train(tiny(trained.path), lambda *_: pytest.fail("no step is left"))
    assert {p: p.stat().st_mtime_ns for p in trained.checkpoints_path.rglob("*")} == before
    assert trained.metrics_path.read_bytes() == lines


def test_training_lowers_the_loss_on_real_episodes(trained):
    losses = [line["loss"] for line in trained.metrics()]
    assert losses[-1] < 0.5 * losses[0]


def test_nothing_that_is_not_finite_is_ever_saved(tiny, tmp_path):
    # The first step of the warm-up has rate 0, the second makes the parameters about 1e37.
    broken = {"agent": "bc", "learning_rate": 1e38, "warmup_steps": 5}
    config = tiny(tmp_path / "bc", checkpoint_every=1, **broken)
    message = (
        r"must stay finite; got \w+ \w+ with seed 0 at step 2, batch index 1\. "
        r"Last good checkpoint: step 1 in .*checkpoints\. Lower optimizer\.learning_rate"
    )
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=message):
            train(config)
    folder = tmp_path / "bc"
    with Checkpoints(folder / "checkpoints") as saved:
        assert saved.latest_step == 1
    assert '"step": 2' not in (folder / "metrics.jsonl").read_text()
    with pytest.raises(FloatingPointError, match=r"at step 2.*Last good checkpoint: step none in"):
        train(tiny(tmp_path / "rare", checkpoint_every=5, **broken))


def test_a_place_without_room_is_refused_before_a_folder_is_made(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(capacity, "measure", lambda: capacity.Capacity(accelerator=None, host=9000))
    with pytest.raises(ValueError, match=r"got data\.place 'host', .* Use data\.place stream, or auto"):
        train(tiny(tmp_path / "at", place="host"))
    assert not list(tmp_path.iterdir())


def test_the_ledger_is_one_step_behind_until_it_is_settled(tiny, tmp_path):
    lines, reported = [], []
    with Checkpoints(tmp_path) as saved:
        run = OpenRun(config=tiny(tmp_path, log_every=2), saved=saved, log=lines.append)
        ledger = Ledger([run], 10, lambda *told: reported.append(told))
        for step in (1, 2, 3):
            assert [told[:2] for told in reported] == [(k, 6) for k in range(1, step - 1)]
            ledger.add(step, {"loss": jax.numpy.float32(step)})
        assert [line["step"] for line in lines] == [2]
        ledger.settle()
        ledger.settle()
        assert [(told[0], told[2]["loss"]) for told in reported] == [(1, 1.0), (2, 2.0), (3, 3.0)]
        ledger.add(4, {"loss": jax.numpy.float32(np.nan)})
        with pytest.raises(FloatingPointError, match="got loss nan with seed 0 at step 4"):
            ledger.add(5, {"loss": jax.numpy.float32(0)})
        assert ([line["step"] for line in lines], len(reported)) == ([2], 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.5}, r"optimizer\.learning_rate = 0\.01, and got 0\.5"),
        ({"embed_dim": 32}, r"model\.embed_dim = 16, and got 32"),
        ({"num_trajectories": 3}, r"data\.num_trajectories = 2, and got 3"),
        ({"seed": 7}, r"seed = 0, and got 7"),
        ({"agent": "bc"}, r"agent = 'at', and got 'bc'"),
    ],
)
def test_a_run_folder_keeps_one_configuration(tiny, trained, changes, message):
    before = trained.config_path.read_bytes()
    with pytest.raises(ValueError, match=f"keeps one configuration; .* was trained with {message}"):
        train(tiny(trained.path, **changes))
    assert trained.config_path.read_bytes() == before


def test_a_run_goes_on_with_its_data_wherever_it_lies_and_with_no_other(tiny, store_path, tmp_path):
    path = tmp_path / "store.h5"
    shutil.copy(store_path, path)
    with pytest.raises(InterruptionError):
        train(tiny(tmp_path / "at"), interrupt_at(3))
    # What does not change the parameters may change.
    train(tiny(tmp_path / "at", store=str(path), log_every=5, checkpoint_every=3, keep_checkpoints=1))
    buffer = store_path.parent / "cartpole" / "ornstein_uhlenbeck" / "buffer"
    build_store(
        BuildConfig(
            source=(str(buffer),), out=str(path), action_repeat=20, subset="first-5-episodes", num_workers=1
        )
    )
    with pytest.raises(
        ValueError, match=r"goes on with the data it began with; .* and .*store\.h5 has \w{12}\."
    ):
        train(tiny(tmp_path / "at", store=str(path)))


def test_data_that_cannot_serve_is_refused_before_a_folder_is_made(tiny, tmp_path):
    run = tmp_path / "runs" / "at"
    with pytest.raises(FileNotFoundError, match=r"none is at nowhere/store\.h5\. Build it first"):
        train(tiny(run, store="nowhere/store.h5"))
    with pytest.raises(
        ValueError, match=r"got 'walker_run', and .* holds cartpole_balance, cartpole_swingup"
    ):
        train(tiny(run, task="walker_run"))
    with pytest.raises(ValueError, match=r"num_trajectories must not exceed .*; got 7 and 6"):
        train(tiny(run, num_trajectories=7))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_logger_without_its_package_says_how_to_install_it(tiny, tmp_path, name, module):
    if importlib.util.find_spec(module):
        pytest.skip(f"{module} is installed")
    with pytest.raises(ModuleNotFoundError, match=rf"package {module}, .*pip install 'bpt-rl\[{name}\]'"):
        train(tiny(tmp_path / "at", logger=(name,)))
    assert not (tmp_path / "at" / "metrics.jsonl").read_text()
