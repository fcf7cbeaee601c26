"""Numbers read from other modules, the process, files, the objects of Python that hold everything, and by tricks."""

from __future__ import annotations

from silent_changes.way import Way

__all__ = ["FILES", "MODULES", "TRICKS"]


def _settings(name: str, text: str, read: str, changed: str, start: str = "import settings", **options: str) -> Way:
    source = f"{start}\ndef model(x):\n    observe(x, {read})\ndef change():\n    import settings\n    {changed}\n"
    return Way(name, source, files={"settings.py": text}, **options)


def _library(module: str) -> Way:
    """A user's script whose name begins like a library's."""
    return Way(
        f"a script called {module}",
        "B = 0.5\ndef model(x):\n    observe(x, B)\ndef change():\n    global B\n    B = 2.0\n",
        module=module,
    )


def _named(module: str) -> Way:
    """A script that reads another module with such a name."""
    return Way(
        f"a module called {module}",
        f"import {module}\ndef model(x):\n    observe(x, {module}.get())\ndef change():\n    {module}.B = 2.0\n",
        files={f"{module}.py": "B = 0.5\ndef get():\n    return B\n"},
    )


MODULES = [
    _settings("settings.beta", "beta = 0.5", "settings.beta", "settings.beta = 2.0"),
    _settings("settings.cfg['b']", "cfg = {'b': 0.5}", "settings.cfg['b']", "settings.cfg['b'] = 2.0"),
    _settings("settings.cfg replaced", "cfg = {'b': 0.5}", "settings.cfg['b']", "settings.cfg = {'b': 2.0}"),
    _settings("settings.obj.b", "class O:\n    b = 0.5\nobj = O()", "settings.obj.b", "settings.obj.b = 2.0"),
    _settings("settings.Config.b", "class Config:\n    b = 0.5", "settings.Config.b", "settings.Config.b = 2.0"),
    _settings("settings.get()", "b = 0.5\ndef get():\n    return b", "settings.get()", "settings.b = 2.0"),
    _settings("settings.get replaced", "def get():\n    return 0.5", "settings.get()", "settings.get = lambda: 2.0"),
    _settings("settings.lst[0]", "lst = [0.5]", "settings.lst[0]", "settings.lst[0] = 2.0"),
    _settings("settings.array", "import numpy as np\na = np.array([0.5])", "settings.a[0]", "settings.a[0] = 2.0"),
    _settings("import settings as s", "beta = 0.5", "s.beta", "settings.beta = 2.0", start="import settings as s"),
    _settings(
        "from settings import get",
        "b = 0.5\ndef get():\n    return b",
        "get()",
        "settings.b = 2.0",
        start="from settings import get",
    ),
    _settings(
        "from settings import cfg",
        "cfg = {'b': 0.5}",
        "cfg['b']",
        "settings.cfg['b'] = 2.0",
        start="from settings import cfg",
    ),
    _settings(
        "import in the function",
        "beta = 0.5",
        "get()",
        "settings.beta = 2.0",
        start="def get():\n    import settings\n    return settings.beta",
    ),
    _settings(
        "from import in the function",
        "beta = 0.5",
        "get()",
        "settings.beta = 2.0",
        start="def get():\n    from settings import beta\n    return beta",
    ),
    _settings(
        "importlib in the function",
        "beta = 0.5",
        "importlib.import_module('settings').beta",
        "settings.beta = 2.0",
        start="import importlib",
    ),
    _settings("getattr(settings, …)", "beta = 0.5", "getattr(settings, 'be' + 'ta')", "settings.beta = 2.0"),
    _settings("vars(settings)", "beta = 0.5", "vars(settings)['beta']", "settings.beta = 2.0"),
    _settings(
        "a module's __getattr__",
        "d = {'beta': 0.5}\ndef __getattr__(name):\n    if name not in d:\n        raise AttributeError(name)\n"
        "    return d[name]",
        "settings.beta",
        "settings.d['beta'] = 2.0",
    ),
    _settings(
        "sys.modules", "beta = 0.5", "sys.modules['settings'].beta", "settings.beta = 2.0", start="import settings, sys"
    ),
    _settings(
        "a reloaded module",
        "import os\nbeta = float(os.environ.get('BETA_WAY', '0.5'))",
        "settings.beta",
        "import os, importlib\n    os.environ['BETA_WAY'] = '2.0'\n    importlib.reload(settings)",
    ),
    Way(
        "a module in a package",
        "import project.deep.settings\ndef model(x):\n    observe(x, project.deep.settings.beta)\n"
        "def change():\n    project.deep.settings.beta = 2.0\n",
        files={"project/__init__.py": "", "project/deep/__init__.py": "", "project/deep/settings.py": "beta = 0.5"},
    ),
    Way(
        "a function of a package that reads another module of it",
        "from project.helpers import get\nimport project.settings\ndef model(x):\n    observe(x, get())\n"
        "def change():\n    project.settings.cfg['b'] = 2.0\n",
        files={
            "project/__init__.py": "",
            "project/settings.py": "cfg = {'b': 0.5}",
            "project/helpers.py": "from . import settings\ndef get():\n    return settings.cfg['b']\n",
        },
    ),
    Way(
        "the model in another module",
        "from project.models import model\nimport project.models\ndef change():\n    project.models.B = 2.0\n",
        files={
            "project/__init__.py": "",
            "project/models.py": "from silent_changes.script import *\nB = 0.5\ndef model(x):\n    observe(x, B)\n",
        },
    ),
    *[_library(name) for name in ("pyro_models", "torch_nets", "numpy_data", "pyro_vae_models", "mathematics")],
    *[_named(name) for name in ("pyro_settings", "torch_settings", "numpy_settings", "pyro_vae_settings")],
    Way(
        "a library's attribute",
        "import math\ndef model(x):\n    observe(x, math.tau / 10)\ndef change():\n    math.tau = 20.0\n"
        "def undo():\n    math.tau = 2 * math.pi\n",
    ),
    Way(
        "a library's function",
        "import math\nsqrt = math.sqrt\ndef model(x):\n    observe(x, math.sqrt(0.5))\n"
        "def change():\n    math.sqrt = lambda v: 2.0\ndef undo():\n    math.sqrt = sqrt\n",
    ),
    Way(
        "a distribution's method",
        "log_prob = dist.Normal.log_prob\ndef model(x):\n    observe(x, 0.5)\n"
        "def change():\n    dist.Normal.log_prob = lambda self, v: 2 * log_prob(self, v)\n"
        "def undo():\n    dist.Normal.log_prob = log_prob\n",
    ),
]


