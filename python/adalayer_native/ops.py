"""Torch operators over the native kernels: schemas, argument checks, implementations, fake kernels.

Operators take the canonical packed weights (device-neutral bytes with a header), so a compiled or
exported program holds nothing that depends on the machine. The layout that the machine's kernels
want is derived on first use and cached by content.

The implementations here are for CPU tensors; ``cuda_ops`` has those for GPUs. Weights are
``uint8[64 + payload]`` as :func:`pack_weight` makes them; scales and biases are
``float32[out_channels]``.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adalayer_native import _C
from adalayer_native.errors import FileFormatError

__all__ = [
    "active_isa",
    "conv2d",
    "conv2d_u8",
    "conv_transpose2d",
    "fake_quantize",
    "force_isa",
    "get_num_threads",
    "isas",
    "linear",
    "pack_weight",
    "packed_info",
    "quantize",
    "set_num_threads",
    "unpack_weight",
]

_INF = float("inf")
_HEADER_BYTES = 64

_library = torch.library.Library("adalayer", "DEF")

_CONV_ARGS = (
    "int[2] kernel_size, int[2] stride, int[4] padding, int[2] dilation, int groups, "
    "float? lo=None, float? hi=None, Tensor? residual=None, float output_scale=0.0, "
    "int output_zero_point=0, int output_bits=0"
)
_library.define(
    "conv2d(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor bias, float input_scale, "
    f"int input_zero_point, int input_bits, {_CONV_ARGS}) -> Tensor"
)
_library.define(
    "conv2d_u8(Tensor x, Tensor weight_packed, Tensor scale, Tensor bias, int input_zero_point, "
    "int output_zero_point, int[2] kernel_size, int[2] stride, int[4] padding, int[2] dilation, "
    "int groups, int lo=0, int hi=255) -> Tensor"
)
_library.define(
    "conv_transpose2d(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor bias, "
    "float input_scale, int input_zero_point, int input_bits, int[2] kernel_size, int[2] stride, "
    "int[2] padding, SymInt[2] output_padding, int[2] dilation, int groups, float? lo=None, "
    "float? hi=None, float output_scale=0.0, int output_zero_point=0, int output_bits=0) -> Tensor"
)
_library.define(
    "linear(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor bias, float input_scale, "
    "int input_zero_point, int input_bits, float? lo=None, float? hi=None) -> Tensor"
)
_library.define("quantize(Tensor x, float scale, int zero_point, int bits) -> Tensor")
_library.define("fake_quantize(Tensor x, float scale, int zero_point, int bits) -> Tensor")


# ------------------------------------------------------------------------------ machine and threads

_threads_lock = threading.Lock()
_threads: int | None = None


def set_num_threads(threads: int | None) -> None:
    """Sets how many threads a native operator may use; ``None`` follows torch.get_num_threads().

    Raises:
        ValueError: if ``threads`` is below 1.
    """
    global _threads
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1 or None, got {threads}")
    with _threads_lock:
        _threads = threads


def get_num_threads() -> int:
    """Threads that a native operator may use."""
    return torch.get_num_threads() if _threads is None else _threads


def isas() -> list[str]:
    """Instruction sets that this build and this machine have, fastest first."""
    return list(_C.isas())


def active_isa() -> str:
    """The instruction set in use: ``ADALAYER_FORCE_ISA`` in the environment, else the fastest."""
    return str(_C.active_isa())


def force_isa(name: str) -> None:
    """Uses one instruction set from now on; ``"auto"`` goes back to the fastest.

    Raises:
        ValueError: for an unknown name or one that the machine does not support.
    """
    _C.force_isa(name)


def set_sparse_policy(name: str) -> None:
    """Chooses how zero weights are used from here on; for tests and measurements.

    Args:
        name: ``"auto"`` (the default: by the clock, layer by layer), ``"dense"``, ``"blocks"`` or
            ``"bitmask"``. Results have the same bits under each. ``ADALAYER_SPARSE`` sets it at the
            start. Engines that exist stay as they are.

    Raises:
        ValueError: for an unknown name.
    """
    _C.set_sparse_policy(name)


# -------------------------------------------------------------------------------------- packing


def pack_weight(weight: Tensor, bits: int) -> Tensor:
    """Packs integer weights into the canonical form.

    Args:
        weight: int8, ``[O, I/groups, KH, KW]`` or ``[O, I]``, in -2^(bits-1) … 2^(bits-1)-1.
        bits: 2 to 8.

    Returns:
        uint8 ``[64 + payload]``: header and bit-planes of all weights, of the 16 x 64 blocks that
        are not zero behind a mask of blocks, or of the nonzeros behind a bitmask: whichever is
        smallest.

    Raises:
        TypeError: if ``weight`` is not int8. ValueError: shape, bits or a value out of range.
    """
    if weight.dtype != torch.int8:
        raise TypeError(f"pack_weight expects int8 weights, got {weight.dtype}")
    if weight.dim() not in (2, 4):
        raise ValueError(f"pack_weight expects [O, I] or [O, I, KH, KW], got {list(weight.shape)}")
    w = weight.detach().cpu().contiguous()
    shape = tuple(w.shape) if w.dim() == 4 else (w.shape[0], w.shape[1], 1, 1)
    packed = _C.pack(w.data_ptr(), w.numel(), bits, *shape)
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def unpack_weight(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_weight`: int8 ``[O, I/groups, KH, KW]``.

    Raises:
        FileFormatError: if the bytes are damaged, saying how.
    """
    packed = _packed_bytes(packed)
    shape = packed_info(packed)["shape"]
    try:
        raw = _C.unpack(packed.data_ptr(), packed.numel())
    except ValueError as error:
        raise FileFormatError(str(error)) from None
    return torch.frombuffer(bytearray(raw), dtype=torch.int8).reshape(shape)


