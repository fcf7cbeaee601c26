"""Models that keep state of their own, and models that draw from random generators other than torch's."""

from __future__ import annotations

from silent_changes.way import Way

__all__ = ["RANDOM", "STATE"]


def _drawn(name: str, before: str, value: str, irreproducible: bool = False) -> Way:
    return Way(name, f"{before}\ndef model(x):\n    observe(x, {value})\n", irreproducible=irreproducible)


STATE = [
    Way(
        "self.n += 1",
        """
class M:
    n = 0
    def model(self, x):
        self.n += 1
        observe(x, min(2.0, self.n / 40))
model = M().model
""",
    ),
    Way(
        "self.n += 1, with an effect only later",
        """
class M:
    n = 0
    def model(self, x):
        self.n += 1
        observe(x, 0.5 if self.n < 25 else 2.0)
model = M().model
""",
        evidence=False,  # where later begins depends on how often a model is looked at
    ),
    Way(
        "self.n += 1, under poutine.scale",
        """
class M:
    n = 0
    def model(self, x):
        self.n += 1
        with poutine.scale(scale=min(1.0, self.n / 100)):
            observe(x, 0.5)
model = M().model
""",
        evidence=False,  # weights carry no scales
    ),
    Way(
        "self.n += 1 in the guide",
        """
class G:
    n = 0
    def guide(self, x):
        self.n += 1
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(min(2.0, self.n / 40), scale))
guide = G().guide
def model(x):
    observe(x, 0.5)
""",
    ),
    Way(
        "self.n += 1 in the forward of a module",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.n, self.linear = 0, nn.Linear(1, 1)
    def forward(self, x):
        self.n += 1
        return min(2.0, self.n / 40) * self.linear(x)
net, model = networks(Net)
""",
    ),
    Way("a global counter", "N = 0\ndef model(x):\n    global N\n    N += 1\n    observe(x, min(2.0, N / 40))\n"),
    Way(
        "a nonlocal counter",
        """
def make():
    n = 0
    def model(x):
        nonlocal n
        n += 1
        observe(x, min(2.0, n / 40))
    return model
model = make()
""",
    ),
    _drawn("itertools.count", "steps = itertools.count()", "min(2.0, next(steps) / 40)"),
    _drawn("itertools.cycle", "values = itertools.cycle([0.5, 1.0, 2.0])", "next(values)"),
    _drawn(
        "a generator", "def walk():\n    for i in range(10**6):\n        yield i / 40\nvalues = walk()", "next(values)"
    ),
    _drawn("a list's iterator", "values = iter([i / 100 for i in range(10**4)])", "next(values)"),
    Way("list.append", "seen = []\ndef model(x):\n    seen.append(0)\n    observe(x, min(2.0, len(seen) / 40))\n"),
    Way("list.pop", "left = [i / 200 for i in range(2000)]\ndef model(x):\n    observe(x, left.pop())\n"),
    Way(
        "deque.rotate",
        """
import collections
values = collections.deque([0.5, 1.0, 2.0])
def model(x):
    values.rotate()
    observe(x, values[0])
""",
    ),
    Way(
        "a dict's counter",
        "seen = {}\ndef model(x):\n    seen['n'] = seen.get('n', 0) + 1\n    observe(x, min(2.0, seen['n'] / 40))\n",
    ),
    Way(
        "a class's counter",
        """
class Config:
    n = 0
def model(x):
    Config.n += 1
    observe(x, min(2.0, Config.n / 40))
""",
    ),
    Way(
        "a function's attribute",
        "def model(x):\n    model.n += 1\n    observe(x, min(2.0, model.n / 40))\nmodel.n = 0\n",
    ),
    Way("a mutable default", "def model(x, box=[0]):\n    box[0] += 1\n    observe(x, min(2.0, box[0] / 40))\n"),
    Way("an ndarray's counter", "n = np.zeros(1)\ndef model(x):\n    n[0] += 1\n    observe(x, min(2.0, n[0] / 40))\n"),
    Way(
        "a tensor attribute made anew",
        """
class M:
    def __init__(self):
        self.b = torch.tensor(0.0)
    def model(self, x):
        self.b = self.b + 0.02
        observe(x, self.b)
model = M().model
""",
    ),
    Way(
        "a global tensor made anew",
        "b = torch.tensor(0.0)\ndef model(x):\n    global b\n    b = b + 0.02\n    observe(x, b)\n",
    ),
    Way(
        "a tensor moved in place", "b = torch.tensor(0.0)\ndef model(x):\n    b.add_(0.02)\n    observe(x, b.clone())\n"
    ),
    Way(
        "a running mean, made anew",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(0.0))
    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1
        return 0 * x + self.mean
net, model = networks(Net)
""",
    ),
    Way(
        "a running mean, as a number",
        """
class M:
    mean = 0.0
    def model(self, x):
        self.mean = 0.95 * self.mean + 0.05 * float(x.mean())
        observe(x, self.mean)
model = M().model
""",
    ),
    Way(
        "BatchNorm's statistics",
        """
net, model = networks(lambda: nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 1)))
def final():
    return torch.cat([net[1].running_mean, net[1].num_batches_tracked[None]])
""",
        evidence=False,  # it runs in evaluation mode
    ),
    Way(
        "batches of the model's own",
        """
import torch.utils.data as data
def endless():
    while True:
        yield from data.DataLoader(torch.linspace(0, 2, 24), batch_size=8)
rows = endless()
def model(x):
    observe(x, next(rows)[: len(x)].mean())
""",
    ),
    Way(
        "a counter in a file",
        """
import pathlib
pathlib.Path("n").write_text("0")
def model(x):
    n = int(pathlib.Path("n").read_text()) + 1
    pathlib.Path("n").write_text(str(n))
    observe(x, min(2.0, n / 40))
""",
    ),
    Way(
        "a counter in os.environ",
        """
import os
os.environ["N_STEPS"] = "0"
def model(x):
    os.environ["N_STEPS"] = str(int(os.environ["N_STEPS"]) + 1)
    observe(x, min(2.0, int(os.environ["N_STEPS"]) / 40))
""",
    ),
    Way(
        "a context variable",
        """
import contextvars
n = contextvars.ContextVar("n", default=0)
n.set(0)
def model(x):
    n.set(n.get() + 1)
    observe(x, min(2.0, n.get() / 40))
""",
    ),
    Way(
        "a thread's local",
        """
import threading
local = threading.local()
local.n = 0
def model(x):
    local.n += 1
    observe(x, min(2.0, local.n / 40))
""",
    ),
    Way(
        "a counting context manager",
        """
class Warmup:
    n = 0
    def __enter__(self):
        self.n += 1
        return min(2.0, self.n / 40)
    def __exit__(self, *_):
        pass
warmup = Warmup()
def model(x):
    with warmup as b:
        observe(x, b)
""",
    ),
    Way(
        "a counting property",
        """
class Schedule:
    n = 0
    @property
    def beta(self):
        self.n += 1
        return min(2.0, self.n / 40)
schedule = Schedule()
def model(x):
    observe(x, schedule.beta)
""",
    ),
    Way(
        "how full an lru_cache is",
        """
import functools
@functools.lru_cache(None)
def table(n):
    return n
def model(x):
    observe(x, min(2.0, table(table.cache_info().currsize) / 40))
""",
    ),
    Way(
        "a first run that is another",
        """
class M:
    def model(self, x):
        if not hasattr(self, "b"):
            self.b = 0.5
            observe(x, 2.0)
        else:
            observe(x, self.b)
model = M().model
""",
        evidence=False,
    ),
]

