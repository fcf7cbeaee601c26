"""What belongs to the state of a fit: runs that are rebuilt from scratch go on to the same bits."""

import pyro
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from states import same
from torch import nn
from torch.distributions.constraints import positive
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from truths import LinearGaussian, linear_vae, small_vae

from pyro_vae import CombinedELBO, fit
from pyro_vae.checkpoint import read, write


@pytest.fixture
def x():
    return LinearGaussian(2, 4).sample(30)


def run(path, data, *, num_epochs, build=lambda: linear_vae(2, 4), seed=0, **options):
    """A fit of what `build` makes anew, from other random numbers each time it is called."""
    pyro.clear_param_store()
    vae = build()
    data = data() if callable(data) else data
    options = {"batch_size": 12, "seed": seed, "progress": False} | options
    return fit(vae.model, vae.guide, data, num_epochs=num_epochs, checkpoint=path, **options), vae


def check(tmp_path, data, **options):
    """A run of five epochs, and one of two that is gone on from, on a model that starts elsewhere."""
    torch.manual_seed(0)
    whole, expected = run(None, data, num_epochs=5, **options)
    torch.manual_seed(0)
    run(tmp_path / "l.pt", data, num_epochs=2, **options)
    torch.manual_seed(1)
    resumed, vae = run(tmp_path / "l.pt", data, num_epochs=5, **options)
    assert (resumed.loss, resumed.validation_loss) == (whole.loss, whole.validation_loss)
    assert same(vae.state_dict().values(), expected.state_dict().values())


def frozen_posterior():
    vae = linear_vae(2, 4)
    vae.posterior.requires_grad_(False)
    return vae


def with_statistics():
    vae = small_vae(4)
    vae.posterior.network = nn.Sequential(vae.posterior.network, nn.BatchNorm1d(16, momentum=0.3))
    return vae


def test_frozen_parameters(tmp_path, x):
    check(tmp_path, x, build=frozen_posterior)
    names = read(tmp_path / "l.pt", "fit")["weights"]
    assert "VAE.posterior.head.weight" in names


def test_frozen_parameters_of_the_store(tmp_path, x):
    """A constant that a user keeps in Pyro's store."""

    class Pair:
        def __init__(self):
            self.vae = linear_vae(2, 4)
            pyro.param("scale", torch.rand(()) + 0.5, constraint=positive)
            dict(pyro.get_param_store().named_parameters())["scale"].requires_grad_(False)

        def model(self, x):
            with pyro.poutine.scale(scale=pyro.param("scale")):
                self.vae.model(x)

        def guide(self, x):
            self.vae.guide(x)

        def state_dict(self):
            return self.vae.state_dict()

    check(tmp_path, x, build=Pair)


def test_buffers_that_move(tmp_path):
    rows = torch.bernoulli(torch.full((30, 4, 4), 0.5))
    check(tmp_path, rows, build=with_statistics, validation_data=rows, patience=4)


def loader(x, kind):
    """A loader with a generator of its own, in one of the places that torch knows."""
    own, rows = torch.Generator().manual_seed(7), TensorDataset(x)
    if kind == "loader":
        return DataLoader(rows, batch_size=12, shuffle=True, generator=own)
    sampler = RandomSampler(rows, generator=own)
    if kind == "sampler":
        return DataLoader(rows, batch_size=12, sampler=sampler)
    if kind == "sampler of batches":
        batches = torch.utils.data.BatchSampler(sampler, 12, False)
        return DataLoader(rows, batch_size=None, sampler=batches)
    if kind == "batch sampler":
        return DataLoader(rows, batch_sampler=torch.utils.data.BatchSampler(sampler, 12, False))
    return DataLoader(rows, batch_size=12, shuffle=True)


@pytest.mark.parametrize("kind", ["loader", "sampler", "batch sampler", "sampler of batches", "none"])
@pytest.mark.parametrize("seed", [0, None])
def test_the_generators_of_a_loader(tmp_path, x, kind, seed):
    check(tmp_path, lambda: loader(x, kind), seed=seed)


class Noisy(TensorDataset):
    """Rows with noise, from a generator that nobody but the dataset knows."""

    def __init__(self, x):
        super().__init__(x)
        self.generator = torch.Generator().manual_seed(3)

    def __getitem__(self, i):
        return (self.tensors[0][i] + 0.1 * torch.randn(4, generator=self.generator),)


