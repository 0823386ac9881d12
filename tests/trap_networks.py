"""Micro-networks with one trap each, and the channel sets written down by hand.

Every set maps a group's name to its rows: for each layer that the group touches, the positions of each of its channels.
Inputs are (n, 2, 6, 6) images unless the trap says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.convnext import LayerNorm2d

from entprune.models.resnet import PaddedShortcut

Rows = list[list[int]]


class Net(nn.Module):
    """Layers by name and a forward pass given as a function."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._forward = forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


class TwoInputs(Net):
    """The same with a second input."""

    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return self._forward(self, x, y)


@dataclass(frozen=True)
class Trap:
    """A network and what must come out.

    Attributes:
        build: makes the network.
        expected: rows of each layer of each group.
        refused: layers of which outputs stay, each with a part of the reason.
    """

    build: Callable[[], nn.Module]
    expected: dict[str, dict[str, Rows]]
    refused: dict[str, str]


def conv(inputs: int, outputs: int, size: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def one(count: int, start: int = 0) -> Rows:
    """Channel i lies at position start + i."""
    return [[start + position] for position in range(count)]


OUT = "the network's outputs"


def head(m: Any, x: Tensor) -> Tensor:
    return m.fc(torch.relu(x).mean((2, 3)))


def glu() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        value, gate = m.wide(x).chunk(2, dim=1)
        return head(m, value * torch.sigmoid(gate))

    return Net(forward, wide=conv(2, 8), fc=nn.Linear(4, 3))


def shuffle() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.relu(m.first(x))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return head(m, x)

    return Net(forward, first=conv(2, 6), fc=nn.Linear(6, 3))


def depthwise() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return head(m, m.depth(torch.relu(m.first(x))))

    return Net(forward, first=conv(2, 4), depth=conv(4, 8, 3, groups=4), fc=nn.Linear(8, 3))


def grouped() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return head(m, m.grouped(torch.relu(m.first(x))))

    return Net(forward, first=conv(2, 6), grouped=conv(6, 3, 3, groups=3), fc=nn.Linear(3, 3))


def squeeze_excitation() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.relu(m.first(x))
        scale = m.up(torch.relu(m.down(F.adaptive_avg_pool2d(x, 1))))
        return head(m, x * torch.sigmoid(scale))

    return Net(forward, first=conv(2, 6), down=conv(6, 3), up=conv(3, 6), fc=nn.Linear(6, 3))


def option_a() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.relu(m.stem(x))
        return head(m, m.main(x) + m.shortcut(x))

    return Net(forward, stem=conv(2, 3), main=conv(3, 7), shortcut=PaddedShortcut(1, 3, 7), fc=nn.Linear(7, 3))


def option_a_by_hand() -> nn.Module:
    """The padding is written into the code: what lies in it cannot go, the padded channels can."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.relu(m.stem(x))
        return head(m, m.main(x) + F.pad(x, (0, 0, 0, 0, 2, 2)))

    return Net(forward, stem=conv(2, 3), main=conv(3, 7), fc=nn.Linear(7, 3))


def doubled_by_zeros() -> nn.Module:
    """Channels concatenated with as many zeros, which shrink with them."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.relu(m.stem(x))
        return head(m, m.main(x) + torch.cat((x, x.mul(0)), 1))

    return Net(forward, stem=conv(2, 3), main=conv(3, 6), fc=nn.Linear(6, 3))


def channels_last() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(m.first(x).permute(0, 2, 3, 1))
        y = m.point2(F.gelu(m.point1(y))).permute(0, 3, 1, 2)
        return head(m, m.last_norm(y))

    return Net(
        forward, first=conv(2, 4, 3), norm=nn.LayerNorm(4), point1=nn.Linear(4, 5), point2=nn.Linear(5, 6),
        last_norm=LayerNorm2d(6), fc=nn.Linear(6, 3),
    )  # fmt: skip


def layer_scale() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.relu(m.stem(x))
        return head(m, x + m.scale * m.inner(x))

    scale = nn.Parameter(torch.rand(5, 1, 1))
    return Net(forward, stem=conv(2, 5), inner=conv(5, 5, 3), scale=scale, fc=nn.Linear(5, 3))


def group_norms() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.relu(m.wide_norm(m.first(x)))
        return head(m, m.narrow_norm(m.second(x)))

    return Net(
        forward, first=conv(2, 6), wide_norm=nn.GroupNorm(2, 6), second=conv(6, 6), narrow_norm=nn.GroupNorm(3, 6),
        fc=nn.Linear(6, 3),
    )  # fmt: skip


def called_twice() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return head(m, m.again(torch.relu(m.again(torch.relu(m.first(x))))))

    return Net(forward, first=conv(2, 4), again=conv(4, 4), fc=nn.Linear(4, 3))


def tied_weights() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return head(m, m.two(torch.relu(m.one(torch.relu(m.first(x))))))

    net = Net(forward, first=conv(2, 4), one=conv(4, 4), two=conv(4, 4), fc=nn.Linear(4, 3))
    net.two.weight = net.one.weight  # type: ignore[union-attr,assignment]
    return net


def flat_concat() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.cat([m.left(x), m.right(x)], 1), 3)
        return m.fc(torch.flatten(x, 1))

    return Net(forward, left=conv(2, 2), right=conv(2, 3), fc=nn.Linear(20, 3))


