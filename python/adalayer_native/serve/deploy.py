"""Replicas as Ray Serve applications."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from typing import Any

from .._ray import connect, import_ray
from ..errors import ClusterError
from .replica import Worker, WorkerSpec
from .settings import Settings

ray = import_ray()
from ray import serve  # noqa: E402

__all__ = ["RayDeployer", "Replica"]

DEPLOYMENT = "replica"


class Replica:
    """The deployment: a :class:`~adalayer_native.serve.replica.Worker` in a Ray Serve replica."""

    def __init__(self, spec: dict[str, Any], app: str) -> None:
        # Calls come from one thread per connection, each of which would get a team of libgomp's.
        os.environ.setdefault("ADALAYER_THREADS", "own")
        self._worker = Worker(WorkerSpec(**spec), lambda: serve.delete(app, _blocking=False))
        self._worker.start()

    def check_health(self) -> None:
        """Ray Serve replaces a replica where this raises."""
        if not self._worker.healthy():
            raise RuntimeError("a thread of this replica has ended, or an engine call hangs")

    def __call__(self) -> str:
        """Ray Serve wants an application to be callable; data goes over the front's connections."""
        return "send requests to the front"

    def __del__(self) -> None:
        worker = getattr(self, "_worker", None)
        if worker is not None:
            worker.stop()


class RayDeployer:
    """Replicas on a Ray cluster of our own, or on one that exists.

    To be made in the main thread, before an event loop runs.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._owned = connect(settings.address, len(os.sched_getaffinity(0)))
        host = "127.0.0.1" if settings.address is None else ray.util.get_node_ip_address()
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self.data_host = settings.data_host or host
        # Ray Serve's client is one for the process, and two calls at a time have crashed it.
        self._one_at_a_time = threading.Lock()
        try:
            serve.start(proxy_location="Disabled")
        except Exception as error:  # Ray raises many kinds
            self.close()
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ClusterError(
                f"Ray Serve did not start: {reason}; try again when the machine is less busy"
            ) from error

    async def deploy(self, app: str, spec: WorkerSpec) -> None:
        """See :class:`~adalayer_native.serve.models.Deployer`."""
        await asyncio.to_thread(self._deploy, app, spec)

    def _deploy(self, app: str, spec: WorkerSpec) -> None:
        # On one machine the threads are what is shared out, and Ray's count of CPUs means nothing.
        cpus = 0 if self._settings.address is None else spec.threads
        with self._one_at_a_time:
            deployment = serve.deployment(Replica, name=DEPLOYMENT).options(
                num_replicas=self._settings.replicas,
                max_ongoing_requests=1,
                ray_actor_options={"num_cpus": cpus},
                health_check_period_s=1,
                health_check_timeout_s=30,
                graceful_shutdown_wait_loop_s=0.1,
                graceful_shutdown_timeout_s=5,
                max_constructor_retry_count=3,
            )
            target = serve.RunTarget(
                target=deployment.bind(spec.as_dict(), app), name=app, route_prefix=None
            )
            serve.run_many(
                [target],
                wait_for_ingress_deployment_creation=False,
                wait_for_applications_running=False,
            )

    async def remove(self, app: str) -> None:
        """See :class:`~adalayer_native.serve.models.Deployer`."""
        await asyncio.to_thread(self._remove, app)

    def _remove(self, app: str) -> None:
        with self._one_at_a_time:
            serve.delete(app, _blocking=False)

    def close(self) -> None:
        """Leave the cluster; one of our own ends with that, and Ray Serve in it."""
        if self._owned:
            ray.shutdown()