def test_a_dataset_with_a_generator_of_its_own(tmp_path, x):
    """The file that is written makes no difference."""
    check(tmp_path, lambda: DataLoader(Noisy(x), batch_size=12))


VECTORIZED = {"num_particles": 2, "vectorize_particles": True}


@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")
@pytest.mark.parametrize(
    "loss",
    [
        Trace_ELBO(**VECTORIZED),
        TraceGraph_ELBO(**VECTORIZED),
        TraceEnum_ELBO(),
        RenyiELBO(**VECTORIZED),
        CombinedELBO([(Trace_ELBO(**VECTORIZED), 1.0)]),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_objectives_that_look_for_plates_when_they_are_first_called(tmp_path, x, loss):
    check(tmp_path, x, loss=loss, compile=False)


class Stateful:
    """Batches in an order that goes on from epoch to epoch, with a state of its own, as loaders of torchdata have."""

    def __init__(self, x):
        self.x, self.epoch = x, 0

    def __len__(self):
        return 3

    def __iter__(self):
        self.epoch += 1
        yield from [[i, (i + self.epoch) % 30, (i * self.epoch) % 30] for i in range(3)]

    def state_dict(self):
        return {"epoch": self.epoch}

    def load_state_dict(self, state):
        self.epoch = state["epoch"]


def test_a_sampler_with_a_state(tmp_path, x):
    check(tmp_path, lambda: DataLoader(TensorDataset(x), batch_sampler=Stateful(x)))


def test_a_loader_with_other_generators_is_refused(tmp_path, x):
    run(tmp_path / "l.pt", lambda: loader(x, "loader"), num_epochs=1)
    with pytest.raises(ValueError, match=r"l.pt is of another .*loaders/generators: expected none, got \['data"):
        run(tmp_path / "l.pt", lambda: loader(x, "none"), num_epochs=2)


SCHEDULERS = {
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.001, 0.01, step_size_up=3),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "steps": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3]),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.01, total_steps=6),
    "restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
    "function": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
}
OPTIMIZERS = ("Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "SGD")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(tmp_path, x, name):
    check(tmp_path, x, scheduler=SCHEDULERS[name], optimizer=lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_torch_and_what_is_no_state_of_theirs(tmp_path, x, name):
    options = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    optimizer = lambda p: getattr(torch.optim, name)(p, lr=0.001, **options)  # noqa: E731
    check(tmp_path, x, optimizer=optimizer)
    saved = read(tmp_path / "l.pt", "fit")
    moments = saved["optimizer"]["state"][0]
    moments[next(n for n, t in moments.items() if isinstance(t, torch.Tensor) and t.dim())] = torch.zeros(2)
    write(saved, tmp_path / "l.pt", "fit")
    with pytest.raises(ValueError, match=r"optimizer/state/0/\w+: expected \(.*, got \(2,\) of float32"):
        run(tmp_path / "l.pt", x, num_epochs=6, optimizer=optimizer)


class Slow(torch.optim.SGD):
    """Somebody's optimizer, with a value that comes only after some steps, and more in it than torch's own."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.01)
        self.after = 4

    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["count"] = self.state[p].get("count", 0) + 1
            if self.state[p]["count"] > self.after:
                self.state[p]["slow"] = p.detach().clone()


def test_an_optimizer_of_somebody_else(tmp_path, x):
    check(tmp_path, x, optimizer=Slow)


def test_a_state_that_cannot_be_read_back_is_refused_before_training(tmp_path, x):
    class Odd(torch.optim.lr_scheduler.ExponentialLR):
        def state_dict(self):
            return super().state_dict() | {"odd": object()}

    seen = []
    vae = linear_vae(2, 4)
    vae.likelihood.register_forward_hook(lambda *_: seen.append(vae.training and torch.is_grad_enabled()))
    before = [p.clone() for p in vae.parameters()]
    with pytest.raises(TypeError, match=r"checkpoint: schedule/odd: expected tensors, numbers, .*got object"):
        run(tmp_path / "l.pt", x, num_epochs=1, build=lambda: vae, scheduler=lambda o: Odd(o, 0.9))
    assert same(before, vae.parameters())
    assert list(tmp_path.iterdir()) == []
