"""The cards of this machine, as NVML tells: https://docs.nvidia.com/deploy/nvml-api/."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

log = logging.getLogger("convoy.gpu")


def nvml() -> Any | None:
    """The module `pynvml`, ready to be asked; None without it, a driver, or a card."""
    try:
        import pynvml  # of the extra `gpu`
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return pynvml if pynvml.nvmlDeviceGetCount() else None
    except pynvml.NVMLError as error:
        log.debug("no cards: %s", error)
        return None


def count() -> int:
    """How many cards there are."""
    module = nvml()
    return int(module.nvmlDeviceGetCount()) if module else 0


# What is told of each card: name, unit and meaning, and how NVML is asked.
_FAMILIES: dict[str, tuple[str, Callable[[Any, Any], float]]] = {
    "utilization_ratio": (
        "Share of the last moments in which the card worked, 0 to 1.",
        lambda nvml, card: nvml.nvmlDeviceGetUtilizationRates(card).gpu / 100,
    ),
    "memory_used_bytes": (
        "Memory in use, by all processes.",
        lambda nvml, card: nvml.nvmlDeviceGetMemoryInfo(card).used,
    ),
    "memory_total_bytes": (
        "Memory there is.",
        lambda nvml, card: nvml.nvmlDeviceGetMemoryInfo(card).total,
    ),
    "temperature_celsius": (
        "Temperature of the chip.",
        lambda nvml, card: nvml.nvmlDeviceGetTemperature(card, nvml.NVML_TEMPERATURE_GPU),
    ),
    "power_watts": (
        "Power drawn.",
        lambda nvml, card: nvml.nvmlDeviceGetPowerUsage(card) / 1000,
    ),
}


class Cards(Collector):
    """Gauges of every card, asked for when they are scraped; nothing where there is none."""

    def __init__(self, nvml: Any | None) -> None:
        """`nvml`: what `nvml()` gives."""
        self._nvml = nvml

    def collect(self) -> Iterator[GaugeMetricFamily]:
        nvml = self._nvml
        if nvml is None:
            return
        families = {
            name: GaugeMetricFamily(f"convoy_gpu_{name}", text, labels=("gpu", "name"))
            for name, (text, _) in _FAMILIES.items()
        }
        for number in range(nvml.nvmlDeviceGetCount()):
            for name, (_, ask) in _FAMILIES.items():
                try:
                    card = nvml.nvmlDeviceGetHandleByIndex(number)
                    labels = [str(number), str(nvml.nvmlDeviceGetName(card))]
                    families[name].add_metric(labels, ask(nvml, card))
                # Not every card tells everything; and one may fall off the bus.
                except nvml.NVMLError as error:
                    log.debug("card %d does not tell its %s: %s", number, name, error)
        yield from families.values()
