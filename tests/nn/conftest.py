"""Parameters that make every part of a tiny model matter, drawn without compiling an initialiser."""

import jax
import numpy as np
import pytest
from flax import nnx


@pytest.fixture(scope="session")
def draw_parameters():
    """Returns (graph, parameters) of the module that `make` makes; no bias is 0 and no scale is 1."""

    def draw(make, seed=0):
        abstract = nnx.eval_shape(make)
        generator = np.random.default_rng(seed)

        def leaf(path, shaped):
            centre = 1.0 if path[-1].key == "scale" else 0.0
            return np.asarray(centre + 0.3 * generator.normal(size=shaped.shape), shaped.dtype)

        shapes = nnx.to_pure_dict(nnx.state(abstract))
        return nnx.graphdef(abstract), jax.tree_util.tree_map_with_path(leaf, shapes)

    return draw