def _read(name: str, start: str, read: str, changed: str, rest: str = "", **options: bool) -> Way:
    return Way(name, f"{start}\ndef model(x):\n    observe(x, {read})\ndef change():\n    {changed}\n{rest}", **options)


WRITE = "import pathlib\nfile = pathlib.Path('b.txt')\nfile.write_text('0.5')"

FILES = [
    _read("a text file", WRITE, "float(open('b.txt').read())", "file.write_text('2.0')"),
    _read("Path.read_text", WRITE, "float(file.read_text())", "file.write_text('2.0')"),
    _read("a JSON file", f"import json\n{WRITE}", "json.loads(file.read_text())", "file.write_text('2.0')"),
    _read("np.load", "np.save('b.npy', np.array(0.5))", "float(np.load('b.npy'))", "np.save('b.npy', np.array(2.0))"),
    _read(
        "np.load as a tensor",
        "np.save('b.npy', np.array([0.5]))",
        "torch.from_numpy(np.load('b.npy')).float()",
        "np.save('b.npy', np.array([2.0]))",
    ),
    _read(
        "torch.load",
        "torch.save(torch.tensor(0.5), 'b.pt')",
        "torch.load('b.pt')",
        "torch.save(torch.tensor(2.0), 'b.pt')",
    ),
    _read(
        "pickle.load",
        "import pickle\npickle.dump(0.5, open('b.pkl', 'wb'))",
        "pickle.load(open('b.pkl', 'rb'))",
        "pickle.dump(2.0, open('b.pkl', 'wb'))",
    ),
    _read(
        "an open file's position",
        f"{WRITE}\nfile.write_text('0.5\\n2.0\\n')\nf = open('b.txt')",
        "float((f.seek(at[0]), f.readline())[1])",
        "at[0] = 4",
        "at = [0]\n",
    ),
    _read("whether a file exists", "import os", "2.0 if os.path.exists('flag') else 0.5", "open('flag', 'w').close()"),
    _read("a file's size", f"import os\n{WRITE}", "os.path.getsize('b.txt') / 6", "file.write_text('2.0' * 5)"),
    _read(
        "how many files a folder has",
        "import os",
        "len(os.listdir()) / 4",
        "[open(f'f{i}', 'w').close() for i in range(8)]",
    ),
    _read(
        "SQLite",
        "import sqlite3\ndb = sqlite3.connect(':memory:')\ndb.execute('create table t as select 0.5 as b')",
        "db.execute('select b from t').fetchone()[0]",
        "db.execute('update t set b = 2.0')",
    ),
    _read(
        "os.environ",
        "import os\nos.environ['BETA_WAY'] = '0.5'",
        "float(os.environ['BETA_WAY'])",
        "os.environ['BETA_WAY'] = '2.0'",
    ),
    _read("os.getenv", "import os", "float(os.getenv('BETA_WAY', '0.5'))", "os.environ['BETA_WAY'] = '2.0'"),
    _read("sys.argv", "import sys\nsys.argv = ['train', '0.5']", "float(sys.argv[1])", "sys.argv[1] = '2.0'"),
    _read(
        "sys.argv replaced",
        "import sys\nsys.argv = ['train', '0.5']",
        "float(sys.argv[1])",
        "sys.argv = ['train', '2.0']",
    ),
    _read(
        "the working folder", "import os\nos.mkdir('longer_name')", "len(os.getcwd()) / 20", "os.chdir('longer_name')"
    ),
    _read(
        "a subprocess",
        WRITE,
        "float(subprocess.check_output(['cat', 'b.txt']))",
        "file.write_text('2.0')",
        "import subprocess\n",
        fit=False,
        evidence=False,
    ),
    _read(
        "the recursion limit",
        "import sys\nsys.setrecursionlimit(3000)",
        "sys.getrecursionlimit() / 6000",
        "sys.setrecursionlimit(9000)",
    ),
    _read(
        "decimal's precision",
        "import decimal\ndecimal.getcontext().prec = 5",
        "decimal.getcontext().prec / 10",
        "decimal.getcontext().prec = 20",
    ),
    _read(
        "a logger's level",
        "import logging\nlog = logging.getLogger('way')\nlog.setLevel(10)",
        "log.level / 20",
        "log.setLevel(40)",
    ),
]

