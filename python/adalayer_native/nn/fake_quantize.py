"""FakeQuantize: a float tensor on a u8 grid."""

from __future__ import annotations

from torch import Tensor

from adalayer_native import ops
from adalayer_native.nn.layer import QuantizedInput, checked_qparams, refuse_backward

__all__ = ["FakeQuantize"]


class FakeQuantize(QuantizedInput):
    """Puts a float tensor of any shape on a u8 grid: ``(q − zero_point) · scale``, float32 out.

    Stands where several readers share a tensor that the engine stores as u8, a residual input
    for one.
    """

    _grid_key = "qparams"

    def __init__(self, scale: float, zero_point: int, bits: int = 8) -> None:
        super().__init__()
        self._set_grid(checked_qparams(scale, zero_point, bits))

    def forward(self, x: Tensor) -> Tensor:
        out = ops.fake_quantize(x, self.input_scale, self.input_zero_point, self.input_bits)
        return refuse_backward(out, x, lambda: "FakeQuantize")

    def extra_repr(self) -> str:
        return (
            f"u{self.input_bits}, scale={self.input_scale:.4g}, zero_point={self.input_zero_point}"
        )
