"""Numbers read through classes, instances, descriptors and methods."""

from __future__ import annotations

from silent_changes.way import Way

__all__ = ["CLASSES", "read"]


def read(name: str, made: str, value: str, changed: str) -> Way:
    """A script that makes something, reads a value in its model, and changes."""
    return Way(name, f"{made}\ndef model(x):\n    observe(x, {value})\ndef change():\n    {changed}\n")


BASE = "class Base:\n    beta = 0.5\nclass Config(Base):\n    pass\nconfig = Config()"

CLASSES = [
    read("Config.beta", "class Config:\n    beta = 0.5", "Config.beta", "Config.beta = 2.0"),
    read("Config.beta through an instance", f"{BASE}", "config.beta", "Config.beta = 2.0"),
    read("Config.beta of a base class", f"{BASE}", "Config.beta", "Base.beta = 2.0"),
    read("an instance's base class", f"{BASE}", "config.beta", "Base.beta = 2.0"),
    read("an attribute that hides a class's", f"{BASE}", "config.beta", "config.beta = 2.0"),
    read("a deleted attribute", f"{BASE}\nconfig.beta = 2.0", "config.beta", "del config.beta"),
    read("a replaced class", f"{BASE}", "Config.beta", "globals().update(Config=type('C', (), {'beta': 2.0}))"),
    read("another base", f"{BASE}\nclass B:\n    beta = 2.0", "config.beta", "config.__class__ = B"),
    read("a class in a class", "class A:\n    class B:\n        beta = 0.5", "A.B.beta", "A.B.beta = 2.0"),
    read("a class's dict", "class A:\n    d = {'b': 0.5}", "A.d['b']", "A.d['b'] = 2.0"),
    read("a class in a dict", f"{BASE}\nclasses = {{'c': Config}}", "classes['c'].beta", "Config.beta = 2.0"),
    read(
        "a metaclass",
        "class Meta(type):\n    beta = 0.5\nclass Config(metaclass=Meta):\n    pass",
        "Config.beta",
        "Meta.beta = 2.0",
    ),
    read(
        "a metaclass's property",
        "class Meta(type):\n    b = 0.5\n    @property\n    def beta(cls):\n        return cls.b\n"
        "class Config(metaclass=Meta):\n    pass",
        "Config.beta",
        "Config.b = 2.0",
    ),
    read(
        "a class method",
        "class A:\n    b = 0.5\n    @classmethod\n    def get(cls):\n        return cls.b",
        "A.get()",
        "A.b = 2.0",
    ),
    read(
        "a static method",
        "B = 0.5\nclass A:\n    @staticmethod\n    def get():\n        return B",
        "A.get()",
        "globals().update(B=2.0)",
    ),
    read(
        "a property",
        "B = 0.5\nclass A:\n    @property\n    def beta(self):\n        return B\na = A()",
        "a.beta",
        "globals().update(B=2.0)",
    ),
    read(
        "a property of an attribute",
        "class A:\n    _b = 0.5\n    @property\n    def beta(self):\n        return self._b\na = A()",
        "a.beta",
        "a._b = 2.0",
    ),
    read(
        "a cached property",
        "import functools\nclass A:\n    b = 0.5\n    @functools.cached_property\n    def beta(self):\n"
        "        return self.b\na = A()",
        "a.beta",
        "a.__dict__.pop('beta')\n    a.b = 2.0",
    ),
    read("__slots__", "class A:\n    __slots__ = ('b',)\na = A()\na.b = 0.5", "a.b", "a.b = 2.0"),
    read(
        "__slots__ and __dict__",
        "class A:\n    __slots__ = ('b', '__dict__')\na = A()\na.b = 0.5",
        "a.b",
        "a.b = 2.0",
    ),
    read(
        "a descriptor",
        "class D:\n    b = 0.5\n    def __get__(self, *_):\n        return self.b\nclass A:\n    beta = D()\na = A()",
        "a.beta",
        "vars(A)['beta'].b = 2.0",
    ),
    read(
        "__getattr__",
        "class A:\n    def __init__(self):\n        self.d = {'beta': 0.5}\n    def __getattr__(self, name):\n"
        "        return self.d[name]\na = A()",
        "a.beta",
        "a.d['beta'] = 2.0",
    ),
    read(
        "__getitem__",
        "class A:\n    b = 0.5\n    def __getitem__(self, i):\n        return self.b\na = A()",
        "a[0]",
        "a.b = 2.0",
    ),
    read(
        "__float__ and __mul__",
        "class A:\n    b = 0.5\n    def __mul__(self, other):\n        return self.b * other\na = A()",
        "a * 1.0",
        "a.b = 2.0",
    ),
    read(
        "__call__", "class A:\n    b = 0.5\n    def __call__(self):\n        return self.b\na = A()", "a()", "a.b = 2.0"
    ),
    read("__len__", "class A:\n    n = 1\n    def __len__(self):\n        return self.n\na = A()", "len(a)", "a.n = 3"),
    read("a class attribute of a module", "class N(nn.Linear):\n    b = 0.5\nn = N(1, 1)", "n.b", "N.b = 2.0"),
    read("a number of a module", "n = nn.Linear(1, 1)\nn.b = 0.5", "n.b", "n.b = 2.0"),
    read(
        "a Generic's attribute",
        f"{BASE}\nclass Pair(tuple):\n    c = config\np = Pair()",
        "p.c.beta",
        "Base.beta = 2.0",
    ),
    Way(
        "a helper method",
        """
class Pair:
    b = 0.5
    def helper(self):
        return self.deeper()
    def deeper(self):
        return self.b
    def model(self, x):
        observe(x, self.helper())
pair = Pair()
model = pair.model
def change():
    pair.b = 2.0
""",
    ),
    Way(
        "a global in a helper method",
        """
BETA = 0.5
class Pair:
    def helper(self):
        return BETA
    def model(self, x):
        observe(x, self.helper())
model = Pair().model
def change():
    global BETA
    BETA = 2.0
""",
    ),
    Way(
        "a class of another class's methods",
        """
class Config:
    beta = 0.5
class Pair:
    def __init__(self):
        self.config = Config
    def model(self, x):
        observe(x, self.config.beta)
model = Pair().model
def change():
    Config.beta = 2.0
""",
    ),
    Way(
        "super()",
        """
class Base:
    b = 0.5
    def helper(self):
        return self.b
class Pair(Base):
    def helper(self):
        return super().helper()
    def model(self, x):
        observe(x, self.helper())
model = Pair().model
def change():
    Base.helper = lambda self: 2.0
""",
    ),
]
