"""Whatever a function can read and somebody can change is noticed and named; what it cannot read is no change."""

import collections
import enum
import functools
import sys
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from pyro_vae.compiled.watch import Watch
from pyro_vae.pairs.libraries import is_library


class Color(enum.Enum):
    RED, BLUE = 1, 2


@dataclass(frozen=True)
class Point:
    x: float


class Base:
    scale = 1.0


class Thing(Base):
    __slots__ = ("slot",)

    def __init__(self, b=1.0):
        self._b, self.slot, self.other = b, 1, 0

    @property
    def b(self):
        return self._b

    def help(self):
        return self._b

    @classmethod
    def of_class(cls):
        return cls.scale

    def __call__(self):
        return self.slot


settings = types.ModuleType("torch_settings")  # begins like a library's name
settings.cfg, settings.obj = {"b": 1.0}, Thing()
settings.get = lambda: settings.cfg["b"]
value, array, scalar = 1.0, np.ones(3), np.float32(1)
table, row = {"b": [1.0, 2.0]}, (1.0, Point(1.0))
long_list, queue, members = [0.0] * 500, collections.deque([1, 2]), {1, 2}
color, point, space, thing = Color.RED, Point(1.0), types.SimpleNamespace(b=1.0), Thing()
sys.modules["torch_settings"] = settings


def nested():
    return [value for _ in range(2)]


def inner():
    return (lambda: thing.b + thing.scale)()


def imports():
    import torch_settings

    return torch_settings.get()


def default(x=1.0, *, y=[1.0]):  # noqa: B006
    return x, y


def attribute():
    return attribute.b


attribute.b = 1.0


def counted():
    def function():
        return cell

    cell = 1.0

    def change():
        nonlocal cell
        cell = 2.0

    return function, change


def set_global(name, new):
    return lambda: globals().__setitem__(name, new)


def set_attribute(owner, name, new):
    return lambda: setattr(owner, name, new)


READ = [
    (nested, set_global("value", 2.0), "'value' of nested's module"),
    (inner, set_attribute(thing, "_b", 2.0), "'_b' of Thing"),
    (inner, set_attribute(Base, "scale", 2.0), "'scale' of Base"),
    (inner, set_attribute(Thing, "scale", 2.0), "an attribute of Thing"),
    (inner, set_attribute(Thing, "b", property(lambda self: 3.0)), "'b' of Thing"),
    (lambda: thing.help(), set_attribute(thing, "help", lambda: 1), "an attribute of Thing"),
    (lambda: thing.of_class(), set_attribute(Base, "scale", 3.0), "'scale' of Base"),
    (lambda: thing(), set_attribute(thing, "slot", 2), "'slot' of Thing"),
    (lambda: thing, set_global("thing", Thing()), "'thing' of <lambda>'s module"),
    (lambda: settings.cfg["b"], lambda: settings.cfg.update(b=2.0), "'b' of a dict"),
    (lambda: settings.cfg["b"], set_attribute(settings, "cfg", {"b": 1.0}), "'cfg' of module 'torch_settings'"),
    (lambda: settings.obj.b, set_attribute(settings.obj, "_b", 2.0), "'_b' of Thing"),
    (lambda: settings.get(), lambda: settings.cfg.update(b=3.0), "'b' of a dict"),
    (imports, lambda: settings.cfg.update(b=4.0), "'b' of a dict"),
    (lambda: table["b"][0], lambda: table["b"].__setitem__(0, 5.0), "an element of a list"),
    (lambda: table["b"], lambda: table["b"].append(5.0), "an element of a list"),
    (lambda: long_list[300], lambda: long_list.__setitem__(300, 1.0), "an element of a list"),
    (lambda: queue, lambda: queue.rotate(1), "an element of a deque"),
    (lambda: members, lambda: members.add(3), "an element of a set"),
    (lambda: row, set_global("row", (1.0, Point(1.0))), "'row' of <lambda>'s module"),
    (lambda: point.x, set_global("point", Point(1.0)), "'point' of <lambda>'s module"),
    (lambda: color, set_global("color", Color.BLUE), "'color' of <lambda>'s module"),
    (lambda: space.b, set_attribute(space, "b", 2.0), "'b' of SimpleNamespace"),
    (lambda: array, lambda: array.__setitem__(0, 2.0), "an array"),
    (lambda: array, set_global("array", np.ones(3)), "'array' of <lambda>'s module"),
    (lambda: scalar, set_global("scalar", np.float32(2)), "'scalar' of <lambda>'s module"),
    (default, set_attribute(default, "__defaults__", (2.0,)), "'__defaults__' of default"),
    (default, lambda: default.__kwdefaults__["y"].append(1), "an element of a list"),
    (attribute, set_attribute(attribute, "b", 2.0), "'b' of a dict"),
    (nested, set_attribute(nested, "__code__", default.__code__), "'__code__' of nested"),
    (lambda: getattr(thing, "other"), set_attribute(thing, "other", 1), "'other' of Thing"),  # noqa: B009
    (functools.partial(lambda d: d["b"], table), lambda: table.update(b=1), "'b' of a dict"),
]


