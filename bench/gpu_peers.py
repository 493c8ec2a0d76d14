"""Linear layers of torchao, where it is installed: calls for ``bench.gpu`` to time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Name of a configuration of torchao, and what the column is called.
_WEIGHT_ONLY = (("Int8WeightOnlyConfig", "ao int8"), ("Int4WeightOnlyConfig", "ao int4"))
_INTEGER = (("Int8DynamicActivationInt8WeightConfig", "ao int8 x int8"),)


def _quantized(n: int, dtype: torch.dtype, name: str) -> Callable[[Tensor], Any]:
    from torchao import quantization

    layer = nn.Sequential(nn.Linear(n, n, bias=False, device="cuda", dtype=dtype))
    quantization.quantize_(layer, getattr(quantization, name)())
    compiled: Callable[[Tensor], Any] = torch.compile(layer, mode="max-autotune-no-cudagraphs")
    return compiled


def torchao_linears(
    x: Tensor, copies: int, *, integer: bool = False
) -> Iterator[tuple[str, list[Callable[[], Any]] | str]]:
    """Calls of as many layers of size ``[n, n]`` as are needed for cold weights.

    Args:
        x: bfloat16 ``[batch, n]`` on a GPU. copies: number of layers. integer: u8-like activations
            too, not only weights.

    Yields:
        Name of the column, and the calls, or why this version of torchao cannot do it.
    """
    try:
        import torchao  # noqa: F401
    except Exception as error:  # a build for another torch fails in many ways
        yield "torchao", f"{type(error).__name__}"
        return
    for config, column in _INTEGER if integer else _WEIGHT_ONLY:
        try:
            layers = [_quantized(x.shape[-1], x.dtype, config) for _ in range(copies)]
            with torch.no_grad():
                for layer in layers:
                    layer(x)
        except Exception as error:  # kernels that are missing say so in many ways
            yield column, f"{type(error).__name__}"
            continue
        yield column, [partial(_call, layer, x) for layer in layers]


def _call(layer: Callable[[Tensor], Any], x: Tensor) -> Any:
    with torch.no_grad():
        return layer(x)
