"""Modules whose mode, parameters, buffers, hooks, parts or numbers change."""

from __future__ import annotations

from silent_changes.way import Way

__all__ = ["NEURAL"]

MLP = "nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))"


def _module(name: str, made: str, changed: str, **options: bool) -> Way:
    return Way(name, f"net, model = networks(lambda: {made})\ndef change():\n    {changed}\n", **options)


def _class(name: str, body: str, changed: str, **options: bool) -> Way:
    source = f"class Net(nn.Module):\n{body}net, model = networks(Net)\ndef change():\n    {changed}\n"
    return Way(name, source, **options)


def _init(*lines: str) -> str:
    return "    def __init__(self):\n        super().__init__()\n" + "".join(f"        {line}\n" for line in lines)


DROPOUT = "nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))"
NORM = "nn.Sequential(nn.Linear(1, 4), nn.LayerNorm(4), nn.Linear(4, 1))"
FORWARD = "    def forward(self, x):\n        return 0 * x + self.b\n"

NEURAL = [
    _module("eval()", DROPOUT, "net.eval()", evidence=False),
    _module("eval() of a part", DROPOUT, "net[1].eval()", evidence=False),
    _module("training, set by hand", DROPOUT, "net[1].training = False", evidence=False),
    _module("a dropout's p", DROPOUT, "net[1].p = 0.05", evidence=False),
    _module("the eps of a LayerNorm", NORM, "net[1].eps = 10.0"),
    _module("a LayerNorm's weight, gone", NORM, "net[2].bias = None"),
    _module(
        "an activation's slope",
        "nn.Sequential(nn.Linear(1, 4), nn.LeakyReLU(0.1), nn.Linear(4, 1))",
        "net[1].negative_slope = 3.0",
    ),
    _module(
        "the momentum of a BatchNorm",
        "nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))",
        "net[1].momentum = 0.9\ndef final():\n    return net[1].running_mean",
        evidence=False,
    ),
    _module("requires_grad_(False)", MLP, "net.requires_grad_(False)", evidence=False),
    _module("requires_grad of one parameter", MLP, "net[2].bias.requires_grad_(False)", evidence=False),
    _module("a replaced parameter", MLP, "net[2].bias = nn.Parameter(torch.full((1,), 2.0))"),
    _module("a parameter's data", MLP, "net[2].bias.data = torch.full((1,), 2.0)"),
    _module("a parameter in place", MLP, "net[2].bias.data.fill_(2.0)"),
    _module("load_state_dict", MLP, "net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()})"),
    _module("a replaced part", MLP, "net[1] = nn.ReLU()"),
    _module("a part that is appended", MLP, "net.append(nn.Softplus())"),
    _module("a part that is deleted", MLP, "del net[1]"),
    _module("a forward hook", MLP, "net.register_forward_hook(lambda m, i, o: o + 2)"),
    _module("a forward pre-hook", MLP, "net[0].register_forward_pre_hook(lambda m, i: (i[0] + 2,))"),
    _module("a hook of a part", MLP, "net[1].register_forward_hook(lambda m, i, o: o + 2)"),
    _module(
        "a backward hook",
        MLP,
        "net[2].register_full_backward_hook(lambda m, i, o: tuple(3 * g for g in i))",
        evidence=False,
    ),
    _module("a hook of a parameter", MLP, "net[2].bias.register_hook(lambda g: -g)", evidence=False),
    _module(
        "a hook of all modules",
        MLP,
        "global hook\n    hook = nn.modules.module.register_module_forward_hook(lambda m, i, o: o + 1)\n"
        "def undo():\n    hook.remove()",
    ),
    Way(
        "a hook's state",
        f"""
net, model = networks(lambda: {MLP})
box = [0.5]
net.register_forward_hook(lambda m, i, o: o + box[0])
def change():
    box[0] = 2.0
""",
    ),
    _module(
        "weight_norm",
        MLP,
        "nn.utils.parametrizations.weight_norm(net[2])\n    net[2].parametrizations.weight.original0.data.mul_(3)",
    ),
    _module("a parametrization", MLP, "nn.utils.parametrize.register_parametrization(net[2], 'bias', nn.Softplus())"),
    _module("forward on the instance", MLP, "net.forward = lambda x: x + 2"),
    _class("forward on the class", _init("self.b = 0.5") + FORWARD, "Net.forward = lambda self, x: x + 2"),
    _class("a number", _init("self.b = 0.5") + FORWARD, "net.b = 2.0"),
    _class("a class's number", "    b = 0.5\n" + FORWARD, "Net.b = 2.0"),
    _class("a buffer in place", _init("self.register_buffer('b', torch.tensor(0.5))") + FORWARD, "net.b.fill_(2.0)"),
    _class(
        "a replaced buffer",
        _init("self.register_buffer('b', torch.tensor(0.5))") + FORWARD,
        "net.b = torch.tensor(2.0)",
    ),
    _class("a tensor attribute", _init("self.b = torch.tensor(0.5)") + FORWARD, "net.b = torch.tensor(2.0)"),
    _class("a list of numbers", _init("self.b_ = [0.5]") + FORWARD.replace("self.b", "self.b_[0]"), "net.b_[0] = 2.0"),
    _class(
        "a dict of numbers",
        _init("self.b_ = {'b': 0.5}") + FORWARD.replace("self.b", "self.b_['b']"),
        "net.b_['b'] = 2.0",
    ),
    _class(
        "an ndarray of a module",
        _init("self.b = np.array([0.5])") + FORWARD.replace("self.b", "float(self.b[0])"),
        "net.b[0] = 2.0",
    ),
    _class(
        "a part in a plain list",
        _init("self.parts = [nn.Linear(1, 1)]") + "    def forward(self, x):\n        return self.parts[0](x)\n",
        "net.parts[0] = nn.Linear(1, 1)",
    ),
    _class(
        "a ParameterList's item",
        _init("self.p = nn.ParameterList([torch.tensor(0.5)])") + FORWARD.replace("self.b", "self.p[0]"),
        "net.p[0] = nn.Parameter(torch.tensor(2.0))",
    ),
    _class(
        "a ModuleDict's item",
        _init("self.m = nn.ModuleDict({'a': nn.Linear(1, 1)})")
        + "    def forward(self, x):\n        return self.m['a'](x)\n",
        "net.m['a'] = nn.Linear(1, 1)",
    ),
    _class(
        "a function in a module",
        _init("self.act = torch.tanh") + "    def forward(self, x):\n        return self.act(x)\n",
        "net.act = torch.exp",
    ),
    _class(
        "a property of a module",
        _init("self._b = 0.5") + "    @property\n    def b(self):\n        return self._b\n" + FORWARD,
        "net._b = 2.0",
    ),
    _class("extra_repr-like state in __dict__", _init("self.__dict__['b'] = 0.5") + FORWARD, "net.__dict__['b'] = 2.0"),
    _class(
        "mode as a number", FORWARD.replace("self.b", "(0.5 if self.training else 2.0)"), "net.eval()", evidence=False
    ),
]