TRICKS = [
    _read("getattr(self, 'be' + 'ta')", "class A:\n    beta = 0.5\na = A()", "getattr(a, 'be' + 'ta')", "a.beta = 2.0"),
    _read("globals()['beta']", "beta = 0.5", "globals()['be' + 'ta']", "globals()['beta'] = 2.0"),
    _read("eval", "beta = 0.5", "eval('be' + 'ta')", "globals()['beta'] = 2.0"),
    _read(
        "exec",
        "beta = 0.5\ndef get():\n    d = {}\n    exec('b = be' + 'ta', globals(), d)\n    return d['b']",
        "get()",
        "globals()['beta'] = 2.0",
    ),
    _read("vars()", "class A:\n    pass\na = A()\na.beta = 0.5", "vars(a)['beta']", "a.beta = 2.0"),
    _read("__dict__", "class A:\n    beta = 0.5", "A.__dict__['beta']", "A.beta = 2.0"),
    _read("type(a).beta", "class A:\n    beta = 0.5\na = A()", "type(a).beta", "A.beta = 2.0"),
    _read(
        "__subclasses__",
        "class A:\n    pass\nkept = [type('B', (A,), {})]",
        "len(A.__subclasses__()) / 2",
        "kept.extend(type('C', (A,), {}) for _ in range(4))",
    ),
    _read("builtins", "import builtins\nbuiltins.BETA_WAY = 0.5", "BETA_WAY", "builtins.BETA_WAY = 2.0"),
    _read(
        "ctypes on an address",
        "import ctypes\nbox = ctypes.c_double(0.5)\naddress = ctypes.addressof(box)",
        "ctypes.c_double.from_address(address).value",
        "box.value = 2.0",
    ),
    _read("a memoryview", "import array\na = array.array('d', [0.5])\nview = memoryview(a)", "view[0]", "a[0] = 2.0"),
    _read(
        "gc.get_objects",
        "import gc\nclass A:\n    pass\na = A()\na.b = 0.5\nkey = 'A'",
        "next(o for o in gc.get_objects() if type(o) is A).b",
        "a.b = 2.0",
        fit=False,
        evidence=False,
    ),
    _read(
        "the caller's frame",
        "import sys\nclass A:\n    b = 0.5\ndef get():\n    return sys._getframe(1).f_globals['A'].b",
        "get()",
        "A.b = 2.0",
    ),
    _read(
        "an attribute of torch",
        "torch.beta_way = 0.5",
        "torch.beta_way",
        "torch.beta_way = 2.0",
        "def undo():\n    del torch.beta_way\n",
    ),
    _read("an attribute of a tensor", "t = torch.zeros(1)\nt.b = 0.5", "t.b", "t.b = 2.0"),
    _read("the shape of a tensor", "t = [torch.zeros(1)]", "float(len(t[0]))", "t[0].resize_(3)"),
    _read("the shape of another tensor", "t = [torch.zeros(1)]", "float(len(t[0]))", "t[0] = torch.zeros(3)"),
    _read("a tensor's stride", "t = torch.zeros(2, 5)", "float(t.stride(0)) / 5", "t.t_()"),
    _read("requires_grad as a number", "t = torch.zeros(2)", "2.0 if t.requires_grad else 0.5", "t.requires_grad_()"),
    _read(
        "a view of an ndarray", "a = np.full(3, 0.5, dtype='float32')\nt = torch.from_numpy(a)", "t[0]", "a[:] = 2.0"
    ),
    _read("a mutable key's order", "d = {'a': 0.5, 'b': 2.0}", "next(iter(d.values()))", "d['a'] = d.pop('a')"),
    _read("a string's format", "f = '{:.0f}'", "float(f.format(0.5))", "globals().update(f='{:.1f}9')"),
    _read(
        "the default dtype",
        "",
        "0.5 if torch.get_default_dtype() == torch.float32 else 2.0",
        "torch.set_default_dtype(torch.float64)",
    ),
    _read(
        "torch.finfo of the default dtype",
        "",
        "torch.finfo(torch.get_default_dtype()).bits / 32",
        "torch.set_default_dtype(torch.float64)",
    ),
    _read(
        "the number of threads",
        "n = torch.get_num_threads()",
        "torch.get_num_threads() / 2",
        "torch.set_num_threads(3)",
        "def undo():\n    torch.set_num_threads(n)\n",
    ),
    _read(
        "a setting of Pyro",
        "",
        "pyro.settings.get('cholesky_relative_jitter') / 8",
        "pyro.settings.set(cholesky_relative_jitter=16.0)",
        "before = pyro.settings.get('cholesky_relative_jitter')\ndef undo():\n"
        "    pyro.settings.set(cholesky_relative_jitter=before)\n",
    ),
]
