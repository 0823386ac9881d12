"""Refit of the layer that gives the logits: to the dense network's class probabilities instead of its logits.

Minimises, over the weights and the bias of this layer alone,

    T^2 mean_i KL(softmax(z_i / T) || softmax(v_i / T)) + ridge ||[W b] - [W0 b0]||^2 / 2

with dense logits z_i, present logits v_i = W x_i + b and the least-squares solution W0, b0. The second derivative is at
most half the features' second moment in every class (Boehning, "Multinomial logistic regression algorithm", 1992), so
each step is a least-squares fit with one and the same matrix, factorised once; steps are extrapolated after Nesterov.

Axes: n images, d features, k classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from entprune.residuals import is_identity

_RIDGE = 1e-3  # of the mean second moment of the features
_STEPS = 50


def find_output_layer(graph: fx.Graph, model: nn.Module) -> str | None:
    """The linear layer whose outputs are the network's, None if there is none."""
    (end,) = (node for node in graph.nodes if node.op == "output")
    node = end.args[0]
    while isinstance(node, fx.Node) and node.op == "call_module" and len(node.users) == 1:
        module = model.get_submodule(str(node.target))
        if isinstance(module, nn.Linear):
            return str(node.target)
        if not is_identity(module):
            return None
        node = node.args[0]
    return None


def fit_probabilities(
    features: Tensor, dense_logits: Tensor, weight: Tensor, bias: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Best weight (k, d) and bias (k,) by the formula above.

    Args:
        features: (n, d) what the layer reads in the smaller network.
        dense_logits: (n, k).
        weight, bias: (k, d) and (k,) to start from and to stay near.
        temperature: T > 0; softens the classes, so that confident images count, too.
    """
    rows = torch.cat([features, torch.ones_like(features[:, :1])], 1).double()
    start = torch.cat([weight, bias[:, None]], 1).double()
    target = (dense_logits.double() / temperature).softmax(1)
    moment = rows.T @ rows / len(rows)
    ridge = _RIDGE * moment.diagonal().mean()
    identity = torch.eye(len(moment), dtype=moment.dtype, device=rows.device)
    factor = torch.linalg.cholesky(0.5 * moment + ridge * identity)
    found = ahead = start
    momentum = 1.0
    for _ in range(_STEPS):
        error = (rows @ ahead.T / temperature).softmax(1) - target  # (n, k)
        slope = temperature * (error.T @ rows) / len(rows) + ridge * (ahead - start)
        step = ahead - torch.cholesky_solve(slope.T, factor).T
        following = 0.5 * (1.0 + (1.0 + 4.0 * momentum**2) ** 0.5)
        ahead = step + (momentum - 1.0) / following * (step - found)
        found, momentum = step, following
    return found[:, :-1].float(), found[:, -1].float()
