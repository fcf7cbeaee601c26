"""Every family of conditional distributions. A new one costs one line here, for all laws of `test_families`."""

from pyro.distributions.transforms import (
    affine_autoregressive,
    affine_coupling,
    conditional_affine_autoregressive,
    spline_coupling,
)
from torch import nn, rand

from pyro_vae.distributions import (
    ConditionalBernoulli,
    ConditionalBeta,
    ConditionalCategorical,
    ConditionalContinuousBernoulli,
    ConditionalDelta,
    ConditionalDirichlet,
    ConditionalFlow,
    ConditionalGamma,
    ConditionalLogNormal,
    ConditionalLowRankMultivariateNormal,
    ConditionalMultivariateNormal,
    ConditionalNegativeBinomial,
    ConditionalNormal,
    ConditionalOneHotCategorical,
    ConditionalPoisson,
    ConditionalProduct,
    ConditionalStudentT,
    ConditionalTruncatedNormal,
    GaussianMixture,
    LearnedScale,
    ObservedPart,
    StandardNormal,
    VampPrior,
)
from pyro_vae.networks import MLP

INPUTS = 3


def net(width=8):
    return MLP(INPUTS, [width])


# over events of any shape
ANY_SHAPE = {
    "normal": lambda shape: ConditionalNormal(net(), shape),
    "normal, fixed scale": lambda shape: ConditionalNormal(net(), shape, scale=0.5),
    "normal, shared scale": lambda shape: ConditionalNormal(net(), shape, scale=LearnedScale()),
    "normal, scale each": lambda shape: ConditionalNormal(net(), shape, scale=LearnedScale(shape)),
    "multivariate normal": lambda shape: ConditionalMultivariateNormal(net(), shape),
    "student t": lambda shape: ConditionalStudentT(net(), shape, df=9.0),
    "student t, df from the network": lambda shape: ConditionalStudentT(net(), shape),
    "beta": lambda shape: ConditionalBeta(net(), shape),
    "log-normal": lambda shape: ConditionalLogNormal(net(), shape, scale=0.25),  # of a variance that draws show
    "gamma": lambda shape: ConditionalGamma(net(), shape),
    "gamma, fixed concentration": lambda shape: ConditionalGamma(net(), shape, concentration=3.0),
    "truncated normal": lambda shape: ConditionalTruncatedNormal(net(), shape, low=-0.5, high=1.5),
    "truncated normal, low end": lambda shape: ConditionalTruncatedNormal(net(), shape, low=0.5),
    "truncated normal, high end": lambda shape: ConditionalTruncatedNormal(net(), shape, high=-rand(shape), scale=0.7),
    "continuous bernoulli": lambda shape: ConditionalContinuousBernoulli(net(), shape),
    "bernoulli": lambda shape: ConditionalBernoulli(net(), shape),
    "poisson": lambda shape: ConditionalPoisson(net(), shape),
    "negative binomial": lambda shape: ConditionalNegativeBinomial(net(), shape),
    "negative binomial, fixed count": lambda shape: ConditionalNegativeBinomial(net(), shape, total_count=4.0),
    "categorical": lambda shape: ConditionalCategorical(net(), shape, num_categories=5),
    "delta": lambda shape: ConditionalDelta(net(), shape),
    "observed part": lambda shape: ObservedPart(ConditionalNormal(net(), shape)),
}
# over vectors
VECTORS = {
    "low-rank normal": lambda d: ConditionalLowRankMultivariateNormal(net(), d, rank=2),
    "dirichlet": lambda d: ConditionalDirichlet(net(), d),
    "one-hot categorical": lambda d: ConditionalOneHotCategorical(net(), d),
    "flow": lambda d: ConditionalFlow(ConditionalNormal(net(), d), [affine_autoregressive(d, [8])]),
    "flow, inverted": lambda d: ConditionalFlow(ConditionalNormal(net(), d), [affine_autoregressive(d, [8]).inv]),
    "flow, conditional": lambda d: ConditionalFlow(
        ConditionalNormal(net(), d), [conditional_affine_autoregressive(d, 8, [8])], network=net()
    ),
    "flow, coupled": lambda d: ConditionalFlow(ConditionalNormal(net(), d), [affine_coupling(d, [8])]),
    "flow, splines": lambda d: ConditionalFlow(ConditionalNormal(net(), d), [spline_coupling(d, hidden_dims=[8])]),
    "product": lambda d: ConditionalProduct(ConditionalNormal(net(), d - 3), ConditionalPoisson(net(), 3)),
    "product, one network": lambda d: shared(d),
    "observed part of a product": lambda d: ObservedPart(shared(d)),
}
# of vectors, called with nothing
PRIORS = {
    "standard normal": lambda d: StandardNormal(d),
    "normal without a network": lambda d: ConditionalNormal(None, d),
    "multivariate normal without a network": lambda d: ConditionalMultivariateNormal(None, d),
    "gaussian mixture": lambda d: GaussianMixture(3, d),
    "vamp prior": lambda d: WithPosterior(d),
    "flow of a prior": lambda d: ConditionalFlow(StandardNormal(d), [affine_autoregressive(d, [8])]),
}

WITHOUT_MEAN = {name for name in [*VECTORS, *PRIORS] if "flow" in name} | {"categorical"}
WITHOUT_PARAMETERS = {"standard normal"}
INVERTED_BY_PYRO = {"flow", "flow, inverted", "flow of a prior"}  # which does so in torch's default dtype
WITHOUT_DENSITY = {"delta"}  # its log-probability is 0 or −∞


def shared(d):
    """A product whose parts share one network."""
    network = net()
    return ConditionalProduct(
        ConditionalNormal(network, d - 3), ConditionalPoisson(network, 2), ConditionalBernoulli(network, 1)
    )


class WithPosterior(nn.Module):
    """A VampPrior beside the posterior that it shares, as in a VAE."""

    def __init__(self, d):
        super().__init__()
        self.posterior = ConditionalNormal(net(), d)
        self.prior = VampPrior(self.posterior, rand(4, INPUTS))

    def forward(self):
        return self.prior()
