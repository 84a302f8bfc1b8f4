"""The command line: parse, build the configuration, call one function of `bpt_rl.run`.

Heavy packages are imported by the verb that needs them, so that `--help` answers at once.
"""

import dataclasses
import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from bpt_rl import ablate_config, config_toml
from bpt_rl import config as config_lib
from bpt_rl.bench_verbs import BENCH_VERBS
from bpt_rl.command import Call, Verb, parse, split
from bpt_rl.data_verbs import DATA_VERBS
from bpt_rl.datasets import capacity

USER_ERRORS = (ValueError, OSError, FloatingPointError, ImportError, MemoryError)
"""What a user can cause: shown as one sentence, without a traceback."""


def _demo(call: Call) -> None:
    config = parse(
        ablate_config.DemoConfig, call, call.arguments, config_toml.load(ablate_config.DemoConfig, "demo")
    )
    from bpt_rl.run.demo import demo

    print(f"Report: {demo(config, command=call.command)}")


def _train(call: Call) -> None:
    names, options = split(call, "a configuration: a TOML file or a preset")
    default = config_toml.load(config_lib.TrainConfig, names[0]) if names else None
    config = parse(config_lib.TrainConfig, call, [*names[1:], *options], default)
    from bpt_rl.run.console import Stages
    from bpt_rl.run.train import train

    with Stages(1) as stages, stages.stage(f"train {config.agent}") as advance:

        def report(step: int, total: int, values: Mapping[str, float]) -> None:
            name = "loss" if "loss" in values else "critic_loss"
            advance(step, total, note=f"{name.replace('_', ' ')} {values[name]:.4f}")

        def announce(line: str) -> None:
            print(line, file=sys.stderr)

        folder = train(config, report, announce=announce, command=call.command)
    print(f"Run: {folder.path}")


def _evaluate(call: Call) -> None:
    paths, options = split(call, "a run folder")
    config = parse(config_lib.EvaluateConfig, call, options)
    from bpt_rl.run.console import Advance, Stages
    from bpt_rl.run.evaluate import evaluate_run
    from bpt_rl.run.evaluation_record import describe_record
    from bpt_rl.run.film_sources import film_evaluation

    with Stages(len(paths)) as stages:
        for path in paths:
            with stages.stage(f"evaluate {Path(path).name}") as advance:

                def report(context: str, done: int, total: int, advance: Advance = advance) -> None:
                    advance(done, total, note=context)

                record = evaluate_run(Path(path), config, command=call.command, report_progress=report)
            print(describe_record(record))
            print(film_evaluation(Path(path)))


def _render(call: Call) -> None:
    paths, options = split(call, "an episode's npz file, a store or a run folder")
    config = parse(RenderOptions, call, options)
    from bpt_rl.run.film import write_film
    from bpt_rl.run.film_sources import episodes_of

    for episode in episodes_of([Path(path) for path in paths], task=config.task, index=config.index):
        out = Path(config.out) / f"{episode.name}.{config.format}"
        size = (config.height, config.width)
        write_film(out, episode.task, episode.physics, action_repeat=episode.action_repeat, size=size)
        print(f"Film: {out}")


def _ablate(call: Call) -> None:
    names, options = split(call, "a configuration: a TOML file or a preset")
    default = config_toml.load(ablate_config.AblateConfig, names[0]) if names else None
    config = parse(ablate_config.AblateConfig, call, [*names[1:], *options], default)
    config = dataclasses.replace(config, name=config.name or Path(names[0]).stem)
    if config.dry_run:
        # A plan starts JAX, which would take accelerators from those who run the grid.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        from bpt_rl.run.ablation_plan import describe_cells, device_of
        from bpt_rl.run.grid import expand

        print(describe_cells(config, expand(config), device_of(config)))
        return
    from bpt_rl.run.ablate import ablate, describe_result, report

    if config.report_only:
        # What lies beside the page is the grid, not that it was reported.
        grid = dataclasses.replace(config, report_only=False)
        print(describe_result(report(grid, command=call.command)))
        return
    from bpt_rl.run.console import Stages
    from bpt_rl.run.job import Job
    from bpt_rl.run.launchers import Launcher

    def start(jobs: Sequence[Job]) -> Launcher:
        from bpt_rl.run.launcher_choice import make_launcher  # Plans need JAX, a finished grid does not.

        return make_launcher(config, jobs)

    with Stages(1) as stages, stages.stage("cells") as advance:
        result = ablate(config, start, report_progress=advance, command=call.command)
    print(describe_result(result))
    if result.failures:
        raise SystemExit(1)


def _plan(call: Call) -> None:
    names, options = split(call, "a configuration: a TOML file or a preset")
    default = config_toml.load(config_lib.PlanConfig, names[0]) if names else None
    config = parse(config_lib.PlanConfig, call, [*names[1:], *options], default)
    from bpt_rl.run.plan import make_plan
    from bpt_rl.run.plan_text import describe

    print(describe(make_plan(config)))


