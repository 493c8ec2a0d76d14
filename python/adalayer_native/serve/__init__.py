"""Serving over HTTP: an Open Inference Protocol front over Ray Serve replicas (extra ``[serve]``).

``adalayer serve`` is the door; docs/serving.md describes the endpoints and the design.
"""

from .settings import Settings

__all__ = ["Settings"]
