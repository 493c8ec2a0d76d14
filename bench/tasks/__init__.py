"""Detection and segmentation, end to end: `python -m bench.tasks` (docs/tasks.md)."""