def _report(call: Call) -> None:
    paths, options = split(call, "one or more run folders")
    config = parse(ReportOptions, call, options)
    from bpt_rl.run.report import write_report

    out = Path(config.out) if config.out else Path(paths[0]) / "report.html"
    print(f"Report: {write_report([Path(path) for path in paths], out)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of `bpt-rl report`."""

    out: str = ""
    """HTML file to write; report.html in the first run folder if empty."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RenderOptions:
    """Options of `bpt-rl render`."""

    out: str = "films"
    """Folder that receives a film of each episode."""
    format: Literal["mp4", "gif"] = "mp4"
    """An MP4 has 25 frames a second, a GIF at most 100 frames and 1.5 MB."""
    task: str = ""
    """Of an npz file: whose body is drawn, if the path does not name its domain."""
    index: int = 0
    """Of the episode in a store."""
    height: int = 480
    """Pixels."""
    width: int = 640
    """Pixels."""


VERBS: Mapping[str, Verb] = {
    "demo": Verb(
        _demo,
        "Collect, relabel, store, train AT, DT and BC-10%, evaluate, ablate and report; minutes on two cores.",
        "[options]",
        "bpt-rl demo --out runs/demo",
    ),
    **DATA_VERBS,
    "train": Verb(
        _train,
        "Train an agent; the same command goes on after an interruption.",
        "CONFIG [options]",
        "bpt-rl train at_small --data.store data/walker.h5 --data.task walker_run --run runs/at",
    ),
    "plan": Verb(
        _plan,
        "Tell memory, operations, time and the longest context of a training step, before anything runs.",
        "CONFIG [options]",
        "bpt-rl plan at_small --device h100 --model.compute-dtype bfloat16",
    ),
    "evaluate": Verb(
        _evaluate,
        "Roll a run out in DMC under named protocols, beside its controls.",
        "RUN... [options]",
        "bpt-rl evaluate runs/at --num-chains 16",
    ),
    "render": Verb(
        _render,
        "Draw episodes as films: of a dataset, or the first and the last of a run's latest evaluation.",
        "PATH... [options]",
        "bpt-rl render runs/at data/exorl/walker/rnd/buffer/episode_000000_1000.npz",
    ),
    "ablate": Verb(
        _ablate,
        "Train and evaluate a grid, like over the number of trajectories; finished cells are skipped.",
        "CONFIG [options]",
        "bpt-rl ablate trajectory_count --train.data.store data/walker.h5 --train.data.task walker_run",
    ),
    "report": Verb(
        _report,
        "Write one self-contained HTML page about runs.",
        "RUN... [options]",
        "bpt-rl report runs/at runs/dt --out report.html",
    ),
    **BENCH_VERBS,
}


def help_text() -> str:
    """Returns what `bpt-rl --help` prints."""
    from bpt_rl import __version__

    width = max(len(f"{name} {verb.arguments}") for name, verb in VERBS.items())
    lines = [f"  {f'{name} {verb.arguments}':<{width}}  {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            f"bpt-rl {__version__}: offline reinforcement learning with very long contexts.",
            "",
            "usage: bpt-rl VERB [arguments]",
            "",
            *lines,
            "",
            f"Presets for CONFIG: {', '.join(config_toml.preset_names())}",
            "Every verb has --help, with units, defaults and an example.",
            "BPT_RL_TRACEBACK=1 shows where an error arose.",
        ]
    )


def _find_verb(arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    for length in (2, 1):
        name = " ".join(arguments[:length])
        if name in VERBS and len(arguments) >= length:
            return name, arguments[length:]
    groups = {name.split()[0] for name in VERBS if " " in name}
    got = " ".join(arguments[:2] if arguments[0] in groups else arguments[:1])
    near = difflib.get_close_matches(got, VERBS, n=1, cutoff=0.0)[0]
    raise ValueError(f"A verb must be one of {', '.join(VERBS)}; got {got!r}. Nearest: bpt-rl {near}.")


def _offer_memory() -> None:
    """Lets JAX have most of a GPU's memory and of the host's; left alone it takes 75% and pins up to 64 GB.

    Read when JAX starts. What the user has set stays.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    pinned = max(1, int(capacity.PINNED_SHARE * capacity.host_memory() / capacity.GIB))
    os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(pinned))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status: 0 done, 2 refused with a sentence, 130 interrupted."""
    try:
        status = _status(list(sys.argv[1:] if arguments is None else arguments))
    except Exception as error:
        _leave_others(1, error)
        raise
    if status:
        _leave_others(status)
    return status


def _leave_others(status: int, error: Exception | None = None) -> None:
    """Ends a process that has failed, if it trained with others."""
    if "bpt_rl.run.processes" in sys.modules:
        from bpt_rl.run.processes import leave

        leave(status, error)


def _status(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text())
        return 0
    if arguments[0] == "--version":
        from bpt_rl import __version__

        print(__version__)
        return 0
    _offer_memory()
    try:
        name, rest = _find_verb(arguments)
        VERBS[name].run(Call(name, VERBS[name], rest))
    except USER_ERRORS as error:
        if os.environ.get("BPT_RL_TRACEBACK"):
            raise
        print(f"bpt-rl: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "bpt-rl: interrupted. What is complete on disk stays; the same command goes on from there.",
            file=sys.stderr,
        )
        return 130
    return 0
