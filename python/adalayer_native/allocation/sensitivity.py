r"""What an error in one layer's weight costs the network, before a whole plan is tried.

A solver needs a number per layer and option that can be added up. The candidates are judged by how
they rank whole plans; see :class:`LogitSensitivity` for the one that is the default and the
comparison, and ``measure="loss"`` of :func:`~adalayer_native.allocation.allocate` for the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..capture import Inputs
from ..detection import named
from ..errors import CalibrationError
from ..importance.analyze import eval_mode
from ..importance.batches import Batch, one_sample
from ..importance.outputs import Pick, Result, picked, results_of
from ..importance.task_loss import TaskLoss
from ..repair.input_rows import columns
from ..rounding import conv_form

__all__ = ["LayerError", "LogitSensitivity", "WeightOf", "shifted"]

# The two places where a repair plugs in: what a layer gets at (bits, sparsity), and what that does
# to the loss. The first is the dequantized weight in the layer's own shape, alone or with what is
# added to the bias, float32 ``[out_channels]``. Where other patterns of zeros than the unstructured
# one are offered, such an option's pattern is the fourth argument of both.
WeightOf = Callable[..., Tensor | tuple[Tensor, Tensor | None]]  # (layer, bits, sparsity)
LayerError = Callable[..., float]  # (layer, bits, sparsity)


def shifted(layer: nn.Module, output: Tensor, shift: Tensor) -> Tensor:
    """A layer's output with a constant added to every channel."""
    if isinstance(layer, nn.Linear):
        return output + shift
    return output + shift.view(-1, 1, 1)


MEMORY = 1 << 29  # bytes of layer inputs and gradients that are kept
# Of gradients: each is rounded by 0.2 % on its own, and an error is a sum of thousands of products.
KEPT = torch.bfloat16
AT_ONCE = 4  # images that are differentiated together


