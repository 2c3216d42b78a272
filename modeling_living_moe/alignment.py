"""Weights in memory where matrix products round the same after loading as before.

safetensors maps its files: on CPU a loaded weight is a view into one, at whatever byte it starts there. Kernels of
matrix products are chosen by alignment too (seen: MKL on AMD), so a model loaded from its own checkpoint would compute
with other roundings than the one that was saved, and a resumed run would drift from the uninterrupted one.
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn

#: What torch's own allocator gives on CPU, bytes.
ALIGNMENT = 64


def align(model: nn.Module) -> None:
    """Give every CPU tensor of the model that starts off a multiple of 64 bytes memory of its own, in place.

    Parameters stay the objects they are, so tied ones stay tied. Values do not change. Tensors of other devices, and
    those that are no plain tensors (quantised weights), are left alone.
    """
    # A copy made in inference mode could never train.
    with torch.inference_mode(False):
        for tensor in chain(model.parameters(), model.buffers()):
            if not is_aligned(tensor):
                tensor.data = tensor.data.clone()


def is_aligned(tensor: Tensor) -> bool:
    """Whether `align` would leave the tensor where it is."""
    plain = type(tensor.data) is Tensor and tensor.device.type == "cpu"
    return not plain or tensor.data_ptr() % ALIGNMENT == 0