@pytest.mark.parametrize(("function", "change", "name"), READ, ids=[name for *_, name in READ])
def test_a_change_is_noticed_named_and_put_back(function, change, name):
    watch = Watch(function)
    assert watch.changed() is None
    change()
    assert watch.changed() == name
    watch.restore()
    if not name.startswith("an attribute"):
        assert watch.changed() is None
    for new in ("help", "scale"):  # what was not there before stays
        vars(thing).pop(new, None)
    if "scale" in vars(Thing):
        del Thing.scale


def test_a_closure():
    function, change = counted()
    watch = Watch(function)
    change()
    assert watch.changed() == "'cell' of counted.<locals>.function"
    watch.restore()
    assert function() == 1.0


def test_modules_of_torch():
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.LayerNorm(2))
    for change, name in [
        (lambda: setattr(network[1], "p", 0.1), "'p' of Dropout"),
        (lambda: network.eval(), "'training' of Sequential"),
        (lambda: setattr(network[0], "weight", nn.Parameter(torch.ones(2, 2))), "'weight' of a dict"),
        (lambda: network.append(nn.ReLU()), "'3' of a dict"),
        (lambda: network[0].register_forward_hook(lambda *args: None), None),
    ]:
        watch = Watch(network)
        with torch.no_grad():
            network[0].weight.add_(1.0)  # read anew in each replay
        assert watch.changed() is None
        change()
        assert watch.changed() == name if name else watch.changed() is not None


def test_what_the_forward_of_a_users_module_reads():
    """Torch calls it: nobody mentions its name."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope, self.losses = 1.0, []

        def forward(self, x):
            return self.slope * x

    network = Network()
    watch = Watch(lambda x: network(x))
    network.losses.append(1)
    assert watch.changed() is None
    network.slope = 2.0
    assert watch.changed().startswith("'slope' of ")


def test_the_same_numbers_in_new_objects_are_no_change():
    watch = Watch(nested)
    set_global("value", float("1.0") + 0.0)()
    assert watch.changed() is None
    set_global("value", float("nan"))()
    watch = Watch(nested)
    set_global("value", float("nan"))()
    assert watch.changed() is None
    set_global("value", 1.0)()


def test_what_the_code_does_not_mention_may_change():
    class Trainer:
        def __init__(self):
            self.beta, self.losses, self.step = 1.0, [], 0

        def model(self):
            return self.beta

    trainer = Trainer()
    watch = Watch(trainer.model)
    trainer.losses.append(1.0)
    trainer.step += 1
    assert watch.changed() is None
    trainer.beta = 0.5
    assert watch.changed() == "'beta' of test_what_the_code_does_not_mention_may_change.<locals>.Trainer"


@pytest.mark.parametrize(
    "moving", [iter([1]), (i for i in range(3)), np.random.default_rng(0), np.random.RandomState(0)]
)
def test_what_moves_when_it_is_read_is_named(moving):
    assert Watch(lambda: moving).moving == "'moving' of test_what_moves_when_it_is_read_is_named.<locals>.<lambda>"
    with open(__file__) as file:
        assert Watch(lambda: file).moving is not None
    assert Watch(lambda: [moving]).moving is not None
    assert Watch(lambda: value).moving is None


def test_libraries_are_whole_packages_where_python_keeps_them(tmp_path, monkeypatch):
    assert all(map(is_library, ("torch", "torch.nn", "pyro.infer", "numpy", "random", "pyro_vae.networks", "builtins")))
    names = ("torch_nets", "pyro_models", "pyro_vae_models", "numpy_data", "mathematics", "__main__", "tests", None)
    assert not any(map(is_library, names))
    (tmp_path / "sndhdr_of_mine.py").touch()
    module = types.ModuleType("this")  # a script of the user's, called as one of Python's modules is
    module.__file__ = str(tmp_path / "this.py")
    monkeypatch.setitem(sys.modules, "this", module)
    assert not is_library("this")
