"""Ways to go on with several modules, or one module several times."""

from __future__ import annotations

from torch import Tensor

from .draft import TOKENS, Draft, draw
from .draws_layers import activation, norm


@draw(1.5)
def attention(d: Draft) -> None:
    x = d.value(lambda v: v.dim() == 3 and v.shape[2] % 2 == 0 and v.shape[1] <= TOKENS)
    if not x:
        return
    size = d.shape(x)[1]
    form = d.one_of(("module", "module", "softmax", "causal", "sdpa"))
    if form == "module":
        y = d.value(lambda v: v.dim() == 3 and v.shape[2] == size and v.shape[1] <= TOKENS) or x
        module = d.part(
            "MultiheadAttention", embed_dim=size, num_heads=2, batch_first=d.chance(0.6),
            bias=True, dropout=d.one_of((0.0, 0.1)),
        )  # fmt: skip
        weights = d.chance(0.4)
        d.step("attend", module, x, y, makes=2 if weights else 1, weights=weights)
    else:
        module = d.part("Linear", in_features=size, out_features=3 * size)
        d.step("heads", module, x, count=2, form=form)


@draw(1)
def tokens_as_batch(d: Draft) -> None:
    if x := d.sequence():
        module = d.part("Linear", dress=d.dress(), in_features=d.shape(x)[1], out_features=6)
        d.step("merge_tokens", module, x)


@draw(1)
def windowed(d: Draft) -> None:
    x = d.value(lambda v: v.dim() == 4 and v.shape[2] % 2 == 0 and v.shape[3] % 2 == 0)
    if x:
        module = d.part("Linear", in_features=d.shape(x)[0], out_features=d.one_of((2, 4)))
        d.step("windows", module, x, size=2)


@draw(1)
def last_axis(d: Draft) -> None:
    """Linear layers and norms over the channels of an image, as in ConvNeXt."""
    if x := d.image():
        c = d.shape(x)[0]
        # (Of two or three values a norm leaves little more than signs, which rounding turns.)
        kind = d.one_of(("Linear", "LayerNorm")) if c > 3 else "Linear"
        words = (
            {"in_features": c, "out_features": 4} if kind == "Linear" else {"normalized_shape": c}
        )
        d.step("channels_last_layer", d.part(kind, **words), x)


@draw(1)
def squeeze_excite(d: Draft) -> None:
    if x := d.image():
        c = d.shape(x)[0]
        first = d.part("Conv2d", in_channels=c, out_channels=2, kernel_size=1)
        d.step("excite", first, d.part("Conv2d", in_channels=2, out_channels=c, kernel_size=1), x)


@draw(2.5)
def called_again(d: Draft) -> None:
    """A module's second call; another norm or activation may follow than after the first."""
    if not d.shared:
        return
    module, shape = d.one_of(d.shared)
    known = next(part for part in d.parts if part.name == module)
    of_images = known.kind not in ("Linear", "ScaledLinear", "LayerNorm", "Conv1d")

    def fits(v: Tensor) -> bool:
        if tuple(v.shape[1:]) == shape:
            return True
        if known.kind == "Linear":
            return v.dim() > 1 and v.shape[-1] == shape[-1]
        larger = v.dim() == 4 == len(shape) + 1 and min(v.shape[2:]) >= 6
        return of_images and larger and v.shape[1] == shape[0]

    if x := d.value(fits):
        x = d.step("call", module, x)
        if d.chance(0.3) and known.kind == "Conv2d":
            x = norm(d, x)
        if d.chance(0.5):
            activation(d, x)


@draw(1)
def tied_layers(d: Draft) -> None:
    """Two layers of one weight."""
    x = d.value(lambda v: v.dim() in (2, 3) and v.shape[-1] <= 12)
    if x:
        size = d.shape(x)[-1]
        first = d.part("Linear", in_features=size, out_features=size)
        second = d.part(
            "Linear", tied=first, in_features=size, out_features=size, bias=d.chance(0.5)
        )
        x = activation(d, d.step("call", first, x))
        d.step("call", second, x)


@draw(1)
def own_modules(d: Draft) -> None:
    if not (x := d.image()):
        return
    c = d.shape(x)[0]
    kind = d.one_of(("Block", "Optional2d", "both"))
    if kind == "Block":
        words = {
            "channels": c,
            "out": d.one_of((4, 6)),
            "act": d.one_of(("ReLU", "SiLU", "Hardswish")),
        }
        d.call(d.part(kind, dress=d.dress(), **words), x)
    elif kind == "Optional2d":
        d.call(d.part(kind, channels=c, there=d.chance(0.5)), x)
    else:
        words = {"in_channels": c, "out_channels": 4, "kernel_size": 3, "padding": 1}
        two = d.part("Conv2d", **words), d.part("Conv2d", **words)
        d.step("both", *two, x, factors=(0.5, 2.0))


@draw(0.5)
def recurrent(d: Draft) -> None:
    if x := d.value(lambda v: v.dim() == 3 and v.shape[1] <= 6):
        words = {"input_size": d.shape(x)[1], "hidden_size": 4, "batch_first": True}
        d.step("recur", d.part(d.one_of(("GRU", "LSTM")), **words), x)


@draw(0.5)
def encoder_layer(d: Draft) -> None:
    x = d.value(lambda v: v.dim() == 3 and v.shape[2] % 2 == 0 and v.shape[1] <= TOKENS)
    if x:
        words = {"d_model": d.shape(x)[1], "nhead": 2, "dim_feedforward": 8, "batch_first": True}
        words.update(norm_first=d.chance(0.5), activation=d.one_of(("relu", "gelu")))
        d.step("call", d.part("TransformerEncoderLayer", **words), x)
