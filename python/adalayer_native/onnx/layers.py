"""Layers and norms: modules of torch, or native ones where the file's integers fit them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adalayer_native.onnx import functions
from adalayer_native.onnx.building import Builder, NodeView, Refused, operator_of
from adalayer_native.onnx.native_layers import native_layer
from adalayer_native.onnx.shapes import transposed
from adalayer_native.onnx.values import Constant, Value
from adalayer_native.padding import PaddedConv2d

__all__ = ["convolution", "product", "row_of", "window"]

_CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_NORMS: dict[int, Any] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}


def window(
    node: NodeView, x: Value, kernel: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """Stride, dilation and padding (begins, then ends) of a window over the axes from 2 on."""
    axes = x.rank - 2
    stride = list(node.get("strides") or [1] * axes)
    dilation = list(node.get("dilations") or [1] * axes)
    how = node.get("auto_pad", "NOTSET")
    if how in ("SAME_UPPER", "SAME_LOWER"):
        upper = how == "SAME_UPPER"
        pads = functions.auto_padding(x.shape[2:], kernel, stride, dilation, upper)
    else:
        pads = list((node.get("pads") if how == "NOTSET" else None) or [0] * 2 * axes)
    return stride, dilation, pads


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=tensor.is_floating_point())


def _filled(layer: Any, weight: Tensor, bias: Tensor | None) -> Any:
    layer.weight = _parameter(weight)
    if bias is not None:
        layer.bias = _parameter(bias)
    return layer


def _constant_bias(g: Builder, bias: Any) -> Tensor | None:
    return None if bias is None else g.known(bias, "bias")


@operator_of("Conv")
def _conv(g: Builder, node: NodeView, x: Value, weight: Any, bias: Any = None) -> Any:
    return convolution(g, node, x, weight, bias)


def convolution(g: Builder, node: NodeView, x: Value, weight: Any, bias: Any) -> Any:
    """A convolution of one to three axes."""
    axes = x.rank - 2
    if axes not in _CONVS:
        raise Refused(f"an operand of {x.rank} axes; expected 3 to 5")
    kernel = list(weight.shape[2:])
    if list(node.get("kernel_shape", kernel)) != kernel:
        said = list(node.get("kernel_shape"))
        raise Refused(f"kernel_shape {said} of a weight of sizes {list(weight.shape)}")
    stride, dilation, pads = window(node, x, kernel)
    groups = node.get("group", 1)
    if not isinstance(weight, Constant) or isinstance(bias, Value):
        run = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[axes]
        x = g.call(functions.pad, x, [0, 0, *pads[:axes], 0, 0, *pads[axes:]], "constant", 0.0)
        return g.call(run, x, weight, bias, stride, 0, dilation, groups)
    key = (weight, bias, x.grid, str((stride, dilation, pads, groups)))
    if key in g.shared:
        return g.again(g.shared[key], x)
    name = g.shared[key] = g.layer_name(node, weight)
    offset = _constant_bias(g, bias)
    geometry = {"stride": stride, "dilation": dilation, "groups": groups}
    if axes == 2:
        sides = (pads[0], pads[1], pads[2], pads[3])
        native = native_layer(g, "Conv2d", name, x, weight, 0, offset, padding=sides, **geometry)
        if native is not None:
            return native
    inputs, outputs = weight.shape[1] * groups, weight.shape[0]
    rest: dict[str, Any] = {**geometry, "bias": offset is not None, "device": "meta"}
    even = pads[:axes] == pads[axes:]
    if even:
        layer = _CONVS[axes](inputs, outputs, kernel, padding=pads[:axes], **rest)
    elif axes == 2:
        layer = PaddedConv2d(inputs, outputs, kernel, sides=sides, **rest)
    else:
        del g.shared[key]  # what stands in front of it is no part of the module
        x = g.call(functions.pad, x, [0, 0, *pads[:axes], 0, 0, *pads[axes:]], "constant", 0.0)
        layer = _CONVS[axes](inputs, outputs, kernel, **rest)
    return g.module(name, _filled(layer, weight.tensor, offset), x)


@operator_of("ConvTranspose")
def _conv_transpose(g: Builder, node: NodeView, x: Value, weight: Any, bias: Any = None) -> Any:
    axes = x.rank - 2
    if axes not in _TRANSPOSED:
        raise Refused(f"an operand of {x.rank} axes; expected 3 to 5")
    kernel = list(weight.shape[2:])
    if list(node.get("kernel_shape", kernel)) != kernel:
        said = list(node.get("kernel_shape"))
        raise Refused(f"kernel_shape {said} of a weight of sizes {list(weight.shape)}")
    groups = node.get("group", 1)
    stride = list(node.get("strides") or [1] * axes)
    dilation = list(node.get("dilations") or [1] * axes)
    begins, ends, extra = _transposed_pads(node, x, kernel, stride, dilation)
    padding, cut = [], []
    for axis in range(axes):
        before, after = begins[axis], ends[axis]
        more = extra[axis] + before - after
        if 0 <= more < max(stride[axis], dilation[axis]):
            padding.append(before)
            extra[axis] = more
            cut.append((0, 0))
        else:
            least = min(before, after)
            padding.append(least)
            cut.append((before - least, after - least))
    if any(n >= max(s, d) for n, s, d in zip(extra, stride, dilation, strict=True)):
        raise Refused(f"output padding {extra} of stride {stride} and dilation {dilation}")
    geometry = {"stride": stride, "padding": padding, "output_padding": extra, "groups": groups,
                "dilation": dilation}  # fmt: skip
    if isinstance(weight, Constant) and not isinstance(bias, Value):
        name, offset = g.layer_name(node, weight), _constant_bias(g, bias)
        result = None
        if axes == 2:
            result = native_layer(g, "ConvTranspose2d", name, x, weight, 1, offset, **geometry)
        if result is None:
            inputs, outputs = weight.shape[0], weight.shape[1] * groups
            layer = _TRANSPOSED[axes](
                inputs, outputs, kernel, **geometry, bias=offset is not None, device="meta"
            )
            result = g.module(name, _filled(layer, weight.tensor, offset), x)
    else:
        run = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[axes]
        rest = (stride, padding, extra, groups, dilation)
        result = g.call(run, x, weight, bias, *rest)
    for axis, (before, after) in enumerate(cut):
        if before or after:
            size = result.shape[axis + 2]
            result = g.call(torch.ops.aten.slice.Tensor, result, axis + 2, before, size - after, 1)
    return result


def _transposed_pads(
    node: NodeView, x: Value, kernel: list[int], stride: list[int], dilation: list[int]
) -> tuple[list[int], list[int], list[int]]:
    """Padding before and after, and output padding."""
    axes = len(kernel)
    extra = list(node.get("output_padding") or [0] * axes)
    how, wanted = node.get("auto_pad", "NOTSET"), node.get("output_shape")
    if how in ("SAME_UPPER", "SAME_LOWER") and not wanted:
        wanted = [size * step for size, step in zip(x.shape[2:], stride, strict=True)]
    if not wanted:
        pads = list((node.get("pads") if how == "NOTSET" else None) or [0] * 2 * axes)
        return pads[:axes], pads[axes:], extra
    begins, ends = [], []
    for axis, out in enumerate(wanted[-axes:]):
        full = stride[axis] * (x.shape[axis + 2] - 1) + dilation[axis] * (kernel[axis] - 1) + 1
        total = full + extra[axis] - out
        if total < 0:
            extra[axis] -= total
            total = 0
        less = total // 2
        begins.append(less if how == "SAME_UPPER" else total - less)
        ends.append(total - less if how == "SAME_UPPER" else less)
    return begins, ends, extra


# -- products -----------------------------------------------------------------------------------


@operator_of("MatMul")
def _matmul(g: Builder, node: NodeView, a: Any, b: Any) -> Any:
    return product(g, node, a, b, None)


def product(g: Builder, node: NodeView, a: Any, b: Any, bias: Tensor | None) -> Any:
    """A matrix product; by a constant matrix it is a linear layer."""
    if not isinstance(a, Value) or not isinstance(b, Constant) or b.rank != 2:
        found = g.call(torch.matmul, a, b)
        return found if bias is None else g.call(torch.add, found, Constant(bias))
    key = (b, None if bias is None else str(bias.tolist()), a.grid)
    if key in g.shared:
        return g.again(g.shared[key], a)
    name = g.shared[key] = g.layer_name(node, b)
    native = native_layer(g, "Linear", name, a, b, 1, bias)
    if native is not None:
        return native
    layer = nn.Linear(b.shape[0], b.shape[1], bias is not None, device="meta")
    return g.module(name, _filled(layer, b.tensor.t().contiguous(), bias), a)


@operator_of("Gemm")
def _gemm(g: Builder, node: NodeView, a: Any, b: Any, c: Any = None) -> Any:
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    if node.get("transA"):
        a = g.call(torch.t, a)
    if not isinstance(a, Value) or not isinstance(b, Constant) or alpha != 1.0:
        b = g.call(torch.t, b) if node.get("transB") else b
        found = g.call(torch.matmul, a, b)
        found = found if alpha == 1.0 else g.call(torch.mul, found, alpha)
        bias = None
    else:
        b = transposed(g, b, [1, 0]) if node.get("transB") else b
        bias = row_of(c, b.shape[1])
        found = product(g, node, a, b, None if bias is None else bias * beta)
    if c is None or bias is not None:
        return found
    return g.call(torch.add, found, c if beta == 1.0 else g.call(torch.mul, c, beta))


def row_of(c: Any, outputs: int) -> Tensor | None:
    """The third operand as a bias, if it is one."""
    if not isinstance(c, Constant) or c.rank > 2 or (c.rank == 2 and c.shape[0] != 1):
        return None
    row = c.tensor.flatten()
    return row.expand(outputs).contiguous() if row.numel() in (1, outputs) else None


# -- norms --------------------------------------------------------------------------------------


@operator_of("BatchNormalization")
def _batch_norm(
    g: Builder, node: NodeView, x: Value, scale: Any, bias: Any, mean: Any, var: Any
) -> Any:
    if node.get("training_mode") or len([name for name in node.outputs if name]) > 1:
        raise Refused("it is in training mode; expected a network for inference")
    if x.rank not in _NORMS:
        raise Refused(f"an operand of {x.rank} axes; expected 2 to 5")
    if node.opset < 9 and not node.get("spatial", 1):
        raise Refused("it has a mean for every pixel (spatial 0); expected one per channel")
    known = [
        g.known(item, what)
        for item, what in ((scale, "scale"), (bias, "bias"), (mean, "mean"), (var, "variance"))
    ]
    norm = _NORMS[x.rank](x.shape[1], eps=node.get("epsilon", 1e-5), device="meta")
    norm.weight, norm.bias = _parameter(known[0]), _parameter(known[1])
    norm.running_mean, norm.running_var = known[2].clone(), known[3].clone()
    norm.num_batches_tracked = torch.zeros((), dtype=torch.int64)
    return g.module(g.layer_name(node, scale), norm.eval(), x)


@operator_of("InstanceNormalization")
def _instance_norm(g: Builder, node: NodeView, x: Value, scale: Any, bias: Any) -> Any:
    return g.call(F.instance_norm, x, weight=scale, bias=bias, eps=node.get("epsilon", 1e-5))


@operator_of("LayerNormalization")
def _layer_norm(g: Builder, node: NodeView, x: Value, scale: Any, bias: Any = None) -> Any:
    if len([name for name in node.outputs if name]) > 1:
        raise Refused("its mean and deviation are read, too, which only training needs")
    axis = node.get("axis", -1) % x.rank
    return g.call(F.layer_norm, x, list(x.shape[axis:]), scale, bias, node.get("epsilon", 1e-5))


@operator_of("RMSNormalization")
def _rms_norm(g: Builder, node: NodeView, x: Value, scale: Any) -> Any:
    axis = node.get("axis", -1) % x.rank
    return g.call(F.rms_norm, x, list(x.shape[axis:]), scale, node.get("epsilon", 1e-5))


@operator_of("GroupNormalization")
def _group_norm(g: Builder, node: NodeView, x: Value, scale: Any, bias: Any) -> Any:
    groups = node.get("num_groups")
    if node.opset < 21:  # one number per group then
        each = x.shape[1] // groups
        scale, bias = (g.call(torch.repeat_interleave, item, each) for item in (scale, bias))
    return g.call(F.group_norm, x, groups, scale, bias, node.get("epsilon", 1e-5))


@operator_of("LRN")
def _lrn(g: Builder, node: NodeView, x: Value) -> Any:
    size = node.get("size")
    alpha, beta, bias = node.get("alpha", 1e-4), node.get("beta", 0.75), node.get("bias", 1.0)
    if size % 2:
        return g.call(F.local_response_norm, x, size, alpha, beta, bias)
    # Of an even window ONNX has the longer side behind, torch in front.
    return g.call(functions.response_norm, x, size, alpha, beta, bias)


@operator_of("LpNormalization")
def _lp_norm(g: Builder, node: NodeView, x: Value) -> Any:
    return g.call(functions.normalized, x, node.get("p", 2), node.get("axis", -1))
