"""The verbs about data: `bpt-rl data ...`."""

import dataclasses
import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from bpt_rl import collect_config
from bpt_rl import config as config_lib
from bpt_rl.command import Call, Nothing, Verb, parse, split


def _collect(call: Call) -> None:
    domains = list(itertools.takewhile(lambda argument: not argument.startswith("-"), call.arguments))
    if len(domains) > 1:
        raise ValueError(
            f"`bpt-rl {call.name}` takes one domain at most; got {' '.join(domains)}. Example: {call.verb.example}"
        )
    config = parse(
        collect_config.CollectConfig, call, call.arguments[len(domains) :], _collect_default(domains)
    )
    _require_task_of(domains, config.task)
    from bpt_rl.run.collect import collect
    from bpt_rl.run.console import Stages

    with Stages(1) as stages, stages.stage(f"collect {config.task}") as advance:
        folder = collect(config, advance)
    print(f"Episodes: {folder}")


def _collect_default(domains: list[str]) -> collect_config.CollectConfig:
    if not domains:
        return collect_config.CollectConfig()
    from bpt_rl.envs import tasks

    return collect_config.CollectConfig(task=tasks.tasks_of(domains[0])[0])


def _require_task_of(domains: list[str], task: str) -> None:
    from bpt_rl.envs import tasks

    if domains and tasks.domain_of(task) != domains[0]:
        raise ValueError(
            f"The task must be one of the domain; got {domains[0]} and {task}. Leave one of them out."
        )


def _list(call: Call) -> None:
    domains = list(itertools.takewhile(lambda argument: not argument.startswith("-"), call.arguments))
    parse(Nothing, call, call.arguments[len(domains) :])
    from bpt_rl.datasets import catalogue

    print(catalogue.describe(domains))


