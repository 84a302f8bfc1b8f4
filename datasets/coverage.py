"""How widely a dataset's states spread: a nearest-neighbour estimate of the entropy of their physical features.

The features are those that rewards are formulas of (`bpt_rl.envs.features`), each divided by the fixed scale of
`SCALES`: a dataset's number does not depend on what it is compared with. In such units states spread uniformly over a
cube of one scale a side have 0 nats, and independent normal features of one scale's standard deviation 1.42 nats each.
One nat more is e times the volume.

Datasets of one domain compare; domains do not. The states of a short dataset lie close together because few episodes
made them: compare collections of the same number of steps.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

NUM_STATES = 20_000
"""States drawn from a dataset."""
NUM_NEIGHBOURS = 12
"""k: as in the rewards of APT and Proto-RL. One neighbour would do for independent states, but states that follow each
other in one episode, and such as rest in one place, lie closer together than the distribution tells."""
SEED = 0
"""Of the draw of states: the same files give the same number."""
CLOSEST = 1e-5
"""Scales; nearer neighbours count as this far away, since a body at rest repeats a state."""

SCALES: Mapping[str, tuple[float, ...]] = {
    "cartpole": (1.0, 2.0, 0.5, 5.0),
    "walker": (0.3, 0.5, 1.0, 5.0),
    "cheetah": (0.3, 0.5, 2.0, 5.0),
    "quadruped": (0.5, 1.0, 1.0, 1.0, 0.2),
    "point_mass_maze": (0.1, 0.1),
    "jaco": (0.2, 0.2, 0.2),
}
"""Unit of each feature, in the order of `bpt_rl.envs.features.FEATURES`: round numbers near the standard deviation
that a mixture of poor and good episodes has."""

_CHUNK = 16
"""States whose distances to all others are held at once: few enough for a core's cache."""


class Coverage(NamedTuple):
    """An entropy in nats."""

    nats: float
    standard_error: float | None
    """Of another collection of as many episodes, each drawn alone; None for one episode."""


def coverage(domain: str, states: Float[np.ndarray, "M F"], episode: Int[np.ndarray, "M"]) -> Coverage | None:
    """Returns the entropy of a domain's states; None if they are too few or the domain has no features.

    Args:
      domain: Like "walker".
      states: Physical features, in the order of their names.
      episode: That each state belongs to: those of one episode count as one for the error.
    """
    if domain not in SCALES or len(states) <= NUM_NEIGHBOURS:
        return None
    information = _information(states / np.array(SCALES[domain]), NUM_NEIGHBOURS)
    return Coverage(float(information.mean()), _standard_error(information, episode))


def entropy(points: Float[np.ndarray, "M F"], num_neighbours: int) -> float:
    """Returns the Kozachenko-Leonenko estimate of the differential entropy that points are drawn from, in nats.

    It is unbiased where the density is constant as far as the k-th neighbour. With 20,000 points in four dimensions
    and k = 12 it is 0.05 nats too low for a normal distribution and 0.19 too high for a uniform one, whose cube has
    edges (2,000 points: 0.07 and 0.36); draws of the same distribution differ by less than 0.01.

    Args:
      points: One a row.
      num_neighbours: k; a point's own place does not count.

    Raises:
      ValueError: If there are not more than k points, or one is not finite.

    Source: Kozachenko and Leonenko 1987; Kraskov, Stögbauer and Grassberger 2004, equation 20, whose epsilon is twice
    the distance here.
    """
    num_points = len(points)
    if not 0 < num_neighbours < num_points or not np.isfinite(points).all():
        raise ValueError(
            f"An entropy needs finite points, and more of them than neighbours; got {num_points} points for "
            f"{num_neighbours} neighbours. Use more points, and leave out what is not finite."
        )
    return float(_information(points, num_neighbours).mean())


