"""One network on one forced instruction set beside OpenVINO capped to it, in a process of its own.

oneDNN reads its cap from the environment when it is loaded, so each cap needs a process. The cap
binds oneDNN's kernels only: what OpenVINO generates itself may still use wider instructions.
"""

from __future__ import annotations

import json
import sys

import torch

import adalayer_native as ada
from bench import engines
from bench.conftest import measure
from bench.networks import native_network, network
from bench.peers import (
    SIMILARITY,
    as_tensor,
    meet_all_cpus,
    openvino_f32,
    openvino_int8,
    similarity,
)


def main(name: str, isa: str, threads: int, seconds: float) -> None:
    """Prints the comparison as one line of JSON."""
    meet_all_cpus()
    ada.ops.force_isa(isa)
    torch.set_num_threads(threads)
    source = network(name)
    images = source.images(1)
    prepared, _ = native_network(name, 8)
    with torch.inference_mode():
        exact, simulated = source.model(images), prepared(images)
    ours = engines.ours(name, 8, images)
    rival = "openvino int8 capped"
    try:
        peer = openvino_int8(source, images, threads)
    except RuntimeError:  # oneDNN has no int8 kernel for some layer under this cap
        rival = "openvino f32 capped"
        peer = openvino_f32(source, images, threads)
    if similarity(as_tensor(ours()), simulated) < 0.99:
        raise AssertionError(f"{name} on {isa}: the native network gives another result")
    if similarity(as_tensor(peer()), exact) < SIMILARITY["openvino int8"]:
        raise AssertionError(f"{name}: capped OpenVINO gives another result")
    comparison = measure(
        f"instruction set/{isa}/{name}",
        {f"ours {isa}": ours, rival: peer},
        threads=threads,
        seconds=seconds,
        info={"network": name, "isa": isa},
    )
    print(json.dumps(comparison.to_dict()))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
