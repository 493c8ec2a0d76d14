"""Ways to go on with a module."""

from __future__ import annotations

import math

from .draft import CHANNELS, FEATURES, PIXELS, Draft, draw

ACTS = ("ReLU",) * 3 + ("ReLU6", "Hardswish", "SiLU", "GELU", "Sigmoid", "Tanh", "ELU", "Mish")
INPLACE = ("ReLU", "ReLU6", "Hardswish", "SiLU", "ELU", "Mish", "LeakyReLU", "Hardtanh")


def conv_geometry(d: Draft, x: str) -> dict:
    """Arguments of a convolution that fits an image."""
    channels, height, width = d.shape(x)
    groups = d.one_of([g for g in range(1, channels + 1) if channels % g == 0])
    groups = d.one_of((1, 1, 1, groups))
    kernel = d.one_of(((1, 1), (3, 3), (3, 3), (3, 3), (2, 2), (1, 3), (3, 1), (5, 5), (4, 2)))
    dilation = d.one_of(((1, 1), (1, 1), (1, 1), (2, 2), (1, 2)))
    stride = d.one_of(((1, 1), (1, 1), (2, 2), (2, 1), (3, 2)))
    spans = [(k - 1) * s for k, s in zip(kernel, dilation, strict=True)]
    padding: object = d.one_of((0, (spans[0] // 2, spans[1] // 2), (1, 0), (2, 1), "same", "valid"))
    if padding == "same":
        stride = (1, 1)
    pads = padding if isinstance(padding, tuple) else (0, 0)
    if padding != "same" and any(
        size + 2 * pad <= span for size, pad, span in zip((height, width), pads, spans, strict=True)
    ):
        kernel, padding, dilation = (1, 1), 0, (1, 1)
    return {
        "in_channels": channels,
        "out_channels": groups * d.one_of([n for n in (1, 2, 3, 4, 8) if n * groups <= CHANNELS]),
        "kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation,
        "groups": groups, "bias": d.chance(0.6),
    }  # fmt: skip


def conv(d: Draft, x: str, kind: str = "Conv2d", *, call: bool = True, **changed: object) -> str:
    words = {**conv_geometry(d, x), **changed}
    return d.part(kind, dress=d.dress(weight=True, call=call), **words)


def activation(d: Draft, x: str) -> str:
    """An activation of a value that no step before has shown to anyone: it may be in place."""
    kind = d.one_of(
        (*ACTS, "LeakyReLU", "Hardtanh", "PReLU", "Hardsigmoid", "Softplus", "PickyReLU")
    )
    words = {"inplace": True} if d.writes and kind in INPLACE and d.chance(0.4) else {}
    if kind == "PReLU":
        words = {"num_parameters": d.one_of((1, d.shape(x)[0]))}
    result = d.step("call", d.part(kind, **words), x)
    return result or x


def norm(d: Draft, x: str) -> str:
    channels = d.shape(x)[0]
    kind = d.one_of(("BatchNorm2d", "BatchNorm2d", "NormAct2d"))
    words: dict = {"act": d.one_of(("ReLU", "SiLU", "Identity"))} if kind == "NormAct2d" else {}
    if kind == "BatchNorm2d" and d.chance(0.15):
        words = {"affine": False}
    name = "channels" if kind == "NormAct2d" else "num_features"
    return d.call(d.part(kind, dress=d.dress(), **{name: channels}, **words), x)


@draw(5)
def conv_norm_act(d: Draft) -> None:
    """The usual chain, or a part of it."""
    if not (x := d.image()):
        return
    kinds = ("Conv2d",) * 6 + ("PaddedConv2d", "StandardConv2d")
    kind = d.one_of(kinds)
    words: dict = {"padding": 0} if kind == "PaddedConv2d" else {}
    if kind == "Conv2d" and d.chance(0.04) and min(d.shape(x)[1:]) >= 3:
        words = {"padding_mode": d.one_of(("reflect", "circular", "replicate")), "padding": (1, 1)}
        words.update(kernel_size=(3, 3), dilation=(1, 1))
    x = d.call(conv(d, x, kind, **words), x)
    if d.chance(0.6):
        x = norm(d, x)
    if d.chance(0.7):
        activation(d, x)


@draw(2)
def residual(d: Draft) -> None:
    if not (x := d.image()):
        return
    c = d.shape(x)[0]
    same = {"out_channels": c, "kernel_size": (3, 3), "padding": (1, 1), "stride": (1, 1)}
    same.update(dilation=(1, 1), groups=d.one_of((1, c)))
    y = d.call(conv(d, x, **same), x)
    y = norm(d, y) if d.chance(0.7) else y
    operands = (x, y) if d.chance(0.5) else (y, x)
    total = d.step("binary", *operands, name=d.one_of(("+", "+", "method_add", "add_alpha")))
    if d.chance(0.7):
        activation(d, total)


@draw(1)
def conv_by_keyword(d: Draft) -> None:
    if x := d.image():
        # (What is hung on calls here takes an argument by position.)
        d.step("call_by_keyword", conv(d, x, call=False), x)


@draw(1)
def transposed(d: Draft) -> None:
    x = d.value(lambda v: v.dim() == 4 and max(v.shape[2:]) <= PIXELS // 2)
    if not x:
        return
    c = d.shape(x)[0]
    groups = d.one_of((1, 1, c))
    stride = d.one_of((1, 2, (2, 1)))
    kernel = d.one_of((2, 3, (3, 2)))
    extra = 1 if stride == 2 and d.chance(0.3) else 0
    module = d.part(
        "ConvTranspose2d", dress=d.dress(weight=True), in_channels=c,
        out_channels=groups * d.one_of((1, 2)) if groups * 2 <= CHANNELS else groups,
        kernel_size=kernel, stride=stride, padding=d.one_of((0, 0, 1)) if max(d.shape(x)[1:]) > 2
        and min(d.shape(x)[1:]) > 2 else 0, output_padding=extra, groups=groups, bias=d.chance(0.6),
    )  # fmt: skip
    d.call(module, x)


@draw(2.5)
def linear(d: Draft) -> None:
    x = d.value(lambda v: v.dim() in (2, 3, 4) and v.shape[-1] <= FEATURES)
    if not x:
        return
    kind = d.one_of(("Linear",) * 6 + ("ScaledLinear",))
    module = d.part(
        kind, dress=d.dress(weight=True), in_features=d.shape(x)[-1],
        out_features=d.one_of((1, 3, 4, 8, 10)), bias=d.chance(0.7),
    )  # fmt: skip
    x = d.call(module, x)
    if d.chance(0.2) and len(d.shape(x)) == 1:
        x = d.call(d.part("BatchNorm1d", num_features=d.shape(x)[0]), x)
    if d.chance(0.5):
        activation(d, x)


@draw(1)
def mlp(d: Draft) -> None:
    """A head: flatten, linear, activation, dropout, linear."""
    x = d.value(lambda v: v.dim() >= 3 and math.prod(v.shape[1:]) <= FEATURES)
    if not x:
        return
    x = d.step("call", d.part("Flatten"), x)
    x = d.call(d.part("Linear", in_features=d.shape(x)[0], out_features=8), x)
    x = activation(d, x)
    x = d.step("call", d.part("Dropout", p=0.5, inplace=d.chance(0.3)), x)
    d.call(d.part("Linear", in_features=8, out_features=d.one_of((2, 5))), x)


@draw(1)
def conv1d(d: Draft) -> None:
    x = d.value(lambda v: v.dim() == 3 and v.shape[-1] >= 3)
    if x:
        module = d.part(
            "Conv1d", dress=d.dress(weight=True), in_channels=d.shape(x)[0], out_channels=4,
            kernel_size=3, stride=d.one_of((1, 2)), padding=d.one_of((0, 1, "valid")),
        )  # fmt: skip
        d.call(module, x)


@draw(2)
def normalised(d: Draft) -> None:
    """Norms of other kinds than that of a convolution's output."""
    if not (x := d.any()):
        return
    shape = d.shape(x)
    kinds = ["LayerNorm"] if shape[-1] > 3 else []
    if len(shape) <= 2:
        kinds.append("BatchNorm1d")
    if len(shape) == 3:
        kinds += ["BatchNorm2d", "NormAct2d", "LocalResponseNorm"]
        if min(shape[1:]) > 1:
            kinds += ["GroupNorm", "InstanceNorm2d"]
    kind = d.one_of(kinds)
    words: dict = {"num_features": shape[0]}
    if kind == "LayerNorm":
        words = {"normalized_shape": shape[-d.one_of((1, len(shape))) :]}
    elif kind == "GroupNorm":
        words = {"num_groups": d.one_of((1, shape[0])), "num_channels": shape[0]}
    elif kind == "NormAct2d":
        words = {"channels": shape[0], "act": "ReLU"}
    elif kind == "LocalResponseNorm":
        words = {"size": 3}
    d.call(d.part(kind, **words), x)


@draw(2)
def activated(d: Draft) -> None:
    """An activation on any value; in place also where others have read it before."""
    if x := d.fresh() if d.writes else d.any():
        activation(d, x)


@draw(1.5)
def pooled(d: Draft) -> None:
    if not (x := d.image(smallest=3)):
        return
    size = d.one_of((2, 3, (2, 3)))
    words: dict = {
        "kernel_size": size,
        "stride": d.one_of((None, 1, 2)),
        "ceil_mode": d.chance(0.3),
    }
    words["padding"] = d.one_of((0, 1))
    kind = d.one_of(
        ("MaxPool2d", "MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d", "AdaptiveMaxPool2d")
    )
    if kind == "AvgPool2d":
        words["count_include_pad"] = d.chance(0.5)
    elif kind.startswith("Adaptive"):
        words = {"output_size": d.one_of((1, 1, 2, (3, 2), (None, 1)))}
    d.step("call", d.part(kind, **words), x)


@draw(1)
def moved_pixels(d: Draft) -> None:
    if not (x := d.image()):
        return
    c, h, w = d.shape(x)
    found: list[tuple[str, dict]] = [
        ("Identity", {}),
        ("Dropout2d", {}),
        ("ZeroPad2d", {"padding": 1}),
    ]
    if max(h, w) <= PIXELS // 2:
        mode = d.one_of(("nearest", "bilinear"))
        words = {"align_corners": d.one_of((True, False))} if mode == "bilinear" else {}
        found += [("Upsample", {"scale_factor": 2, "mode": mode, **words})] * 3
        found += [("PixelShuffle", {"upscale_factor": 2})] if c % 4 == 0 else []
    if h % 2 == w % 2 == 0 and c * 4 <= CHANNELS:
        found.append(("PixelUnshuffle", {"downscale_factor": 2}))
    if c % 2 == 0:
        found.append(("ChannelShuffle", {"groups": 2}))
    kind, words = d.one_of(found)
    d.step("call", d.part(kind, **words), x)
