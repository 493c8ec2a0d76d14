"""Engines on a GPU: the bits of the interpreter and of the engine on the CPU."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from helpers_cuda import MARKS, run_on_gpu
from helpers_engine import native_of
from helpers_models import batches, tiny
from helpers_program import noise, programs, run_reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import adalayer_native as ada
from adalayer_native.cuda import CudaEngine
from adalayer_native.errors import DeviceError, InputError

pytestmark = MARKS


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(
    program=programs(ids=False),
    batch=st.integers(1, 5),
    choice=st.integers(-1, 8),
    part=st.integers(0, 3),
    graph=st.booleans(),
    overlap=st.booleans(),
    nhwc=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_random_programs(program, batch, choice, part, graph, overlap, nhwc, seed):
    images = noise(program, batch, seed)
    engine = CudaEngine(
        program,
        0,
        graph=graph,
        overlap=overlap,
        tune=False,
        choice=choice,
        images_per_pass=part,
    )
    expected = run_reference(program, images)
    for _ in range(2):
        got = run_on_gpu(engine, program, images, nhwc=nhwc)
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def engine():
    native = native_of(tiny(), batches(labels=False)[0])
    return ada.compile(native, batches(labels=False)[0][:1], policy="native", strict=True)


@pytest.mark.parametrize("batch", [0, 1, 2, 7, 33])
def test_a_small_network_has_the_bits_of_the_cpu(engine, batch):
    on_gpu = engine.to("cuda")
    assert on_gpu.device.type == "cuda"
    x = torch.randn(batch, 3, 8, 8)
    expected = engine(x)
    for image in (x, x.to(memory_format=torch.channels_last), x.half().float()):
        wanted = expected if image is x else engine(image)
        assert torch.equal(on_gpu(image.cuda()).cpu(), wanted)


def _block(c: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c, c, 3, padding=1, groups=c, bias=False),
        nn.BatchNorm2d(c),
        nn.ReLU6(),
        nn.Conv2d(c, c, 1, bias=False),
        nn.BatchNorm2d(c),
    )


class Wide(nn.Module):
    """Depthwise, grouped, strided and residual layers at widths that fill tiles."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        )
        self.depthwise = _block(64)
        self.grouped = nn.Conv2d(64, 128, 3, 2, 1, groups=4)
        self.dilated = nn.Conv2d(128, 256, 3, padding=2, dilation=2)
        self.narrow = nn.Conv2d(256, 512, 1)
        self.fc = nn.Linear(512, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.depthwise(x))
        x = torch.relu(self.dilated(torch.relu(self.grouped(x))))
        x = torch.relu(self.narrow(x))
        return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))


@pytest.fixture(scope="module")
def wide():
    torch.manual_seed(0)
    images = torch.randn(4, 3, 96, 96)
    native = native_of(Wide().eval(), images)
    return ada.compile(native, images[:1], policy="native", strict=True), images


@pytest.mark.parametrize("options", [{}, {"tune": False}, {"graph": False}, {"overlap": False}])
def test_a_wide_network_has_the_bits_of_the_cpu(wide, options):
    engine, images = wide
    on_gpu = engine.to("cuda", **options)
    for batch in (1, 4):
        assert torch.equal(on_gpu(images[:batch].cuda()).cpu(), engine(images[:batch]))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_known_networks_have_the_bits_of_the_cpu(name):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    images = torch.randn(3, 3, 224, 224)
    native = native_of(models.get_model(name, weights=None).eval(), images[:2])
    engine = ada.compile(native, images[:1], policy="native", strict=True)
    on_gpu = engine.to("cuda")
    for batch in (1, 3):
        assert torch.equal(on_gpu(images[:batch].cuda()).cpu(), engine(images[:batch]))


def test_streams_and_threads(wide):
    engine, images = wide
    on_gpu = engine.to("cuda")
    x = images.cuda()
    expected = engine(images)
    failures = []

    def work(number: int) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            for round_ in range(5):
                batch = 1 + (number + round_) % 4
                y = on_gpu(x[:batch])
                stream.synchronize()
                if not torch.equal(y.cpu(), expected[:batch]):
                    failures.append((number, round_))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_inside_a_graph_of_torch(wide):
    engine, images = wide
    on_gpu = engine.to("cuda")
    x = images.cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_gpu(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = on_gpu(x)
    other = torch.randn_like(x)
    x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y.cpu(), engine(other.cpu()))
    # Calls beside the captured one have memory of their own.
    assert torch.equal(on_gpu(images.cuda()).cpu(), engine(images))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y.cpu(), engine(other.cpu()))


def test_coverage_names_kernels(engine):
    coverage = engine.to("cuda").coverage(batch=4)
    assert all(row.kernel for row in coverage)
    assert sum(row.microseconds for row in coverage) > 0


def test_saved_and_loaded(engine, tmp_path):
    engine.to("cuda").save(tmp_path / "model.ada")
    loaded = ada.load(tmp_path / "model.ada")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded.to("cuda")(x.cuda()).cpu(), engine(x))
    assert torch.equal(loaded.to("cuda").to("cpu")(x), engine(x))


def test_numpy(engine):
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(engine.to("cuda").run(x), engine.run(x))


def test_wrong_devices_are_named(engine):
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(InputError, match=r"expected a tensor on cuda:0, got one on cpu"):
        engine.to("cuda")(x)
    with pytest.raises(InputError, match=r"expected a tensor on cpu, got one on cuda:0"):
        engine(x.cuda())
    with pytest.raises(DeviceError, match="there is no device cuda:99"):
        engine.to("cuda:99")


def test_a_batch_that_does_not_fit_is_an_error(wide):
    engine, _ = wide
    on_gpu = engine.to("cuda", images_per_pass=1 << 20, tune=False)
    free, _ = torch.cuda.mem_get_info()
    batch = 1024
    held = torch.empty(max(free - (64 << 20), 0), dtype=torch.uint8, device="cuda")
    try:
        with pytest.raises(InputError, match="does not fit into memory"):
            on_gpu(torch.zeros(1, 3, 96, 96, device="cuda").expand(batch, -1, -1, -1))
    finally:
        del held
        torch.cuda.empty_cache()
    x = torch.randn(2, 3, 96, 96)
    assert torch.equal(on_gpu(x.cuda()).cpu(), engine(x))