def packed_info(packed: Tensor) -> dict:
    """Header of packed weights: bits, encoding, shape, stored (weights), payload_bytes.

    Raises:
        FileFormatError: if the header does not describe the buffer.
    """
    packed = _packed_bytes(packed)
    try:
        return dict(_C.header(packed.data_ptr(), packed.numel()))
    except ValueError as error:
        raise FileFormatError(str(error)) from None


def _packed_bytes(packed: Tensor) -> Tensor:
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise FileFormatError(
            f"packed weights are uint8 of one dimension, got {packed.dtype} {list(packed.shape)}"
        )
    return packed.detach().cpu().contiguous()


# ------------------------------------------------------------------------------- shared checking

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _channels_last(x: Tensor) -> bool:
    """Whether the result should be channels_last: the input is, and not just ambiguously so."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _geometry(
    channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, ...]:
    top, left, bottom, right = padding
    return (
        channels,
        out_channels,
        *kernel_size,
        *stride,
        top,
        left,
        bottom,
        right,
        *dilation,
        groups,
    )


def _out_size(size: int, before: int, after: int, kernel: int, stride: int, dilation: int) -> int:
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


def _conv_out_shape(
    x: Tensor,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    top, left, bottom, right = padding
    if min(stride) < 1:
        raise ValueError(f"adalayer::conv2d: stride must be at least 1, got {list(stride)}")
    h = _out_size(x.shape[2], top, bottom, kernel_size[0], stride[0], dilation[0])
    w = _out_size(x.shape[3], left, right, kernel_size[1], stride[1], dilation[1])
    if h < 1 or w < 1:
        raise ValueError(
            f"adalayer::conv2d: an input of {list(x.shape)} with padding {list(padding)} is "
            f"smaller than the dilated kernel {list(kernel_size)}, dilation {list(dilation)}"
        )
    return x.shape[0], out_channels, h, w


def _check_input(op: str, x: Tensor, dtypes: tuple[torch.dtype, ...], dims: int | None) -> None:
    if x.dtype not in dtypes:
        wanted = " or ".join(str(d) for d in dtypes)
        raise TypeError(f"adalayer::{op}: expected an input of {wanted}, got {x.dtype}")
    if dims is not None and x.dim() != dims:
        raise ValueError(
            f"adalayer::{op}: expected an input of {dims} dimensions, got shape {list(x.shape)}"
        )


def _check_parameters(op: str, packed: Tensor, scale: Tensor, bias: Tensor) -> None:
    if packed.dtype != torch.uint8 or packed.dim() != 1 or not packed.is_contiguous():
        raise TypeError(
            f"adalayer::{op}: weight_packed must be contiguous uint8 of one dimension, "
            f"got {packed.dtype} {list(packed.shape)}"
        )
    for name, t in (("scale", scale), ("bias", bias)):
        if t.dtype != torch.float32 or t.shape != scale.shape or not t.is_contiguous():
            raise TypeError(
                f"adalayer::{op}: {name} must be contiguous float32 {list(scale.shape)}, "
                f"got {t.dtype} {list(t.shape)}"
            )


# ------------------------------------------------------------------------------------------ conv2d


try:
    _dispatch_modes = torch._C._len_torch_dispatch_stack
    _functorch_active = torch._C._are_functorch_transforms_active
except AttributeError:  # private functions: where they are missing, always use the dispatcher
    _dispatch_modes = _functorch_active = None  # type: ignore[assignment]


def plain_eager(x: Tensor) -> bool:
    """Whether nobody watches the operators: no compiler, tracer, mode or tensor subclass."""
    return (
        _dispatch_modes is not None
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not _functorch_active()
        and _dispatch_modes() == 0
        and not torch.autograd.profiler._is_profiler_enabled
    )


def conv2d_direct(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    input_scale: float,
    input_zero_point: int,
    input_bits: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    lo: float | None = None,
    hi: float | None = None,
    residual: Tensor | None = None,
    output_scale: float = 0.0,
    output_zero_point: int = 0,
    output_bits: int = 0,
) -> Tensor:
    """The operator without the dispatcher and without checks of the parameters.

    For layers that own their (checked) parameters, where :func:`plain_eager` holds: it saves about
    a third of the overhead of a call, which is what a small layer at batch 1 mostly consists of.
    """
    _check_input("conv2d", x, _FLOATS, 4)
    dtype = x.dtype
    if dtype != torch.float32:
        x = x.float()
    nhwc = _channels_last(x)
    if not nhwc:
        x = x.contiguous()
    n, channels, h, w = x.shape
    out_channels = weight_scale.shape[0]
    geometry = _geometry(channels, out_channels, kernel_size, stride, padding, dilation, groups)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    shape = _conv_out_shape(x, out_channels, kernel_size, stride, padding, dilation)
    out = torch.empty(shape, dtype=torch.float32, memory_format=layout)
    if residual is not None:
        if residual.shape != out.shape:
            raise ValueError(
                f"adalayer::conv2d: expected a residual of shape {list(shape)}, "
                f"got {list(residual.shape)}"
            )
        if residual.dtype != torch.float32:
            residual = residual.float()
        residual = residual.contiguous(memory_format=layout)
    _C.conv2d(
        x.data_ptr(),
        False,
        nhwc,
        n,
        h,
        w,
        geometry,
        weight_packed.data_ptr(),
        weight_packed.numel(),
        weight_scale.data_ptr(),
        bias.data_ptr(),
        input_scale,
        input_zero_point,
        input_bits,
        out.data_ptr(),
        False,
        nhwc,
        -_INF if lo is None else lo,
        _INF if hi is None else hi,
        0,
        0 if residual is None else residual.data_ptr(),
        output_scale,
        output_zero_point,
        output_bits,
        get_num_threads(),
    )
    return out if dtype == torch.float32 else out.to(dtype)


def _conv2d_cpu(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor, *rest: Any
) -> Tensor:
    _check_parameters("conv2d", weight_packed, weight_scale, bias)
    return conv2d_direct(x, weight_packed, weight_scale, bias, *rest)


def _conv2d_fake(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    input_scale: float,
    input_zero_point: int,
    input_bits: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *rest: Any,
) -> Tensor:
    _check_input("conv2d", x, _FLOATS, 4)
    return _empty_like_input(x, weight_scale.shape[0], kernel_size, stride, padding, dilation)


def _empty_like_input(x: Tensor, out_channels: int, *geometry: Sequence[int]) -> Tensor:
    """Output of a convolution: the input's dtype, device and memory format."""
    layout = torch.channels_last if _channels_last(x) else torch.contiguous_format
    shape = _conv_out_shape(x, out_channels, *geometry)
    return x.new_empty(shape).contiguous(memory_format=layout)


