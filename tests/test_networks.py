import math

import pytest
import torch
from torch import nn

from pyro_vae import VAE, fit
from pyro_vae.distributions import ConditionalBernoulli, ConditionalNormal, StandardNormal
from pyro_vae.networks import MLP, ConvDecoder, ConvEncoder


def test_mlp_is_the_composition_it_says(device):
    net = MLP((2, 3), [5, 4], activation=nn.Tanh).to(device)
    x = torch.randn(7, 2, 3, device=device)
    first, second = net.layers[0], net.layers[2]
    expected = torch.tanh(torch.tanh(x.flatten(1) @ first.weight.T + first.bias) @ second.weight.T + second.bias)
    torch.testing.assert_close(net(x), expected)
    assert net.out_features == 4


def test_mlp_without_hidden_layers_flattens_and_appends_context():
    net = MLP((2, 2), [], context_size=3)
    x, c = torch.randn(5, 2, 2), torch.randn(5, 3)
    torch.testing.assert_close(net(x, c), torch.cat([x.flatten(1), c], 1))
    assert net.out_features == 7


@pytest.mark.parametrize("size", [(28, 28), (8, 8), (7, 10), (5, 3)])
def test_conv_decoder_mirrors_the_encoder(size, device):
    encoder = ConvEncoder((2, *size), [4, 6], 9, context_size=3).to(device)
    decoder = ConvDecoder(9, [6, 4], size, context_size=3).to(device)
    c = torch.randn(5, 3, device=device)
    h = encoder(torch.randn(5, 2, *size, device=device), c)
    assert h.shape == (5, encoder.out_features)
    assert decoder(h, c).shape == (5, *decoder.out_features) == (5, 4, *size)


@pytest.mark.parametrize(
    ("kernel_size", "stride"), [(3, 1), (3, 2), (5, 2), (5, 3), (4, 2), (4, 4), (2, 1), (2, 2), (1, 1)]
)
def test_any_image_kernel_and_stride(kernel_size, stride):
    """The decoder's maps have the sizes of the encoder's, in the other order, as torch's own layers give them."""
    options = {"kernel_size": kernel_size, "stride": stride}
    for size in [(28, 28), (16, 9), (17, 31), (33, 12)]:
        encoder = ConvEncoder((2, *size), [3, 4], 5, **options)
        decoder = ConvDecoder(5, [4, 3], size, **options)
        x, sizes = torch.randn(2, 2, *size), [size]
        for layer in encoder.convolutions:
            x = layer(x)
            if isinstance(layer, nn.Conv2d):
                sizes.append(tuple(x.shape[2:]))
        back = [decoder._smallest[1:]]
        z = torch.randn(2, *decoder._smallest)
        for layer in decoder.convolutions:
            z = layer(z)
            if isinstance(layer, nn.ConvTranspose2d):
                back.append(tuple(z.shape[2:]))
        assert back == sizes[::-1]
        if kernel_size % 2:
            assert sizes[1] == tuple(math.ceil(n / stride) for n in size)
        assert decoder(encoder(torch.randn(2, 2, *size))).shape == (2, 3, *size)


def test_every_pixel_counts():
    """No pixel of an image is left out by the strides, and none of the decoder's is out of reach."""
    for kernel_size, stride, size in [(3, 2, (7, 10)), (4, 2, (8, 6)), (5, 3, (11, 13)), (3, 3, (7, 8))]:
        options = {"kernel_size": kernel_size, "stride": stride, "activation": nn.Identity}
        x = torch.randn(1, 1, *size, requires_grad=True)
        ConvEncoder((1, *size), [3], 4, **options)(x).sum().backward()
        assert (x.grad != 0).all() or kernel_size % 2 == 0
        decoder = ConvDecoder(4, [3], size, **options)
        first, second = (decoder(torch.randn(1, 4)) for _ in range(2))
        assert (first != second).all()


