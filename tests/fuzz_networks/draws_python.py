"""Ways to go on with Python: control flow, containers, arguments; and what may be refused."""

from __future__ import annotations

import math

from .draft import PIXELS, Draft, draw


@draw(2)
def controlled(d: Draft) -> None:
    if not (x := d.any()):
        return
    shape = d.shape(x)
    plain = (
        "branch_on_rank",
        "loop_over_sizes",
        "divide_by_size",
        "through_object",
        "without_grad",
    )
    form = d.one_of((*plain, "branch_on_size", "loop_over_axis", "while_wide", "through_generator"))
    if form == "branch_on_size":
        d.step(form, x, limit=d.one_of((2, 4, 6)))
    elif form in ("loop_over_axis", "through_generator"):
        if shape[0] <= 8 and (len(shape) > 1 or form == "loop_over_axis"):
            d.step(form, x)
    elif form != "while_wide" or (len(shape) >= 2 and 3 < shape[-1] <= PIXELS):
        d.step(form, x)


@draw(1)
def containers(d: Draft) -> None:
    if x := d.any():
        if d.chance(0.5):
            d.step("through_dict", x, d.like(x) or x)
        else:
            d.step("fold_list", x, d.like(x) or x, d.like(x) or x)


@draw(1.5)
def arguments(d: Draft) -> None:
    """Optional tensors, given or not, and arguments with a default."""
    if not (x := d.any()):
        return
    kind = d.one_of(("image", "row", "number", "flag"))
    known = [item.name for item in d.inputs if item.kind == kind]
    if kind in ("number", "flag"):
        name = known[0] if known else d.add_input(kind, (), given=False)
        d.step(f"by_{kind}", x, name)
    elif len(d.inputs) < 3:
        shape = (2, 4, 4) if kind == "image" else (5,)
        d.step("optional", x, d.add_input(kind, shape, given=d.chance(0.5)))


@draw(1)
def modes(d: Draft) -> None:
    """What a forward asks about itself."""
    if not (x := d.image()):
        return
    c = d.shape(x)[0]
    module = d.part("Conv2d", in_channels=c, out_channels=4, kernel_size=1)
    if d.chance(0.5):
        d.step("without_autocast", x, module)
    else:
        d.step("by_training", d.call(module, x), module)


@draw(0.5)
def pyramid(d: Draft) -> None:
    if x := d.image(smallest=4):
        c = d.shape(x)[0]
        if c <= 4:
            words = {"in_channels": c, "out_channels": c, "kernel_size": 3, "padding": 1}
            d.step("last_of_pyramid", d.part("Conv2d", **words), x)


@draw(1, odd=True)
def of_values(d: Draft) -> None:
    """Python that looks at a tensor's numbers."""
    if x := d.any():
        d.step(d.one_of(("branch_on_value", "read_value", "through_numpy")), x)


@draw(1.5, odd=True)
def across_batch(d: Draft) -> None:
    """Images that depend on other images."""
    if not (x := d.any()):
        return
    form = d.one_of(("centre_batch", "turn_batch", "branch_on_batch", "divide_by_batch", "norm"))
    if form == "turn_batch":
        d.step(form, x, form=d.one_of(("flip", "roll")))
    elif form != "norm":
        d.step(form, x)
    elif len(d.shape(x)) == 3 and math.prod(d.shape(x)[1:]) > 1:
        words = {"num_features": d.shape(x)[0], "track_running_stats": False}
        d.step("call", d.part("BatchNorm2d", **words), x)


@draw(0.7, odd=True)
def counted(d: Draft) -> None:
    """A module whose calls change its state."""
    if x := d.any():
        d.step("call", d.part("Counted"), x)
