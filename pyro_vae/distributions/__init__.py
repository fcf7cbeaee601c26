"""Families of conditional distributions, in the roles of prior p(z), likelihood p(x|z) and posterior q(z|x)."""

from pyro_vae.distributions.bounded import (
    ConditionalDirichlet,
    ConditionalGamma,
    ConditionalLogNormal,
    ConditionalTruncatedNormal,
)
from pyro_vae.distributions.conditional import Conditional
from pyro_vae.distributions.continuous import (
    ConditionalBeta,
    ConditionalContinuousBernoulli,
    ConditionalDelta,
    ConditionalNormal,
    ConditionalStudentT,
    LearnedScale,
)
from pyro_vae.distributions.discrete import (
    ConditionalBernoulli,
    ConditionalCategorical,
    ConditionalNegativeBinomial,
    ConditionalOneHotCategorical,
    ConditionalPoisson,
)
from pyro_vae.distributions.flows import ConditionalFlow
from pyro_vae.distributions.gaussians import MultivariateNormal
from pyro_vae.distributions.missing import ObservedPart
from pyro_vae.distributions.multivariate import ConditionalLowRankMultivariateNormal, ConditionalMultivariateNormal
from pyro_vae.distributions.priors import GaussianMixture, StandardNormal, VampPrior
from pyro_vae.distributions.products import ConditionalProduct
from pyro_vae.distributions.structure import Broadcasting, condition

__all__ = [
    "Broadcasting",
    "Conditional",
    "ConditionalBernoulli",
    "ConditionalBeta",
    "ConditionalCategorical",
    "ConditionalContinuousBernoulli",
    "ConditionalDelta",
    "ConditionalDirichlet",
    "ConditionalFlow",
    "ConditionalGamma",
    "ConditionalLogNormal",
    "ConditionalLowRankMultivariateNormal",
    "ConditionalMultivariateNormal",
    "ConditionalNegativeBinomial",
    "ConditionalNormal",
    "ConditionalOneHotCategorical",
    "ConditionalPoisson",
    "ConditionalProduct",
    "ConditionalStudentT",
    "ConditionalTruncatedNormal",
    "GaussianMixture",
    "LearnedScale",
    "MultivariateNormal",
    "ObservedPart",
    "StandardNormal",
    "VampPrior",
    "condition",
]