class LogitSensitivity:
    r"""The loss increase to second order, with the errors of all positions added with their signs.

    Let ``J`` be the derivative of the logits z of one image by the output y of a layer, ``p`` the
    softmax of z, and ``dy`` the change of y by the weight error. To second order

    .. math:: KL(p \| p') = \tfrac12 (J\,dy)^T (\mathrm{diag}(p) - p p^T) (J\,dy)
              = \tfrac12\, E_v \langle J^T B v, dy \rangle^2, \quad B = (I - p 1^T)\,
              \mathrm{diag}(\sqrt p),\ v \sim N(0, I)

    (the Gauss-Newton form of the Hessian, Schraudolph 2002, with one random vector per image in
    place of all classes). A backward pass per v gives ``J^T B v`` of every layer at once; one
    option then costs one convolution of the layer's own input with the weight error.

    Why this one: for 80 plans of 6 to 15 % of the float file, the rank correlation between the sum
    over layers and the real KL on 1,000 held-out training images of CIFAR-10, with the trend over
    the plans' size taken out of both, is

    ==================================  =========  ===========
    error of a layer                    ResNet-20  AdaLayerNet
    ==================================  =========  ===========
    this                                     0.71         0.90
    loss with that layer alone changed       0.71         0.90
    diagonal over outputs instead            0.58         0.83
    KFAC with a diagonal output factor       0.40         0.60
    weight error                             0.43         0.23
    relative output error                    0.25        -0.03
    ==================================  =========  ===========

    The second costs a pass through the network per option, this one a single layer. Errors of
    different positions cancel in the logits, which diagonals do not see.

    An output that is no logits counts with its squared error relative to the squared size of the
    float output over the batch, as in :func:`~adalayer_native.importance.outputs.distance`; it is
    of second order already. Several outputs add up: each has random vectors of its own. A
    :class:`~adalayer_native.importance.TaskLoss` brings ``B`` of its terms along.

    ``<J^T B v, dy>`` is linear in the weight error, too. Where a layer's weight is smaller than
    what goes through it, as in the first layers of a network for large images, its gradient by the
    weight is kept instead of inputs and gradients by the output: an option then costs one product,
    and far more images fit into memory. Gradients are kept in bfloat16, inputs as they are:
    what a grid of a few bits does to values that have been rounded is something else.

    Args:
        model: float model; not changed.
        batches: calibration batches; the first ``images`` images are used, fewer where layer
            inputs and gradients exceed 512 MiB.
        layers: the layers of interest by name.
        images: at most so many.
        directions: random vectors per image.
        seed: of the random vectors.
        logits: false where the loss is not known: half the squared change of what would be logits
            is used.
        output: which output counts.
        loss: the loss of the task, which has a second derivative of its own; in place of both.

    Raises:
        CalibrationError: no batches, or no outputs of floating point.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        layers: dict[str, Any],
        *,
        images: int = 128,
        directions: int = 3,
        seed: int = 0,
        logits: bool = True,
        output: Pick = None,
        loss: TaskLoss | None = None,
    ) -> None:
        self.layers, self.pick, self.logits, self.loss = layers, output, logits, loss
        self.images = self.directions = 0
        # Per layer, batch and call: the input, and the gradients of every direction.
        self._seen: dict[str, list[list[tuple[Tensor, list[Tensor]]]]] = {n: [] for n in layers}
        # Or per layer and batch, summed over calls: gradients by weight and output channel,
        # ``[images x directions, weights + channels]``.
        self._folded: dict[str, list[Tensor]] = {}
        generator = torch.Generator().manual_seed(seed)
        held = per_image = 0
        for batch in batches:
            room = images - self.images
            if room <= 0 or held >= MEMORY:
                break
            if not per_image:
                per_image = self._bytes(model, one_sample(model, batch.x), directions)
            fitting = max(1, int((MEMORY - held) // max(1, per_image)))
            part = batch.part(slice(0, min(room, fitting)))
            held += per_image * part.count
            with torch.no_grad(), eval_mode(model):
                found = part.x(model)
            scales: list[Any]
            if loss is not None:
                outputs = named(picked(found, output))
                scales = [term.form(outputs).spread for term in loss.terms]
            else:
                results = results_of(found, output, part.tokens)
                scales = [_Form(result, logits).scale for result in results]
            for start in range(0, part.count, AT_ONCE):
                few = part.part(slice(start, start + AT_ONCE))
                self._run(model, few, directions, generator, scales)
            self.images += part.count
        if self.images == 0:
            raise CalibrationError("the calibration data hold no image to measure errors on")
        self.directions = directions

    def _bytes(self, model: nn.Module, x: Inputs, directions: int) -> int:
        """Bytes that are kept of one image; decides which layers keep gradients by the weight."""
        found: dict[str, int] = dict.fromkeys(self.layers, 0)

        def hook_for(name: str) -> Any:
            def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
                found[name] += 4 * inputs[0].numel()
                found[name] += KEPT.itemsize * directions * output.numel()

            return hook

        handles = [
            layer.register_forward_hook(hook_for(name)) for name, layer in self.layers.items()
        ]
        try:
            with torch.no_grad(), eval_mode(model):
                x(model)
        finally:
            for handle in handles:
                handle.remove()
        total = 0
        for name, layer in self.layers.items():
            kept = found[name] // x.count
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                form = conv_form(layer, layer.weight)
                folded = KEPT.itemsize * directions * (form.numel() + form.shape[0])
                if folded < kept:
                    self._folded[name], kept = [], folded
            total += kept
        return total

    def _run(
        self,
        model: nn.Module,
        batch: Batch,
        directions: int,
        generator: torch.Generator,
        scales: list[Any],
    ) -> None:
        calls: list[tuple[str, Tensor, Tensor]] = []

        def hook_for(name: str) -> Any:
            def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
                # A leaf added to the output receives dL/dy even if an activation then works in
                # place, and models whose parameters are frozen have a gradient, too.
                probe = torch.zeros_like(output, requires_grad=True)
                calls.append((name, inputs[0].detach(), probe))
                return output + probe

            return hook

        handles = [
            layer.register_forward_hook(hook_for(name)) for name, layer in self.layers.items()
        ]
        try:
            with torch.enable_grad(), eval_mode(model):
                result = batch.x(model)
        finally:
            for handle in handles:
                handle.remove()
        gradients: list[list[Tensor]] = [[] for _ in calls]
        projected = self._projection(result, batch, scales, generator)
        for direction in range(directions):
            found = torch.autograd.grad(
                projected(),
                [probe for _, _, probe in calls],
                retain_graph=direction + 1 < directions,
                allow_unused=True,
            )
            for (_, _, probe), kept, gradient in zip(calls, gradients, found, strict=True):
                kept.append(torch.zeros_like(probe.detach()) if gradient is None else gradient)
        for name, layer in self.layers.items():
            own = [
                (call[1], kept)
                for call, kept in zip(calls, gradients, strict=True)
                if call[0] == name
            ]
            if name not in self._folded:
                self._seen[name].append([(x, [g.to(KEPT) for g in k]) for x, k in own])
            elif own:
                folded = torch.stack([_by_weight(layer, x, kept) for x, kept in own]).sum(dim=0)
                self._folded[name].append(folded.to(KEPT))

    def _projection(
        self, output: Any, batch: Batch, scales: list[Any], generator: torch.Generator
    ) -> Callable[[], Tensor]:
        """What gives a random combination of the outputs, another one in every call."""
        if self.loss is None:
            results = results_of(output, self.pick, batch.tokens)
            found = [
                _Form(result, self.logits, scale)
                for result, scale in zip(results, scales, strict=True)
            ]
            return lambda: torch.stack([form.projected(generator) for form in found]).sum()
        outputs = named(picked(output, self.pick))
        forms = [t.form(outputs, s) for t, s in zip(self.loss.terms, scales, strict=True)]
        return lambda: torch.stack([form.projected(outputs, generator) for form in forms]).sum()

    @torch.no_grad()
    def error(self, name: str, weight: Tensor, shift: Tensor | None = None) -> float:
        """Predicted loss increase in nats per image.

        Args:
            name: of the layer.
            weight: its new weight.
            shift: added to its bias, ``[out_channels]``.
        """
        layer = self.layers[name]
        if name in self._folded:
            change = conv_form(layer, weight.to(layer.weight) - layer.weight)
            step = torch.zeros(len(change)).to(change) if shift is None else shift.to(change)
            both = torch.cat([change.flatten(), step])
            total = sum(
                float((part.to(both) @ both).double().square().sum()) for part in self._folded[name]
            )
            return 0.5 * total / (self.images * self.directions)
        state = {"weight": weight.to(layer.weight) - layer.weight}
        if layer.bias is not None:
            state["bias"] = torch.zeros_like(layer.bias)

        def change_of(inputs: Tensor) -> Tensor:
            found: Tensor = functional_call(layer, state, (inputs,))
            return found if shift is None else shifted(layer, found, shift)

        return self.of_change(name, change_of)

    @torch.no_grad()
    def of_change(self, name: str, change_of: Callable[[Tensor], Tensor]) -> float:
        """Predicted loss increase in nats per image where a layer's output changes.

        Args:
            name: of the layer.
            change_of: its input to what is added to its output.
        """
        total = 0.0
        for calls in self._seen[name]:
            # A layer that is called twice changes the logits by the sum of both.
            inner = torch.zeros((), dtype=torch.float64)
            for inputs, gradients in calls:
                change = change_of(inputs)
                products = [(g * change).flatten(1).sum(1) for g in gradients]
                inner = inner + torch.stack(products).double().cpu()
            total += float(inner.square().sum())
        return 0.5 * total / (self.images * self.directions)


@torch.no_grad()
def _by_weight(layer: nn.Module, x: Tensor, gradients: list[Tensor]) -> Tensor:
    """Gradients of every image and direction by a layer's weight and its output channels.

    Args:
        layer: a layer.
        x: its input.
        gradients: by its output, one per direction.

    Returns:
        ``[images x directions, weights + channels]``, output channels first.
    """
    every = 1 << 30  # all positions: nothing is drawn
    rows = columns(layer, x, every, torch.Generator())  # [G, N * P, K]
    groups, count, width = rows.shape
    images = x.shape[0] if x.dim() > 1 else 1
    # All directions with one reading of the inputs, which are the larger operand.
    y = torch.stack(gradients)
    if not isinstance(layer, nn.Linear):
        y = y.permute(0, 1, 3, 4, 2)  # [D, N, ..., O]
    by_output = y.reshape(len(gradients), images, count // images, groups, -1)
    inputs = rows.reshape(groups, images, count // images, width)
    weight = torch.einsum("dnpgo,gnpk->dngok", by_output, inputs)
    found = torch.cat([weight.flatten(2), by_output.sum(dim=2).flatten(2)], dim=2)
    return found.flatten(0, 1)


class _Form:
    """The quadratic form of one output: what a change of it costs, half its square summed.

    Its scale is that of the batch that a few images are of, where it is given.
    """

    def __init__(self, result: Result, logits: bool, scale: float | None = None) -> None:
        self.p: Tensor | None = None
        if result.classes is not None:
            self.output = result.logits.float()
            self.scale = self.output[0, 0].numel() ** 0.5
            if logits:
                self.p = self.output.detach().softmax(dim=1)
        else:
            self.output = result.value.float()
            energy = float(self.output.detach().square().sum())
            samples = self.output.shape[0] if self.output.dim() else 1
            size = energy if energy > 0 else self.output.numel()
            self.scale = max(size / (2 * samples), 1e-30) ** 0.5
        if scale is not None:
            self.scale = scale

    def projected(self, generator: torch.Generator) -> Tensor:
        """The output times a random vector that the form is the mean square of."""
        v = torch.randn(self.output.shape, generator=generator).to(self.output.device)
        if self.p is not None:
            root = self.p.sqrt() * v
            v = root - self.p * root.sum(dim=1, keepdim=True)
        return (self.output * v).sum() / self.scale