def _information(points: Float[np.ndarray, "M F"], num_neighbours: int) -> Float[np.ndarray, "M"]:
    """Returns what each point adds to the entropy: less the logarithm of the density around it."""
    num_points, dim = points.shape
    squared = _squared_distances(points, num_neighbours)
    log_distance = np.log(np.maximum(squared, CLOSEST**2)) / 2
    log_unit_ball = dim / 2 * math.log(math.pi) - math.lgamma(dim / 2 + 1)
    # Of whole numbers, digamma(n) - digamma(k) is the sum of 1/j over j from k up to n - 1.
    digammas = (1 / np.arange(num_neighbours, num_points)).sum()
    information: Float[np.ndarray, "M"] = digammas + log_unit_ball + dim * log_distance
    return information


def _standard_error(information: Float[np.ndarray, "M"], episode: Int[np.ndarray, "M"]) -> float | None:
    """Returns that of the mean, with episodes of any number of states as what is drawn."""
    excess = np.bincount(episode, information - information.mean())
    num_episodes = len(np.unique(episode))
    if num_episodes < 2:
        return None
    variance = np.square(excess).sum() * num_episodes / (num_episodes - 1)
    return float(math.sqrt(variance) / len(information))


def _squared_distances(points: Float[np.ndarray, "M F"], num_neighbours: int) -> Float[np.ndarray, "M"]:
    """Returns the squared distance from each point to its k-th neighbour."""
    # Differences of float32, not |x|^2 + |y|^2 - 2xy, which would cancel where neighbours are close.
    columns = np.ascontiguousarray((points - points.mean(axis=0)).T, np.float32)
    difference = np.empty((_CHUNK, len(points)), np.float32)
    nearest = []
    for start in range(0, len(points), _CHUNK):
        squared = np.zeros((len(columns[0, start : start + _CHUNK]), len(points)), np.float32)
        for column in columns:
            part = difference[: len(squared)]
            np.subtract(column[start : start + _CHUNK, None], column, out=part)
            squared += np.square(part, out=part)
        # A point's own distance, 0, is the first.
        squared.partition(num_neighbours, axis=1)
        nearest.append(squared[:, num_neighbours])
    return np.concatenate(nearest).astype(np.float64)


def draw_states(num_steps: Int[np.ndarray, "E"]) -> Int[np.ndarray, "M 2"]:
    """Returns (episode, row) of `NUM_STATES` states drawn uniformly over all steps, or of all where there are fewer.

    Row 0, the state after a reset, is never drawn, and none twice. They stand in random order, so that the first m
    rows are a uniform draw too.

    Args:
      num_steps: Of each episode.
    """
    ends = np.cumsum(num_steps)
    generator = np.random.default_rng(SEED)
    chosen = generator.choice(int(ends[-1]), min(NUM_STATES, int(ends[-1])), replace=False)
    episode = np.searchsorted(ends, chosen, side="right")
    return np.stack([episode, chosen - (ends - num_steps)[episode] + 1], axis=1)


def rows_by_episode(drawn: Int[np.ndarray, "M 2"], num_episodes: int) -> list[Int[np.ndarray, "_"]]:
    """Returns the drawn rows of each episode, ascending."""
    in_file = drawn[_file_order(drawn)]
    return np.split(in_file[:, 1], np.searchsorted(in_file[:, 0], np.arange(1, num_episodes)))


def in_order_drawn(
    drawn: Int[np.ndarray, "M 2"], pieces: Sequence[Float[np.ndarray, "_ F"]]
) -> Float[np.ndarray, "M F"]:
    """Returns values of drawn states in the order of the draw.

    Args:
      drawn: From `draw_states`.
      pieces: Values at the rows that `rows_by_episode` gives, episodes one after another.
    """
    in_file = np.concatenate(pieces)
    values = np.empty_like(in_file)
    values[_file_order(drawn)] = in_file
    return values


def _file_order(drawn: Int[np.ndarray, "M 2"]) -> Int[np.ndarray, "M"]:
    return np.lexsort((drawn[:, 1], drawn[:, 0]))
