"""Query networks: what a router compares with its keys.

A pretrained linear router scores hidden states against the rows of its weight. Those rows are keys, and its query
network is the identity; so a graft needs nothing here. With a network of its own a router can ask in a space of another
size, and can learn to ask otherwise while keys stay where they are (SOME's query network Q, one linear map or a small
MLP). Either kind can take over a pretrained router without changing a score, see `take_over`.

T tokens, H hidden, D length of a query, W width of the MLP.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from living_moe.configuration.errors import ConversionError
from living_moe.configuration.sections import RouterConfig


class QueryNetwork(nn.Module):
    """Linear map, plus an MLP with one hidden layer beside it where `width` is given.

    The linear path is what makes an exact take-over possible: there the MLP starts at zero.
    """

    def __init__(self, hidden_size: int, d_key: int, width: int | None = None):
        super().__init__()
        self.d_key = d_key
        self.linear = nn.Linear(hidden_size, d_key, bias=False)
        self.up = None if width is None else nn.Linear(hidden_size, width)
        self.down = None if width is None else nn.Linear(width, d_key, bias=False)

    def forward(self, hidden_TH: Tensor) -> Tensor:
        """(T, H) -> (T, D), in the wider dtype of input and weights."""
        dtype = torch.promote_types(hidden_TH.dtype, self.linear.weight.dtype)
        hidden_TH = hidden_TH.to(dtype)
        query_TD = F.linear(hidden_TH, self.linear.weight.to(dtype))
        if self.up is not None and self.down is not None:
            units_TW = F.silu(F.linear(hidden_TH, self.up.weight.to(dtype), self.up.bias.to(dtype)))
            query_TD = query_TD + F.linear(units_TW, self.down.weight.to(dtype))
        return query_TD

    @torch.no_grad()
    def take_over(self, keys_EH: Tensor) -> Tensor:
        """Become a network whose scores are those of a pretrained router; returns its keys in query space, (E, D).

        With D = H the linear map is the identity and scores are equal bit for bit; with another D they are equal up to
        rounding.

        Raises:
            ConversionError: D is less than the rank of the keys, so that no linear map keeps all scores.
        """
        experts, hidden = keys_EH.shape
        weight = torch.eye(self.d_key, hidden, dtype=torch.float32, device=keys_EH.device)
        keys_ED = keys_EH
        if self.d_key < hidden:
            if self.d_key < experts:
                raise ConversionError(
                    f"router.d_key is {self.d_key}, less than the {experts} experts of a layer: such queries cannot "
                    f"keep the scores of the pretrained router. Set router.d_key to {min(experts, hidden)} or more."
                )
            # An orthonormal basis of a space that holds every key: what lies outside never counted.
            weight = torch.linalg.svd(keys_EH.double()).Vh[: self.d_key].float()
            keys_ED = (keys_EH.double() @ weight.double().T).to(keys_EH.dtype)
            keys_ED[:, experts:] = 0
        elif self.d_key > hidden:
            # Keys are zero there; were the queries too, neither would ever get a gradient.
            generator = torch.Generator(keys_EH.device).manual_seed(1)
            nn.init.normal_(weight[hidden:], std=hidden**-0.5, generator=generator)
            keys_ED = F.pad(keys_EH, (0, self.d_key - hidden))
        self.linear.weight = nn.Parameter(weight.to(keys_EH.dtype))
        if self.up is not None and self.down is not None:
            device, dtype = keys_EH.device, keys_EH.dtype
            width = self.up.out_features
            self.up.weight = nn.Parameter(torch.empty(width, hidden, device=device, dtype=torch.float32))
            nn.init.normal_(self.up.weight, std=hidden**-0.5, generator=torch.Generator(device).manual_seed(0))
            self.up.weight.data = self.up.weight.data.to(dtype)
            self.up.bias = nn.Parameter(torch.zeros(width, device=device, dtype=dtype))
            self.down.weight = nn.Parameter(torch.zeros(self.d_key, width, device=device, dtype=dtype))
        return keys_ED


def query_network(settings: RouterConfig, hidden_size: int) -> QueryNetwork | None:
    """The configured network; None is the identity."""
    if settings.query_network == "identity":
        return None
    d_key = settings.d_key or hidden_size
    width = (settings.query_hidden or d_key) if settings.query_network == "mlp" else None
    return QueryNetwork(hidden_size, d_key, width)