def _conv2d_u8_cpu(
    x: Tensor,
    weight_packed: Tensor,
    scale: Tensor,
    bias: Tensor,
    input_zero_point: int,
    output_zero_point: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    lo: int = 0,
    hi: int = 255,
) -> Tensor:
    _check_input("conv2d_u8", x, (torch.uint8,), 4)
    _check_parameters("conv2d_u8", weight_packed, scale, bias)
    if not 0 <= lo <= hi <= 255 or not 0 <= output_zero_point <= 255:
        raise ValueError(
            "adalayer::conv2d_u8: expected 0 <= lo <= hi <= 255 and a zero point in 0…255, "
            f"got lo={lo}, hi={hi}, output_zero_point={output_zero_point}"
        )
    nhwc = _channels_last(x)
    if not nhwc:
        x = x.contiguous()
    n, channels, h, w = x.shape
    out_channels = scale.shape[0]
    geometry = _geometry(channels, out_channels, kernel_size, stride, padding, dilation, groups)
    out = torch.empty(
        _conv_out_shape(x, out_channels, kernel_size, stride, padding, dilation),
        dtype=torch.uint8,
        memory_format=torch.channels_last if nhwc else torch.contiguous_format,
    )
    _C.conv2d(
        x.data_ptr(),
        True,
        nhwc,
        n,
        h,
        w,
        geometry,
        weight_packed.data_ptr(),
        weight_packed.numel(),
        scale.data_ptr(),
        bias.data_ptr(),
        1.0,
        input_zero_point,
        8,
        out.data_ptr(),
        True,
        nhwc,
        float(lo - output_zero_point),
        float(hi - output_zero_point),
        output_zero_point,
        0,
        0.0,
        0,
        0,
        get_num_threads(),
    )
    return out


