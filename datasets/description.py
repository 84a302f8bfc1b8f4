"""What a dataset holds, in plain values."""

import os
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from bpt_rl.datasets import coverage
from bpt_rl.datasets.store import Store
from bpt_rl.datasets.store_format import FORMAT_VERSION
from bpt_rl.datasets.survey import Survey, drawn_states

SAMPLE_ROWS = 200_000
"""Rows that describe the states visited; of a larger store, an even spread of its episodes."""


def describe(path_or_store: str | os.PathLike[str] | Store) -> dict[str, Any]:
    """Returns what `bpt-rl data info` shows: plain values, returns summarised for each task.

    `features` tells how far the states spread: quantiles of every physical feature; `coverage` the same in one
    number (`bpt_rl.datasets.coverage`), None where the domain has no features or the states are too few.
    """
    if not isinstance(path_or_store, Store):
        with Store.open(path_or_store) as store:
            return describe(store)
    store = path_or_store
    lengths = store.lengths
    return {
        "path": str(store.path),
        "bytes": store.path.stat().st_size,
        "domain": store.domain,
        "source": store.source,
        "subset": store.subset,
        "subset_digest": store.subset_digest,
        "action_repeat": store.action_repeat,
        "num_episodes": store.num_episodes,
        "num_steps": int(lengths.sum()),
        "episode_steps": [int(lengths.min()), int(lengths.max())],
        "observation_dim": store.observation_dim,
        "action_dim": store.action_dim,
        "returns": {task: _summary(store.returns(task)) for task in store.tasks},
        "features": {name: _spread(values) for name, values in visited_features(store).items()},
        "coverage": _coverage(
            store.domain, store.feature_names, drawn_states(store), coverage.draw_states(lengths)[:, 0]
        ),
        "digest": store.digest,
        "format_version": FORMAT_VERSION,
        "versions": store.versions,
    }


def describe_survey(survey: Survey, num_states: int | None = None) -> dict[str, Any]:
    """Returns what `bpt-rl data info` shows of episodes that are in no store, or of one dataset among several.

    Args:
      survey: Of the dataset.
      num_states: States that its coverage is measured with; None for all that were drawn.
    """
    features = zip(survey.feature_names, survey.states.T, strict=True)
    states, episode = survey.states[:num_states], coverage.draw_states(survey.num_steps)[:num_states, 0]
    return {
        "path": survey.dataset.path,
        "domain": survey.dataset.domain,
        "source": survey.dataset.source,
        "subset": survey.subset,
        "action_repeat": survey.action_repeat,
        "num_episodes": len(survey.num_steps),
        "num_steps": int(survey.num_steps.sum()),
        "episode_steps": [int(survey.num_steps.min()), int(survey.num_steps.max())],
        "returns": {task: _summary(returns) for task, returns in survey.returns.items()},
        "features": {name: _spread(values) for name, values in features},
        "coverage": _coverage(survey.dataset.domain, survey.feature_names, states, episode),
    }


def visited_features(store: Store) -> dict[str, Float[np.ndarray, "_"]]:
    """Returns each physical feature at the states of an even spread of episodes, `SAMPLE_ROWS` at most."""
    num_steps = store.lengths
    count = max(1, min(store.num_episodes, SAMPLE_ROWS // (int(num_steps.max()) + 1)))
    episodes = np.unique(np.linspace(0, store.num_episodes - 1, count).astype(int))
    rows = np.concatenate(
        [store.block(("features",), i, i + 1)["features"][0, : num_steps[i] + 1] for i in episodes.tolist()]
    )
    return dict(zip(store.feature_names, rows.T, strict=True))


def _coverage(
    domain: str,
    names: tuple[str, ...],
    states: Float[np.ndarray, "M F"],
    episode: Int[np.ndarray, "M"],
) -> dict[str, Any] | None:
    found = coverage.coverage(domain, states, episode)
    if found is None:
        return None
    scales = dict(zip(names, coverage.SCALES[domain], strict=True))
    return {**found._asdict(), "num_states": len(states), "scales": scales}


def _summary(returns: Float[np.ndarray, "E"]) -> dict[str, float]:
    return {
        "mean": float(returns.mean(dtype=np.float64)),
        "min": float(returns.min()),
        "median": float(np.median(returns)),
        "quantile_95": float(np.quantile(returns, 0.95)),
        "max": float(returns.max()),
    }


def _spread(values: Float[np.ndarray, "_"]) -> dict[str, float]:
    names = ("min", "quantile_05", "median", "quantile_95", "max")
    quantiles = np.quantile(values, (0, 0.05, 0.5, 0.95, 1))
    return dict(zip(names, quantiles.tolist(), strict=True))
