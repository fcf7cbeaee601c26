"""Things that hold a number, each as a global, in a closure, and as an attribute: replaced, or changed in place."""

from __future__ import annotations

import re
from textwrap import indent

from silent_changes.way import Way

__all__ = ["ATTRIBUTES", "CLOSURES", "GLOBALS"]

# name: (how it is made, how it is read, how it changes)
HOLDERS = {
    "a number": ("S = 0.5", "S", "S = 2.0"),
    "an int": ("S = 1", "S", "S = 2"),
    "a bool": ("S = False", "2.0 if S else 0.5", "S = True"),
    "a string": ("S = 'low'", "0.5 if S == 'low' else 2.0", "S = 'high'"),
    "None": ("S = None", "0.5 if S is None else S", "S = 2.0"),
    "a Fraction": ("import fractions\nS = fractions.Fraction(1, 2)", "float(S)", "S = S * 4"),
    "a range": ("S = range(2)", "len(S)", "S = range(4)"),
    "bytes": ("S = bytes([1])", "S[0]", "S = bytes([3])"),
    "a tuple": ("S = (0.5, 1.0)", "S[0]", "S = (2.0, 1.0)"),
    "a tuple in a tuple": ("S = (0, (0, 0.5))", "S[1][1]", "S = (0, (0, 2.0))"),
    "a dict": ("S = {'b': 0.5}", "S['b']", "S = {'b': 2.0}"),
    "a dict's entry": ("S = {'b': 0.5}", "S['b']", "S['b'] = 2.0"),
    "a dict in a dict": ("S = {'a': {'b': 0.5}}", "S['a']['b']", "S['a']['b'] = 2.0"),
    "a dict's missing entry": ("S = {}", "S.get('b', 0.5)", "S['b'] = 2.0"),
    "a dict of 2000": ("S = {i: 0.5 for i in range(2000)}", "S[1999]", "S[1999] = 2.0"),
    "a list": ("S = [0.5]", "S[0]", "S = [2.0]"),
    "a list's item": ("S = [0.5]", "S[0]", "S[0] = 2.0"),
    "a list in a list": ("S = [[0.5]]", "S[0][0]", "S[0][0] = 2.0"),
    "an item of a list of 100": ("S = [0.5] * 100", "S[70]", "S[70] = 2.0"),
    "an item of a list of 2000": ("S = [0.5] * 2000", "S[1500]", "S[1500] = 2.0"),
    "an item of a list of 20000": ("S = [0.5] * 20000", "S[15000]", "S[15000] = 2.0"),
    "twelve lists in each other": ("S = [0.5]\nfor _ in range(12): S = [S]", "leaf(S)", "branch(S)[0] = 2.0"),
    "a set": ("S = {1}", "float(len(S))", "S.update({2, 3})"),
    "a set of equal size": ("S = {0.5}", "sum(S)", "S.remove(0.5) or S.add(2.0)"),
    "a frozenset": ("S = frozenset({0.5})", "sum(S)", "S = frozenset({2.0})"),
    "a deque": ("import collections\nS = collections.deque([0.5])", "S[0]", "S[0] = 2.0"),
    "an OrderedDict's order": (
        "import collections\nS = collections.OrderedDict(a=0.5, b=2.0)",
        "next(iter(S.values()))",
        "S.move_to_end('a')",
    ),
    "a defaultdict": ("import collections\nS = collections.defaultdict(lambda: 0.5)", "S['b']", "S['b'] = 2.0"),
    "a ChainMap": ("import collections\nS = collections.ChainMap({}, {'b': 0.5})", "S['b']", "S.maps[1]['b'] = 2.0"),
    "a UserDict": ("import collections\nS = collections.UserDict(b=0.5)", "S['b']", "S['b'] = 2.0"),
    "a mappingproxy": (
        "import types\nS = {'b': 0.5}\nS = [S, types.MappingProxyType(S)]",
        "S[1]['b']",
        "S[0]['b'] = 2.0",
    ),
    "a SimpleNamespace": ("import types\nS = types.SimpleNamespace(b=0.5)", "S.b", "S.b = 2.0"),
    "a namedtuple": ("import collections\nS = collections.namedtuple('B', 'b')(0.5)", "S.b", "S = S._replace(b=2.0)"),
    "a dataclass's field": ("import dataclasses\nS = dataclasses.make_dataclass('B', ['b'])(0.5)", "S.b", "S.b = 2.0"),
    "a frozen dataclass": (
        "import dataclasses\nS = dataclasses.make_dataclass('B', ['b'], frozen=True)(0.5)",
        "S.b",
        "S = type(S)(2.0)",
    ),
    "an Enum": ("import enum\nS = enum.Enum('B', {'LOW': 0.5, 'HIGH': 2.0}).LOW", "S.value", "S = type(S).HIGH"),
    "an ndarray": ("S = np.array([0.5])", "S[0]", "S = np.array([2.0])"),
    "an ndarray in place": ("S = np.array([0.5])", "S[0]", "S[0] = 2.0"),
    "a large ndarray in place": ("S = np.full(100_000, 0.5)", "S[70_001]", "S[70_001] = 2.0"),
    "an ndarray read by float()": ("S = np.array([0.5])", "float(S.sum())", "S[0] = 2.0"),
    "an ndarray read by torch": ("S = np.array([0.5])", "torch.from_numpy(S).float()", "S[0] = 2.0"),
    "an ndarray read by torch, replaced": ("S = np.array([0.5])", "torch.from_numpy(S).float()", "S = 4 * S"),
    "an ndarray of objects": ("S = np.array([0.5, None], dtype=object)", "S[0]", "S[0] = 2.0"),
    "a NumPy scalar": ("S = np.float64(0.5)", "S", "S = np.float64(2.0)"),
    "a 0-d ndarray": ("S = np.array(0.5)", "float(S)", "S[()] = 2.0"),
    "a record array": ("S = np.rec.array([(0.5,)], dtype=[('b', float)])", "S.b[0]", "S.b[0] = 2.0"),
    "a memory map": (
        "np.full(3, 0.5).tofile('values')\nS = np.memmap('values', dtype=float, mode='r+')",
        "float(S[0])",
        "np.full(3, 2.0).tofile('values')",
    ),
    "an array.array": ("import array\nS = array.array('d', [0.5])", "S[0]", "S[0] = 2.0"),
    "a bytearray": ("S = bytearray([1])", "S[0]", "S[0] = 2"),
    "a ctypes double": ("import ctypes\nS = ctypes.c_double(0.5)", "S.value", "S.value = 2.0"),
    "a tensor": ("S = torch.tensor(0.5)", "S", "S = torch.tensor(2.0)"),
    "a tensor in place": ("S = torch.tensor(0.5)", "S", "S.fill_(2.0)"),
    "a tensor's data": ("S = torch.tensor(0.5)", "S", "S.data = torch.tensor(2.0)"),
    "a tensor in a list": ("S = [torch.tensor(0.5)]", "S[0]", "S[0] = torch.tensor(2.0)"),
    "a tensor read by item()": ("S = torch.tensor(0.5)", "S.item()", "S.fill_(2.0)"),
    "a list read by torch": ("S = [0.5]", "torch.tensor(S)", "S[0] = 2.0"),
    "a torch.Size": ("S = torch.Size([1])", "float(S[0])", "S = torch.Size([2])"),
    "a lambda": ("S = lambda: 0.5", "S()", "S = lambda: 2.0"),
    "a partial": ("S = partial(max, 0.5)", "S(0.1)", "S = partial(max, 2.0)"),
    "a partial's keywords": ("S = partial(dict, b=0.5)", "S()['b']", "S.keywords['b'] = 2.0"),
    "a built-in function": ("S = math.sin", "S(1.5)", "S = math.cos"),
    "a class": ("S = int", "S(0.5)", "S = float"),
    "a weak reference": (
        "import weakref\nS = Box()\nS = [S, weakref.ref(S)]",
        "S[1]().b",
        "S[0].b = 2.0",
    ),
}
HELPERS = """
import math
class Box:
    b = 0.5
def branch(s):
    while isinstance(s[0], list):
        s = s[0]
    return s
def leaf(s):
    return branch(s)[0]
"""


