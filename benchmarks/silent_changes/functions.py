"""Numbers read through functions: replaced ones, parts of them, nested ones, and callables as the model."""

from __future__ import annotations

from silent_changes.classes import read
from silent_changes.way import Way

__all__ = ["FUNCTIONS"]

HELPER = "class A:\n    def get(self):\n        return 0.5\na = A()"

FUNCTIONS = [
    read("a method monkeypatched on the class", HELPER, "a.get()", "A.get = lambda self: 2.0"),
    read("a method monkeypatched on the instance", HELPER, "a.get()", "a.get = lambda: 2.0"),
    read(
        "a replaced bound method",
        f"{HELPER}\nclass B(A):\n    def get(self):\n        return 2.0\nget = a.get",
        "get()",
        "globals().update(get=B().get)",
    ),
    read(
        "a bound method's object",
        "class A:\n    b = 0.5\n    def get(self):\n        return self.b\na = A()\nget = a.get",
        "get()",
        "a.b = 2.0",
    ),
    read("a replaced function", "def get():\n    return 0.5", "get()", "globals().update(get=lambda: 2.0)"),
    read("a function's __code__", "def get():\n    return 0.5", "get()", "get.__code__ = (lambda: 2.0).__code__"),
    read("a function's __defaults__", "def get(b=0.5):\n    return b", "get()", "get.__defaults__ = (2.0,)"),
    read("a function's __kwdefaults__", "def get(*, b=0.5):\n    return b", "get()", "get.__kwdefaults__ = {'b': 2.0}"),
    read("a keyword default's entry", "def get(*, b=0.5):\n    return b", "get()", "get.__kwdefaults__['b'] = 2.0"),
    read("a default's item", "def get(b=[0.5]):\n    return b[0]", "get()", "get.__defaults__[0][0] = 2.0"),
    read("a function's attribute, set", "def get():\n    return get.b\nget.b = 0.5", "get()", "get.b = 2.0"),
    read(
        "a decorated function",
        "import functools\nB = 0.5\ndef twice(f):\n    @functools.wraps(f)\n    def inner():\n"
        "        return 2 * f()\n    return inner\n@twice\ndef get():\n    return B",
        "get()",
        "globals().update(B=1.0)",
    ),
    read(
        "an lru_cache that is cleared",
        "import functools\nB = 0.5\n@functools.lru_cache\ndef get():\n    return B",
        "get()",
        "get.cache_clear()\n    globals().update(B=2.0)",
    ),
    read(
        "singledispatch",
        "import functools\n@functools.singledispatch\ndef get(v):\n    return 0.5",
        "get(1)",
        "get.register(int)(lambda v: 2.0)",
    ),
    read(
        "a partial of a method",
        f"{HELPER}\nget = partial(A.get, a)",
        "get()",
        "A.get.__code__ = (lambda self: 2.0).__code__",
    ),
    read(
        "operator.attrgetter",
        "import operator\nclass A:\n    b = 0.5\nget = operator.attrgetter('b')",
        "get(A)",
        "A.b = 2.0",
    ),
    read("map and filter", "B = [0.5]\ndef get(i):\n    return B[i]", "sum(map(get, range(1)))", "B[0] = 2.0"),
    Way(
        "a global in a nested function",
        """
BETA = 0.5
def model(x):
    def inner():
        def innermost():
            return BETA
        return innermost()
    observe(x, inner())
def change():
    global BETA
    BETA = 2.0
""",
    ),
    read("a global in a lambda", "B = 0.5", "(lambda: B)()", "globals().update(B=2.0)"),
    read("a global in a comprehension", "B = 0.5", "sum([B * i for i in range(2)])", "globals().update(B=2.0)"),
    read("a global in a generator expression", "B = 0.5", "sum(B * i for i in range(2))", "globals().update(B=2.0)"),
    read("a global in a dict comprehension", "B = 0.5", "{i: B for i in range(2)}[1]", "globals().update(B=2.0)"),
    read("a default of a nested function", "B = 0.5", "(lambda b=B: b)()", "globals().update(B=2.0)"),
    read("a global that hides a built-in", "", "abs(0.5)", "globals().update(abs=lambda v: 2.0)"),
    read("a deleted global", "def max(*v):\n    return 2.0", "max(0.5, 0.4)", "del globals()['max']"),
    Way(
        "a class made in the model",
        """
BETA = 0.5
def model(x):
    class Local:
        b = BETA
    observe(x, Local.b)
def change():
    global BETA
    BETA = 2.0
""",
    ),
    Way(
        "the model's __code__",
        """
def model(x):
    observe(x, 0.5)
def other(x):
    observe(x, 2.0)
def change():
    model.__code__ = other.__code__
""",
    ),
    Way(
        "the model's __defaults__",
        "def model(x, b=0.5):\n    observe(x, b)\ndef change():\n    model.__defaults__ = (2.0,)\n",
    ),
    Way(
        "the model's keyword default",
        """
def model(x, *, b=0.5):
    observe(x, b)
def change():
    model.__kwdefaults__ = {"b": 2.0}
""",
    ),
    Way(
        "a number in the guide",
        """
WIDTH = 0.5
def guide(x):
    slope = pyro.param("slope", torch.tensor(0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, WIDTH))
def model(x):
    observe(x, 0.5)
def change():
    global WIDTH
    WIDTH = 2.0
""",
    ),
    Way(
        "a callable object's state, as the model",
        """
class Model:
    b = 0.5
    def __call__(self, x):
        observe(x, self.b)
model = Model()
def change():
    model.b = 2.0
""",
    ),
    Way(
        "the class of a callable model",
        """
class Model:
    b = 0.5
    def __call__(self, x):
        observe(x, self.b)
model = Model()
def change():
    Model.b = 2.0
""",
    ),
    Way(
        "a partial as the model",
        """
def full(box, x):
    observe(x, box["b"])
model = partial(full, {"b": 0.5})
def change():
    model.args[0]["b"] = 2.0
""",
    ),
    Way(
        "an exception decides",
        """
S = {}
def model(x):
    try:
        b = S["b"]
    except KeyError:
        b = 0.5
    observe(x, b)
def change():
    S["b"] = 2.0
""",
    ),
    Way(
        "a handler's attribute",
        """
scale = poutine.scale_messenger.ScaleMessenger(1.0)
@scale
def model(x):
    observe(x, 0.5)
def change():
    scale.scale = 5.0
""",
        evidence=False,
    ),
    Way(
        "a global object in poutine.scale",
        """
import types
S = types.SimpleNamespace(b=1.0)
def model(x):
    with poutine.scale(scale=S.b):
        observe(x, 0.5)
def change():
    S.b = 5.0
""",
        evidence=False,
    ),
]
