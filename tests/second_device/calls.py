"""A call of every public function, that gives what it returns on a device."""

import tempfile
import warnings
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from contract.families import ANY_SHAPE, VECTORS
from pairs_on import On
from pyro.infer import MCMC, NUTS, SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from torch.distributions import kl_divergence

import pyro_vae
from pyro_vae import diagnostics, evidence, guides, objectives, plots
from pyro_vae.checkpoint import load_weights, save_weights
from pyro_vae.integrations.sampler_statistics import with_statistics
from pyro_vae.networks import MLP, ConvDecoder, ConvEncoder, MaskedInput

K = {"num_particles": 40, "seed": 0}
QUIET = K | {"progress": False}
ANNEALED = {"num_temperatures": 3, "num_leapfrog": 2, "num_particles": 8}


def stepped(on, elbo, pair=None, steps=3, **options):
    """Losses and parameters after steps of Pyro's own SVI."""
    model, guide, *data = pair or on.plain()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=elbo)
    losses = [svi.step(*data, **options) for _ in range(steps)]
    return losses, dict(pyro.get_param_store().items())


def fitted(on, pair=None, **options):
    model, guide, *data = pair or on.plain()
    options = {"num_epochs": 2, "batch_size": 5, "seed": 0, "progress": False, "compile": False} | options
    result = pyro_vae.fit(model, guide, *data, **options)
    return result.loss, result.validation_loss, dict(pyro.get_param_store().items())


def fit_moved(on):
    """Data and modules of the CPU."""
    vae, cpu = On("cpu").vae(), On("cpu").images()
    data = {"batch_size": 5, "validation_data": cpu, "progress": False}
    pyro_vae.fit(vae.model, vae.guide, cpu, num_epochs=2, seed=0, compile=False, device=on.device, **data)
    return vae, vae.generate(2, seed=0)


def fit_resumed(on):
    """Interrupted after two epochs, with weights that were best."""

    def run(folder, stop):
        def decay(epoch):
            if epoch == stop:
                raise KeyboardInterrupt
            return 0.9**epoch

        vae, x = on.vae(), on.images()
        options = {"batch_size": 5, "checkpoint": f"{folder}/fit.pt", "seed": 0, "progress": False, "patience": 3}
        schedule = lambda optim: torch.optim.lr_scheduler.LambdaLR(optim, decay)  # noqa: E731
        pyro_vae.fit(vae.model, vae.guide, x, num_epochs=4, validation_data=x, scheduler=schedule, **options)
        return vae

    with tempfile.TemporaryDirectory() as folder, mock.patch("pyro_vae.training.resume.SECONDS_BETWEEN", 0.0):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fit: interrupted")
            run(folder, 2)
        pyro.clear_param_store()
        return run(folder, None)


def of_vae(on, method, *args, **options):
    return getattr(on.vae(), method)(*args, **options)


def vae_pair(on):
    vae = on.vae()
    return vae.model, vae.guide, on.images()


def layers(on):
    both = [on.vae(), on.vae(1, 2, name="second")]
    both[1].likelihood = on.made(lambda: pyro_vae.distributions.ConditionalNormal(MLP(1, [4]), 2))
    return both


def fit_layers(on):
    both = layers(on)
    pyro_vae.fit_layers(both, on.images(), num_epochs=1, seed=0, progress=False, compile=False)
    return both


def stack(on):
    vae = pyro_vae.stack(layers(on))
    return vae, vae.generate(3, seed=0), pyro_vae.importance_sampling(vae.model, vae.guide, on.images(), **QUIET)


def checkpoint(on):
    first, second = on.vae(), on.vae()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        save_weights(first, f"{folder}/w.pt")
        for p in second.parameters():
            p.zero_()
        load_weights(second, f"{folder}/w.pt")
    return second


def tree(found):
    """The arrays of an ArviZ tree."""
    groups = found.groups() if callable(found.groups) else found.groups
    return [
        {str(n): torch.from_numpy(np.array(v.values)) for n, v in found[g].data_vars.items() if v.dtype.kind in "fiub"}
        for g in sorted(g for g in groups if g != "/")
    ]


def from_pyro(on):
    model, _, x = on.hierarchical()
    mcmc = MCMC(with_statistics(NUTS(model)), num_samples=3, warmup_steps=2, disable_progbar=True)
    mcmc.run(x)
    return tree(pyro_vae.from_pyro(mcmc, num_particles=20, seed=0, progress=False))


