"""Predicted longest row and step time of transformers that 1 to 512 H100s share, and plans against what was measured.

Every number comes from `bpt_rl.run.plan`, with the constants of `bpt_rl/run/devices.py`: change those, run this, and
the page and its picture are of the new ones. Nothing is compiled and no accelerator is needed. Half a minute.

JAX_PLATFORMS=cpu python benchmarks/scaling.py --out results/scaling.json --page docs/scaling.md
"""

import argparse
import dataclasses
import json
import re
from pathlib import Path

import jax
import matplotlib as mpl
from matplotlib.figure import Figure

from bpt_rl import config_toml
from bpt_rl.agents.registry import make_agent
from bpt_rl.config import TrainConfig
from bpt_rl.datasets.capacity import GIB
from bpt_rl.mesh_config import MeshConfig
from bpt_rl.run.bench_record import Column, table
from bpt_rl.run.devices import H100
from bpt_rl.run.picture_style import PICTURE_STYLE
from bpt_rl.run.plan import Rows, plan_step
from bpt_rl.run.synthetic import synthetic_statistics

SHAPES = {"at_350m": {}, "7B": {"embed_dim": 4096, "num_layers": 32, "num_heads": 32}}
"""What each has other than the configuration of that name."""
COUNTS = (1, 2, 4, 8, 16, 64, 512)
TOKENS = (2**17, 2**20, 2**23, 2**26)
HOST_GIB = 192
"""Of a host's memory, for each of its devices."""
MARK = re.compile(r"(<!-- made by benchmarks/scaling.py -->\n).*(<!-- until here -->)", re.DOTALL)
COLOURS = {"at_350m": "#0072b2", "7B": "#d55e00"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Longest:
    """The longest row that some mesh of so many devices can train on."""

    shape: str
    devices: int
    tokens: int
    mesh: str
    activations: str
    host_tokens: int
    host_mesh: str
    host_activations: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A step on rows of a given length."""

    shape: str
    tokens: int
    """Of a row."""
    devices: int
    mesh: str
    rows: int | None = None
    activations: str = "does not fit"
    device_gib: float | None = None
    host_gib: float | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    """Of a device."""
    waiting: float | None = None
    """Share of the step that a device waits for others."""
    auto: str = ""
    """What `mesh.attention = "auto"` takes."""
    most: float | None = None
    """Most tokens a second of a device, on as many rows as some mesh of so many devices shares."""
    most_mesh: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """A step that was measured, beside its plan."""

    record: str
    tokens: int
    mesh: str
    implementation: str
    activations: str
    seconds: float
    planned_seconds: float | None
    waiting: float | None
    """Seconds, by a profile."""
    planned_waiting: float | None
    device_gib: float | None
    planned_gib: float


def config_of(shape):
    config = config_toml.load(TrainConfig, "at_350m")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **SHAPES[shape]))


def parameters_of(config):
    statistics = synthetic_statistics(config.data.task)
    shapes = jax.eval_shape(make_agent(config, statistics).init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def planned(config, mesh, tokens, *, host_gib=HOST_GIB, num_rows=0, num_parameters=None):
    """Returns the plan of a step on H100s; None if devices cannot share the heads so."""
    rows = Rows(
        statistics=synthetic_statistics(config.data.task),
        num_rows=num_rows or mesh.data * mesh.fsdp,
        context_length=tokens,
        is_one_chain_a_row=True,
    )
    device = dataclasses.replace(H100, host_memory=int(host_gib * GIB))
    try:
        config = dataclasses.replace(config, mesh=mesh)
        return plan_step(config, rows, device, num_parameters=num_parameters)
    except ValueError:
        return None


def meshes_of(count):
    """Returns the meshes of so many devices, those that split matrices least first."""
    for fsdp in (2**power for power in range(10) if count % 2**power == 0):
        context = count // fsdp
        methods = ("ring", "ulysses") if context > 1 else ("auto",)
        yield [MeshConfig(fsdp=fsdp, context=context, attention=method) for method in methods]


def named(mesh, plan):
    """Returns a mesh's name with the way of attention that was chosen."""
    return str(dataclasses.replace(mesh, attention=plan.method.method) if plan.method else mesh)


def longest_of(shape, count, config, num_parameters):
    def best(host_gib):
        found = []
        for meshes in meshes_of(count):
            for mesh in meshes:
                plan = planned(config, mesh, 4096, host_gib=host_gib, num_parameters=num_parameters)
                for level in plan.levels if plan else ():
                    found.append((level.longest_context, -mesh.fsdp, named(mesh, plan), level.activations))
        tokens, _, mesh, activations = max(found, key=lambda each: each[:2])
        return (tokens, mesh, activations) if tokens else (0, "none", "does not fit")

    here, there = best(0), best(HOST_GIB)
    return Longest(
        shape=shape,
        devices=count,
        tokens=here[0],
        mesh=here[1],
        activations=here[2],
        host_tokens=there[0],
        host_mesh=there[1],
        host_activations=there[2],
    )


def step_of(shape, count, tokens, config, num_parameters):
    """Returns the fastest step of the meshes that split matrices least, among those that fit."""
    for meshes in meshes_of(count):
        plans = [(mesh, planned(config, mesh, tokens, num_parameters=num_parameters)) for mesh in meshes]
        fitting = [(mesh, plan) for mesh, plan in plans if plan and plan.choice]
        if not fitting:
            continue
        mesh, plan = min(fitting, key=lambda pair: pair[1].choice.seconds)
        most = most_of(count, tokens, config, num_parameters)
        auto = planned(
            config, dataclasses.replace(mesh, attention="auto"), tokens, num_parameters=num_parameters
        )
        level, rows = plan.choice, plan.workload.num_rows
        return Step(
            shape=shape,
            tokens=tokens,
            devices=count,
            mesh=named(mesh, plan),
            rows=rows,
            activations=level.activations,
            device_gib=level.memory.device / GIB,
            host_gib=level.memory.host / GIB,
            seconds=level.seconds,
            tokens_per_second=rows * tokens / level.seconds / count,
            waiting=level.time.exposed / level.seconds,
            auto=auto.method.method if auto.method else "",
            most=most[0],
            most_mesh=most[1],
        )
    return Step(shape=shape, tokens=tokens, devices=count, mesh="none")


def most_of(count, tokens, config, num_parameters):
    """Returns the most tokens a second of a device, and the mesh that has them; fewest rows among equals."""
    found = []
    for data in (2**power for power in range(10) if count % 2**power == 0):
        for meshes in meshes_of(count // data):
            for mesh in (dataclasses.replace(each, data=data) for each in meshes):
                plan = planned(config, mesh, tokens, num_parameters=num_parameters)
                if plan and plan.choice:
                    rate = plan.workload.num_rows * tokens / plan.choice.seconds / count
                    found.append((round(rate, 1), -plan.workload.num_rows, named(mesh, plan)))
    rate, _, name = max(found)
    return rate, name


def checks(folder):
    """Yields the steps measured on H100s of which there are records, beside their plans."""
    num_parameters = {}
    for path in sorted(folder.rglob("*.json")):
        record = json.loads(path.read_text())
        is_step = isinstance(record, dict) and record.get("bench") == "step"
        # Runs for their losses write them out step by step, and their times say so.
        if not is_step or not record["device"].startswith(H100.name) or path.name.startswith("loss_"):
            continue
        config = config_toml.from_mapping(TrainConfig, record["config"]["train"])
        shape = dataclasses.replace(config.model, activations="auto")
        if shape not in num_parameters:
            num_parameters[shape] = parameters_of(config)
        for row in record["rows"]:
            if (
                row["step_seconds"] is None
                or record["config"].get("forward_only")
                or config.model.layout == "fused"
            ):
                continue
            model = dataclasses.replace(config.model, implementation=row["implementation"])
            plan = planned(
                dataclasses.replace(config, model=model),
                config.mesh,
                row["tokens"],
                num_rows=row["num_rows"],
                num_parameters=num_parameters[shape],
            )
            level = plan.level(row["activations"])
            if level.seconds is None:
                continue  # Of products in float32 no rate was measured.
            yield Check(
                record=str(path.relative_to(folder)),
                tokens=row["tokens"],
                mesh=named(config.mesh, plan),
                implementation=plan.workload.implementation,
                activations=row["activations"],
                seconds=row["step_seconds"],
                planned_seconds=level.seconds,
                waiting=waiting_of(row),
                planned_waiting=level.time.exposed if level.time else None,
                device_gib=row["device_bytes"] / GIB if row.get("device_bytes") else None,
                planned_gib=level.memory.device / GIB,
            )


def waiting_of(row):
    """Returns the seconds of a profiled step in which devices sent and did nothing else."""
    if row.get("communication_seconds") is None:
        return None
    return row["communication_seconds"] - row["hidden_seconds"]


LONGEST_COLUMNS = (
    Column(heading="GPUs", field="devices"),
    Column(heading="longest row, tokens", field="tokens"),
    Column(heading="mesh", field="mesh"),
    Column(heading="activations", field="activations"),
    Column(heading="with the host, tokens", field="host_tokens"),
    Column(heading="mesh", field="host_mesh"),
    Column(heading="activations", field="host_activations"),
)
STEP_COLUMNS = (
    Column(heading="tokens a row", field="tokens"),
    Column(heading="GPUs", field="devices"),
    Column(heading="rows", field="rows"),
    Column(heading="mesh", field="mesh"),
    Column(heading="activations", field="activations"),
    Column(heading="GiB a GPU", field="device_gib", digits=1),
    Column(heading="host GiB a GPU", field="host_gib", digits=1),
    Column(heading="step s", field="seconds", digits=3),
    Column(heading="tokens/s a GPU", field="tokens_per_second"),
    Column(heading="waiting %", field="waiting", divisor=0.01, digits=1),
    Column(heading="auto takes", field="auto"),
    Column(heading="most tokens/s", field="most"),
    Column(heading="on mesh", field="most_mesh"),
)
CHECK_COLUMNS = (
    Column(heading="record", field="record"),
    Column(heading="tokens", field="tokens"),
    Column(heading="mesh", field="mesh"),
    Column(heading="attention", field="implementation"),
    Column(heading="activations", field="activations"),
    Column(heading="measured s", field="seconds", digits=3),
    Column(heading="planned s", field="planned_seconds", digits=3),
    Column(heading="waited s", field="waiting", digits=3),
    Column(heading="planned s", field="planned_waiting", digits=3),
    Column(heading="measured GiB", field="device_gib", digits=1),
    Column(heading="planned GiB", field="planned_gib", digits=1),
)


def constants():
    """Returns the rates that the plans rest on, by name."""
    rates = dataclasses.asdict(H100.rates)
    links = dataclasses.asdict(H100.links)
    return {"memory_gib": H100.memory / GIB, **rates, **links}


def page_of(record_rows):
    parts = [fenced("\n".join(f"{name:<18} {value:.4g}" for name, value in constants().items()))]
    for shape, longest in record_rows["longest"].items():
        fitting = [row for row in record_rows["steps"][shape] if row.seconds]
        parts += [
            f"### {shape}",
            fenced(table(longest, LONGEST_COLUMNS)),
            fenced(table(fitting, STEP_COLUMNS)),
        ]
    parts += ["### Plans beside measured steps", fenced(table(record_rows["checks"], CHECK_COLUMNS))]
    return "\n\n".join(parts)


def fenced(text):
    return f"```text\n{text}\n```"


def draw(record_rows, out):
    with mpl.rc_context(PICTURE_STYLE):
        figure = Figure(figsize=(11, 4.6))
        left, right = figure.subplots(1, 2)
        for shape, rows in record_rows["longest"].items():
            found = [row for row in rows if row.tokens]
            colour = COLOURS[shape]
            left.plot(
                [row.devices for row in found], [row.tokens for row in found], "o-", color=colour, label=shape
            )
            found = [row for row in rows if row.host_tokens]
            name = f"{shape}, offloading"
            left.plot(
                [row.devices for row in found],
                [row.host_tokens for row in found],
                "s--",
                color=colour,
                label=name,
            )
            for tokens, style in zip(TOKENS[1:3], ("o-", "s--"), strict=True):
                found = [row for row in record_rows["steps"][shape] if row.tokens == tokens and row.seconds]
                right.plot(
                    [row.devices for row in found],
                    [row.tokens_per_second for row in found],
                    style,
                    color=colour,
                    label=f"{shape}, {tokens / 2**20:.0f}M tokens a row",
                )
        for axes, label in ((left, "longest row, tokens"), (right, "tokens/s of a GPU")):
            axes.set(xscale="log", yscale="log", xlabel="H100s", ylabel=label)
            axes.set_xticks(COUNTS, [str(count) for count in COUNTS])
            axes.minorticks_off()
            axes.legend(frameon=False, fontsize=8)
        figure.savefig(out, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("scaling.json"), help="and a picture beside it")
    parser.add_argument("--page", type=Path, default=None, help="whose tables are to be made anew")
    parser.add_argument("--records", type=Path, default=Path("results"), help="folder of measured steps")
    options = parser.parse_args()
    longest, steps = {}, {}
    for shape in SHAPES:
        config = config_of(shape)
        num_parameters = parameters_of(config)
        longest[shape] = [longest_of(shape, count, config, num_parameters) for count in COUNTS]
        steps[shape] = [
            step_of(shape, count, tokens, config, num_parameters) for tokens in TOKENS for count in COUNTS
        ]
    rows = {"longest": longest, "steps": steps, "checks": list(checks(options.records))}
    text = page_of(rows)
    print(text)
    record = {
        "command": "JAX_PLATFORMS=cpu python benchmarks/scaling.py --out results/scaling.json --page docs/scaling.md",
        "constants": constants(),
        "host_gib_a_device": HOST_GIB,
        "longest": {shape: [dataclasses.asdict(row) for row in found] for shape, found in longest.items()},
        "steps": {shape: [dataclasses.asdict(row) for row in found] for shape, found in steps.items()},
        "checks": [dataclasses.asdict(row) for row in rows["checks"]],
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    draw(rows, options.out.with_suffix(".png"))
    if options.page:
        page = options.page.read_text()
        options.page.write_text(MARK.sub(lambda found: found[1] + text + "\n" + found[2], page))


if __name__ == "__main__":
    main()
