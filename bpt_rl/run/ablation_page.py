"""The page."""

from collections.abc import Sequence

from bpt_rl.run.grid import Cell
from bpt_rl.run.grid_folder import GridFolder


def write_page(cells: Sequence[Cell], folder: GridFolder, *, command: str = "") -> None:
    """Writes the page."""
