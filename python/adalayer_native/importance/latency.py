"""Criterion "latency": what a layer costs in time, measured on this machine."""

from __future__ import annotations

from ..plan import MAX_BITS, LayerPlan, Plan, layer_kind
from .batches import Batch
from .registry import Probe, criterion

__all__ = ["latency"]


@criterion("latency", unit="µs", once=True, increase=False)
def latency(probe: Probe, batch: Batch) -> None:
    """``t_l``: median microseconds of the layer at 8 bits in the engine, one image per call.

    The hardware's own word in place of an operation count, as in Zhao et al., "Edge-MPQ", IEEE
    Transactions on Computers, 2024. It is a cost: like F in eq. (1) it counts for the layer. A
    layer that has no native form counts 0. The only criterion whose values differ from one run and
    machine to the next.
    """
    from ..engine.compiler import compile as compile_engine
    from ..engine.latency import LayerTimes
    from ..quantization import calibrate, convert, prepare
    from ..quantization.file_contents import stored_model

    def plan(native: set[str]) -> Plan:
        return Plan(
            {
                name: LayerPlan(
                    name,
                    layer_kind(layer),
                    layer.weight.numel(),
                    MAX_BITS if name in native else None,
                )
                for name, layer in probe.layers.items()
            }
        )

    native = set(stored_model(probe.model, plan(set(probe.layers))).layers)
    times: dict[str, float] = {}
    if native:
        x = batch.x[:1]
        prepared = prepare(probe.model, plan(native))
        calibrate(prepared, [x], observer="minmax", progress=False)
        engine = compile_engine(convert(prepared), x, policy="native")
        times, _ = LayerTimes(engine, native).column(MAX_BITS, 0.0)
    for name in probe.layers:
        probe.report(name, times.get(name, 0.0))
