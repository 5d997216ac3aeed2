"""Programs that are compared with reference numbers are compiled as users' are."""

import jax
import pytest


@pytest.fixture(scope="package", autouse=True)
def optimized():
    """Without optimizations the order of sums is another, and so is round-off."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