def _conv2d_u8_fake(
    x: Tensor,
    weight_packed: Tensor,
    scale: Tensor,
    bias: Tensor,
    input_zero_point: int,
    output_zero_point: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *rest: Any,
) -> Tensor:
    _check_input("conv2d_u8", x, (torch.uint8,), 4)
    return _empty_like_input(x, scale.shape[0], kernel_size, stride, padding, dilation)


# ----------------------------------------------------------------------------- conv_transpose2d

# Weights of transposed convolutions with their kernels flipped, by their canonical header, which
# holds a hash of the content. Small next to the layouts that the kernels derive from them.
_FLIPPED_LIMIT = 64
_flipped: OrderedDict[bytes, Tensor] = OrderedDict()
_flipped_lock = threading.Lock()


def _flipped_weight(packed: Tensor) -> Tensor:
    key = packed[:_HEADER_BYTES].numpy().tobytes()
    with _flipped_lock:
        found = _flipped.get(key)
        if found is not None:
            _flipped.move_to_end(key)
            return found
    flipped = pack_weight(unpack_weight(packed).flip(2, 3), packed_info(packed)["bits"])
    with _flipped_lock:
        _flipped[key] = flipped
        while len(_flipped) > _FLIPPED_LIMIT:
            _flipped.popitem(last=False)
    return flipped


def _transposed_padding(
    kernel_size: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) around the spread-out input; a negative one cuts off."""
    top, left = (d * (k - 1) - p for d, k, p in zip(dilation, kernel_size, padding, strict=True))
    return top, left, top + output_padding[0], left + output_padding[1]


def _conv_transpose_out_shape(
    x: Tensor,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    _check_input("conv_transpose2d", x, _FLOATS, 4)
    if min(stride) < 1 or min(dilation) < 1:
        raise ValueError(
            "adalayer::conv_transpose2d: stride and dilation must be at least 1, "
            f"got {list(stride)} and {list(dilation)}"
        )
    sizes = []
    for axis in range(2):
        extra = output_padding[axis]
        if extra < 0 or extra >= max(stride[axis], dilation[axis]):
            raise ValueError(
                "adalayer::conv_transpose2d: output_padding must be at least 0 and smaller than "
                f"stride {list(stride)} or dilation {list(dilation)}, got {list(output_padding)}"
            )
        reach = dilation[axis] * (kernel_size[axis] - 1) + 1
        sizes.append((x.shape[2 + axis] - 1) * stride[axis] - 2 * padding[axis] + reach + extra)
        if sizes[axis] < 1:
            raise ValueError(
                f"adalayer::conv_transpose2d: an input of {list(x.shape)} with padding "
                f"{list(padding)} leaves no output"
            )
    return x.shape[0], out_channels, sizes[0], sizes[1]


def _conv_transpose2d_cpu(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    input_scale: float,
    input_zero_point: int,
    input_bits: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    lo: float | None = None,
    hi: float | None = None,
    output_scale: float = 0.0,
    output_zero_point: int = 0,
    output_bits: int = 0,
) -> Tensor:
    """A convolution with the flipped kernel over the input, its pixels ``stride`` apart.

    The 0.0 between them is a level of every grid and adds nothing to the integer sums.
    """
    _check_parameters("conv_transpose2d", weight_packed, weight_scale, bias)
    shape = _conv_transpose_out_shape(
        x, weight_scale.shape[0], kernel_size, stride, padding, output_padding, dilation
    )
    layout = torch.channels_last if _channels_last(x) else torch.contiguous_format
    n, channels, h, w = x.shape
    spread = torch.empty(
        (n, channels, (h - 1) * stride[0] + 1, (w - 1) * stride[1] + 1),
        dtype=x.dtype,
        memory_format=layout,
    ).zero_()
    spread[:, :, :: stride[0], :: stride[1]] = x
    around = _transposed_padding(kernel_size, padding, output_padding, dilation)
    if min(around) < 0:
        top, left, bottom, right = (max(-p, 0) for p in around)
        spread = spread[:, :, top : spread.shape[2] - bottom, left : spread.shape[3] - right]
        spread = spread.contiguous(memory_format=layout)
        around = tuple(max(p, 0) for p in around)  # type: ignore[assignment]
    out = conv2d_direct(
        spread,
        _flipped_weight(weight_packed),
        weight_scale,
        bias,
        input_scale,
        input_zero_point,
        input_bits,
        kernel_size,
        (1, 1),
        around,
        dilation,
        groups,
        lo,
        hi,
        None,
        output_scale,
        output_zero_point,
        output_bits,
    )
    assert tuple(out.shape) == shape
    return out


def _conv_transpose2d_fake(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    input_scale: float,
    input_zero_point: int,
    input_bits: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    *rest: Any,
) -> Tensor:
    shape = _conv_transpose_out_shape(
        x, weight_scale.shape[0], kernel_size, stride, padding, output_padding, dilation
    )
    layout = torch.channels_last if _channels_last(x) else torch.contiguous_format
    return x.new_empty(shape).contiguous(memory_format=layout)


# ------------------------------------------------------------------------------------------ linear


def _linear_cpu(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    input_scale: float,
    input_zero_point: int,
    input_bits: int,
    lo: float | None = None,
    hi: float | None = None,
) -> Tensor:
    _check_input("linear", x, _FLOATS, None)
    if x.dim() == 0:
        raise ValueError("adalayer::linear: expected an input of at least one dimension")
    _check_parameters("linear", weight_packed, weight_scale, bias)
    dtype = x.dtype
    x = x.float().contiguous()
    features, out_features = x.shape[-1], weight_scale.shape[0]
    out = torch.empty((*x.shape[:-1], out_features), dtype=torch.float32)
    geometry = _geometry(features, out_features, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
    _C.conv2d(
        x.data_ptr(),
        False,
        True,
        x.numel() // features,
        1,
        1,
        geometry,
        weight_packed.data_ptr(),
        weight_packed.numel(),
        weight_scale.data_ptr(),
        bias.data_ptr(),
        input_scale,
        input_zero_point,
        input_bits,
        out.data_ptr(),
        False,
        True,
        -_INF if lo is None else lo,
        _INF if hi is None else hi,
        0,
        0,
        0.0,
        0,
        0,
        get_num_threads(),
    )
    return out if dtype == torch.float32 else out.to(dtype)


def _linear_fake(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor, *rest: Any
) -> Tensor:
    _check_input("linear", x, _FLOATS, None)
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))


# ------------------------------------------------------------------------------- element-wise


def _dense(x: Tensor) -> Tensor:
    """x itself where its elements fill its memory in some order, else a contiguous copy."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


