"""The command line: parse, build the configuration, call one function of `bpt_rl.run`.

Heavy packages are imported by the verb that needs them, so that `--help` answers at once.
"""

import dataclasses
import difflib
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from bpt_rl import config as config_lib
from bpt_rl import config_toml

T = TypeVar("T")

USER_ERRORS = (ValueError, OSError, FloatingPointError, ImportError)
"""What a user can cause: shown as one sentence, without a traceback."""


@dataclasses.dataclass(frozen=True)
class Verb:
    """One verb of the command line."""

    run: Callable[[str, Sequence[str]], None]
    """Takes the program name so far and the arguments behind it."""
    summary: str
    arguments: str
    example: str


def _parse(config_type: type[T], prog: str, arguments: Sequence[str], default: T | None = None) -> T:
    import tyro

    verb = VERBS[prog.removeprefix("bpt-rl ")]
    description = f"{verb.summary}\n\nExample: {verb.example}"
    usage = f"{prog} {verb.arguments}".replace("[options]", "").strip()
    try:
        return tyro.cli(
            config_type,
            prog=usage,
            args=list(arguments),
            default=default or config_type(),
            description=description,
        )
    except SystemExit:
        # tyro finds what is near only if the groups before the name are right.
        for sentence in _misspelt(default or config_type(), arguments):
            print(sentence, file=sys.stderr)
        raise


def _misspelt(config: object, arguments: Sequence[str]) -> Iterator[str]:
    """Yields a sentence for each option that there is none of; it names the nearest."""
    known = {"help": "help"} | {name: name.rpartition(".")[2] for name in _option_names(config)}
    for argument in arguments:
        if not argument.startswith("--"):
            continue
        group, dot, last = argument[2:].partition("=")[0].replace("_", "-").rpartition(".")
        if {group + dot + last, group + dot + last.removeprefix("no-")} & known.keys():
            continue

        def likeness(name: str, option: str = group + dot + last, last: str = last) -> tuple[float, float]:
            ratios = [
                difflib.SequenceMatcher(None, *pair).ratio() for pair in ((last, known[name]), (option, name))
            ]
            return ratios[0], ratios[1]

        yield f"bpt-rl: there is no option {argument.partition('=')[0]}. Nearest: --{max(known, key=likeness)}."


