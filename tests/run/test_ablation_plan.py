"""What the cells of a grid should take, before any runs."""

import dataclasses
import re

import pytest

from bpt_rl.ablate_config import AblateConfig
from bpt_rl.config import DataConfig, ModelConfig, OptimizerConfig, PlanConfig, TrainConfig
from bpt_rl.datasets.capacity import GIB
from bpt_rl.run.ablation_plan import describe_cells, device_of, duration
from bpt_rl.run.devices import H100, this_device
from bpt_rl.run.grid import expand
from bpt_rl.run.grid_folder import GridFolder
from bpt_rl.run.plan import make_plan, size


@pytest.fixture
def config(store_path, tmp_path):
    model = ModelConfig(
        layout="fused", embed_dim=256, num_heads=4, compute_dtype="bfloat16", implementation="cudnn"
    )
    train = TrainConfig(
        data=DataConfig(store=str(store_path), task="cartpole_balance", batch_size=2),
        model=model,
        optimizer=OptimizerConfig(num_steps=1000),
    )
    linked = ({"train.data.num_trajectories": (4, 1)},)
    axes = {"train.agent": ("at", "td3"), "train.seed": (0, 1)}
    return AblateConfig(out=str(tmp_path), linked=linked, axes=axes, train=train)


def described(config, device):
    """Returns the rows of the table by the cells' titles, and the lines below it."""
    table, _, rest = describe_cells(config, expand(config), device).partition("\n\n")
    head, *rows = (re.split(r"  +", line) for line in table.splitlines())
    assert head == ["cell", "state", "step memory", "training"]
    return {row[0]: row[1:] for row in rows}, rest.splitlines()


def planned(config, cell):
    fields = {field.name: getattr(cell.train, field.name) for field in dataclasses.fields(cell.train)}
    return make_plan(PlanConfig(**fields, device="h100")).choice


def test_on_a_card_with_known_rates_memory_and_time_are_those_of_the_plan(config):
    rows, (counted, left, device, *reasons) = described(config, H100)
    cells = {cell.train.data.num_trajectories: cell for cell in expand(config) if cell.train.agent == "at"}
    assert list(rows) == [
        *(f"trajectories 4, agent at, seed {seed}" for seed in (0, 1)),
        *(f"agent td3, seed {seed}" for seed in (0, 1)),
        *(f"trajectories 1, agent at, seed {seed}" for seed in (0, 1)),
    ]
    total = 0.0
    for count, cell in cells.items():
        step = planned(config, cell)
        expected = ["missing", size(step.memory.device), duration(1000 * step.seconds)]
        assert [rows[f"trajectories {count}, agent at, seed {seed}"] for seed in (0, 1)] == 2 * [expected]
        total += 2 * 1000 * step.seconds
    assert rows["agent td3, seed 1"] == ["missing", "-", "-"]
    assert counted == f"6 cells of 6 trainings; 6 are missing in {config.out}."
    assert f"left of 4 of 6 trainings take {duration(total)} of a device; compiling, load" in left
    assert device == f"Planned for a cell with {size(H100.memory)} of NVIDIA H100 80GB HBM3."
    assert reasons == ["- not planned: td3 is no transformer"]


def test_what_is_finished_or_behind_a_checkpoint_takes_no_time_any_more(config):
    folder = GridFolder.of(config)
    cells = {
        (cell.train.data.num_trajectories, cell.train.seed): cell
        for cell in expand(config)
        if cell.train.agent == "at"
    }
    folder.write_result(cells[4, 0].address, {})
    folder.write_failure(cells[1, 0].address, {"error": "", "tries": 2})
    # Trained, but not evaluated; and interrupted at a quarter, while another checkpoint was being written.
    for key, names in (((4, 1), ("500", "1000")), ((1, 1), ("250", "750.orbax-checkpoint-tmp"))):
        for name in names:
            (folder.run_folder(cells[key].train.run).checkpoints_path / name).mkdir(parents=True)
    rows, (counted, left, *_) = described(config, H100)
    states = {title: row[0] for title, row in rows.items() if "agent at" in title}
    assert list(states.values()) == ["finished", "missing", "failed", "missing"]
    assert counted == f"6 cells of 6 trainings; 5 are missing in {config.out}."
    seconds = 1.75 * 1000 * planned(config, cells[1, 0]).seconds
    assert f"left of 2 of 4 trainings take {duration(seconds)} of a device" in left


def test_cells_that_share_a_card_have_each_its_part_of_the_memory(config):
    def of(batch_size):
        data = dataclasses.replace(config.train.data, batch_size=batch_size)
        train = dataclasses.replace(config.train, data=data)
        return dataclasses.replace(config, train=train, linked=({"train.data.num_trajectories": (1,)},))

    # With all activations kept 0.7 of a card: more than its half.
    kept = planned(of(512), expand(of(512))[0]).memory.device
    large = of(int(0.7 * H100.memory / kept * 512))
    memory = {}
    for number in (1, 2):
        rows, lines = described(large, H100.share(number))
        memory[number] = float(rows["agent at, seed 0"][1].removesuffix(" GiB"))
        assert any(f"with {size(H100.memory // number)} of" in line for line in lines)
    assert memory[1] == pytest.approx(0.7 * H100.memory / GIB, rel=0.02)
    assert memory[2] < H100.memory / 2 / GIB


def test_without_an_accelerator_there_is_memory_and_no_time(config):
    model = dataclasses.replace(config.train.model, implementation="auto")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, model=model))
    rows, lines = described(dataclasses.replace(config, seeds_at_once=2), device_of(config))
    state, memory, time = rows["trajectories 4, agent at, seed 0"]
    assert (state, time) == ("missing", "-") and memory.endswith("iB")
    assert lines[1:] == [
        f"Planned for a cell with {size(this_device().memory)} of cpu.",
        "- no rates were measured on cpu",
        "- not planned: td3 is no transformer",
        "- memory is that of one seed; up to 2 are trained at once",
    ]