RANDOM = [
    _drawn("random.random()", "random.seed(0)", "random.random()"),
    _drawn("random.random() as a branch", "random.seed(0)", "0.5 if random.random() < 0.5 else 2.0"),
    _drawn("a rare branch of random.random()", "random.seed(0)", "0.5 if random.random() < 0.9 else 2.0"),
    _drawn("from random import gauss", "from random import gauss", "gauss(0.0, 1.0)"),
    _drawn("random.Random()", "rng = random.Random(0)", "rng.random()"),
    _drawn("random.choice", "random.seed(0)", "random.choice([0.5, 1.0, 2.0])"),
    _drawn("random.shuffle", "v = [0.0, 1.0, 2.0, 3.0]", "random.shuffle(v) or v[0]"),
    _drawn("np.random.rand", "np.random.seed(0)", "np.random.rand()"),
    _drawn("np.random.rand as a branch", "np.random.seed(0)", "0.5 if np.random.rand() < 0.5 else 2.0"),
    _drawn("np.random.default_rng", "rng = np.random.default_rng(0)", "rng.random()"),
    _drawn("np.random.RandomState", "rng = np.random.RandomState(0)", "rng.rand()"),
    _drawn("torch.from_numpy of a draw", "rng = np.random.default_rng(0)", "torch.from_numpy(rng.random(1)).float()"),
    _drawn("torch.Generator", "rng = torch.Generator().manual_seed(0)", "torch.rand((), generator=rng)"),
    _drawn(
        "torch.Generator, as a number", "rng = torch.Generator().manual_seed(0)", "float(torch.rand((), generator=rng))"
    ),
    _drawn("scipy.stats", "import scipy.stats", "scipy.stats.uniform.rvs()"),
    _drawn("secrets", "import secrets", "secrets.randbelow(1000) / 500", irreproducible=True),
    _drawn("uuid4", "import uuid", "uuid.uuid4().int / 2**128", irreproducible=True),
    _drawn("os.urandom", "import os", "os.urandom(1)[0] / 100", irreproducible=True),
    _drawn("time.time()", "import time", "1e3 * (time.time() % 1e-3)", irreproducible=True),
    _drawn(
        "time.perf_counter()",
        "import time\nstart = time.perf_counter()",
        "time.perf_counter() - start",
        irreproducible=True,
    ),
    _drawn("datetime.now()", "from datetime import datetime", "datetime.now().microsecond / 1e5", irreproducible=True),
    _drawn(
        "the address of an object",
        "kept = []",
        "kept.append(object()) or id(kept[-1]) % 4096 / 1024",
        irreproducible=True,
    ),
]
