"""Counted operations against numbers known otherwise."""

import jax
import jax.numpy as jnp
import pytest

from mim_jax import config as configs
from mim_jax.training.experiment import Experiment
from mim_jax.training.flops import count_flops, peak_flops, peak_flops_of


def test_matrix_product_counts_two_for_each_multiply_add():
    a, b = jnp.ones((4, 5)), jnp.ones((5, 7))
    assert count_flops(jnp.dot, a, b) == 2 * 4 * 5 * 7
    # Backward needs two products of the same size; the forward value is not needed.
    gradient = jax.grad(lambda a, b: jnp.dot(a, b).sum(), argnums=(0, 1))
    assert count_flops(gradient, a, b) == pytest.approx(3 * 2 * 4 * 5 * 7)


def test_loops_count_as_often_as_they_run():
    def repeated(x):
        return jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=6)[0]

    assert count_flops(repeated, jnp.ones((3, 3))) == 6 * 2 * 27


def test_convolution_counts_its_kernel():
    x, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((4, 4, 3, 5))

    def convolve(x, kernel):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (4, 4), "VALID", dimension_numbers=dims)

    assert count_flops(convolve, x, kernel) == 2 * (2 * 2 * 2 * 5) * (4 * 4 * 3)


@pytest.mark.parametrize("changes", [{}, {"model.scan": True}, {"model.remat": "full"}])
def test_vit_base_costs_what_it_should(changes):
    # 49 + 1 tokens of width 768 in 12 blocks, 197 of width 512 in 8, by hand.
    def blocks(tokens, width, depth):
        return depth * 2 * tokens * (12 * width**2 + 2 * tokens * width)

    forward = (
        blocks(50, 768, 12)
        + blocks(197, 512, 8)
        + 2 * 49 * 768 * 768  # patches
        + 2 * 50 * 768 * 512  # into the decoder
        + 2 * 197 * 512 * 768  # prediction
    )
    config = configs.load("mae:vit_b16", {"batch_size": 8, **changes})
    experiment = Experiment.without_data(config, jax.devices()[:1])
    counted = experiment.flops_per_step(experiment.batch_shapes()) / 8
    # All but the gradient of the patches with respect to the image.
    assert counted == pytest.approx(3 * forward - 2 * 49 * 768 * 768, rel=1e-3)


def test_known_chips_have_their_peak_and_others_are_measured():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("cpu") is None
    assert 1e8 < peak_flops_of(jax.devices()[0], "float32") < 1e14