def _global(made: str, read: str, changed: str) -> str:
    return f"{HELPERS}\n{made}\ndef model(x):\n    observe(x, {read})\ndef change():\n    global S\n    {changed}\n"


def _closure(made: str, read: str, changed: str) -> str:
    inside = f"{made}\ndef model(x):\n    observe(x, {read})\ndef change():\n    nonlocal S\n    {changed}"
    inside += "\nreturn model, change"
    return f"{HELPERS}\ndef make():\n{indent(inside, '    ')}\nmodel, change = make()\n"


def _attribute(made: str, read: str, changed: str) -> str:
    made, read, changed = (re.sub(r"\bS\b", "self.S", text) for text in (made, read, changed))
    body = f"def __init__(self):\n{indent(made, '    ')}\ndef model(self, x):\n    observe(x, {read})"
    body += f"\ndef change(self):\n    {changed}"
    return f"{HELPERS}\nclass Pair:\n{indent(body, '    ')}\npair = Pair()\nmodel, change = pair.model, pair.change\n"


# `fit` and evidence watch in the same way wherever the thing is
GLOBALS = [Way(f"{name}, global", _global(*holder)) for name, holder in HOLDERS.items()]
CLOSURES = [
    Way(f"{name}, in a closure", _closure(*holder), fit=False, evidence=False) for name, holder in HOLDERS.items()
]
ATTRIBUTES = [
    Way(f"{name}, an attribute", _attribute(*holder), fit=False, evidence=False) for name, holder in HOLDERS.items()
]
