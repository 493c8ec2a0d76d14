"""Load and faults of `adalayer serve`, on loopback; see docs/serving.md."""
