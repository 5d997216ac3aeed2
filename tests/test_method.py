import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import method
from mim_jax.method import Input, Method, Picture, method_class, method_names, register
from tests.training.toy import Toy


@pytest.fixture
def registry(monkeypatch):
    """A copy of the registry, so that a test leaves no method behind."""
    copy = dict(method._REGISTRY)
    monkeypatch.setattr(method, "_REGISTRY", copy)
    return copy


@dataclasses.dataclass(frozen=True)
class Picky(Toy):
    """A toy that needs an image of any height with three channels, and integer labels."""

    @property
    def inputs(self):
        return {"image": Input((None, 4, 3)), "label": Input((), "int")}


def batch(**changes) -> dict[str, np.ndarray]:
    given = {"image": np.zeros((2, 7, 4, 3), np.float32), "label": np.zeros(2, np.int32)}
    return {**given, **changes}


def test_a_name_leads_to_its_class():
    assert method_class("mae").__name__ == "MAE"
    assert "mae" in method_names()


def test_an_unknown_method_is_an_error_that_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown method 'mea'; known are .*Did you mean 'mae'\?"):
        method_class("mea")
    with pytest.raises(ValueError) as error:
        method_class("xyz")
    assert "Did you mean" not in str(error.value)


def test_every_registered_method_is_a_complete_one():
    for name in method_names():
        assert issubclass(method_class(name), Method)
        assert not method_class(name).__abstractmethods__, name


def test_two_methods_of_one_name_are_an_error_that_names_both(registry):
    register("toy")(Toy)
    with pytest.raises(ValueError, match=r"'toy': .*toy\.Toy and .*test_method\.Picky; rename one"):
        register("toy")(Picky)
    assert registry["toy"] is Toy


def test_classes_of_one_name_in_two_modules_are_two_methods(registry):
    register("toy")(Toy)
    other = type("Toy", (Toy,), {"__module__": "elsewhere"})
    with pytest.raises(ValueError, match=r"elsewhere\.Toy"):
        register("toy")(other)


def test_a_reloaded_method_takes_the_place_of_its_old_self(registry):
    register("toy")(Toy)
    again = type("Toy", (Toy,), {"__module__": Toy.__module__})
    assert register("toy")(again) is again
    assert method_class("toy") is again


def test_a_method_without_its_functions_cannot_be_made():
    class Half(Method):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Half()


def test_a_fitting_batch_passes():
    Picky().check(batch())
    Picky().check(batch(image=np.zeros((2, 1, 4, 3), np.uint8)))
    Picky().check(batch(image=jnp.zeros((2, 7, 4, 3), jnp.bfloat16)))
    Picky().check(batch(extra=np.zeros(2)))


def test_a_missing_entry_is_an_error_that_lists_what_there_is():
    with pytest.raises(ValueError, match=r"Picky needs the batch entry 'label'.*\['image'\]"):
        Picky().check({"image": batch()["image"]})


@pytest.mark.parametrize("shape", [(2, 7, 4), (2, 7, 4, 1), (2, 4, 7, 3), (2, 7, 4, 3, 1)])
def test_a_wrong_shape_is_an_error_that_names_both(shape):
    with pytest.raises(ValueError) as error:
        Picky().check(batch(image=np.zeros(shape, np.float32)))
    message = str(error.value)
    assert f"'image' has shape [batch, {', '.join(map(str, shape[1:]))}]" in message
    assert "expects [batch, any, 4, 3]" in message
    assert "data.image_size" in message


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("image", np.zeros((2, 7, 4, 3), np.int32)),
        ("image", np.zeros((2, 7, 4, 3), bool)),
        ("image", np.full((2, 7, 4, 3), "x")),
        ("label", np.zeros(2, np.float32)),
        ("label", jnp.zeros(2, jnp.bfloat16)),
    ],
)
def test_a_wrong_type_is_an_error_that_names_both(name, array):
    expected = "float" if name == "image" else "int"
    with pytest.raises(ValueError, match=f"{name!r} has type {array.dtype}; expected {expected}"):
        Picky().check(batch(**{name: array}))


def test_the_columns_of_a_picture_keep_their_order_under_jit():
    titles = ["z", "a", "m"]
    picture = Picture({title: jnp.full((1,), i) for i, title in enumerate(titles)}, "caption")
    again = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p))(picture)
    assert {title: int(image[0]) for title, image in again.columns.items()} == dict(z=1, a=2, m=3)
    assert list(again.columns) == titles
    assert again.caption == "caption"
