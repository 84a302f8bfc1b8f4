"""The verbs about data: `bpt-rl data ...`."""

import json
from collections.abc import Mapping
from pathlib import Path

from bpt_rl import config as config_lib
from bpt_rl.command import Call, Nothing, Verb, parse, split


def _collect(call: Call) -> None:
    config = parse(config_lib.CollectConfig, call, call.arguments)
    from bpt_rl.run.collect import collect
    from bpt_rl.run.console import Stages

    with Stages(1) as stages, stages.stage(f"collect {config.task}") as advance:
        folder = collect(config, advance)
    print(f"Episodes: {folder}")


def _build(call: Call) -> None:
    config = parse(config_lib.BuildConfig, call, call.arguments)
    from bpt_rl.datasets.build import build_store
    from bpt_rl.run.console import Stages

    with Stages(1) as stages, stages.stage("relabel and store") as advance:
        path = build_store(config, advance)
    print(f"Store: {path}")


def _info(call: Call) -> None:
    paths, options = split(call, "the path of a store")
    parse(Nothing, call, options)
    from bpt_rl.datasets.store import describe

    for path in paths:
        print(json.dumps(describe(path), indent=1))


def _verify(call: Call) -> None:
    paths, options = split(call, "the path of a store, or of a folder or zip of episodes")
    parse(Nothing, call, options)
    from bpt_rl.datasets import exorl
    from bpt_rl.datasets.store import verify

    for path in paths:
        if Path(path).is_dir() or path.endswith(".zip"):
            count = sum(1 for _ in exorl.iterate_episodes(path))
            print(f"{path}: {count} episodes, every array readable, finite and of the right shape.")
        else:
            verify(path)
            print(f"{path}: every byte matches its digest.")


DATA_VERBS: Mapping[str, Verb] = {
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
}
