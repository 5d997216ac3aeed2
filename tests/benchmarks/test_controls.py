import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.controls import FeatureReconstruction
from mim_jax import config as configs
from mim_jax.method import parameter_shapes
from mim_jax.methods.maskalign import MaskAlign
from mim_jax.training.tree import flatten, split, unflatten
from tests.methods.test_maskalign import BATCH, COMMON, IMAGES, KEPT, TOKENS, draw, rngs

DEPTH = 2


@functools.cache
def control() -> FeatureReconstruction:
    depths = {"model.depth": DEPTH, "model.teacher.depth": DEPTH}
    return FeatureReconstruction.build(configs.load("maskalign", {**COMMON, **depths}))


@functools.cache
def computed():
    """Loss, its terms, the gradient, the masking, predictions and targets of all patches."""
    method = control()
    aligned, everything = method.aligned, jnp.tile(jnp.arange(TOKENS), (BATCH, 1))
    shapes = flatten(parameter_shapes(method))
    given = unflatten({name: 0.2 * draw(*leaf.shape) for name, leaf in shapes.items()})

    def loss(params):
        value, aux = method.loss({"params": params}, {"image": IMAGES}, rngs(), jnp.int32(0))
        seen = aligned.seen({"params": params}, IMAGES)
        chosen = aligned.choose(rngs()["mask"], seen)
        noise = jax.random.uniform(rngs()["drop_path"], (DEPTH, 2, BATCH))
        own = {name: params[name] for name in ("encoder", "decoder")}
        pred = method.model.apply({"params": own}, IMAGES, chosen, noise)
        goals = [aligned.target(seen, layer, everything)[:, 1:] for layer in range(DEPTH)]
        return value, (aux.metrics, chosen, pred, goals)

    (value, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(given)
    return value, gradient, *found


def test_the_control_is_the_mean_error_of_the_target_layers_at_hidden_patches():
    value, _, terms, chosen, pred, goals = computed()
    hidden = np.asarray(chosen.mask) == 1
    assert hidden.sum() == BATCH * (TOKENS - KEPT)
    errors = []
    for layer, goal in enumerate(goals):
        apart = np.abs(np.asarray(pred)[..., 12 * layer : 12 * (layer + 1)] - goal)[hidden]
        errors.append(np.mean(np.where(apart < 1, apart**2, 2 * apart - 1)))
        assert float(terms[f"loss_layer{layer}"]) == pytest.approx(errors[-1], rel=1e-4)
    assert float(value) == pytest.approx(np.mean(errors), rel=1e-4)


def test_only_the_teacher_gets_no_gradient():
    gradient = computed()[1]
    trained, fixed = split(gradient, control().frozen)
    assert set(trained) == {"encoder", "decoder"}
    assert all(np.any(leaf) for leaf in flatten(trained).values())
    assert not any(np.any(leaf) for leaf in flatten(fixed).values())


def test_student_and_teacher_are_those_of_the_method_it_is_a_control_of():
    ours, theirs = (flatten(parameter_shapes(m)) for m in (control(), control().aligned))
    for part in ("encoder/", "teacher/"):
        names = {name for name in theirs if name.startswith(part)}
        assert names and names == {name for name in ours if name.startswith(part)}
        assert all(ours[name].shape == theirs[name].shape for name in names)
    assert control().pretrained == control().aligned.pretrained
    assert isinstance(control().aligned, MaskAlign)
