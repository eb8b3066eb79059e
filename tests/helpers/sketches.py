"""An oracle of gradient sketches: the sketch of a matrix that autograd computed."""

import torch
from torch import Tensor

from diagnostics.gradients.sketch import Projection, project


@torch.no_grad()
def matrix_sketch(gradient: Tensor, projection: Projection) -> Tensor:
    """Sketch the gradient of a matrix, (V, D) -> (J, m1 m2)."""
    half = project(gradient.T, projection.vocabulary)  # (D, J, m1)
    right = projection.hidden.to(half)
    return torch.einsum("dja,djb->jab", half, right).flatten(1) * projection.scale