def drawn(function):
    """A plot, which returns no tensors: it must only work."""

    def call(on):
        function(on)
        plt.close("all")

    return call


def decoder(on):
    vae = on.vae()
    return lambda z: vae.decode(z).mean.detach()


def networks(on):
    x, c = on.normal(5, 1, 8, 8), on.normal(5, 3)
    return {
        "MLP": on.made(lambda: MLP((4, 4), [5], context_size=3))(on.normal(5, 4, 4), c),
        "ConvEncoder": on.made(lambda: ConvEncoder((1, 8, 8), [4, 6], 9, context_size=3))(x, c),
        "ConvDecoder": on.made(lambda: ConvDecoder(9, [6, 4], (8, 8), context_size=3))(on.normal(5, 9), c),
        "MaskedInput": on.made(lambda: MaskedInput(MLP(6, [4])))(on.normal(5, 3).log()),
    }


def log_likelihood(on):
    return on.normal(50, 12)


def integrated(on):
    return pyro_vae.integrated_log_likelihood(*on.hierarchical(), num_samples=10, num_particles=10, seed=0)


def missing(on, **options):
    vae, x = on.vae(shape=(1, 4, 4)), on.images().unsqueeze(1)
    vae.likelihood = pyro_vae.distributions.ObservedPart(vae.likelihood)
    vae.posterior = on.made(lambda: pyro_vae.distributions.ConditionalNormal(MaskedInput(MLP((2, 4, 4), [8])), 2))
    x[0, 0, 1, 2] = torch.nan
    return pyro_vae.impute(vae.model, vae.guide, x, **(options or K | {"num_draws": 3}))


def reduce(on, name, **options):
    return getattr(evidence, name)(*on.plain(), **QUIET | options)


def refined(on, pair, rows=(3, 1)):
    model, _, x = pair
    guide = pyro_vae.refine(*pair, **QUIET, num_steps=2)
    drawn = None if rows is None else pyro_vae.draw_particles(model, guide, x[list(rows)], **K)
    return guide, guide.gap, guide.gap_error, guide.kept, drawn


def amortized(on, kind):
    return [fitted(on, on.amortized(kind), num_epochs=1), pyro_vae.draw_particles(*on.amortized(kind), **K)]


def quantiles(on):
    """Of bounded latents too, whose bounds are on the device."""
    pairs = [on.amortized("full"), on.amortized("full", on.bounded())]
    return [[guide.quantiles([0.1, 0.5], x), guide.median(x)] for _, guide, x in pairs]


def sbc(on, name, **options):
    return getattr(diagnostics, name)(*on.plain(), seed=0, progress=False, num_simulations=20, num_draws=10, **options)