def test_options_are_torchs_layers():
    net = MLP(3, [5, 4], norm="layer", dropout=0.25)
    kinds = [nn.Linear, nn.LayerNorm, nn.ELU, nn.Dropout]
    assert [type(m) for m in net.layers] == 2 * kinds
    assert net.layers[3].p == 0.25
    assert [type(m) for m in MLP(3, [5], norm="batch").layers] == [nn.Linear, nn.BatchNorm1d, nn.ELU]
    encoder, decoder = (
        ConvEncoder((1, 8, 8), [4], 6, norm="batch", dropout=0.1),
        ConvDecoder(3, [4], (8, 8), norm="layer"),
    )
    assert [type(m) for m in encoder.convolutions] == [nn.Conv2d, nn.BatchNorm2d, nn.ELU, nn.Dropout2d]
    assert [type(m) for m in encoder.dense] == [nn.Linear, nn.BatchNorm1d, nn.ELU, nn.Dropout]
    assert [type(m) for m in decoder.dense] == [nn.Linear, nn.LayerNorm, nn.ELU]
    assert [type(m) for m in decoder.convolutions] == [nn.ConvTranspose2d, nn.GroupNorm, nn.ELU]


def test_layer_norm_keeps_rows_apart_and_dropout_is_off_in_evaluation():
    x = torch.randn(6, 1, 8, 8)
    net = ConvEncoder((1, 8, 8), [4], 5, norm="layer", dropout=0.5)
    assert not torch.equal(net(x), net(x))
    net.eval()
    torch.testing.assert_close(net(x)[2:3], net(x[2:3]))
    h = net.convolutions[1](net.convolutions[0](x))
    torch.testing.assert_close(h.flatten(1).mean(1), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(h.flatten(1).var(1, correction=0), torch.ones(6), atol=1e-3, rtol=0)


@pytest.mark.parametrize("norm", [None, "layer", "batch"])
def test_a_vae_of_them_trains(norm):
    options = {"norm": norm, "dropout": 0.1, "kernel_size": 4, "stride": 2}
    vae = VAE(
        StandardNormal(2),
        ConditionalBernoulli(ConvDecoder(2, [4, 3], (8, 10), **options), (1, 8, 10)),
        ConditionalNormal(ConvEncoder((1, 8, 10), [3, 4], 6, **options), 2),
    )
    x = torch.bernoulli(torch.full((40, 1, 8, 10), 0.3))
    result = fit(vae.model, vae.guide, x, num_epochs=20, batch_size=20, learning_rate=0.01, seed=0)
    assert result.loss[-1] < result.loss[0] - 1


def test_context_changes_the_output():
    decoder = ConvDecoder(2, [4], (6, 6), context_size=1)
    z = torch.randn(3, 2)
    assert not torch.equal(decoder(z, torch.zeros(3, 1)), decoder(z, torch.ones(3, 1)))


def test_errors_say_what_to_try():
    with pytest.raises(ValueError, match=r"end in shape \(784,\), got \(5, 28, 28\).*MLP\(in_shape=\(28, 28\)"):
        MLP(784, [3])(torch.zeros(5, 28, 28))
    with pytest.raises(ValueError, match=r"context of total width 0.*Try context_size=10"):
        MLP(4, [3])(torch.zeros(5, 4), torch.zeros(5, 10))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP(3, [4], norm="group"), 'MLP: expected norm=None, "layer" or "batch", got \'group\''),
        (lambda: MLP(3, [4], norm=nn.LayerNorm), "MLP: expected norm=None"),
        (lambda: MLP(3, [4], dropout=1.0), "MLP: dropout: expected a probability between 0 and 1, got 1.0"),
        (lambda: ConvEncoder((1, 8, 8), [4], 3, stride=4), "expected 1 <= stride <= kernel_size.*Try kernel_size=7"),
        (lambda: ConvEncoder((8, 8), [4], 3), r"expected in_shape=\(channels, height, width\), got \(8, 8\)"),
        (lambda: ConvEncoder((1, 5, 9), [4, 4, 4], 3, kernel_size=4), r"got \(5, 9\), of which 2 leave \(1, 2\)"),
        (
            lambda: ConvDecoder(2, [4, 4], (2, 2), kernel_size=4),
            r"got \(2, 2\), of which 1 leave \(1, 1\)",
        ),
        (lambda: ConvDecoder(2, [], (2, 2)), "ConvDecoder: expected at least one channel count"),
        (lambda: ConvDecoder(2, [4], (1, 2, 2)), r"out_size=\(height, width\), got .*\(1, 2, 2\)"),
    ],
)
def test_options_that_do_not_work_out(make, message):
    with pytest.raises(ValueError, match=message):
        make()