def _quantize_cpu(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    _check_input("quantize", x, _FLOATS, None)
    x = _dense(x.float())
    out = torch.empty_like(x, dtype=torch.uint8)
    _C.quantize(x.data_ptr(), x.numel(), scale, zero_point, bits, out.data_ptr(), get_num_threads())
    return out


def _quantize_fake(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    _check_input("quantize", x, _FLOATS, None)
    return torch.empty_like(_dense(x), dtype=torch.uint8)


def _fake_quantize_cpu(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    _check_input("fake_quantize", x, _FLOATS, None)
    dtype = x.dtype
    x = _dense(x.float())
    out = torch.empty_like(x)
    _C.fake_quantize(
        x.data_ptr(), x.numel(), scale, zero_point, bits, out.data_ptr(), get_num_threads()
    )
    return out if dtype == torch.float32 else out.to(dtype)


def _fake_quantize_fake(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    _check_input("fake_quantize", x, _FLOATS, None)
    return torch.empty_like(_dense(x))


for _name, _cpu, _fake in (
    ("conv2d", _conv2d_cpu, _conv2d_fake),
    ("conv2d_u8", _conv2d_u8_cpu, _conv2d_u8_fake),
    ("conv_transpose2d", _conv_transpose2d_cpu, _conv_transpose2d_fake),
    ("linear", _linear_cpu, _linear_fake),
    ("quantize", _quantize_cpu, _quantize_fake),
    ("fake_quantize", _fake_quantize_cpu, _fake_quantize_fake),
):
    _library.impl(_name, _cpu, "CPU")
    torch.library.register_fake(f"adalayer::{_name}", _fake, lib=_library)

conv2d = torch.ops.adalayer.conv2d.default
conv2d_u8 = torch.ops.adalayer.conv2d_u8.default
conv_transpose2d = torch.ops.adalayer.conv_transpose2d.default
linear = torch.ops.adalayer.linear.default
quantize = torch.ops.adalayer.quantize.default
fake_quantize = torch.ops.adalayer.fake_quantize.default
