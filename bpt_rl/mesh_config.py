"""Configuration of the devices that share a training step."""

import dataclasses
from typing import Literal

from bpt_rl.config_checks import positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis of the mesh; their product is how many train together."""

    data: int = 1
    """Devices that share the rows of a batch, each with all parameters."""
    fsdp: int = 1
    """Devices that share the rows of a batch and the matrices of the layers, each gathered where it is used; must
    divide model.embed_dim and model.feedforward_dim."""
    context: int = 1
    """Devices that share each row's tokens."""
    attention: Literal["auto", "ring", "ulysses"] = "auto"
    """How attention crosses the devices of `context`. ring: keys and values go around; any number of heads. ulysses:
    each device gets the whole row for its share of the heads, which they must divide. auto: by heads, devices and
    length; the log says why."""

    def __post_init__(self) -> None:
        positive(self, "data", "fsdp", "context")

    @property
    def num_devices(self) -> int:
        """Devices that train together."""
        return self.data * self.fsdp * self.context
