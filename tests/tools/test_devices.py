"""What machine is this, how long does a call take, how fast could it be. No time is ever asserted."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tutorial_lib.tools import devices, profiling
from tutorial_lib.tools.devices import autocast_dtype, pick_device, supports_bf16, synchronize
from tutorial_lib.tools.profiling import Roofline, measure_roofline, profile_table, time_call


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be a machine with so many CUDA devices, with or without Metal, with or without bf16."""

    def pretend(cuda: int = 0, mps: bool = False, capability: tuple[int, int] = (8, 0), flags: str = "avx2"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(devices, "_cpuinfo", lambda: f"flags : {flags}\n")
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)

    return pretend


def test_the_best_device_comes_first(machine):
    machine()
    assert pick_device() == torch.device("cpu")
    machine(mps=True)
    assert pick_device() == torch.device("mps")
    machine(cuda=2, mps=True)
    assert pick_device() == torch.device("cuda")


def test_a_preference_that_is_there_is_taken(machine):
    machine(cuda=2, mps=True)
    for wish in ("cpu", "mps", "cuda", "cuda:1"):
        assert pick_device(wish) == torch.device(wish)


@pytest.mark.parametrize(
    "cuda, mps, wish, advice",
    [
        (0, False, "cuda", "use 'cpu'"),
        (0, True, "cuda", "use 'mps'"),
        (2, False, "mps", "use 'cuda'"),
        (2, False, "cuda:2", "use 'cuda:1'"),
        (0, True, "mps:1", "use 'mps'"),
        (0, False, "gpu", "use 'cpu'"),
        (1, False, "cuad", "use 'cuda'"),
        (1, False, "meta", "use 'cuda'"),
        (0, False, "", "use 'cpu'"),
    ],
)
def test_a_preference_that_is_not_there_names_the_nearest(machine, cuda, mps, wish, advice):
    machine(cuda=cuda, mps=mps)
    with pytest.raises(ValueError) as caught:
        pick_device(wish)
    sentence = str(caught.value)
    assert sentence.endswith(advice) and "\n" not in sentence


def test_bf16_asks_the_hardware(machine):
    machine(cuda=1, capability=(7, 5))
    assert not supports_bf16("cuda") and autocast_dtype("cuda") == torch.float16
    machine(cuda=1, capability=(9, 0))
    assert supports_bf16(torch.device("cuda", 0)) and autocast_dtype("cuda") == torch.bfloat16
    machine()
    assert not supports_bf16("cpu") and autocast_dtype("cpu") == torch.float32
    assert not supports_bf16("mps") and not supports_bf16("meta")
    for flags in ("avx2 avx512_bf16 sse4", "amx_bf16 amx_tile", "asimd bf16 i8mm"):
        machine(flags=flags)
        assert supports_bf16("cpu") and autocast_dtype("cpu") == torch.bfloat16


def test_bf16_trusts_torch_where_it_can_tell(machine, monkeypatch):
    machine()
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert supports_bf16("cpu")


def test_synchronize_on_a_cpu_does_nothing():
    assert synchronize("cpu") is None


class FakeDevice:
    """Its time passes when work is handed over (1 s) or waited for."""

    def __init__(self, *costs: float, busy: float = 0.0) -> None:
        self.costs, self.now, self.free_at = list(costs), 0.0, busy

    def launch(self) -> None:
        self.now += 1.0
        self.free_at = max(self.now, self.free_at) + self.costs.pop(0)

    def synchronize(self, device: object) -> None:
        self.now = max(self.now, self.free_at)


def fake(monkeypatch, *costs: float, busy: float = 0.0) -> FakeDevice:
    device = FakeDevice(*costs, busy=busy)
    monkeypatch.setattr(profiling, "synchronize", device.synchronize)
    monkeypatch.setattr(time, "perf_counter", lambda: device.now)
    return device


def test_time_call_warms_up_waits_and_takes_the_median(monkeypatch):
    device = fake(monkeypatch, 50.0, 50.0, 2.0, 3.0, 90.0, 4.0, busy=7.0)
    timing = time_call(device.launch, warmup=2, repeats=4, device="cpu")
    assert timing.samples == (3.0, 4.0, 91.0, 5.0) and timing.median == 4.5
    assert timing.spread == 26.5 - 3.75  # the quartiles
    assert not device.costs


def test_a_single_call_has_a_time_and_no_spread(monkeypatch):
    device = fake(monkeypatch, 2.0, busy=7.0)
    timing = time_call(device.launch, warmup=0, repeats=1, device="cpu")
    assert timing.median == 3.0 and timing.spread == 0.0 and str(timing) == "3000.000 ms (spread 0.000)"
    with pytest.raises(ValueError, match="repeats is 0"):
        time_call(device.launch, repeats=0)


def test_time_call_waits_for_the_device_of_its_arguments(monkeypatch):
    waited = []
    monkeypatch.setattr(profiling, "synchronize", waited.append)
    x = torch.ones(2, device="meta")
    time_call(lambda n, tensor: tensor * n, 3, x, repeats=2)
    assert waited == [x.device] * 4


def test_the_roof_and_its_ridge():
    roof = Roofline(flops_per_second=100.0, bytes_per_second=10.0)
    assert roof.ridge == 10.0
    assert [roof.attainable(i) for i in (0.0, 0.5, 10.0, 1e6)] == [0.0, 5.0, 100.0, 100.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measure_roofline_gives_two_rates(dtype):
    roof = measure_roofline("cpu", dtype)
    assert all(math.isfinite(x) and x > 0 for x in (roof.flops_per_second, roof.bytes_per_second))


def test_profile_table_counts_a_matmul():
    a, b = torch.ones(20, 30), torch.ones(30, 40)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as prof:
        for _ in range(3):
            a @ b
    table = profile_table(prof, top=2)
    assert len(table.splitlines()) == 3
    (row,) = [line for line in table.splitlines() if line.startswith("aten::mm ")]
    assert row.split()[1] == "3"
    assert f"{3 * 2 * 20 * 30 * 40 / 1e9:.2f}" in row
    assert "20×30 · 30×40" in profile_table(prof, by_shape=True)
