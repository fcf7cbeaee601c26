"""Arguments of the model that change from call to call."""

from __future__ import annotations

from silent_changes.way import Way

__all__ = ["ARGUMENTS"]


def _argument(name: str, made: str, read: str, args: str, **options: bool) -> Way:
    """`args` is what the model is called with in `step`, besides x."""
    source = f"{made}\ndef model(x, b):\n    observe(x, {read})\ndef args(step):\n    return X, {args}\n"
    return Way(name, source, fit=False, **options)


def _changed(name: str, made: str, read: str, changed: str) -> Way:
    """One object, `S`, is the argument in each call, and it changes."""
    source = f"{made}\ndef model(x, b):\n    observe(x, {read})\ndef args(step):\n    return X, S\n"
    return Way(name, f"{source}def change():\n    {changed}\n", fit=False)


LATER = "(0.5 if step < 12 else 2.0)"

ARGUMENTS = [
    _argument("an int", "", "b", "1 if step < 12 else 2"),
    _argument("a string", "", "0.5 if b == 'low' else 2.0", "'low' if step < 12 else 'high'"),
    _argument("a flag", "", "2.0 if b else 0.5", "step >= 12"),
    _argument("a flag, now and then", "", "2.0 if b else 0.5", "step % 5 == 4"),
    _argument("None or a number", "", "0.5 if b is None else b", "None if step < 12 else 2.0"),
    _argument("a float", "", "b", LATER),
    _argument("an annealed float", "", "b", "step / 32"),
    _argument("an annealed float in a dict", "", "b['b']", "{'b': step / 32}"),
    _argument("a float that decides", "", "0.5 if b < 0.4 else 2.0", "step / 32", evidence=False),
    _argument("a float in math", "import math", "math.sqrt(b)", f"{LATER}"),
    _argument("an int that anneals", "", "b / 32", "step"),
    _argument("a tensor", "", "b", f"torch.tensor({LATER})"),
    _argument("an integer tensor", "", "b.float()", "torch.tensor(step // 12)"),
    _argument("a tensor that is read", "", "float(b)", f"torch.tensor({LATER})"),
    _argument("a tensor of another shape", "", "float(len(b)) / 2", "torch.ones(1 if step < 12 else 3)"),
    _argument(
        "a tensor of another dtype",
        "",
        "b.element_size() / 4",
        "torch.ones((), dtype=torch.float64 if step > 11 else None)",
    ),
    _argument("a new dict in each call", "", "b['b']", f"{{'b': {LATER}}}"),
    _argument("a new list of ints in each call", "", "b[0]", "[1 if step < 12 else 2]"),
    _argument("a new tuple", "", "b[0]", f"({LATER},)"),
    _argument("a new list of another length", "", "sum(b)", "[0.5] * (1 if step < 12 else 3)"),
    _argument("a new set", "", "float(sum(b))", "{1} if step < 12 else {2}"),
    _argument("a new object in each call", "import types", "b.b", f"types.SimpleNamespace(b={LATER})"),
    _argument(
        "a new frozen dataclass",
        "import dataclasses\nB = dataclasses.make_dataclass('B', ['b'], frozen=True)",
        "b.b",
        f"B({LATER})",
    ),
    _argument("a NumPy array", "", "b[0]", f"np.array([{LATER}])"),
    _argument("a NumPy array read by torch", "", "torch.from_numpy(b).float()", f"np.array([{LATER}])"),
    _argument("a NumPy scalar", "", "float(b)", f"np.float64({LATER})"),
    _argument("a Fraction", "import fractions", "float(b)", "fractions.Fraction(1 if step < 12 else 4, 2)"),
    _argument("a function", "", "b()", "(lambda: 0.5) if step < 12 else (lambda: 2.0)"),
    _argument("a class", "class A:\n    b = 0.5\nclass B:\n    b = 2.0", "b.b", "A if step < 12 else B"),
    _argument("a dtype", "", "torch.finfo(b).bits / 32", "torch.float32 if step < 12 else torch.float64"),
    _argument("a slice", "", "float(b.stop)", "slice(1 if step < 12 else 2)"),
    _argument(
        "a module",
        "n = [nn.Linear(1, 1), nn.Linear(1, 1)]\nn[0].b, n[1].b = 0.5, 2.0",
        "b.b",
        "n[0] if step < 12 else n[1]",
    ),
    _changed("an object's state", "import types\nS = types.SimpleNamespace(b=0.5)", "b.b", "S.b = 2.0"),
    _changed("an object's class", "class A:\n    b = 0.5\nS = A()", "b.b", "A.b = 2.0"),
    _changed("an object's __slots__", "class A:\n    __slots__ = ('b',)\nS = A()\nS.b = 0.5", "b.b", "S.b = 2.0"),
    _changed("a dict's state", "S = {'b': 0.5}", "b['b']", "S['b'] = 2.0"),
    _changed("a dict of strings", "S = {'b': 'low'}", "0.5 if b['b'] == 'low' else 2.0", "S['b'] = 'high'"),
    _changed("a list's state", "S = [0.5]", "b[0]", "S[0] = 2.0"),
    _changed("a set's state", "S = {1}", "float(sum(b))", "S.add(3)"),
    _changed("a NumPy array in place", "S = np.array([0.5])", "b[0]", "S[0] = 2.0"),
    _changed(
        "a NumPy array in an object",
        "import types\nS = types.SimpleNamespace(b=np.array([0.5]))",
        "b.b[0]",
        "S.b[0] = 2.0",
    ),
    _changed("a tensor in place", "S = torch.tensor(0.5)", "b", "S.fill_(2.0)"),
    _changed(
        "a tensor's requires_grad", "S = torch.tensor(0.5)", "2.0 if b.requires_grad else 0.5", "S.requires_grad_()"
    ),
    _changed("a function's default", "def S(b=0.5):\n    return b", "b()", "S.__defaults__ = (2.0,)"),
    _changed("a module's mode", "S = nn.Linear(1, 1)", "0.5 if b.training else 2.0", "S.eval()"),
    _argument("an iterator", "S = iter([i / 100 for i in range(10**4)])", "next(b)", "S"),
]
