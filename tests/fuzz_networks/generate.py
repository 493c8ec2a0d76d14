"""Random recipes."""

from __future__ import annotations

from . import (  # noqa: F401  (they register)
    draws_blocks,
    draws_layers,
    draws_memory,
    draws_python,
    draws_values,
)
from .draft import DRAWS, ODD, Draft
from .network import TOKENS
from .recipe import Recipe, leaves, tidy

LAYERS = ("Conv2d", "Linear", "ConvTranspose2d")


def generate(seed: int, *, odd: bool = False, writes: bool = True) -> Recipe:
    """The recipe of a seed.

    Args:
        writes: whether it may write into values that others read.
        odd: with a step that may be refused (but must not be wrong).
    """
    d = Draft(seed, writes=writes)
    _begin(d)
    wanted = d.rng.randint(3, 7)
    functions = [function for function, _ in DRAWS]
    weights = [weight for _, weight in DRAWS]
    tries = 0
    while len(d.steps) < wanted and tries < 60:
        tries += 1
        d.rng.choices(functions, weights)[0](d)
    if odd:
        d.odd = True
        d.rng.choices([f for f, _ in ODD], [w for _, w in ODD])[0](d)
    if not any(part.kind in LAYERS and _called(d, part.name) for part in d.parts):
        _add_layer(d)
    return tidy(d.recipe(_returns(d)))


def _called(d: Draft, part: str) -> bool:
    return any(step.op == "call" and part in step.operands for step in d.steps)


def _begin(d: Draft) -> None:
    """Inputs, as values that layers can read."""
    side = lambda: d.rng.randint(4, 10)  # noqa: E731
    kind = d.one_of(("image",) * 10 + ("row", "sequence", "sequence", "tokens", "bytes", "two"))
    if kind in ("image", "two"):
        shape = (d.one_of((1, 2, 3, 3, 4, 8)), side(), side())
        d.add_input("image", shape)
        if kind == "two":
            d.add_input("image", shape if d.chance(0.5) else (2, side(), side()))
    elif kind == "row":
        d.add_input("row", (d.one_of((4, 8, 17)),))
    elif kind == "sequence":
        length = d.rng.randint(2, 9)
        d.add_input("sequence", (length, d.one_of((4, 6, 8))))
        if d.chance(0.4):
            d.add_input("mask", (length,))
    elif kind == "bytes":
        x = d.add_input("bytes", (3, side(), side()))
        d.step("from_bytes", x, form=d.one_of(("divide", "float", "to")))
    else:
        x = d.add_input("tokens", (d.rng.randint(2, 9),))
        module = d.part("Embedding", num_embeddings=TOKENS, embedding_dim=d.one_of((4, 6)))
        d.step("call", module, x)
        if d.chance(0.3):
            d.add_input("mask", d.inputs[0].shape)


def _add_layer(d: Draft) -> None:
    """Nothing could be compressed in a network without layers."""
    if x := d.image():
        c = d.shape(x)[0]
        d.call(d.part("Conv2d", in_channels=c, out_channels=3, kernel_size=1), x)
    else:
        x = d.value(lambda v: v.dim() >= 2)
        assert x is not None
        d.call(d.part("Linear", in_features=d.shape(x)[-1], out_features=3), x)


def _returns(d: Draft) -> object:
    """What nothing has read, and now and then also what others read, or an input as it is."""
    read = {name for step in d.steps for name in step.operands}
    made = [name for name in d.live if name.startswith("v")]
    names = [name for name in made if name not in read][-4:] or made[-1:]
    if d.chance(0.25):
        names.append(d.one_of(made))
    if d.chance(0.06):
        names.append(d.one_of([item.name for item in d.inputs if item.given]))
    if len(names) == 1 and d.chance(0.7):
        return names[0]
    kind = d.one_of(("tuple", "list", "dict", "pair", "deep"))
    if kind == "pair":
        names = (names * 2)[-2:]
    elif kind == "dict":
        return ("dict", *((f"out{k}", name) for k, name in enumerate(names)))
    elif kind == "deep":
        extra = (("number", 3),) if d.chance(0.3) else ()
        return ("dict", ("first", names[0]), ("rest", ("list", *names, *extra)))
    return (kind, *names)


def size_of(recipe: Recipe) -> int:
    """A measure that shrinking lowers."""
    dressed = sum(len(part.dress) + bool(part.tied) for part in recipe.parts)
    return 4 * len(recipe.steps) + len(recipe.parts) + dressed + 2 * len(leaves(recipe.returns))