CALLS = {
    # models
    "VAE.encode": lambda on: of_vae(on, "encode", on.images()).scale_tril,
    "VAE.decode": lambda on: of_vae(on, "decode", on.normal(3, 2)).mean,
    "VAE.generate": lambda on: of_vae(on, "generate", 3, seed=0),
    "VAE.reconstruct": lambda on: of_vae(on, "reconstruct", on.images(), seed=0),
    "VAE.similar": lambda on: of_vae(on, "similar", on.images(), size=2, seed=0),
    "VAE.frozen": lambda on: of_vae(on, "frozen").encode(on.images()).mean,
    "fit_layers": fit_layers,
    "stack": stack,
    # training
    "fit": lambda on: [fitted(on), fitted(on, vae_pair(on), validation_data=on.images(), clip_norm=1.0)],
    "fit, enumerated": lambda on: fitted(on, on.enumerated(), loss=TraceEnum_ELBO()),
    "fit, globals": lambda on: fitted(on, on.hierarchical(), batch_size=12),
    "fit, compiled": lambda on: fitted(on, compile=True, num_epochs=4, batch_size=4),
    "fit, moved": fit_moved,
    "fit, resumed": fit_resumed,
    "fit, RenyiELBO": lambda on: fitted(on, loss=RenyiELBO(num_particles=2)),
    "fit, arrays": lambda on: fitted(on, (*vae_pair(on)[:2], on.images().cpu().numpy())),
    "VAE.model, total": lambda on: stepped(on, Trace_ELBO(), (*vae_pair(on)[:2], on.images()), total=100),
    # objectives
    "BetaELBO": lambda on: stepped(on, objectives.BetaELBO(4.0), vae_pair(on)),
    "CombinedELBO": lambda on: stepped(
        on, objectives.CombinedELBO([(Trace_ELBO(), 1.0), (objectives.ForwardKL(), objectives.linear(5))])
    ),
    "DenoisingELBO": lambda on: stepped(on, objectives.DenoisingELBO(objectives.gaussian_noise(0.1))),
    "DenoisingELBO, masking": lambda on: stepped(on, objectives.DenoisingELBO(objectives.masking_noise(0.3))),
    "DenoisingELBO, salt": lambda on: stepped(on, objectives.DenoisingELBO(objectives.salt_and_pepper_noise(0.3))),
    "ForwardKL": lambda on: stepped(on, objectives.ForwardKL(3)),
    "ImportanceWeightedELBO": lambda on: stepped(on, objectives.ImportanceWeightedELBO(5)),
    "ImportanceWeightedELBO, counts": lambda on: stepped(on, objectives.ImportanceWeightedELBO(5), on.counts()),
    "CompiledELBO, number": lambda on: stepped(
        on, pyro_vae.CompiledELBO(Trace_ELBO(), backend="eager"), (*on.plain(), 0.7), steps=5
    ),
    "CompiledELBO": lambda on: stepped(on, pyro_vae.CompiledELBO(Trace_ELBO()), vae_pair(on), steps=6),
    "CompiledELBO, one by one": lambda on: stepped(on, pyro_vae.CompiledELBO(TraceGraph_ELBO(), backend="eager")),
    "CompiledELBO, enumerated": lambda on: stepped(
        on, pyro_vae.CompiledELBO(TraceEnum_ELBO(), backend="eager"), on.enumerated(), steps=5
    ),
    # particles
    "draw_particles": lambda on: pyro_vae.draw_particles(*on.plain(), **K),
    "draw_particles, one by one": lambda on: pyro_vae.draw_particles(*on.plain(), **K, parallel=False),
    "draw_particles, enumerated": lambda on: pyro_vae.draw_particles(*on.enumerated(), **K),
    "impute": missing,
    "impute, given draws": lambda on: missing(on, draws={"z": on.normal(6, 12, 2)}),
    "simulate": lambda on: pyro_vae.simulate(*on.plain(), seed=0),
    # evidence
    "importance_sampling": lambda on: [
        reduce(on, "importance_sampling", **options)
        for options in ({}, {"defensive": 0.3}, {"smooth": True}, {"correction": "jackknife"}, {"compile": True})
    ],
    "importance_sampling, enumerated": lambda on: pyro_vae.importance_sampling(*on.enumerated(), **QUIET),
    "importance_sampling, jointly": lambda on: pyro_vae.importance_sampling(*on.hierarchical(), plate=None, **QUIET),
    "importance_sampling, subsampled": lambda on: pyro_vae.importance_sampling(*on.subsampled(), **QUIET),
    "prior_sampling": lambda on: reduce(on, "prior_sampling"),
    "adaptive_importance_sampling": lambda on: reduce(on, "adaptive_importance_sampling"),
    "annealed_importance_sampling": lambda on: [
        reduce(on, "annealed_importance_sampling", **ANNEALED, start=start, schedule=schedule)
        for start, schedule in (("guide", "sigmoid"), ("adapted", "adaptive"), ("prior", "linear"))
    ],
    "sandwich": lambda on: pyro_vae.sandwich(*on.plain(), **QUIET | ANNEALED),
    "compare": lambda on: vars(pyro_vae.compare({n: reduce(on, n) for n in ("prior_sampling", "importance_sampling")})),
    "draw_posterior": lambda on: [
        pyro_vae.draw_posterior(*on.plain(), num_samples=20, method=method, **QUIET)
        for method in ("adaptive", "importance")
    ],
    "draw_posterior, jointly": lambda on: pyro_vae.draw_posterior(*on.hierarchical(), num_samples=20, **QUIET),
    "integrated_log_likelihood": integrated,
    "integrated_log_likelihood, given draws": lambda on: pyro_vae.integrated_log_likelihood(
        *on.hierarchical(),
        draws={"mean": on.normal(9), "spread": on.normal(9).exp(), "z": on.normal(9, 12)},
        num_particles=10,
        seed=0,
    ),
    "prior_sampling, correlations": lambda on: pyro_vae.prior_sampling(*on.correlated(), **QUIET),
    "refine": lambda on: refined(on, on.plain()),
    "refine, amortized": lambda on: refined(on, on.amortized("full")),
    "refine, globals": lambda on: refined(on, on.hierarchical(), rows=None),
    "pareto_khat": lambda on: evidence.pareto_khat(on.normal(200, 3)),
    # guides
    "AmortizedNormal": lambda on: amortized(on, "diagonal"),
    "AmortizedMultivariateNormal": lambda on: amortized(on, "full"),
    "AmortizedFlow": lambda on: amortized(on, "flow"),
    "quantiles": quantiles,
    "KL": lambda on: [
        kl_divergence(*(on.made(lambda: VECTORS["low-rank normal"](4))(on.normal(5, 3) + i) for i in range(2))),
        kl_divergence(
            on.made(lambda: ANY_SHAPE["multivariate normal"](4))(on.normal(5, 3)),
            on.made(lambda: VECTORS["low-rank normal"](4))(on.normal(5, 3)),
        ),
    ],
    # diagnostics
    "simulation_based_calibration": lambda on: sbc(on, "simulation_based_calibration"),
    "expected_coverage": lambda on: sbc(on, "expected_coverage"),
    "posterior_calibration": lambda on: sbc(on, "posterior_calibration", num_particles=40),
    "doubtful_rows": lambda on: diagnostics.doubtful_rows(*on.plain(), num_simulated=40, **QUIET),
    "inference_gaps": lambda on: diagnostics.inference_gaps(*on.plain(), num_steps=3, **QUIET),
    "latent_usage": lambda on: pyro_vae.latent_usage(*vae_pair(on), **K),
    "leave_one_out": lambda on: diagnostics.leave_one_out(log_likelihood(on), on.normal(50)),
    "log_predictive": lambda on: diagnostics.log_predictive(log_likelihood(on)),
    # networks, files, pictures, bridges
    "networks": networks,
    "save_weights": checkpoint,
    "plot_training": drawn(lambda on: plots.plot_training(fitted(on)[0])),
    "plot_images": drawn(lambda on: plots.plot_images(on.images(4)[None])),
    "plot_traversal": drawn(lambda on: plots.plot_traversal(decoder(on), on.normal(2))),
    "plot_interpolation": drawn(
        lambda on: plots.plot_interpolation(decoder(on), on.normal(2, 2), on.normal(2, 2), num=3)
    ),
    "plot_latent_usage": drawn(lambda on: plots.plot_latent_usage(on.normal(3).abs(), on.normal(3) > 0)),
    "plot_embedding": drawn(lambda on: plots.plot_embedding(on.normal(9, 2), on.tensor([0, 1, 2] * 3))),
    "plot_khat": drawn(lambda on: plots.plot_khat(on.normal(9))),
    "from_pyro_svi": lambda on: [
        tree(pyro_vae.from_pyro_svi(*pair, num_samples=10, num_particles=10, seed=0, progress=False, **options))
        for pair, options in (
            (on.plain(), {}),
            (on.plain(), {"resample": True}),
            (on.enumerated(), {}),
            (on.hierarchical(), {}),
        )
    ],
    "from_pyro": from_pyro,
}
# results that other functions return, and names that stand in the calls above
COVERED = {
    *("VAE", "Comparison", "Evidence", "FitResult", "LatentUsage", "Particles", "Simulation", "Sandwich"),
    *("LogLikelihood", "PosteriorDraws", "RefinedGuide", "Calibration", "Coverage", "DoubtfulRows", "InferenceGaps"),
    *("LeaveOneOut", "load_weights", "MLP", "ConvEncoder", "ConvDecoder", "MaskedInput"),
    *("cyclical", "linear", "gaussian_noise", "masking_noise", "salt_and_pepper_noise"),  # functions of numbers
}
PUBLIC = {
    *(pyro_vae.__all__ + evidence.__all__ + guides.__all__ + objectives.__all__ + diagnostics.__all__ + plots.__all__),
    *("save_weights", "load_weights", "MLP", "ConvEncoder", "ConvDecoder", "MaskedInput"),
    *(pyro_vae.particles.__all__ + pyro_vae.models.__all__ + pyro_vae.training.__all__),
}
