import pytest
import torch
from torch import nn

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


def test_context_changes_the_output():
    decoder = ConvDecoder(2, [4], (6, 6), context_size=1)
    z = torch.randn(3, 2)
    assert not torch.equal(decoder(z, torch.zeros(3, 1)), decoder(z, torch.ones(3, 1)))


def test_errors_say_what_to_try():
    with pytest.raises(ValueError, match=r"end in shape \(784,\), got \(5, 28, 28\).*MLP\(in_shape=\(28, 28\)"):
        MLP(784, [3])(torch.zeros(5, 28, 28))
    with pytest.raises(ValueError, match=r"context of total width 0.*Try context_size=10"):
        MLP(4, [3])(torch.zeros(5, 4), torch.zeros(5, 10))
