"""Ways to go on with functions, parameters of one's own, arithmetic."""

from __future__ import annotations

import math

from torch import Tensor

from .draft import CHANNELS, FEATURES, PIXELS, Draft, draw
from .draws_layers import conv_geometry
from .ops import BINARY, CONSTANTS, SCALAR, UNARY


@draw(2.5)
def function_conv(d: Draft) -> None:
    """A convolution of a parameter; some of these weights are no parameters."""
    if not (x := d.image()):
        return
    words = conv_geometry(d, x)
    bias = words.pop("bias")
    inputs, out = words.pop("in_channels"), words.pop("out_channels")
    kernel = words.pop("kernel_size")
    operands = [x, d.parameter(out, inputs // words["groups"], *kernel)]
    if bias:
        operands.append(d.parameter(out, fill="bias"))
    d.step("conv2d", *operands, **words)


@draw(0.5)
def function_transposed(d: Draft) -> None:
    x = d.value(lambda v: v.dim() == 4 and max(v.shape[2:]) <= PIXELS // 2)
    if x:
        operands = [x, d.parameter(d.shape(x)[0], 3, 2, 2)]
        operands += [d.parameter(3, fill="bias")] * d.chance(0.5)
        d.step("conv_transpose2d", *operands, stride=2)


@draw(0.5)
def function_conv1d(d: Draft) -> None:
    if x := d.value(lambda v: v.dim() == 3 and v.shape[-1] >= 3):
        operands = [x, d.parameter(4, d.shape(x)[0], 3)]
        operands += [d.parameter(4, fill="bias")] * d.chance(0.5)
        d.step("conv1d", *operands, padding=d.one_of((0, 1)))


@draw(2)
def function_linear(d: Draft) -> None:
    x = d.value(lambda v: v.dim() in (2, 3) and v.shape[-1] <= FEATURES)
    if not x:
        return
    out = d.one_of((2, 4, 6))
    weight = d.parameter(out, d.shape(x)[-1])
    form = d.one_of(("linear", "linear", "@", "einsum", "turned", "addmm"))
    if form == "linear":
        bias = [d.parameter(out, fill="bias")] * d.chance(0.6)
        d.step("linear", x, weight, *bias)
    elif form == "addmm":
        if len(d.shape(x)) == 1:
            bias = d.parameter(out, fill="bias")
            d.step("addmm", bias, x, weight, beta=d.one_of((1.0, 1.0, 0.5, 0.0)))
    elif form != "turned" or len(d.shape(x)) == 2:
        d.step("matmul", x, weight, form=form)


@draw(1.5)
def function_norm(d: Draft) -> None:
    if not (x := d.any()):
        return
    shape = d.shape(x)
    kinds = ("batch_norm", "batch_norm", "group_norm", "layer_norm", "rms_norm")
    if math.prod(shape) == 1:  # (One value per group is an error of torch's.)
        kinds = kinds[:2]
    kind = d.one_of(kinds if shape[-1] > 3 else kinds[:3])
    size = shape[-1] if kind in ("layer_norm", "rms_norm") else shape[0]
    weight, bias = d.parameter(size, fill="scale"), d.parameter(size, fill="bias")
    if kind == "batch_norm":
        mean, var = d.parameter(size, fill="bias"), d.parameter(size, fill="scale")
        d.step("batch_norm", x, mean, var, weight, bias)
    elif kind == "layer_norm":
        d.step("layer_norm", x, weight, bias)
    elif kind == "rms_norm":
        form = d.one_of(("operator", "weight first", "weight behind"))
        d.step("rms_norm", x, weight, form=form)
    else:
        groups = d.one_of((1, size)) if len(shape) > 1 and math.prod(shape[1:]) > 1 else 1
        d.step("group_norm", x, weight, bias, groups=groups)


@draw(1.5)
def weight_in_forward(d: Draft) -> None:
    """A layer's weight that the forward reads beside, or in place of, calling the layer."""
    known = [
        part for part in d.parts if part.kind in ("Linear", "Conv2d", "Embedding", "BatchNorm2d")
    ]
    if not known:
        return
    part = d.one_of(known)
    if part.kind in ("Linear", "Embedding"):
        wide = part.args.get("in_features", part.args.get("embedding_dim"))
        high = part.args.get("out_features", part.args.get("num_embeddings"))
        turned = d.chance(0.5)
        size = high if turned else wide
        if x := d.value(lambda v: v.dim() in (2, 3) and v.shape[-1] == size):
            d.step("linear_with_weight_of", x, part.name, turned=turned)
    elif part.kind == "Conv2d" and part.args.get("groups", 1) == 1:
        c = part.args["in_channels"]
        x = d.value(lambda v: v.dim() == 4 and v.shape[1] == c and min(v.shape[2:]) >= 4)
        if x:
            d.step("conv_with_weight_of", x, part.name)
    elif (x := d.any()) and part.args.get("affine", True):
        named = d.one_of(("scaled_by_weight_of", "shifted_by_bias_of"))
        if named == "scaled_by_weight_of" or part.args.get("bias", True):
            d.step(named, x, part.name)


@draw(3)
def unary(d: Draft) -> None:
    if x := d.any():
        names = [name for name in UNARY if name != "standardise" or d.shape(x)[-1] > 1]
        d.step("unary", x, name=d.one_of(names))


@draw(2.5)
def binary(d: Draft) -> None:
    """Two values of equal sizes, or of sizes that broadcast, or one value twice."""
    if not (x := d.any()):
        return
    shape = d.live[x].shape
    y = d.value(
        lambda v: (
            v.dim() == len(shape)
            and all(b in (1, a) for a, b in zip(shape[1:], v.shape[1:], strict=True))
        )
    )
    if y:
        d.step("binary", x, y, name=d.one_of(sorted(BINARY)))


@draw(1.5)
def with_parameter(d: Draft) -> None:
    """A parameter or buffer that is added to, or multiplies, a value."""
    if not (x := d.any()):
        return
    shape = d.shape(x)
    sizes = d.one_of(((), shape[-1:], (1, *shape), (shape[0], *[1] * (len(shape) - 1))))
    name = d.one_of(("+", "-", "*", "maximum", "where", "torch.add", "gate", "lerp"))
    y = d.parameter(*sizes, fill="scale" if name == "*" else "bias")
    operands = (y, x) if name in ("+", "*", "-") and d.chance(0.3) else (x, y)
    d.step("binary", *operands, name=name)


@draw(2)
def scalar(d: Draft) -> None:
    if x := d.any():
        d.step("scalar", x, name=d.one_of(sorted(SCALAR)), value=d.one_of((0.5, 1.5, 2, 0.25, 1)))


@draw(1.5)
def constant(d: Draft) -> None:
    if x := d.any():
        names = [n for n in CONSTANTS if n not in ("eye", "triangle") or d.shape(x)[-1] <= 64]
        d.step("constant", x, name=d.one_of(names))


@draw(1)
def soft(d: Draft) -> None:
    if not (x := d.any()):
        return
    mask = [item for item in d.inputs if item.kind == "mask"]
    if len(d.shape(x)) == 2 and mask and mask[0].shape[0] == d.shape(x)[0]:
        d.step("softmax_masked", x, mask[0].name, fill=d.one_of((-10.0, float("-inf"))))
    else:
        axis = d.one_of((1, -1, len(d.shape(x))))
        d.step("softmax", x, axis=axis, log=d.chance(0.2))


@draw(1)
def masked(d: Draft) -> None:
    if not (x := d.any()):
        return
    shape = d.shape(x)
    mask = [item for item in d.inputs if item.kind == "mask" and item.shape == shape[:1]]
    if mask and len(shape) == 2:
        d.step("mask_out", x, mask[0].name)
    elif not mask:
        d.step("mask_out", x, d.parameter(1, *shape, fill="mask", kinds=("Buffer", "HiddenBuffer")))


@draw(1.5)
def reduced(d: Draft) -> None:
    x = d.value(lambda v: v.dim() >= 3)
    if x:
        rank = len(d.shape(x))
        axes = d.one_of(((-1,), (1,), tuple(range(2, rank + 1)), (rank - 1, rank)))
        axes = tuple(axis for axis in axes if axis == -1 or axis >= 1)
        d.step(
            "reduce",
            x,
            name=d.one_of(("mean", "mean", "amax", "sum")),
            axes=axes,
            keep=d.chance(0.5),
        )


@draw(2)
def joined(d: Draft) -> None:
    """Values of equal sizes but for one axis, side by side."""
    if not (x := d.any()):
        return
    shape = d.live[x].shape
    axis = d.one_of(range(1, len(shape)))
    limit = CHANNELS if axis == 1 and len(shape) > 2 else PIXELS

    def fits(v: Tensor) -> bool:
        return v.dim() == len(shape) and all(
            a == b for k, (a, b) in enumerate(zip(shape, v.shape, strict=True)) if k != axis
        )

    values = [x] + [d.value(fits) for _ in range(d.one_of((1, 1, 2)))]
    if sum(d.live[v].shape[axis] for v in values) <= max(limit, FEATURES // 4 * (len(shape) == 2)):
        if d.chance(0.2) and all(d.live[v].shape == shape for v in values) and len(shape) < 4:
            d.step("stack", *values, form=d.one_of(("flatten", "sum", "mean")))
        else:
            d.step("concat", *values, axis=d.one_of((axis, axis - len(shape))))


@draw(1)
def with_token(d: Draft) -> None:
    """A parameter or zeros beside a value, the same for every sample."""
    if x := d.any():
        shape = list(d.live[x].shape)
        axis = d.one_of(range(1, len(shape)))
        shape[0], shape[axis] = 1, d.one_of((1, 1, 2))
        if d.live[x].shape[axis] <= PIXELS and math.prod(shape) <= FEATURES:
            form = d.one_of(("first", "last", "both", "zeros"))
            d.step("with_token", x, d.parameter(*shape), axis=axis, form=form)


@draw(1)
def padded(d: Draft) -> None:
    if x := d.image(smallest=2):
        sides = d.one_of(((1, 1, 1, 1), (0, 1, 0, 1), (1, 0), (0, 0, 0, 0, 0, 1), (-1, 0, 0, 0)))
        modes = (
            ("constant", "constant", "reflect", "replicate") if len(sides) == 4 else ("constant",)
        )
        if max(d.shape(x)) <= PIXELS:
            mode = d.one_of(modes if min(sides) >= 0 else ("constant",))
            d.step("pad", x, sides=sides, mode=mode, value=d.one_of((0.0, 0.0, 0.5)))


@draw(1)
def resized(d: Draft) -> None:
    if x := d.value(lambda v: v.dim() == 4 and max(v.shape[2:]) <= PIXELS // 2):
        mode = d.one_of(("nearest", "bilinear"))
        size, scale = d.one_of(((None, 2.0), ((5, 7), None), ((3, 4), None), (None, 1.5)))
        d.step("resize", x, size=size, scale=scale, mode=mode)


@draw(0.7)
def picked(d: Draft) -> None:
    """Elements by a tensor of indices."""
    if x := d.any():
        axis = d.one_of(range(1, len(d.shape(x)) + 1))
        order = d.parameter(d.live[x].shape[axis], fill="order", kinds=("Buffer", "HiddenBuffer"))
        d.step("pick", x, order, axis=axis, form=d.one_of(("index_select", "index")))


@draw(0.7)
def patched(d: Draft) -> None:
    if (x := d.image(smallest=2)) and math.prod(d.shape(x)) <= 200:
        d.step("patches", x, size=2, stride=d.one_of((1, 2)))


@draw(0.7)
def function_pool(d: Draft) -> None:
    if x := d.image(smallest=2):
        names = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d")
        d.step("pool", x, name=d.one_of(names), size=2)


@draw(0.7)
def positions(d: Draft) -> None:
    """A table of more positions than there are tokens."""
    if x := d.sequence():
        t, width = d.shape(x)
        d.step("add_positions", x, d.parameter(1, t + 2, width, fill="bias"))