def _download(call: Call) -> None:
    names, options = split(call, "a domain and a collector, as `bpt-rl data list` shows them")
    config = parse(config_lib.DownloadConfig, call, options)
    if len(names) != 2:
        raise ValueError(
            f"`bpt-rl {call.name}` needs one domain and one collector, as `bpt-rl data list` shows them; got "
            f"{' '.join(names)}. Example: {call.verb.example}"
        )
    from bpt_rl.datasets import catalogue
    from bpt_rl.datasets.download import download
    from bpt_rl.run.console import Stages

    archive = catalogue.find(*names)
    with Stages(1) as stages, stages.stage(f"download {archive.name} (MB)") as advance:

        def report(done: int, total: int, note: str) -> None:
            advance(done // 10**6, total // 10**6, note=note)

        done = download(archive, config, report)
    print(f"Archive: {done.path}{'' if done.is_new else ' (it was there already)'}")
    print(f"{done.num_bytes:,} bytes, SHA-256 {done.sha256}: {done.verification}.")
    if not done.is_verified:
        print(f"`bpt-rl data verify {done.path}` can still tell whether every episode is readable.")


def _build(call: Call) -> None:
    config = parse(config_lib.BuildConfig, call, call.arguments)
    from bpt_rl.datasets.build import build_store
    from bpt_rl.run.console import Stages

    with Stages(1) as stages, stages.stage("relabel and store") as advance:
        path = build_store(config, advance)
    print(f"Store: {path}")


def _export(call: Call) -> None:
    paths, options = split(call, "the path of a store")
    config = parse(config_lib.ExportConfig, call, options)
    if len(paths) > 1:
        raise ValueError(
            f"`bpt-rl {call.name}` needs one store; got {' '.join(paths)}. Example: {call.verb.example}"
        )
    from bpt_rl.datasets.minari_export import export_store
    from bpt_rl.run.console import Stages

    with Stages(1) as stages, stages.stage(f"export {paths[0]}") as advance:
        done = export_store(paths[0], config, advance)
    print(f"Minari dataset: {done.dataset_id}, {done.num_episodes} episodes in {done.path}")


def _info(call: Call) -> None:
    paths, options = split(call, "the path of a store, or of a folder or zip of episodes")
    config = parse(InfoOptions, call, options)
    from bpt_rl.datasets import comparison
    from bpt_rl.datasets.description import describe, describe_survey
    from bpt_rl.datasets.survey import identify, survey
    from bpt_rl.run import data_plots
    from bpt_rl.run.console import Stages

    datasets = [identify(path, config.domain) for path in paths]
    picture = Path(config.plot_out or _beside(Path(paths[0]), is_only=len(paths) == 1))
    if len(paths) == 1 and datasets[0].is_store:
        print(json.dumps(describe(paths[0]), indent=1))
        if config.plot:
            print(f"Plot: {data_plots.plot_store(Path(paths[0]), picture)}", file=sys.stderr)
        return
    if len(paths) > 1:
        comparison.check_comparable(datasets, config.against)
    surveys = []
    with Stages(len(paths)) as stages:
        for dataset in datasets:
            with stages.stage(f"read {dataset.path}") as advance:
                surveys.append(survey(dataset, num_workers=config.num_workers, report_progress=advance))
    if len(paths) == 1:
        print(json.dumps(describe_survey(surveys[0]), indent=1))
    else:
        compared = comparison.compare(surveys, config.against)
        print(json.dumps(compared, indent=1) if config.json else comparison.comparison_text(compared))
    if config.plot:
        print(f"Plot: {data_plots.plot_surveys(surveys, picture)}", file=sys.stderr)


def _beside(dataset: Path, *, is_only: bool) -> Path:
    """Returns a PNG beside a dataset, and never among the episodes of a buffer."""
    dataset = dataset.parent if dataset.absolute().name == "buffer" else dataset
    if not is_only:
        return dataset.with_name("comparison.png")
    return dataset.with_name(f"{dataset.name}.png") if dataset.is_dir() else dataset.with_suffix(".png")


def _verify(call: Call) -> None:
    paths, options = split(call, "the path of a store, or of a folder or zip of episodes")
    config = parse(VerifyOptions, call, options)
    from bpt_rl.datasets.build import domain_and_tasks
    from bpt_rl.datasets.store import Store
    from bpt_rl.datasets.verification import verify_episodes, verify_store
    from bpt_rl.envs.tasks import DOMAINS
    from bpt_rl.run.console import Stages

    workers = {"num_workers": config.num_workers}
    with Stages(len(paths)) as stages:
        for path in paths:
            with stages.stage(f"verify {path}") as advance:
                if Path(path).is_dir() or path.endswith(".zip"):
                    build = config_lib.BuildConfig(source=(path,), domain=config.domain)
                    domain, _ = domain_and_tasks(build)
                    count = verify_episodes(path, domain, report_progress=advance, **workers)
                    said = f"readable, finite, and each {domain} observation that of its state"
                else:
                    count = verify_store(path, report_progress=advance, **workers)
                    with Store.open(path) as store:
                        is_simulated = store.domain in DOMAINS
                    said = "every byte matches its digest"
                    said += ", and each observation is that of its state" if is_simulated else ""
            print(f"{path}: {count} episodes, {said}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """Options of `bpt-rl data info`."""

    plot: bool = True
    """Also draw the returns of each task and the states visited, as a PNG."""
    plot_out: str = ""
    """The PNG; by default beside the dataset, of several comparison.png beside the first."""
    json: bool = False
    """Print the comparison of several datasets as JSON in place of tables; one dataset always is."""
    against: str = "random"
    """Dataset of several that differences are shown to, as the table names it."""
    domain: str = ""
    """Simulated body of folders or zips of episodes, if their paths do not say it."""
    num_workers: int = 0
    """Processes that relabel folders and zips; 0 means one a core."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Options of `bpt-rl data verify`."""

    domain: str = ""
    """Simulated body of a folder or zip of episodes, if its path does not say it."""
    num_workers: int = 0
    """Checking processes; 0 means one a core."""


DATA_VERBS: Mapping[str, Verb] = {
    "data list": Verb(
        _list,
        "Show ExoRL's domains and the zips of their episodes.",
        "[DOMAIN...]",
        "bpt-rl data list walker cheetah",
    ),
    "data download": Verb(
        _download,
        "Fetch and verify one of ExoRL's zips; the same command goes on after an interruption.",
        "DOMAIN COLLECTOR [options]",
        "bpt-rl data download walker rnd --out data/exorl",
    ),
    "data collect": Verb(
        _collect,
        "Explore and record episodes in ExoRL's layout.",
        "[DOMAIN] [options]",
        "bpt-rl data collect walker --algorithm rnd --num-steps 1_000_000 --out data/exorl",
    ),
    "data build": Verb(
        _build,
        "Relabel episodes for tasks of their domain into an HDF5 store.",
        "[options]",
        "bpt-rl data build --source data/exorl/walker/rnd --tasks walker_run --out data/walker.h5",
    ),
    "data export": Verb(
        _export,
        "Write a store as a Minari dataset, with the rewards of one task.",
        "STORE [options]",
        "bpt-rl data export data/walker.h5 --task walker_run --dataset-id walker/rnd-walker_run-v0",
    ),
    "data info": Verb(
        _info,
        "Describe a dataset, or compare several of one domain: states covered, returns of episodes; and draw them.",
        "PATH... [options]",
        "bpt-rl data info data/exorl/walker/random data/exorl/walker/rnd.zip data/walker.h5",
    ),
    "data verify": Verb(
        _verify,
        "Check every byte of a store, or every episode of a folder or zip, alignment included.",
        "PATH",
        "bpt-rl data verify data/walker.h5",
    ),
}
