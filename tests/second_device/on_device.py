"""Every public function on another device than the CPU. `test_second_device.py` runs this in a process of its own."""

import re
from pathlib import Path

import pyro
import pytest
import second
import torch
import torchgen
from calls import CALLS, COVERED, PUBLIC
from contract.families import ANY_SHAPE, INPUTS, PRIORS, VECTORS
from pairs_on import On
from results import computed_of, tensors_of

from pyro_vae import fit

ON_CPU = {"from_pyro", "from_pyro_svi"}  # arrays
FAMILIES = [*((make, (3, 2)) for make in ANY_SHAPE.values()), *((make, 5) for make in VECTORS.values())]
FAMILIES = dict(zip([*ANY_SHAPE, *VECTORS], FAMILIES, strict=True))
pytestmark = pytest.mark.usefixtures("by_operation")


def run(function, device):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    found = function(On(device))
    return list(tensors_of(found)), list(computed_of(found))


def check(function, device, *, results_on):
    """The same as on the CPU, where the random numbers are."""
    (there, then_there), (here, then_here) = run(function, device), run(function, "cpu")
    assert {x.device.type for x in there if isinstance(x, torch.Tensor)} <= {results_on}
    assert len(there) == len(here)
    assert len(then_there) == len(then_here)
    if device.type == "second":
        for x, y in zip(there + then_there, here + then_here, strict=True):
            x, y = (torch.as_tensor(v).cpu().double() for v in (x, y))
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_every_public_name_has_a_call():
    assert CALLS.keys() | COVERED >= PUBLIC


@pytest.mark.parametrize("name", CALLS)
def test_a_function(name, device):
    if name == "fit, moved" and device.type == "second":
        pytest.skip("torch moves parameters in place between the CPU and its own GPUs only")
    check(CALLS[name], device, results_on="cpu" if name in ON_CPU else device.type)


@pytest.mark.parametrize("name", [*FAMILIES, *PRIORS])
def test_a_family(name, device):
    def call(on):
        if name in PRIORS:
            found = on.made(lambda: PRIORS[name](4))()
        else:
            make, shape = FAMILIES[name]
            found = on.made(lambda: make(shape))(on.normal(7, INPUTS))
        value = found.sample((2,))
        return value, found.log_prob(value), found.expand(torch.Size([2, *found.batch_shape])).log_prob(value)

    check(call, device, results_on=device.type)


@pytest.mark.parametrize("compile", [False, True])
def test_a_loss_that_is_not_finite_is_found_as_on_the_cpu(device, compile):
    """At the end of the epoch, after steps that the device itself has skipped, and not before the next step."""

    def call(on):
        model, guide, x = on.plain()
        x[7, 1] = 1e30

        def fused(parameters):
            return torch.optim.Adam(parameters, lr=0.01, fused=True)

        with pytest.raises(ValueError, match="row 7 of the data") as error:
            fit(model, guide, x, num_epochs=1, batch_size=1, optimizer=fused, seed=2, compile=compile, progress=False)
        messages.append(str(error.value))
        return dict(pyro.get_param_store().items())

    messages = []
    check(call, device, results_on=device.type)
    steps = [int(message.split("step ")[1].partition(":")[0]) for message in messages]
    assert 5 < steps[0] < 11  # compiled steps before it, and skipped ones after it
    assert device.type != "second" or messages[0] == messages[1]


def cuda_operations():
    """Names of torch's operations, and whether CUDA has them."""
    text = (Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text()
    entries, known = re.split(r"^- func: ", text, flags=re.M)[1:], {}
    for entry in entries:
        name = entry.partition("(")[0]
        dispatch = re.search(r"^  dispatch:\n((?:    .*\n|\s*\n)*)", entry, flags=re.M)
        known[name] = dispatch is None or bool(re.search("CUDA|Composite", dispatch[1]))
        for other in re.findall(r"^  autogen: (.*)$", entry, flags=re.M):
            known.update(dict.fromkeys(other.replace(",", " ").split(), known[name]))
    return known


def test_no_operation_is_missing_on_cuda(device):
    """Runs after all others: each operation that they asked of the device has a kernel of CUDA."""
    if device.type != "second":
        pytest.skip("CUDA itself would say so")
    known, called = cuda_operations(), [name.removeprefix("aten::") for name in second.called()]
    assert len(called) > 20
    assert [name for name in called if not known.get(name, False)] == []
