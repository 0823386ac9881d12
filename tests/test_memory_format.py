"""The order of activations in memory while a network trains."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from entprune.memory_format import lay_out, thin_norms_by_channel


def make_network(num_channels: int, *, size: int = 8, inplace: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, num_channels, size if size == 1 else 3, bias=False),
        nn.BatchNorm2d(num_channels),
        nn.ReLU(inplace=inplace),
        nn.Conv2d(num_channels, 4, 1),
    )


def seen_by_norm(network: nn.Sequential, images: Tensor) -> list[Tensor]:
    """What the normalisation and the layer behind it read, then the gradients of what the first two layers give."""
    seen: list[Tensor] = []
    handles = [
        network[1].register_forward_hook(lambda _, given, __: seen.append(given[0])),
        network[2].register_forward_pre_hook(lambda _, given: seen.append(given[0].detach())),
        network[1].register_full_backward_pre_hook(lambda _, gradients: seen.append(gradients[0])),
        network[0].register_full_backward_pre_hook(lambda _, gradients: seen.append(gradients[0])),
    ]
    network(images).square().sum().backward()
    for handle in handles:
        handle.remove()
    return seen


def is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


def test_a_thin_norm_works_channel_by_channel_between_layers_in_channels_last() -> None:
    network = lay_out(make_network(7, inplace=False), torch.channels_last)
    images = torch.randn(5, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    with thin_norms_by_channel(network, torch.channels_last):
        read, passed_on, _, gradient = seen_by_norm(network, images)
    assert read.is_contiguous()
    assert is_channels_last(passed_on)
    assert is_channels_last(gradient)


@pytest.mark.parametrize("num_channels", [16, 32, 48, 65])
def test_other_norms_are_left_alone(num_channels: int) -> None:
    network = make_network(num_channels)
    with thin_norms_by_channel(network, torch.channels_last):
        assert not network[1]._forward_hooks
        assert not network[1]._forward_pre_hooks


def test_a_network_in_the_ordinary_order_is_left_alone() -> None:
    network = make_network(7)
    with thin_norms_by_channel(network, torch.contiguous_format):
        assert not network[1]._forward_hooks


def test_hooks_are_gone_after_an_error() -> None:
    network = make_network(7)
    with pytest.raises(RuntimeError), thin_norms_by_channel(network, torch.channels_last):
        network(torch.zeros(2, 5, 8, 8))
    assert not network[1]._forward_hooks
    assert not network[1]._forward_pre_hooks


@pytest.mark.parametrize("size", [1, 8])  # at 1 both orders are the same, and the layer behind works in place
def test_gradients_are_those_of_the_plain_network(size: int) -> None:
    plain = make_network(7, size=size).double()
    network = lay_out(copy.deepcopy(plain), torch.channels_last)
    images = torch.randn(6, 3, size, size, dtype=torch.float64)
    with thin_norms_by_channel(network, torch.channels_last):
        found = network(images.contiguous(memory_format=torch.channels_last))
        found.square().sum().backward()
    expected = plain(images)
    expected.square().sum().backward()
    torch.testing.assert_close(found, expected, check_stride=False)
    for parameter, reference in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad, check_stride=False)
    for name, value in plain[1].named_buffers():
        torch.testing.assert_close(network[1].get_buffer(name), value)


class Named(nn.Module):
    """Hands its input over by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)

    def forward(self, images: Tensor) -> Tensor:
        normalised: Tensor = self.norm(input=self.conv(images))
        return normalised


def test_a_norm_called_by_name_still_works() -> None:
    network, images = Named(), torch.randn(4, 3, 6, 6)
    expected = copy.deepcopy(network)(images)
    with thin_norms_by_channel(network, torch.channels_last):
        torch.testing.assert_close(network(images), expected, check_stride=False)
