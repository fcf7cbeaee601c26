"""Changes in Pyro itself: the parameter store, handlers, objectives, plates, distributions made outside."""

from __future__ import annotations

from silent_changes.way import Way

__all__ = ["PYRO"]

PARAM = """
def model(x):
    observe(x, pyro.param("b", torch.tensor(0.5)))
"""

PYRO = [
    Way(
        "an entry of the store, replaced",
        PARAM + 'def change():\n    pyro.get_param_store()["b"] = torch.tensor(2.0)\n',
    ),
    Way("an entry of the store, in place", PARAM + 'def change():\n    pyro.param("b").data.fill_(2.0)\n'),
    Way("an entry of the store, deleted", PARAM + 'def change():\n    del pyro.get_param_store()["b"]\n'),
    Way(
        "another constraint",
        """
def model(x):
    observe(x, pyro.param("b", torch.tensor(0.5)))
def change():
    del pyro.get_param_store()["b"]
    pyro.param("b", torch.tensor(2.0), constraint=constraints.positive)
""",
    ),
    Way(
        "the state of the store",
        PARAM
        + """
def change():
    state = pyro.get_param_store().get_state()
    state["params"]["b"] = torch.tensor(2.0, requires_grad=True)
    pyro.get_param_store().set_state(state)
""",
    ),
    Way(
        "whether a parameter exists",
        """
def model(x):
    observe(x, 2.0 if "other" in pyro.get_param_store() else 0.5)
def change():
    pyro.param("other", torch.tensor(0.0))
""",
    ),
    Way(
        "a parameter of another name",
        """
S = ["b"]
def model(x):
    observe(x, pyro.param(S[0], torch.tensor(0.5 if S[0] == "b" else 2.0)))
def change():
    S[0] = "c"
""",
    ),
    Way(
        "poutine.scale by attribute",
        """
class M:
    b = 1.0
    def model(self, x):
        with poutine.scale(scale=self.b):
            observe(x, 0.5)
m = M()
model = m.model
def change():
    m.b = 3.0
""",
        evidence=False,
    ),
    Way(
        "poutine.mask by attribute",
        """
class M:
    on = True
    def model(self, x):
        with poutine.mask(mask=self.on):
            observe(x, 0.5)
m = M()
model = m.model
def change():
    m.on = False
""",
        evidence=False,
    ),
    Way(
        "poutine.condition's data",
        """
data = {"b": torch.tensor(0.5)}
def joint(x):
    observe(x, pyro.sample("b", dist.Normal(0.0, 1.0)))
model = poutine.condition(joint, data=data)
def change():
    data["b"] = torch.tensor(2.0)
""",
    ),
    Way(
        "poutine.scale around a call",
        """
def model(x):
    observe(x, 0.5)
def around(step):
    return poutine.scale(scale=1.0 if step < 12 else 3.0)
""",
        fit=False,
        evidence=False,
    ),
    Way(
        "poutine.mask around a call",
        """
def model(x):
    observe(x, 0.5)
def around(step):
    return poutine.mask(mask=False) if step > 11 else contextlib.nullcontext()
""",
        fit=False,
        evidence=False,
    ),
    Way(
        "num_particles of the objective",
        """
elbo = Trace_ELBO(num_particles=1)
def model(x):
    observe(x, 0.5)
def change():
    elbo.num_particles = 3
""",
        fit=False,
        evidence=False,
    ),
    Way(
        "an attribute of an objective",
        """
class Annealed(Trace_ELBO):
    beta = 1.0
    def _differentiable_loss_particle(self, model_trace, guide_trace):
        loss, surrogate = super()._differentiable_loss_particle(model_trace, guide_trace)
        return self.beta * loss, self.beta * surrogate
    def loss_and_grads(self, model, guide, *args, **kwargs):
        loss = self.beta * self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return loss.item()
elbo = Annealed()
def model(x):
    observe(x, 0.5)
def change():
    elbo.beta = 3.0
""",
        fit=False,
        evidence=False,
    ),
    Way(
        "a counter of an objective",
        """
class Annealed(Trace_ELBO):
    n = 0
    def loss_and_grads(self, model, guide, *args, **kwargs):
        self.n += 1
        loss = self.n / 30 * self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return loss.item()
elbo = Annealed()
def model(x):
    observe(x, 0.5)
""",
        fit=False,
        evidence=False,
    ),
    Way(
        "alpha of RenyiELBO",
        """
elbo = pyro.infer.RenyiELBO(alpha=0.9, num_particles=4)
def model(x):
    observe(x, 0.5)
def change():
    elbo.alpha = -5.0
""",
        fit=False,
        evidence=False,
    ),
    Way(
        "a plate's subsample size",
        """
S = [8]
def model(x):
    with pyro.plate("data", 8, subsample_size=S[0]) as i:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + 0.5, 1.0), obs=x[i])
def guide(x):
    slope = pyro.param("slope", torch.tensor(0.3))
    with pyro.plate("data", 8, subsample_size=S[0]) as i:
        pyro.sample("z", dist.Normal(slope * x[i], 1.0))
def change():
    S[0] = 2
""",
        evidence=False,
        fit=False,
    ),
    Way(
        "a plate that is kept",
        """
S = [pyro.plate("data", 8)]
def model(x):
    with S[0]:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + 0.5, 1.0), obs=x)
def guide(x):
    slope = pyro.param("slope", torch.tensor(0.3))
    with S[0]:
        pyro.sample("z", dist.Normal(slope * x, 1.0))
def change():
    S[0] = poutine.scale(scale=3.0) if False else pyro.plate("data", 16, subsample=torch.arange(8))
""",
        evidence=False,
        fit=False,
    ),
    Way(
        "a PyroParam, replaced",
        """
class Net(PyroModule):
    def __init__(self):
        super().__init__()
        self.b = PyroParam(torch.tensor(0.5))
    def forward(self, x):
        observe(x, self.b)
model = Net()
def change():
    model.b = torch.tensor(2.0)
""",
    ),
    Way(
        "a PyroModule's number",
        """
class Net(PyroModule):
    b = 0.5
    def forward(self, x):
        observe(x, self.b)
model = Net()
def change():
    model.b = 2.0
""",
    ),
    Way(
        "a distribution made outside",
        """
prior = dist.Normal(torch.tensor(0.5), torch.tensor(1.0))
def model(x):
    observe(x, prior.mean)
def change():
    prior.loc = torch.tensor(2.0)
""",
    ),
    Way(
        "a distribution made outside, in place",
        """
prior = dist.Normal(torch.tensor(0.5), torch.tensor(1.0))
def model(x):
    observe(x, prior.mean)
def change():
    prior.loc.fill_(2.0)
""",
    ),
    Way(
        "which sites are enumerated",
        """
elbo = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1)
infer = {"enumerate": "parallel"}
def model(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3)), infer=infer)
        pyro.sample("x", dist.Normal(k, 1.0), obs=x)
def guide(x):
    p = pyro.param("p", torch.tensor(0.4), constraint=constraints.unit_interval)
    with pyro.plate("data", len(x)):
        pyro.sample("k", dist.Bernoulli(p), infer=infer)
def change():
    del infer["enumerate"]
""",
        fit=False,
        evidence=False,
    ),
    Way(
        "another model in SVI",
        """
def model(x):
    observe(x, 0.5)
def with_svi(svi):
    svi.model = lambda x: observe(x, 2.0)
""",
        fit=False,
        evidence=False,
    ),
    Way(
        "the handlers that are applied",
        """
handlers = []
def model(x):
    f = observe
    for handler in handlers:
        f = handler(f)
    f(x, 0.5)
def change():
    handlers.append(partial(poutine.scale, scale=3.0))
""",
        evidence=False,
    ),
]
