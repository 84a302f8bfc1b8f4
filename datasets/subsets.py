"""Named subsets of a collection. Published results are on different ones, so each has a name and a digest."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

SHORT_NAMES = {
    "first-1M": "first-1000000-steps",
    "first-5k": "first-5000-episodes",
    "stratified-1M": "stratified-1000000-steps",
}
"""Names that papers use, spelled out. ExoRL itself takes first-1M; HILP and others take first-5k."""

_RULE = re.compile(r"(first|stratified)-([1-9]\d*)-(steps|episodes)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episodes:
    """The episodes that a subset chooses from, in the order of their sources and indices."""

    names: Sequence[str]
    """Source and file name, like "walker/rnd/episode_000017_1000.npz"."""
    num_steps: Int[np.ndarray, "E"]
    """Control steps."""
    returns: Callable[[], Float[np.ndarray, "E"]]
    """Gives the return of each; called only by a subset that needs it."""


def is_stratified(subset: str) -> bool:
    """Returns whether choosing the subset takes the return of every episode."""
    return SHORT_NAMES.get(subset, subset).startswith("stratified-")


def select(subset: str, episodes: Episodes) -> Int[np.ndarray, "_"]:
    """Returns the indices of a subset's episodes, ascending.

    Args:
      subset: One of
        full                      every episode
        first-N-steps             the first episodes, up to the one that makes N control steps
        first-N-episodes          the first N episodes
        stratified-N-steps, stratified-N-episodes
                                  as many episodes, spread evenly over the ranking by return: the ranking is
                                  cut into that many equal bands and the middle of each is taken. Nothing is
                                  drawn at random.
        list:FILE                 those that FILE names, one `episode_{index}_{length}.npz` a line
        or a name of `SHORT_NAMES`: first-1M (steps), first-5k (episodes), stratified-1M (steps).
      episodes: What there is to choose from.

    Raises:
      ValueError: If the subset is unknown, asks for more than there is, or names an episode that is not there.
      FileNotFoundError: If there is no such list.
    """
    if subset == "full":
        return np.arange(len(episodes.names))
    if subset.startswith("list:"):
        return _listed(Path(subset.removeprefix("list:")), episodes.names)
    match = _RULE.fullmatch(SHORT_NAMES.get(subset, subset))
    if match is None:
        raise ValueError(
            f"subset must be full, {', '.join(SHORT_NAMES)}, first-N-steps, first-N-episodes, stratified-N-steps, "
            f"stratified-N-episodes or list:FILE; got {subset!r}. Choose one of them."
        )
    kind, number, unit = match[1], int(match[2]), match[3]
    sizes = episodes.num_steps if unit == "steps" else np.ones(len(episodes.names), np.int64)
    if number > sizes.sum():
        raise ValueError(
            f"A subset must not ask for more than there is; {subset} asks for {number} {unit} and there are "
            f"{sizes.sum()}. Use full, or a smaller number."
        )
    count = int(np.searchsorted(np.cumsum(sizes), number)) + 1
    if kind == "first":
        return np.arange(count)
    return _spread(episodes, sizes, number)


def _spread(episodes: Episodes, sizes: Int[np.ndarray, "E"], number: int) -> Int[np.ndarray, "_"]:
    # Equal lengths are the rule; for unequal ones this is the count that their mean gives.
    count = max(1, min(len(sizes), round(number / sizes.mean())))
    ranking = np.argsort(episodes.returns(), kind="stable")
    middles = ((np.arange(count) + 0.5) * len(ranking) / count).astype(np.int64)
    return np.sort(ranking[middles])


def _listed(path: Path, names: Sequence[str]) -> Int[np.ndarray, "_"]:
    if not path.is_file():
        raise FileNotFoundError(
            f"A subset list must be a text file; there is none at {path}. Check the path."
        )
    lines = path.read_text("utf-8-sig", "replace").splitlines()
    wanted = [line.strip() for line in lines if line.strip()]
    places: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        places.setdefault(name.rpartition("/")[2], []).append(i)
    for name in wanted:
        if len(places.get(name, [])) != 1:
            raise ValueError(
                f"A subset list must name episodes that the sources hold once; {path} names {name!r}, and they "
                f"hold {len(places.get(name, []))} of that name. Correct the list."
            )
    if not wanted or len(set(wanted)) != len(wanted):
        raise ValueError(
            f"A subset list must name each episode once, and at least one; {path} has {len(wanted)} lines with "
            f"{len(set(wanted))} names. Correct the list."
        )
    return np.sort(np.array([places[name][0] for name in wanted]))
