"""Figures that the two papers print, for the columns beside ours.

"AdaLayerNet" (first paper): Tables 1 and 2, Figure 6. Its "Millions" and "MB" are thousands of
parameters and kilobytes, its sizes and latencies synthetic. "Layer-wise Quantization in Green-Aware
AI" (second paper): Table 3, which states no units; by its numbers they are seconds, kWh and kg of
CO2 per training step (26 J in 0.16 s are 168 W, and 0.33 kg per kWh is Italy's mix).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FIGURE6", "TABLE2", "TABLE3", "Figure6Row", "Table2Row", "Table3Row"]

KWH = 3.6e6  # joules


@dataclass(frozen=True)
class Table2Row:
    """A row of the first paper's Table 2.

    Attributes:
        parameters: thousands, "after" as its Figure 6 counts them.
        accuracy: per cent.
        kilobytes: of the model; synthetic.
        milliseconds: latency; synthetic.
    """

    parameters: float
    accuracy: float
    kilobytes: float
    milliseconds: float


@dataclass(frozen=True)
class Figure6Row:
    """A row of the first paper's Figure 6: thousands of parameters, per cent pruned, bits, A."""

    before: float
    after: float
    pruned: float
    bits: int
    contribution: float


@dataclass(frozen=True)
class Table3Row:
    """A row of the second paper's Table 3: means and spreads over the epochs of one run.

    Attributes:
        test, train: accuracy in per cent.
        loss: of training.
        seconds: per step.
        kwh: per step.
        kg: of CO2 per step.
    """

    test: tuple[float, float]
    train: tuple[float, float]
    loss: tuple[float, float]
    seconds: tuple[float, float]
    kwh: tuple[float, float]
    kg: tuple[float, float]

    @property
    def joules(self) -> tuple[float, float]:
        """Energy per step."""
        return self.kwh[0] * KWH, self.kwh[1] * KWH


TABLE2 = {
    "float": Table2Row(1389.10, 86.00, 1390.50, 198.95),
    "uniform-paper": Table2Row(400.00, 82.50, 400.00, 190.00),
    "adalayer": Table2Row(229.70, 84.61, 229.53, 184.10),
}
FIGURE6 = {
    "conv1": Figure6Row(0.864, 0.20217, 6.4045, 8, 0.06),
    "conv2": Figure6Row(18.432, 3.0835, 10.45, 6, 0.08),
    "conv3": Figure6Row(73.728, 10.742, 6.7552, 5, 0.12),
    "conv4": Figure6Row(147.46, 30.362, 5.8713, 7, 0.12),
    "conv5": Figure6Row(294.91, 54.015, 16.271, 7, 0.18),
    "conv6": Figure6Row(589.82, 104.55, 5.4632, 6, 0.15),
    "fc1": Figure6Row(131.58, 13.881, 32.487, 5, 0.18),
    "fc2": Figure6Row(131.33, 12.685, 22.727, 4, 0.11),
}
TABLE3 = {
    "cifar10": {
        "full": Table3Row(
            (90.01, 3.72), (95.41, 5.36), (0.1289, 0.1492), (0.1562, 0.0377),
            (7.28e-6, 4.27e-6), (2.40e-6, 1.42e-6),
        ),
        "ascending": Table3Row(
            (86.88, 5.06), (91.53, 0.24), (0.2390, 0.1535), (0.1525, 0.00093),
            (5.10e-6, 2.42e-8), (1.69e-6, 8.53e-9),
        ),
        "descending": Table3Row(
            (86.34, 5.63), (90.23, 5.48), (0.2766, 0.1514), (0.1507, 0.00082),
            (5.10e-6, 2.84e-8), (1.69e-6, 9.38e-9),
        ),
        "fixed": Table3Row(
            (84.26, 4.91), (89.54, 5.48), (0.2956, 0.1514), (0.1529, 0.00061),
            (5.10e-6, 5.48e-9), (1.69e-6, 3.37e-9),
        ),
    },
    "cifar100": {
        "full": Table3Row(
            (64.36, 6.73), (82.68, 10.69), (0.56, 0.42), (0.17, 0.01),
            (9.01e-6, 3.62e-6), (2.97e-6, 1.20e-6),
        ),
        "ascending": Table3Row(
            (55.69, 7.03), (64.94, 7.87), (1.21, 0.34), (0.22, 0.03),
            (5.10e-6, 2.88e-8), (1.68e-6, 8.42e-8),
        ),
        "descending": Table3Row(
            (51.15, 6.36), (61.8, 7.34), (1.33, 0.32), (0.146, 0.004),
            (5.11e-6, 9.860e-8), (1.68e-6, 1.22e-7),
        ),
        "fixed": Table3Row(
            (54.75, 7.19), (61.5, 7.37), (1.35, 0.32), (0.19, 0.04),
            (8.48e-6, 3.66e-6), (2.73e-6, 1.27e-6),
        ),
    },
}  # fmt: skip
