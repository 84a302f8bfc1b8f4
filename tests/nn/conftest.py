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


@pytest.fixture(scope="session")
def assert_unmoved():
    """Compares what one program made of two inputs that only differ where it must not look, entry by entry.

    Bit for bit on a CPU. A GPU adds up what is scattered, as an embedding's gradient is, in the order in which its
    threads come: there within 1e-6 of the largest entry, ten roundings of float32.
    """

    def check(got, expected):
        for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            if jax.default_backend() == "cpu":
                np.testing.assert_array_equal(g, e)
            else:
                np.testing.assert_allclose(g, e, rtol=0, atol=1e-6 * np.abs(e).max())

    return check