def flipped() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return head(m, m.one(x).flip(1) + m.two(x))

    return Net(forward, one=conv(2, 4), two=conv(2, 4), fc=nn.Linear(4, 3))


def spatial_gate() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.relu(m.first(x))
        return head(m, x * torch.sigmoid(m.gate(x)))

    return Net(forward, first=conv(2, 4), gate=conv(4, 1, 3), fc=nn.Linear(4, 3))


def pixel_shuffle() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return head(m, F.pixel_shuffle(m.first(x), 2))

    return Net(forward, first=conv(2, 8), fc=nn.Linear(2, 3))


def auxiliary_head() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Any:
        x = torch.relu(m.first(x))
        return (head(m, x), m.aux(x.mean((2, 3)))) if m.training else head(m, x)

    return Net(forward, first=conv(2, 4), aux=nn.Linear(4, 3), fc=nn.Linear(4, 3))


def two_outputs() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Any:
        x = m.first(x)
        return {"logits": head(m, m.second(torch.relu(x))), "features": x}

    return Net(forward, first=conv(2, 4), second=conv(4, 5), fc=nn.Linear(5, 3))


def unequal_split() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        small, large = torch.split(m.first(x), [2, 4], dim=1)
        return head(m, m.second(torch.relu(large))) + small.mean((2, 3)).sum(1, keepdim=True)

    return Net(forward, first=conv(2, 6), second=conv(4, 5), fc=nn.Linear(5, 3))


def prelu() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return head(m, m.slope(m.first(x)))

    return Net(forward, first=conv(2, 4), slope=nn.PReLU(4), fc=nn.Linear(4, 3))


_PAIRS = [[0, 3], [1, 4], [2, 5]]

