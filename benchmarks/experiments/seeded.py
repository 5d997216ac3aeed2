"""The first state and the step of an experiment, compiled once for all seeds."""

from typing import Any

import jax
import jax.numpy as jnp

from mim_jax.training.experiment import Experiment
from mim_jax.training.state import TrainState, init_state
from mim_jax.training.step import make_train_step


class Seeded:
    """What an experiment begins with and goes on with, as functions of a seed.

    Attributes:
        initial: the first state of a seed.
        step: `(state, batch, seed) -> (state, metrics)`; the state is given away.
    """

    def __init__(self, experiment: Experiment) -> None:
        """Nothing is compiled before it is called."""
        shapes = experiment.batch_shapes()
        like = {name: jnp.zeros((1, *x.shape[1:])) for name, x in shapes.items()}

        def initial(seed: jax.Array) -> TrainState:
            key = jax.random.key(seed)
            return init_state(experiment.method, experiment.optimizer, key, like)

        def step(state: TrainState, batch: Any, seed: jax.Array) -> Any:
            return make_train_step(
                experiment.method,
                experiment.optimizer,
                experiment.schedules,
                experiment.prepare,
                seed=seed,  # type: ignore[arg-type]  # a traced one will do
            )(state, batch)

        self.initial = jax.jit(initial)
        self.step = jax.jit(step, donate_argnums=0)
