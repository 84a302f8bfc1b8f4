"""ExoRL's zips: where each lies, what is known about its bytes, and what its episodes hold."""

import dataclasses
import difflib
import io
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from bpt_rl.envs import tasks

HOST = "https://dl.fbaipublicfiles.com/exorl"
"""The original folder of the zips."""
DOMAINS = ("cartpole", "cheetah", "jaco", "point_mass_maze", "quadruped", "walker")
COLLECTORS = ("aps", "diayn", "disagreement", "icm", "icm_apt", "proto", "random", "rnd", "smm")
"""Explorers, each of which recorded 10M environment steps of every domain."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Archive:
    """The zip of one collector's episodes of one domain, and what is known of it beforehand."""

    domain: str
    collector: str
    num_bytes: int | None = None
    sha256: str | None = None
    """64 hexadecimal digits."""
    etag: str | None = None
    """The original server's entity tag, without its quotes."""

    @property
    def name(self) -> str:
        """Like "walker/rnd"."""
        return f"{self.domain}/{self.collector}"

    @property
    def url(self) -> str:
        """Where ExoRL itself keeps it."""
        return self.url_below(HOST)

    def url_below(self, folder: str) -> str:
        """Returns where it lies on a server that keeps the zips in `folder`, itself a URL."""
        return f"{folder.rstrip('/')}/{self.name}.zip"


# Sizes and digests read in public sources; for the other 47 none was found.
_KNOWN = (
    Archive(
        domain="cartpole",
        collector="proto",
        num_bytes=587_145_013,
        sha256="0384fa7c899777150335b0d602c6b3d945cdc856adbd81341d1eb8848854a042",
    ),
    Archive(
        domain="cheetah",
        collector="proto",
        num_bytes=2_280_144_517,
        sha256="f18e42150977604b6244a5cdf97aa3e2d078700ab60440050b12b98f60dd00d8",
    ),
    Archive(
        domain="jaco",
        collector="proto",
        num_bytes=2_502_210_180,
        sha256="c8da7ff91856e1865deef46f964f4ed5d7663312769a941b71a9706a8a049476",
    ),
    Archive(
        domain="point_mass_maze",
        collector="proto",
        num_bytes=527_876_713,
        sha256="1839c8d7426fb43c33dcabfb1adf6d4128e43c94989a3d0f053244f4a7da5064",
    ),
    Archive(
        domain="quadruped",
        collector="proto",
        num_bytes=7_768_551_121,
        sha256="b9d613aaaadfd8bf75a9a9a52e3e61f27a473d5ab9b1bcd39c25056ab23234a5",
    ),
    Archive(
        domain="walker",
        collector="proto",
        num_bytes=2_584_420_588,
        sha256="a34d0edf628d4824d90d1bf6cb69b2d97bf0c753a09a04bffc3deab130277b42",
    ),
    Archive(
        domain="walker",
        collector="rnd",
        num_bytes=2_585_461_986,
        etag="5fcbe90c646cb714d080a6b4c8586186-309",
    ),
)
_KNOWN_BY_NAME = {archive.name: archive for archive in _KNOWN}
ARCHIVES: Mapping[str, Archive] = {
    name: _KNOWN_BY_NAME.get(name) or Archive(domain=domain, collector=collector)
    for domain in DOMAINS
    for collector in COLLECTORS
    for name in [f"{domain}/{collector}"]
}
"""Every zip by its name, like "walker/rnd"."""


def find(domain: str, collector: str) -> Archive:
    """Returns the zip of a collector's episodes of a domain.

    Raises:
      ValueError: If either name is unknown; the nearest known one is named.
    """
    _check_name("domain", domain, DOMAINS)
    _check_name("collector", collector, COLLECTORS)
    return ARCHIVES[f"{domain}/{collector}"]


def _check_name(kind: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"A {kind} of ExoRL must be one of {', '.join(known)}; got {name!r}. Nearest valid one: {nearest!r}."
        )


def describe(domains: Sequence[str] = (), width: int | None = None) -> str:
    """Returns two tables as text: the domains with their sizes and tasks, and their zips.

    Args:
      domains: Those to show; all if empty.
      width: Characters a line; the terminal's if None, or 80 where there is none.

    Raises:
      ValueError: If a domain is unknown.
    """
    for domain in domains:
        _check_name("domain", domain, DOMAINS)
    chosen = [domain for domain in DOMAINS if domain in (domains or DOMAINS)]
    console = Console(file=io.StringIO(), width=width or shutil.get_terminal_size().columns)
    with console.capture() as captured:
        console.print(_domain_table(chosen))
        console.print(_archive_table(chosen))
        console.print(
            f"A task's full name is DOMAIN_TASK, like walker_run. The zips lie at {HOST}/DOMAIN/COLLECTOR.zip.",
            highlight=False,
        )
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _table(title: str) -> Table:
    return Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)


def _domain_table(domains: Iterable[str]) -> Table:
    table = _table("Domains: numbers a step, control steps an episode")
    table.add_column("domain", no_wrap=True)
    for name in ("observation", "action", "physics", "steps"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("tasks")
    for name in domains:
        domain = tasks.DOMAINS[name]
        sizes = (domain.observation_dim, domain.action_dim, domain.physics_dim, domain.episode_steps)
        table.add_row(
            name, *map(str, sizes), ", ".join(task.removeprefix(f"{name}_") for task in domain.tasks)
        )
    return table


def _archive_table(domains: Iterable[str]) -> Table:
    table = _table("Zips: 10M environment steps each")
    table.add_column("domain", no_wrap=True)
    table.add_column("collector")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("verified by")
    for name in domains:
        for group in _alike(name):
            num_bytes = group[0].num_bytes
            table.add_row(
                name,
                ", ".join(archive.collector for archive in group),
                "unknown" if num_bytes is None else f"{num_bytes:,}",
                verified_by(group[0]),
            )
    return table


def _alike(domain: str) -> Iterator[list[Archive]]:
    """Yields the zips of a domain in groups of which equally much is known: one row each."""
    archives = [ARCHIVES[f"{domain}/{collector}"] for collector in COLLECTORS]
    yield from ([archive] for archive in archives if archive.num_bytes is not None)
    yield [archive for archive in archives if archive.num_bytes is None]


def verified_by(archive: Archive) -> str:
    """Returns what a download of this zip is checked against."""
    if archive.sha256:
        return "SHA-256"
    return "known ETag" if archive.etag else "server's ETag"