def _option_names(config: object, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value, name = getattr(config, field.name), prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from _option_names(value, f"{name}.")
        else:
            yield name


def _split(prog: str, arguments: Sequence[str], needed: str) -> tuple[list[str], list[str]]:
    """Returns the leading positional arguments and the options behind them."""
    first_option = next((i for i, a in enumerate(arguments) if a.startswith("-")), len(arguments))
    positional, options = list(arguments[:first_option]), list(arguments[first_option:])
    if not positional and not {"-h", "--help"} & set(options):
        raise ValueError(
            f"`{prog}` needs {needed}; got none. Example: {VERBS[prog.removeprefix('bpt-rl ')].example}"
        )
    return positional, options


def _command(prog: str, arguments: Sequence[str]) -> str:
    return shlex.join([*prog.split(), *arguments])


def _demo(prog: str, arguments: Sequence[str]) -> None:
    config = _parse(config_lib.DemoConfig, prog, arguments, config_toml.load(config_lib.DemoConfig, "demo"))
    from bpt_rl.run.demo import demo

    print(f"Report: {demo(config, command=_command(prog, arguments))}")


def _collect(prog: str, arguments: Sequence[str]) -> None:
    config = _parse(config_lib.CollectConfig, prog, arguments)
    from bpt_rl.run.collect import collect
    from bpt_rl.run.console import Stages

    with Stages(1) as stages, stages.stage(f"collect {config.task}") as advance:
        folder = collect(config, advance)
    print(f"Episodes: {folder}")


def _build(prog: str, arguments: Sequence[str]) -> None:
    config = _parse(config_lib.BuildConfig, prog, arguments)
    from bpt_rl.datasets.build import build_store
    from bpt_rl.run.console import Stages

    with Stages(1) as stages, stages.stage("relabel and store") as advance:
        path = build_store(config, advance)
    print(f"Store: {path}")


def _info(prog: str, arguments: Sequence[str]) -> None:
    paths, options = _split(prog, arguments, "the path of a store")
    _parse(Nothing, prog, options)
    from bpt_rl.datasets.store import describe

    for path in paths:
        print(json.dumps(describe(path), indent=1))


def _verify(prog: str, arguments: Sequence[str]) -> None:
    paths, options = _split(prog, arguments, "the path of a store, or of a folder or zip of episodes")
    _parse(Nothing, prog, options)
    from bpt_rl.datasets import exorl
    from bpt_rl.datasets.store import verify

    for path in paths:
        if Path(path).is_dir() or path.endswith(".zip"):
            count = sum(1 for _ in exorl.iterate_episodes(path))
            print(f"{path}: {count} episodes, every array readable, finite and of the right shape.")
        else:
            verify(path)
            print(f"{path}: every byte matches its digest.")


def _train(prog: str, arguments: Sequence[str]) -> None:
    names, options = _split(prog, arguments, "a configuration: a TOML file or a preset")
    default = config_toml.load(config_lib.TrainConfig, names[0]) if names else None
    config = _parse(config_lib.TrainConfig, prog, [*names[1:], *options], default)
    from bpt_rl.run.console import Stages
    from bpt_rl.run.train import train

    with Stages(1) as stages, stages.stage(f"train {config.agent}") as advance:

        def report(step: int, total: int, values: Mapping[str, float]) -> None:
            advance(step, total, note=f"loss {values['loss']:.4f}")

        folder = train(config, report, command=_command(prog, arguments))
    print(f"Run: {folder.path}")


def _evaluate(prog: str, arguments: Sequence[str]) -> None:
    paths, options = _split(prog, arguments, "a run folder")
    config = _parse(config_lib.EvaluateConfig, prog, options)
    from bpt_rl.run.console import Advance, Stages
    from bpt_rl.run.evaluate import describe_record, evaluate_run, render_run

    with Stages(len(paths)) as stages:
        for path in paths:
            with stages.stage(f"evaluate {Path(path).name}") as advance:

                def report(context: str, done: int, total: int, advance: Advance = advance) -> None:
                    advance(done, total, note=context)

                record = evaluate_run(
                    Path(path), config, command=_command(prog, arguments), report_progress=report
                )
            print(describe_record(record))
            print(render_run(Path(path), config))


def _ablate(prog: str, arguments: Sequence[str]) -> None:
    names, options = _split(prog, arguments, "a configuration: a TOML file or a preset")
    default = config_toml.load(config_lib.AblateConfig, names[0]) if names else None
    config = _parse(config_lib.AblateConfig, prog, [*names[1:], *options], default)
    from bpt_rl.run.ablate import ablate
    from bpt_rl.run.console import Stages

    with Stages(1) as stages, stages.stage("cells") as advance:
        folders = ablate(config, report_progress=advance, command=_command(prog, arguments))
    print("\n".join(str(folder) for folder in folders))


def _report(prog: str, arguments: Sequence[str]) -> None:
    paths, options = _split(prog, arguments, "one or more run folders")
    config = _parse(ReportOptions, prog, options)
    from bpt_rl.run.report import write_report

    out = Path(config.out) if config.out else Path(paths[0]) / "report.html"
    print(f"Report: {write_report([Path(path) for path in paths], out)}")


@dataclasses.dataclass(frozen=True)
class Nothing:
    """No options."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of `bpt-rl report`."""

    out: str = ""
    """HTML file to write; report.html in the first run folder if empty."""


VERBS: Mapping[str, Verb] = {
    "demo": Verb(
        _demo,
        "Collect, relabel, store, train AT, DT and BC-10%, evaluate, ablate and report; minutes on two cores.",
        "[options]",
        "bpt-rl demo --out runs/demo",
    ),
    "data collect": Verb(
        _collect,
        "Explore and record episodes in ExoRL's layout.",
        "[options]",
        "bpt-rl data collect --task walker_run --num-steps 100_000 --out data/exorl",
    ),
    "data build": Verb(
        _build,
        "Relabel episodes for tasks of their domain into an HDF5 store.",
        "[options]",
        "bpt-rl data build --source data/exorl/walker/rnd --tasks walker_run --out data/walker.h5",
    ),
    "data info": Verb(_info, "Describe a store.", "STORE", "bpt-rl data info data/walker.h5"),
    "data verify": Verb(
        _verify,
        "Check every byte of a store, or every episode of a folder or zip.",
        "PATH",
        "bpt-rl data verify data/walker.h5",
    ),
    "train": Verb(
        _train,
        "Train an agent; the same command goes on after an interruption.",
        "CONFIG [options]",
        "bpt-rl train at_small --data.store data/walker.h5 --data.task walker_run --run runs/at",
    ),
    "evaluate": Verb(
        _evaluate,
        "Roll a run out in DMC under named protocols, beside its controls.",
        "RUN... [options]",
        "bpt-rl evaluate runs/at --num-chains 16",
    ),
    "ablate": Verb(
        _ablate,
        "Train and evaluate a grid over the number of trajectories; finished cells are skipped.",
        "CONFIG [options]",
        "bpt-rl ablate trajectory_count --train.data.store data/walker.h5 --train.data.task walker_run",
    ),
    "report": Verb(
        _report,
        "Write one self-contained HTML page about runs.",
        "RUN... [options]",
        "bpt-rl report runs/at runs/dt --out report.html",
    ),
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
    got = " ".join(arguments[:2] if arguments[0] == "data" else arguments[:1])
    near = difflib.get_close_matches(got, VERBS, n=1, cutoff=0.0)[0]
    raise ValueError(f"A verb must be one of {', '.join(VERBS)}; got {got!r}. Nearest: bpt-rl {near}.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status: 0 done, 2 refused with a sentence, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text())
        return 0
    if arguments[0] == "--version":
        from bpt_rl import __version__

        print(__version__)
        return 0
    try:
        name, rest = _find_verb(arguments)
        VERBS[name].run(f"bpt-rl {name}", rest)
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