TRAPS: dict[str, Trap] = {
    "chunk, gated": Trap(
        glu, {"wide": {"wide": [[i, i + 4] for i in range(4)], "fc": one(4)}}, {"fc": OUT}
    ),
    "channel shuffle": Trap(
        shuffle, {"first": {"first": _PAIRS, "fc": [[0, 1], [2, 3], [4, 5]]}}, {"fc": OUT}
    ),
    "depthwise with multiplier": Trap(
        depthwise, {"first": {"first": one(4), "depth": [[2 * i, 2 * i + 1] for i in range(4)],
                              "fc": [[2 * i, 2 * i + 1] for i in range(4)]}}, {"fc": OUT}
    ),
    "grouped convolution": Trap(
        grouped, {"first": {"first": [[0, 1], [2, 3], [4, 5]], "grouped": one(3), "fc": one(3)}}, {"fc": OUT}
    ),
    "squeeze and excitation": Trap(
        squeeze_excitation,
        {
            "first": {"first": one(6), "down": one(6), "up": one(6), "fc": one(6)},
            "down": {"down": one(3), "up": one(3)},
        },
        {"fc": OUT},
    ),
    "option A shortcut": Trap(
        option_a,
        {
            "stem": {"stem": one(3), "main<": one(3), "main": one(3, 2), "shortcut<": one(3), "shortcut": one(3, 2),
                     "fc": one(3, 2)},
            "main": {"main": [[0], [1], [5], [6]], "shortcut": [[0], [1], [5], [6]], "fc": [[0], [1], [5], [6]]},
        },
        {"fc": OUT},
    ),
    "option A by hand": Trap(
        option_a_by_hand,
        {"stem": {"stem": one(3), "main<": one(3), "main": one(3, 2), "fc": one(3, 2)}},
        {"main": "4 of its 7 outputs stay: a constant of fixed size", "fc": OUT},
    ),
    "doubled by zeros": Trap(
        doubled_by_zeros,
        {"stem": {"stem": one(3), "main<": one(3), "main": _PAIRS, "fc": _PAIRS}}, {"fc": OUT},
    ),
    "channels last, LayerNorm": Trap(
        channels_last,
        {
            "first": {"first": one(4), "norm": one(4), "point1": one(4)},
            "point1": {"point1": one(5), "point2": one(5)},
            "point2": {"point2": one(6), "last_norm": one(6), "fc": one(6)},
        },
        {"fc": OUT},
    ),
    "layer scale": Trap(
        layer_scale,
        {"stem": {"stem": one(5), "inner<": one(5), "inner": one(5), "scale": one(5), "fc": one(5)}}, {"fc": OUT},
    ),
    "GroupNorm, wide and narrow groups": Trap(
        group_norms,
        {
            "first": {"first": _PAIRS, "wide_norm": _PAIRS, "second": _PAIRS},
            "second": {"second": [[0, 1], [2, 3], [4, 5]], "narrow_norm": [[0, 1], [2, 3], [4, 5]],
                       "fc": [[0, 1], [2, 3], [4, 5]]},
        },
        {"fc": OUT},
    ),
    "module called twice": Trap(
        called_twice, {"first": {"first": one(4), "again<": one(4), "again": one(4), "fc": one(4)}}, {"fc": OUT}
    ),
    "tied weights": Trap(
        tied_weights,
        {"first": {"first": one(4), "one<": one(4), "one": one(4), "two<": one(4), "two": one(4), "fc": one(4)}},
        {"fc": OUT},
    ),
    "flattened concatenation": Trap(
        flat_concat,
        {
            "left": {"left": one(2), "fc": [[0, 1, 2, 3], [4, 5, 6, 7]]},
            "right": {"right": one(3), "fc": [[8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18, 19]]},
        },
        {"fc": OUT},
    ),
    "channels turned over": Trap(
        flipped, {"one": {"one": one(4), "two": [[3], [2], [1], [0]], "fc": [[3], [2], [1], [0]]}}, {"fc": OUT}
    ),
    "spatial gate": Trap(
        spatial_gate,
        {"first": {"first": one(4), "gate": one(4), "fc": one(4)}},
        {"gate": "several channels", "fc": OUT},
    ),
    "pixel shuffle": Trap(
        pixel_shuffle, {"first": {"first": [[0, 1, 2, 3], [4, 5, 6, 7]], "fc": one(2)}}, {"fc": OUT}
    ),
    "auxiliary head in training": Trap(
        auxiliary_head, {"first": {"first": one(4), "aux": one(4), "fc": one(4)}}, {"aux": OUT, "fc": OUT}
    ),
    "two outputs": Trap(two_outputs, {"second": {"second": one(5), "fc": one(5)}}, {"first": OUT, "fc": OUT}),
    "unequal split": Trap(
        unequal_split, {"second": {"second": one(5), "fc": one(5)}}, {"first": "unequal parts", "fc": OUT}
    ),
    "PReLU": Trap(prelu, {"first": {"first": one(4), "slope": one(4), "fc": one(4)}}, {"fc": OUT}),
}  # fmt: skip
