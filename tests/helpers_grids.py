"""Which u8 grid every tensor of a converted graph lies on."""

from __future__ import annotations

from torch import fx, nn

from adalayer_native.capture import info_of
from adalayer_native.capture import vocabulary as table
from adalayer_native.capture.float_values import float_values
from adalayer_native.nn import Conv2d, ConvTranspose2d, FakeQuantize, Linear

Grid = tuple[float, int, int]
_NATIVE = (Conv2d, ConvTranspose2d, Linear)


class GridWalk:
    """Follows the u8 grids through a converted graph.

    Attributes:
        grids: grid by node, for nodes whose values are known to lie on one.
        problems: one line for every float tensor between the input and the last native layer that
            is neither on a grid nor read only by what puts it on one.
    """

    def __init__(self, native: fx.GraphModule) -> None:
        self.modules = dict(native.named_modules())
        self.nodes = list(native.graph.nodes)
        self.floats = float_values(native)
        # Nodes from which a native layer can be reached: the rest is the float tail.
        self.reaching: set[fx.Node] = set()
        for node in reversed(self.nodes):
            if any(user in self.reaching or self.is_native(user) for user in node.users):
                self.reaching.add(node)
        self.grids: dict[fx.Node, Grid] = {}
        for node in self.nodes:
            grid = self.own_grid(node)
            if grid is not None:
                self.grids[node] = grid
        self.problems = [
            f"{node.op} {node.target}: {problem}"
            for node in self.nodes
            if (problem := self.problem(node)) is not None
        ]

    def module(self, node: fx.Node) -> nn.Module | None:
        return table.module_of(node, self.modules)

    def is_native(self, node: fx.Node) -> bool:
        return isinstance(self.module(node), _NATIVE)

    def passes(self, node: fx.Node) -> bool:
        return table.is_grid_preserving(node, self.modules)

    @staticmethod
    def grid_of(module: nn.Module) -> Grid:
        """Input grid of a native layer, or the grid of a FakeQuantize."""
        return module.input_scale, module.input_zero_point, module.input_bits  # type: ignore

    def own_grid(self, node: fx.Node) -> Grid | None:
        module = self.module(node)
        if isinstance(module, FakeQuantize):
            return self.grid_of(module)
        grid = module.__dict__.get("output_grid") if module is not None else None
        if grid is not None:
            return self.grid_of(grid)
        operand = table.source(node)
        if self.passes(node) and operand is not None:
            return self.grids.get(operand)
        return None

    def problem(self, node: fx.Node) -> str | None:
        """Why a tensor without a grid cannot be stored as u8."""
        if (
            node in self.grids
            or not table.is_value(node)
            or node in self.floats.values
            or node.op in ("get_attr", "output")  # parameters are constants of the program
            or node not in self.reaching
        ):
            return None
        wanted: set[Grid] = set()
        pending = [node]
        while pending:
            value = pending.pop()
            for user in value.users:
                module = self.module(user)
                if user.op != "output" and info_of(user) is None:
                    continue  # a size
                if self.passes(user):
                    pending.append(user)
                elif isinstance(module, FakeQuantize) or (
                    isinstance(module, _NATIVE) and value not in user.args[1:]
                ):
                    wanted.add(self.grid_of(module))
                elif self.chained(value, user) or self.needs_floats(user):
                    continue
                else:
                    return f"is float where {user.op} {user.target} reads it"
        if len(wanted) > 1:
            return f"its readers have {len(wanted)} different grids"
        return None

    def needs_floats(self, user: fx.Node) -> bool:
        """Whether the engine has no operation for it on levels."""
        return (
            user.op == "call_function"
            and table.op_name(user) not in table.INTEGER_OPERATORS
            and not table.is_grid_preserving(user, self.modules)
        ) or user in self.floats.readers

    def chained(self, value: fx.Node, user: fx.Node) -> bool:
        """A batch norm and the activation that is its only reader are one step."""
        return (
            table.op_name(value) == "adalayer.grid_batch_norm.default"
            and len(value.users) == 1
            and table.clamp_range(user) is not None
        )
