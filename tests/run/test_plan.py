"""What `bpt-rl plan` answers, against the agents that training would make and the rules it would follow."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from bpt_rl import config_toml
from bpt_rl.agents.registry import make_agent
from bpt_rl.cli import main
from bpt_rl.config import DataConfig, ModelConfig, OptimizerConfig, PlanConfig
from bpt_rl.datasets.capacity import GIB
from bpt_rl.datasets.sampling import ChainSampler
from bpt_rl.datasets.store import Store
from bpt_rl.envs.tasks import DOMAINS
from bpt_rl.nn.memory_plan import LEVELS
from bpt_rl.run import plan as plan_lib
from bpt_rl.run.activations import choose_activations
from bpt_rl.run.devices import H100, Device
from bpt_rl.run.plan import make_plan, plan_step, rows_of_task
from bpt_rl.run.plan_text import describe
from bpt_rl.run.step import init_state, make_optimizer


def large(**changes):
    """Returns the 350M shape for an H100, one row of 32 trajectories."""
    model = ModelConfig(
        embed_dim=1024,
        num_layers=24,
        num_heads=8,
        dropout=0.0,
        feedforward_chunk_size=4096,
        compute_dtype="bfloat16",
    )
    data = DataConfig(num_trajectories=32, batch_size=1)
    return PlanConfig(**{"model": model, "data": data, "device": "h100"} | changes)


@pytest.mark.parametrize(
    ("tokens", "choice"),
    [
        (4096, "keep"),
        (131_072, "save_attention"),
        (786_432, "offload_attention"),
        (2_097_152, "offload_attention"),
    ],
)
def test_the_choice_is_the_fastest_level_that_fits(tokens, choice):
    plan = make_plan(large(tokens=tokens))
    assert plan.choice.activations == choice
    fitting = [level for level in plan.levels if level.memory.device <= plan.device.memory]
    assert plan.choice.seconds == min(level.seconds for level in fitting)
    for level in plan.levels:
        assert (level in fitting) == (tokens <= level.longest_context), level.activations


def test_where_little_is_computed_transfers_are_slower_than_computing_again():
    model = ModelConfig(layout="fused", embed_dim=256, num_layers=8, num_heads=2, compute_dtype="bfloat16")
    data = DataConfig(num_trajectories=1, batch_size=4096)
    order = [level.activations for level in make_plan(large(model=model, data=data)).levels]
    assert order.index("recompute") < order.index("offload_attention")
    order = [level.activations for level in make_plan(large(tokens=131_072)).levels]
    assert order.index("offload_attention") < order.index("recompute")


# Seconds of the training step measured on one H100 80 GB; see `tests/nn/test_memory_plan.py` for its shape.
MEASURED_SECONDS = [
    (131_072, "save_attention", "auto", 6.130),
    (131_072, "offload_attention", "auto", 6.460),
    (131_072, "recompute", "auto", 7.655),
    (524_288, "save_attention", "auto", 91.2),
    (524_288, "recompute", "auto", 118.7),
    (65_536, "recompute", "blockwise", 32.3),
]


@pytest.mark.parametrize(("tokens", "activations", "implementation", "seconds"), MEASURED_SECONDS)
def test_planned_seconds_are_those_measured(tokens, activations, implementation, seconds):
    config = large(tokens=tokens)
    model = dataclasses.replace(config.model, implementation=implementation)
    plan = make_plan(dataclasses.replace(config, model=model))
    [level] = [level for level in plan.levels if level.activations == activations]
    assert level.seconds == pytest.approx(seconds, rel=0.05)


@pytest.mark.parametrize("agent", ["at", "dt"])
def test_parameters_and_state_are_those_of_training(agent, trained):
    statistics = trained.statistics()
    model = ModelConfig(layout="fused", embed_dim=16, num_layers=1, num_heads=2)
    data = DataConfig(task="cartpole_swingup", num_trajectories=1)
    config = PlanConfig(agent=agent, data=data, model=model)
    # A plan's episodes have their 1000 control steps; those of this run hold each action for 20.
    statistics = dataclasses.replace(statistics, episode_steps=1000)
    optimizer = make_optimizer(OptimizerConfig())
    state = jax.eval_shape(lambda: init_state(make_agent(config, statistics), optimizer, 0))
    plan = make_plan(config)
    assert plan.workload.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(state.params))
    memory = plan.levels[0].memory
    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    # The state also counts its steps, three times in four bytes.
    assert num_bytes - (memory.parameters + memory.optimizer) == 12


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"context_length": 800},
        {"window": 20, "num_trajectories": 1},
        {"window": 20, "num_trajectories": 1, "window_start": "anywhere"},
        {"mixture": (1, 2)},
    ],
)
def test_rows_are_those_that_the_sampler_makes(changes, store_path, monkeypatch):
    # The store's episodes have 50 steps.
    domain = dataclasses.replace(DOMAINS["cartpole"], episode_steps=50)
    monkeypatch.setattr(plan_lib, "DOMAINS", {"cartpole": domain})
    fields = {"task": "cartpole_swingup", "num_trajectories": 2, "batch_size": 5} | changes
    data = DataConfig(store=str(store_path), **fields)
    model = ModelConfig(layout="return_state_action_reward", embed_dim=16, compute_dtype="bfloat16")
    plan = make_plan(PlanConfig(data=data, model=model, device="h100"))
    with Store.open(store_path) as store:
        sampler = ChainSampler(store, data, model.layout, 0)
    work = plan.workload
    assert (work.num_rows, work.context_length) == (sampler.num_rows, sampler.context_length)
    # Segment ids, which cuDNN's kernel cannot take, go with rows of several chains.
    assert work.implementation == ("cudnn" if sampler.is_one_chain_a_row else "blockwise")


@pytest.mark.parametrize(
    ("changes", "expected", "is_timed"),
    [
        ({}, "cudnn", True),
        ({"compute_dtype": "float32"}, "blockwise", False),
        ({"num_heads": 4}, "blockwise", True),
        ({"implementation": "blockwise"}, "blockwise", True),
    ],
)
def test_attention_is_what_auto_would_take(changes, expected, is_timed):
    config = large(tokens=65_536)
    plan = make_plan(dataclasses.replace(config, model=dataclasses.replace(config.model, **changes)))
    assert plan.workload.implementation == expected
    has_seconds = [level.seconds is not None for level in plan.levels]
    assert has_seconds == [is_timed] * len(LEVELS)
    assert ("Step time is left out: no rates were measured in float32" in describe(plan)) != is_timed


def test_a_processor_moves_nothing_to_the_host_and_gives_no_time():
    plan = make_plan(large(device="this", tokens=1024))
    assert [level.activations for level in plan.levels] == ["keep", "save_attention", "recompute"]
    assert all(level.memory.host == 0 and level.seconds is None for level in plan.levels)
    assert "Step time is left out: no rates were measured on cpu." in describe(plan)
    assert "Host: the device itself." in describe(plan)


def test_a_step_that_fits_nowhere_names_ways_out_that_the_plan_lets_fit():
    config = large(tokens=4_194_304)
    plan = make_plan(config)
    assert plan.choice is None
    longest = plan.levels[-1].longest_context
    need = plan.levels[-1].memory.device / GIB
    said = describe(plan).splitlines()[-1]
    assert f"even offload takes {need:.1f} GiB. Ways out: " in said
    assert (
        f"Rows of at most {longest:,} tokens hold data.num_trajectories = {longest // 4000}, of 1000" in said
    )
    assert "A smaller model (model.embed_dim, model.num_layers)." in said


def test_rows_at_a_time_and_accumulation_of_a_way_out_fit_and_make_the_same_batch():
    config = large(data=DataConfig(num_trajectories=64, batch_size=24))
    plan = make_plan(config)
    said = describe(plan).splitlines()[-1]
    rows, batch_size, accumulation = (
        int(found)
        for found in re.search(
            r"At most (\d+) of 24 rows at a time: data.batch_size = (\d+) with optimizer.accumulation = (\d+)\.",
            said,
        ).groups()
    )
    assert (rows, accumulation) == (batch_size, -(-24 // batch_size))

    def fits(num_rows):
        data = dataclasses.replace(config.data, batch_size=num_rows)
        fewer = dataclasses.replace(config.optimizer, accumulation=2)
        return make_plan(dataclasses.replace(config, data=data, optimizer=fewer)).choice is not None

    assert fits(rows)
    assert not fits(rows + 1)


def test_a_level_that_the_host_cannot_hold_is_not_chosen():
    plenty, little = (make_plan(large(tokens=786_432, host_gib=gib)) for gib in (100, 50))
    assert (plenty.choice.activations, little.choice.activations) == ("offload_attention", "recompute")
    assert "Host: 50.0 GiB." in describe(little)
    assert "Host: assumed to have what a step takes; --host-gib sets" in describe(
        make_plan(large(tokens=4096))
    )
    levels = {level.activations: level for level in little.levels}
    assert levels["offload_attention"].longest_context < 786_432 < levels["recompute"].longest_context
    # 50 GiB, two 16-bit tensors of the width and a float32 a head in each of 24 layers.
    assert levels["offload_attention"].longest_context == 50 * GIB // (24 * (4 * 1024 + 4 * 8))


def test_moments_in_the_host_leave_room_for_a_longer_context():
    here = make_plan(large(tokens=131_072))
    there = make_plan(large(tokens=131_072, optimizer=OptimizerConfig(place="host")))
    assert all(level.memory.optimizer == 0 for level in there.levels)
    pairs = zip(here.levels, there.levels, strict=True)
    assert all(other.longest_context > level.longest_context for level, other in pairs)
    assert "or the update, GiB" in describe(there)
    # A processor has no other memory to move them to.
    assert (
        make_plan(large(tokens=1024, device="this", optimizer=OptimizerConfig(place="host")))
        .levels[0]
        .memory.optimizer
    )


def auto(tokens, **changes):
    config = large(tokens=tokens)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, activations="auto"), **changes)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (4096, r"keep, \d+\.\d GiB of 75\.7 GiB planned"),
        (131_072, r"save_attention, \d+\.\d GiB of 75\.7 GiB planned; keep would need \d+\.\d GiB"),
        (
            786_432,
            r"offload_attention, \d+\.\d GiB of 75\.7 GiB and \d+\.\d GiB of the host planned; "
            r"save_attention would need \d+\.\d GiB",
        ),
        (16_777_216, r"offload, .* planned: by the plan it may not fit"),
    ],
)
def test_auto_stands_for_the_choice_of_the_plan_and_says_why(tokens, said):
    config = auto(tokens)
    choice = choose_activations(config, rows_of_task(config), device=H100)
    assert re.fullmatch(said, str(choice))
    assert choice.applied(config).model == dataclasses.replace(config.model, activations=choice.activations)
    named = choose_activations(choice.applied(config), rows_of_task(config), device=H100)
    assert str(named) == f"{choice.activations}, asked for"


def test_auto_is_what_the_run_began_with_or_recomputes_where_nothing_is_planned():
    config = auto(131_072)
    rows = rows_of_task(config)
    assert str(choose_activations(config, rows, device=H100, recorded="keep")) == "keep, as the run began"
    reference = dataclasses.replace(
        config, model=dataclasses.replace(config.model, implementation="reference")
    )
    # What ran out of memory is taken no more, nor anything that needs as much.
    after = choose_activations(
        config, rows, device=H100, recorded="save_attention", exhausted=["save_attention"]
    )
    plan = plan_step(config, rows, H100)
    assert plan.level(after.activations).memory.device < plan.level("save_attention").memory.device
    assert after.reason.endswith("planned; memory ran out with save_attention")
    last = choose_activations(config, rows, device=H100, exhausted=[plan.leanest.activations])
    assert last.activations == plan.leanest.activations
    assert last.reason.startswith("since nothing needs less; memory ran out with ")
    assert choose_activations(reference, rows, device=H100).activations == "recompute"
    assert choose_activations(auto(131_072, agent="bc"), rows, device=H100).activations == "recompute"
    asked = dataclasses.replace(config, model=dataclasses.replace(config.model, implementation="cudnn"))
    with pytest.raises(ValueError, match="cudnn attention must have an NVIDIA GPU; got 'cpu'"):
        choose_activations(asked, rows, device=Device(name="cpu", memory=GIB, is_host=True))


def test_memory_that_something_else_takes_is_not_planned_with():
    config = auto(131_072)
    rows = rows_of_task(config)
    # Episodes that fill the device but for 15 GiB, which recompute needs: then it, and no longer save_attention.
    taken = H100.less(device_bytes=H100.memory - 15 * GIB)
    [level] = [
        level for level in plan_step(config, rows, taken).levels if level.activations == "save_attention"
    ]
    assert level.longest_context < 131_072
    assert choose_activations(config, rows, device=taken).activations == "offload_attention"
    without_host = dataclasses.replace(taken, host_memory=20 * GIB).less(host_bytes=10 * GIB)
    assert choose_activations(config, rows, device=without_host).activations == "recompute"
    processor = Device(name="cpu", memory=8 * GIB, is_host=True)
    assert processor.less(host_bytes=GIB, device_bytes=GIB).memory == 6 * GIB


def test_the_command_prints_each_kind_of_each_level(capsys):
    line = "plan at_small --device h100 --tokens 131072 --model.compute-dtype bfloat16 --model.num-layers 24"
    assert main(line.split()) == 0
    out = capsys.readouterr().out
    base = config_toml.load(PlanConfig, "at_small")
    model = dataclasses.replace(base.model, compute_dtype="bfloat16", num_layers=24)
    plan = make_plan(dataclasses.replace(base, model=model, tokens=131_072, device="h100"))
    assert out == describe(plan) + "\n"
    rows = {row[:23].strip(): row[23:].split() for row in out.splitlines()[5:18]}
    assert rows[""] == [level.activations for level in plan.levels]
    assert set(rows[""]) == set(LEVELS)
    kinds = ("parameters", "optimizer", "gradients", "kept activations", "token embeddings")
    parts = [[float(cell) for cell in rows[f"{kind}, GiB"]] for kind in (*kinds, "largest temporary")]
    whole = [float(cell) for cell in rows["device in all, GiB"]]
    # Seven numbers, each rounded to a hundredth.
    np.testing.assert_allclose(np.sum(parts, axis=0), whole, atol=0.035)
    assert plan.device == H100
    assert f"{plan.workload.num_parameters:,} parameters" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("bc10", "must be of a transformer; got agent 'bc'"),
        ("td3", "must be of a transformer; got agent 'td3'"),
        ("at_small --model.implementation reference", "got implementation 'reference'. Use auto,"),
        (
            "at_small --data.context-length 3999",
            "must hold a whole chain; got 3999 tokens for 4 trajectories of 1000",
        ),
        ("at_paper --tokens 1001", "must be a positive multiple of the layout's tokens a step; got 1001"),
        ("at_small --data.task walker_rnu", "Nearest valid one: 'walker_run'"),
        ("at_small --tokens -1", "tokens must not be negative; got -1"),
        ("", "`bpt-rl plan` needs a configuration"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_the_rule(options, message, capsys):
    try:
        status = main(["plan", *options.split()])
    except SystemExit as ended:
        status = ended.code
    err = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert (status, message in err) == (2, True), err
