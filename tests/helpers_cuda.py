"""What the tests on GPUs share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from adalayer_native import _C, cuda

REASON = cuda.why_unavailable()
# Every test of a module with these marks is left out, with the reason, where there is no GPU.
MARKS = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=REASON or "")]


def run_on_gpu(
    engine: Any, program: _C.Program, inputs: Sequence[np.ndarray], *, nhwc: bool = False
) -> list[np.ndarray]:
    """Outputs of a :class:`adalayer_native.cuda.CudaEngine`, [batch, c, h, w]."""
    where = torch.device("cuda", engine.device)
    orders = [nhwc and any_order for any_order in engine.any_order()]
    tensors = [
        torch.from_numpy(np.ascontiguousarray(x.transpose(0, 2, 3, 1) if last else x)).to(where)
        for x, last in zip(inputs, orders, strict=True)
    ]
    batch = tensors[0].shape[0]
    values = program.values()
    outputs = [
        torch.full((batch, *values[number][2:5]), -1.0, device=where)
        for number in program.outputs()
    ]
    engine.run([x.data_ptr() for x in tensors], orders, batch, [y.data_ptr() for y in outputs])
    return [y.cpu().numpy() for y in outputs]
