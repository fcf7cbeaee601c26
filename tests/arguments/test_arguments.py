"""Checks of arguments by their names. What all public functions make of bad input is in `contract/test_bad_input`."""

import inspect

import numpy as np
import pytest
import torch

from pyro_vae.arguments import check_dense, check_shape, check_tensors, checked, refuse_unusual
from pyro_vae.arguments.door import KINDS
from pyro_vae.objectives import linear


@checked
def tool(model, *args, num_particles: int = 10, seed: int | None = None, plate: str = "data", other=None, **kwargs):
    return num_particles, seed, plate, other


def test_numbers_of_any_library_are_handed_on_as_those_of_python():
    for number in (5, np.int64(5), np.uint8(5), np.array(5), torch.tensor(5)):
        found = tool(None, num_particles=number, seed=number)
        assert found == (5, 5, "data", None)
        assert all(type(n) is int for n in found[:2])


def test_none_is_taken_where_the_annotation_has_it():
    assert tool(None, seed=None)[1] is None
    with pytest.raises(TypeError, match=r"tool: num_particles: expected a whole number, got None\. Try an int"):
        tool(None, num_particles=None)


def test_other_names_are_left_alone():
    assert tool(None, other="anything", more=object())[3] == "anything"


def test_arguments_that_are_missing_are_named_as_python_names_them():
    with pytest.raises(TypeError, match=r"tool\(\) missing 1 required positional argument: 'model'"):
        tool()
    with pytest.raises(TypeError, match=r"linear\(\) got an unexpected keyword argument"):
        linear(3, steps=3)


def test_a_constructor_that_refuses_leaves_the_generator_where_it_was():
    class Layer:
        @checked
        def __init__(self, size: int) -> None:
            self.weight = torch.randn(size)
            raise ValueError("no")

    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="no"):
        Layer(3)
    assert torch.equal(before, torch.get_rng_state())


def test_the_signature_stays():
    assert list(inspect.signature(tool).parameters)[:3] == ["model", "args", "num_particles"]
    assert len(KINDS) > 40


def test_shapes():
    assert (
        check_shape("shape", 3) == check_shape("shape", [np.int64(3)]) == check_shape("shape", torch.Size([3])) == (3,)
    )
    assert check_shape("shape", ()) == ()
    with pytest.raises(ValueError, match=r"shape\[1\]: expected at least 1, got 0"):
        check_shape("shape", (2, 0))


def test_arrays_are_looked_for_inside_of_tuples_and_dicts():
    masked = np.ma.masked_array([1.0, 2.0], mask=[True, False])
    with pytest.raises(TypeError, match=r"data\['x'\]\[1\]: expected an array without a mask"):
        check_tensors("data", {"x": (torch.zeros(2), masked)})
    error = RuntimeError("what the model said")
    with pytest.raises(TypeError, match=r"x\[1\]: .*got a sparse one\. Try x.*what the model said") as found:
        refuse_unusual("x", (torch.zeros(2), torch.eye(2).to_sparse()), error)
    assert found.value.__cause__ is error
    refuse_unusual("x", (torch.zeros(2), None, 3, True), error)  # nothing unusual: the error itself has to do


def test_dense():
    check_dense("x", torch.zeros(0, 2))
    with pytest.raises(TypeError, match=r"x: expected a dense tensor of real numbers, got one of torch\.complex64"):
        check_dense("x", torch.zeros(2, dtype=torch.complex64))
