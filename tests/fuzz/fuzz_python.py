"""Fuzzes what Python reads of model files: safetensors files, and the texts of .ada files.

    python tests/fuzz/fuzz_python.py [--seconds S] [--seed N] [--crashes FOLDER] [FILE ...]

Coverage-guided by atheris (extra ``fuzz``) where that is installed, else by luck alone; files that
are named are run once each, to reproduce a finding. What has to hold for every input: it is read,
or refused with an ``AdaError``. Seeds are written by the package itself and follow the format.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

try:
    import atheris
except ImportError:  # no wheel for this Python
    atheris = None

import torch
from safetensors.torch import save as serialize

# What is imported here reports what runs; torch and the like are not for us to cover.
with (
    contextlib.nullcontext()
    if atheris is None
    else atheris.instrument_imports(include=["adalayer_native"])
):
    import adalayer_native as ada
    from adalayer_native import _C
    from adalayer_native.errors import AdaError
    from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers

ADA_KEYS = (
    *("adalayer.inputs", "adalayer.order", "adalayer.outputs", "adalayer.leaves"),
    *("adalayer.structure", "adalayer.call", "preprocessing", "classes"),
)
EDGES = (b"\x00", b"\xff", b"[", b"{", b"null", b"-1", b"1e999", b"2147483648", b'"', b"9" * 20)


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16, 3)
    ).eval()


class Target:
    """One function per kind of input; an input's first byte chooses."""

    def __init__(self, folder: Path) -> None:
        self.safetensors, self.ada = folder / "model.safetensors", folder / "model.ada"
        self.model = _model()
        images = torch.randn(4, 3, 4, 4)
        layers = {
            name: LayerPlan(name, layer_kind(layer), layer.weight.numel(), bits)
            for (name, layer), bits in zip(
                supported_layers(self.model).items(), (3, 8), strict=True
            )
        }
        prepared = ada.prepare(self.model, Plan(layers, "fixed", {}))
        ada.calibrate(prepared, [images], progress=False)
        native = ada.convert(prepared)
        ada.save(native, self.safetensors)
        engine = ada.compile(native, images[:1], policy="native", strict=True)
        engine.save(
            self.ada,
            preprocessing={"mean": [0.5] * 3, "std": [0.2] * 3},
            class_names=["a", "b", "c"],
        )
        self.program = _C.Program.load(self.ada)
        self.images = images
        texts = self.program.metadata()
        self.seeds = [
            b"\x00" + self.safetensors.read_bytes(),
            b"\x00" + serialize({"weight": torch.zeros(2)}),
            *(bytes([1 + k]) + texts[key].encode() for k, key in enumerate(ADA_KEYS)),
        ]
        self.counts = {"read": 0, "refused": 0}

    def run(self, data: bytes) -> None:
        if not data:
            return
        kind = data[0] % (1 + len(ADA_KEYS))
        try:
            if kind == 0:
                self._safetensors(data[1:])
            else:
                self._text(ADA_KEYS[kind - 1], data[1:])
            self.counts["read"] += 1
        except AdaError:
            self.counts["refused"] += 1

    def _safetensors(self, data: bytes) -> None:
        self.safetensors.write_bytes(data)
        try:
            ada.files.describe(self.safetensors)
        finally:
            ada.restore(self.model, self.safetensors)(self.images)

    def _text(self, key: str, data: bytes) -> None:
        try:
            text = data.decode()
        except UnicodeDecodeError:
            return  # the reader in C++ refuses it, and is fuzzed by itself
        before = self.program.metadata()[key]
        self.program.set_metadata(key, text)
        self.program.save(self.ada)
        self.program.set_metadata(key, before)
        ada.load(self.ada, weights="streamed")(self.images)


def mutate(data: bytes, size_limit: int, seed: int, inner: Callable[[bytes, int], bytes]) -> bytes:
    """Changes the header of a safetensors file apart from its tensors; its length stays right."""
    rng = random.Random(seed)
    if len(data) < 9 or data[0] % (1 + len(ADA_KEYS)) != 0 or rng.random() < 0.2:
        return inner(data, size_limit)
    length = struct.unpack("<Q", data[1:9])[0]
    header, tensors = data[9 : 9 + length], data[9 + length :]
    if rng.random() < 0.3:
        tensors = inner(tensors or b"\x00", max(1, len(tensors)))
    elif rng.random() < 0.5:
        header = _changed_header(header, rng) or inner(header, len(header) + 64)
    else:
        header = inner(header or b"{}", len(header) + 64)
    whole = data[:1] + struct.pack("<Q", len(header)) + header + tensors
    return whole if len(whole) <= size_limit else data


