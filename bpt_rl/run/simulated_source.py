"""Which data an evaluation can be had of."""

from bpt_rl.datasets.minari_source import UNSIMULATED


def check_simulated(source: str) -> None:
    """Checks that a store's source is not a Minari dataset whose task has no simulator here.

    Raises:
      ValueError: If it is one.
    """
    if source.startswith(UNSIMULATED):
        raise ValueError(
            "A run can be evaluated only where its task can be simulated; there is no simulator for the Minari "
            f"dataset {source.removeprefix(UNSIMULATED)}. Give `bpt_rl.run.evaluate.evaluate` environments of yours."
        )
