"""What is told of the cards of a machine, which are played by functions."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from convoy_service.engine import gpu
from convoy_service.server.supervisor import on_card
from convoy_service.settings import Settings


class NVMLError(Exception):
    pass


def library(cards: int) -> Any:
    def power(card: int) -> int:
        if card == 1:
            raise NVMLError("not supported")
        return 70_500

    return SimpleNamespace(
        NVMLError=NVMLError,
        NVML_TEMPERATURE_GPU=0,
        nvmlDeviceGetCount=lambda: cards,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetName=lambda card: "H200",
        nvmlDeviceGetUtilizationRates=lambda card: SimpleNamespace(gpu=25 + card),
        nvmlDeviceGetMemoryInfo=lambda card: SimpleNamespace(used=1000, total=4000),
        nvmlDeviceGetTemperature=lambda card, sensor: 40,
        nvmlDeviceGetPowerUsage=power,
    )


def text(nvml: Any) -> str:
    registry = CollectorRegistry()
    registry.register(gpu.Cards(nvml))
    return generate_latest(registry).decode()


def test_each_card_tells_what_it_can() -> None:
    lines = text(library(2)).splitlines()
    for line in (
        'convoy_gpu_utilization_ratio{gpu="0",name="H200"} 0.25',
        'convoy_gpu_utilization_ratio{gpu="1",name="H200"} 0.26',
        'convoy_gpu_memory_used_bytes{gpu="0",name="H200"} 1000.0',
        'convoy_gpu_memory_total_bytes{gpu="0",name="H200"} 4000.0',
        'convoy_gpu_temperature_celsius{gpu="1",name="H200"} 40.0',
        'convoy_gpu_power_watts{gpu="0",name="H200"} 70.5',
    ):
        assert line in lines
    assert not any(line.startswith('convoy_gpu_power_watts{gpu="1"') for line in lines)


def test_without_cards_nothing_is_told() -> None:
    assert text(None) == ""


@pytest.mark.skipif(gpu.count() > 0, reason="this machine has a card")
def test_a_machine_without_cards_is_no_error() -> None:
    assert gpu.nvml() is None
    assert gpu.count() == 0


def test_processes_that_run_batches_take_one_card_after_the_other() -> None:
    settings = Settings(device="auto")
    taken = [on_card(settings, n, lambda: 2).device for n in range(3)]
    assert taken == ["auto:0", "auto:1", "auto:0"]
    assert on_card(settings, 1, lambda: 0) is settings
    for device in ("cuda:1", "cpu"):
        named = replace(settings, device=device)
        assert on_card(named, 0, lambda: 2) is named
