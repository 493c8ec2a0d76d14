"""Ways to go on with a view, or by writing into memory that others read."""

from __future__ import annotations

import math

from .draft import FEATURES, PIXELS, TOKENS, Draft, draw
from .ops_memory import VIEWS, WRITES


@draw(2)
def turned(d: Draft) -> None:
    """The same elements in another order."""
    x = d.value(lambda v: v.dim() >= 3 and max(v.shape[1:]) <= TOKENS)
    if not x:
        return
    rank = len(d.shape(x)) + 1
    axes = list(range(1, rank))
    form = d.one_of(("permute", "transpose", "flip", "roll"))
    if form == "permute":
        d.step("permute", x, order=(0, *d.rng.sample(axes, len(axes))))
    elif form == "transpose":
        d.step("transpose", x, axes=d.one_of(((1, 2), (-1, -2), (1, -1))))
    elif form == "flip":
        d.step("flip", x, axis=d.one_of(axes))
    else:
        d.step("roll", x, axis=d.one_of(axes), by=d.one_of((1, -1)))


@draw(2.5)
def reshaped(d: Draft) -> None:
    """An image becomes tokens or a row, tokens become an image."""
    x = d.value(lambda v: math.prod(v.shape[1:]) <= FEATURES and v.dim() > 1)
    if not x:
        return
    shape = d.shape(x)
    if len(shape) == 3:
        _, h, w = shape
        if h * w <= TOKENS and d.chance(0.7):
            y = d.step("flatten", x, start=2)
            if d.chance(0.6):
                d.step("transpose", y, axes=(1, 2))
        else:
            d.step("flatten", x, start=1)
    elif len(shape) == 2:
        a, b = shape
        side = math.isqrt(b)
        if side * side == b and 1 < side <= PIXELS:
            form = d.one_of(("reshape", "view") if d.live[x].is_contiguous() else ("reshape",))
            d.step("reshape", x, shape=(a, side, side), form=form)
        else:
            d.step("flatten", x, start=1)
    else:
        sizes = [k for k in range(2, 9) if shape[0] % k == 0 and shape[0] // k <= TOKENS]
        if sizes:
            k = d.one_of(sizes)
            form = d.one_of(("reshape", "unflatten"))
            d.step("reshape", x, shape=(k, shape[0] // k), form=form)


@draw(1.5)
def cut(d: Draft) -> None:
    if not (x := d.any()):
        return
    shape = d.live[x].shape
    axis = d.one_of(range(1, len(shape)))
    size = shape[axis]
    form = d.one_of(("cut", "cut", "narrow", "select"))
    if form == "select":
        if len(shape) > 2:
            d.step("select", x, axis=axis, index=d.one_of((0, -1, size // 2)))
    elif size > 1:
        start = d.one_of((0, 1))
        if form == "narrow":
            d.step("narrow", x, axis=axis, start=start, length=d.rng.randint(1, size - start))
        else:
            stop = d.one_of((size, size - 1 + (start == size - 1), 2**31))
            d.step("cut", x, axis=axis, start=start, stop=stop, step=d.one_of((1, 1, 2)))


@draw(2)
def divided(d: Draft) -> None:
    """Several values of one; they stay views of it."""
    x = d.value(lambda v: v.dim() >= 2 and v.shape[1] > 1)
    if not x:
        return
    shape = d.live[x].shape
    axis = d.one_of(range(1, len(shape)))
    size = shape[axis]
    form = d.one_of(("chunk", "split", "unbind"))
    if form == "unbind":
        if len(shape) > 2 and 1 < size <= 8:
            d.step("unbind", x, axis=axis, makes=size)
    elif size > 1 and form == "chunk":
        d.step("chunk", x, count=2, axis=axis, makes=2)
    elif size > 1:
        first = d.rng.randint(1, size - 1)
        d.step("split", x, sizes=(first, size - first), axis=axis, makes=2)


@draw(1)
def shown(d: Draft) -> None:
    """Steps that give back, or seem to give back, what they got."""
    if not (x := d.any()):
        return
    shape = d.live[x].shape
    form = d.one_of(("contiguous", "expand", "unsqueeze_squeeze", "detach", "repeat"))
    if form == "contiguous":
        d.step("contiguous", x, form=d.one_of(("plain", "to", "channels_last")[: len(shape) - 1]))
    elif form in ("expand", "repeat"):
        narrow = [axis for axis in range(1, len(shape)) if shape[axis] == 1]
        if narrow and form == "expand":
            d.step("expand", x, axis=d.one_of(narrow), size=d.one_of((2, 3)))
        elif max(shape[1:]) <= PIXELS // 2:
            d.step("repeat", x, axis=d.one_of(range(1, len(shape))))
    else:
        d.step(form, x)


@draw(3)
def written(d: Draft) -> None:
    if not (x := d.fresh()):
        return
    name = d.one_of([name for name in WRITES if name != "fill_" or d.chance(0.2)])
    if name != "set_masked" and d.chance(0.3):
        d.step("write_and_return", x, name=name)
    else:
        d.step("write", x, name=name, makes=0)


@draw(2)
def written_tensor(d: Draft) -> None:
    """One value is added to, or copied into, another; they may share memory."""
    if not (x := d.fresh()):
        return
    memory = d.live[x].untyped_storage().data_ptr()
    shape = d.live[x].shape
    # An operator that reads what it writes through another view is an error of the program.
    y = d.value(
        lambda v: v.shape == shape and (v is d.live[x] or v.untyped_storage().data_ptr() != memory)
    )
    if y:
        name = d.one_of(("+=", "*=", "-=", "copy_", "add_"))
        d.step("write_tensor", x, y, name=name, makes=0)


@draw(2)
def assigned(d: Draft) -> None:
    if not (x := d.fresh(lambda v: v.dim() >= 2 and v.shape[1] > 1)):
        return
    shape = d.live[x].shape
    if d.chance(0.4):
        d.step(
            "assign_ends", x, makes=0, form=d.one_of(("last", "every second", "ellipsis", "all"))
        )
        return
    axis = d.one_of(range(1, len(shape)))
    stop = d.rng.randint(1, shape[axis])
    memory = d.live[x].untyped_storage().data_ptr()
    y = d.value(lambda v: v.shape == shape and v.untyped_storage().data_ptr() != memory)
    operands = (x, y) if y and d.chance(0.6) else (x,)
    d.step("assign", *operands, makes=0, axis=axis, start=d.rng.randrange(stop), stop=stop)


@draw(3)
def written_through(d: Draft) -> None:
    if not (x := d.fresh(lambda v: v.dim() >= 2 and v.is_contiguous())):
        return
    names = [name for name in WRITES if name not in ("fill_", "hardtanh")]
    d.step("write_through", x, view=d.one_of(sorted(VIEWS)), name=d.one_of(names), makes=0)


@draw(1)
def read_around(d: Draft) -> None:
    if x := d.fresh():
        d.step("read_around_write", x, name=d.one_of(("add_", "mul_", "relu_", "neg_")))


@draw(0.7)
def accumulated(d: Draft) -> None:
    if x := d.image():
        c = d.shape(x)[0]
        module = d.part("Conv2d", in_channels=c, out_channels=c, kernel_size=3, padding=1)
        d.step("accumulate", x, module, times=2)


@draw(0.7)
def canvas(d: Draft) -> None:
    if x := d.value(lambda v: v.dim() >= 3 and v.shape[2] < PIXELS):
        d.step("fill_canvas", x)
