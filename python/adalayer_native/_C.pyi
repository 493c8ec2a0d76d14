"""Native kernels over raw addresses. Use adalayer_native.ops, which checks every argument."""

from os import PathLike
from typing import TypedDict

def conv2d(
    x: int,
    x_is_u8: bool,
    x_nhwc: bool,
    batch: int,
    h: int,
    w: int,
    geometry: tuple[int, ...],
    packed: int,
    packed_bytes: int,
    scale: int,
    bias: int,
    input_scale: float,
    input_zero_point: int,
    input_bits: int,
    y: int,
    y_is_u8: bool,
    y_nhwc: bool,
    lo: float,
    hi: float,
    output_zero_point: int,
    residual: int,
    grid_scale: float,
    grid_zero_point: int,
    grid_bits: int,
    threads: int,
    /,
) -> None: ...
def quantize(
    x: int, n: int, scale: float, zero_point: int, bits: int, q: int, threads: int, /
) -> None: ...
def fake_quantize(
    x: int, n: int, scale: float, zero_point: int, bits: int, y: int, threads: int, /
) -> None: ...
def fma(a: int, b: int, c: int, n: int, y: int, threads: int, /) -> None: ...
def float_function(function: int, x: int, n: int, y: int, threads: int, /) -> None: ...
def float_conv(
    geometry: tuple[int, ...],
    x: int,
    images: int,
    h: int,
    w: int,
    weights: int,
    bias: int,
    y: int,
    threads: int,
) -> None: ...
def float_norm(
    x: int,
    images: int,
    channels: int,
    plane: int,
    groups: int,
    about_zero: bool,
    eps: float,
    gamma: int,
    beta: int,
    y: int,
    threads: int,
) -> None: ...
def softmax(
    x: int, images: int, channels: int, positions: int, y: int, threads: int, /
) -> None: ...
def attention(
    sizes: tuple[int, int, int, int, int, int, int],
    zero_points: tuple[int, int, int],
    scale: float,
    value_scale: float,
    causal: bool,
    mask: int,
    mask_image: int,
    mask_head: int,
    q: int,
    k: int,
    v: int,
    y: int,
    threads: int,
    /,
) -> None: ...
def pack(weights: int, count: int, bits: int, o: int, i: int, kh: int, kw: int, /) -> bytes: ...
def unpack(packed: int, size: int, /) -> bytes: ...
def header(packed: int, size: int, /) -> dict[str, int | str | tuple[int, int, int, int]]: ...
def check_accumulator(reduction: int, bits: int, /) -> None: ...
def isas() -> list[str]: ...
def active_isa() -> str: ...
def kernels_key() -> str: ...
def force_isa(name: str, /) -> None: ...
def set_sparse_policy(name: str, /) -> None: ...
def set_winograd_policy(name: str, /) -> None: ...
def cpu_features() -> str: ...
def fork_join_seconds(threads: int, rounds: int, /) -> float: ...
def probe_cores(threads: int, /) -> tuple[float, int]: ...
def threading_backend() -> str: ...
def cache_info() -> tuple[int, int, int]: ...
def set_cache_limit(bytes: int, /) -> None: ...
def clear_cache() -> None: ...

class _Operation(TypedDict):
    inputs: tuple[int, int]  # fewest and most; -1 for any number
    forms: list[tuple[str, str, int]]  # kind of inputs, kind of output, minor version of the format
    ints: list[tuple[str, int, int, int | None]]  # name, lowest, highest, usual
    floats: list[tuple[str, float | None]]  # name, usual
    constants: list[tuple[str, str, str, bool]]  # name, kind, other kind, optional
    table_per_input: bool

def operations() -> dict[str, _Operation]: ...

class Program:
    """A network for the engine (csrc/engine/program.hpp). Constants are copied from addresses."""

    def __init__(self) -> None: ...
    def add_value(
        self,
        name: str,
        kind: str,
        c: int,
        h: int = 1,
        w: int = 1,
        scale: float = 1.0,
        zero_point: int = 0,
        qmax: int = 255,
    ) -> int: ...
    def add_constant_weights(self, address: int, size: int, /) -> int: ...
    def add_constant_f32(self, address: int, count: int, /) -> int: ...
    def add_constant_i32(self, address: int, count: int, /) -> int: ...
    def add_constant_u8(self, address: int, count: int, /) -> int: ...
    def add_node(
        self,
        op: str,
        name: str,
        inputs: list[int],
        output: int,
        ints: list[int] = ...,
        floats: list[float] = ...,
        constants: list[int] = ...,
    ) -> None: ...
    def set_inputs(self, values: list[int], /) -> None: ...
    def set_outputs(self, values: list[int], /) -> None: ...
    def inputs(self) -> list[int]: ...
    def outputs(self) -> list[int]: ...
    def metadata(self) -> dict[str, str]: ...
    def set_metadata(self, key: str, text: str, /) -> None: ...
    # name, kind, c, h, w, scale, zero point, qmax
    def values(self) -> list[tuple[str, str, int, int, int, float, int, int]]: ...
    # operation, name, inputs, output, ints, floats, constants
    def nodes(
        self,
    ) -> list[tuple[str, str, list[int], int, list[int], list[float], list[int]]]: ...
    # kind, bytes
    def constants(self) -> list[tuple[str, int]]: ...
    def constant_bytes(self, index: int, /) -> bytes: ...
    def validate(self) -> None: ...
    # The bytes of an .ada file (docs/ada-format.md).
    def to_bytes(self) -> bytes: ...
    @staticmethod
    def from_bytes(address: int, size: int, /) -> Program: ...
    def save(self, path: str | PathLike[str], /) -> None: ...
    @staticmethod
    def load(path: str | PathLike[str], memory_bytes: int = 0) -> Program: ...
    def run_reference(
        self, inputs: list[int], nhwc: list[bool], batch: int, outputs: list[int], /
    ) -> None: ...
    def reference_values(
        self, inputs: list[int], nhwc: list[bool], batch: int, /
    ) -> list[bytes]: ...

class Engine:
    """A program made ready for this machine."""

    def __init__(
        self,
        program: Program,
        chunk: int = 0,
        cache_bytes: int = 0,
        weights: str = "measured",
        memory_bytes: int = 0,
        plan: str = "",
    ) -> None: ...
    def any_order(self) -> list[bool]: ...
    def run(
        self,
        inputs: list[int],
        nhwc: list[bool],
        batch: int,
        outputs: list[int],
        threads: int,
        /,
    ) -> None: ...
    # name, operation, kernel, bits, MACs, packed bytes, derived bytes, microseconds, why
    def profile(
        self, batch: int, threads: int, rounds: int, /
    ) -> list[tuple[str, str, str, int, int, int, int, float, str]]: ...
    # name, and what algorithms could run it: equal where they, and so their times, are the same
    def forms(self) -> list[tuple[str, int]]: ...
    # what the clock has chosen, for ``plan``; empty where nothing was measured
    def plan(self) -> str: ...
    def weight_bytes(self) -> int: ...
    def workspace_bytes(self) -> int: ...
    def program(self) -> Program: ...