def _changed_header(header: bytes, rng: random.Random) -> bytes:
    """A tensor with another shape or type, under another name, or none; empty if it is no JSON."""
    try:
        entries = json.loads(header)
        name = rng.choice([key for key in entries if key != "__metadata__"])
        entry = entries[name]
        choice = rng.randrange(5)
        if choice == 0:
            del entries[name]
        elif choice == 1:
            entries[rng.choice(list(entries))] = entry
        elif choice == 2:
            entry["dtype"] = rng.choice(["U8", "I8", "F16", "F32", "F64", "I64", "BOOL", "BF16"])
        elif choice == 3:
            size = entry["data_offsets"][1] - entry["data_offsets"][0]
            width = rng.choice([1, 2, 4, 8])
            entry["shape"] = rng.choice([[size // width], [1, size // width], [size // width, 1]])
            entry["dtype"] = {1: "U8", 2: "F16", 4: "F32", 8: "F64"}[width]
        else:
            end = entry["data_offsets"][1]
            cut = rng.randrange(0, end + 1)
            entry["data_offsets"] = [cut, end]
            entry["shape"] = [end - cut]
            entry["dtype"] = "U8"
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return b""
    return json.dumps(entries).encode()


def blind_change(data: bytes, size_limit: int, rng: random.Random) -> bytes:
    """What libFuzzer's mutations do, without its feedback."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out)) if out else 0
        choice = rng.randrange(4)
        if choice == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif choice == 1:
            out[at:at] = rng.choice(EDGES)
        elif choice == 2:
            del out[at : at + rng.randint(1, 8)]
        else:
            out[at : at + 4] = rng.choice(EDGES)
    return bytes(out[:size_limit])


def without_atheris(target: Target, seconds: float, seed: int, crashes: Path) -> int:
    rng = random.Random(seed)
    seeds = target.seeds
    executions = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = rng.choice(seeds)
        for _ in range(rng.randint(1, 3)):
            data = mutate(data, 1 << 16, rng.getrandbits(32), lambda d, n: blind_change(d, n, rng))
        executions += 1
        try:
            target.run(data)
        except BaseException:
            crashes.mkdir(parents=True, exist_ok=True)
            path = crashes / f"crash-python-{seed}-{executions}"
            path.write_bytes(data)
            print(f"input of {len(data)} bytes written to {path}", file=sys.stderr)
            raise
    return executions


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--crashes", type=Path, default=Path("build/fuzz/crashes"))
    options = parser.parse_args()
    seed = random.SystemRandom().getrandbits(31) if options.seed is None else options.seed
    ada.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        target = Target(Path(name))
        for data in target.seeds:
            target.run(data)
        if options.files:
            for path in options.files:
                target.run(path.read_bytes())
                print(f"{path}: ran")
            return 0
        print(f"seed {seed}, {'atheris' if atheris else 'without coverage'}", flush=True)
        if atheris is None:
            executions = without_atheris(target, options.seconds, seed, options.crashes)
            print(f"stat::number_of_executed_units: {executions}")
            print(f"{target.counts['read']} inputs read, {target.counts['refused']} refused")
            return 0
        corpus = Path(name) / "corpus"
        corpus.mkdir()
        for k, data in enumerate(target.seeds):
            (corpus / str(k)).write_bytes(data)
        options.crashes.mkdir(parents=True, exist_ok=True)
        arguments = [
            sys.argv[0],
            f"-max_total_time={int(options.seconds)}",
            f"-seed={seed}",
            f"-artifact_prefix={os.fspath(options.crashes)}/crash-python-",
            "-print_final_stats=1",
            "-max_len=65536",
            "-timeout=60",
            os.fspath(corpus),
        ]
        atheris.Setup(
            arguments,
            target.run,
            custom_mutator=lambda data, limit, seed: mutate(data, limit, seed, atheris.Mutate),
        )
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
