"""How pictures drawn by Matplotlib look, where no page gives them its colours."""

from collections.abc import Mapping
from typing import Any

PICTURE_STYLE: Mapping[str, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dcdfe4",
    "figure.constrained_layout.use": True,
}
"""For `matplotlib.rc_context`."""
