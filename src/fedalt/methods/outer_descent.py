"""Descent of a server's adapter towards the mean of its clients', with momentum."""

from dataclasses import dataclass
from typing import Literal

import torch

from fedalt.core.tree import Tree, add, cast, scale, subtract, zeros_like

Form = Literal["nesterov", "heavy_ball"]


@dataclass(frozen=True)
class OuterDescent:
    """D = theta - mean,  v <- mu v + D,  theta <- theta - eta (D + mu v), by heavy ball - eta v.

    Computed in float64, kept in float32; an empty v is zero.
    """

    eta: float
    mu: float
    form: Form

    def step(self, theta: Tree, mean: Tree, v: Tree) -> tuple[Tree, Tree]:
        """Theta and v after one step."""
        before = cast(theta, torch.float64)
        d = subtract(before, cast(mean, torch.float64))
        v = add(scale(cast(v or zeros_like(before), torch.float64), self.mu), d)
        step = add(d, scale(v, self.mu)) if self.form == "nesterov" else v
        after = subtract(before, scale(step, self.eta))
        return cast(after, torch.float32), cast(v, torch.float32)
