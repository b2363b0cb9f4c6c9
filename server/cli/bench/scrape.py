"""What a server says of where its time goes: two scrapes of its metrics, and the budget of a token between them."""

import http.client
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from server.budget import CPU_NAME, ENGINE, FRAME, GRPC, KERNELS, LOOP, OTHER, PHASES_NAME, TEXT, WRITE
from server.errors import ConfigError, StartupError

TIMEOUT_S = 5.0
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Goes past any proxy, as the load itself does."""
PROCESS_CPU = "process_cpu_seconds_total"
HOW_TO_TURN_ON = "`pathfox serve --metrics-port 9464` opens it, and --metrics-address 127.0.0.1:9464 finds it"

ENGINE_PHASES = ("intake", "schedule", "rows", "kernels", "sample", "commit", "deliver")
"""As the engine names them, in its order."""
REST = "unaccounted"
CLIENT = "client"
LOOP_REST = "event loop: asyncio, grpc, network"


@dataclass(frozen=True, slots=True)
class Scrape:
    """Counters, as they stand."""

    phases_s: Mapping[str, float]
    threads_s: Mapping[str, float]
    """CPU time by what threads do; empty where the server cannot tell."""
    process_cpu_s: float


@dataclass(frozen=True, slots=True)
class Budget:
    """Microseconds for each output token of a run."""

    streams: int
    tokens: int
    elapsed_us: float
    wall_us: Mapping[str, float]
    """The engine's thread, phase by phase; with the rest they make up the elapsed time."""
    cpu_us: Mapping[str, float]
    """Of server and client, all threads; with the rest they make up what the processes used."""
    write_us: float
    """Between handing a frame to grpc and its wish for the next one; many streams wait at once."""


def scrape(address: str | None) -> Scrape:
    """Read a server's counters.

    Raises:
        ConfigError: there is no address.
        StartupError: nobody answers there, or without these counters.
    """
    if address is None:
        raise ConfigError(f"--profile: needs the server's metrics: {HOW_TO_TURN_ON}")
    try:
        with direct.open(f"http://{address}/metrics", timeout=TIMEOUT_S) as answer:
            return parse(answer.read().decode())
    except (urllib.error.URLError, OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise StartupError(f"cannot profile: no metrics on {address}: {reason}; {HOW_TO_TURN_ON}") from None


def parse(text: str) -> Scrape:
    """Read a scrape in Prometheus' text format.

    Raises:
        ValueError: the counters are not in it.
    """
    phases_s: dict[str, float] = {}
    threads_s: dict[str, float] = {}
    process_cpu_s = None
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == f"{PHASES_NAME}_total":
                phase = sample.labels["phase"]
                phases_s[phase] = phases_s.get(phase, 0.0) + sample.value
            elif sample.name == f"{CPU_NAME}_total":
                threads_s[sample.labels["threads"]] = sample.value
            elif sample.name == PROCESS_CPU:
                process_cpu_s = sample.value
    if process_cpu_s is None:
        raise ValueError("these are no metrics of a Pathfox server")
    return Scrape(phases_s, threads_s, process_cpu_s)


def budget(
    before: Scrape, after: Scrape, *, streams: int, tokens: int, elapsed_s: float, client_cpu_s: float
) -> Budget:
    """Divide what passed between two scrapes by the tokens that came meanwhile."""

    def phase_us(name: str) -> float:
        return 1e6 * (after.phases_s.get(name, 0.0) - before.phases_s.get(name, 0.0)) / tokens

    def cpu_us(name: str) -> float:
        return 1e6 * (after.threads_s.get(name, 0.0) - before.threads_s.get(name, 0.0)) / tokens

    elapsed_us = 1e6 * elapsed_s / tokens
    wall = {phase: phase_us(phase) for phase in ENGINE_PHASES}
    wall[REST] = elapsed_us - sum(wall.values())
    text_us, frame_us = phase_us(TEXT), phase_us(FRAME)
    cpu = {
        "engine": cpu_us(ENGINE),
        "pool of the kernels": cpu_us(KERNELS),
        "event loop: text": text_us,
        "event loop: frames": frame_us,
        LOOP_REST: cpu_us(LOOP) - text_us - frame_us,
        "threads of grpc": cpu_us(GRPC),
        "other threads": cpu_us(OTHER),
    }
    cpu[REST] = 1e6 * (after.process_cpu_s - before.process_cpu_s) / tokens - sum(cpu.values())
    cpu[CLIENT] = 1e6 * client_cpu_s / tokens
    return Budget(streams, tokens, elapsed_us, wall, cpu, phase_us(WRITE))
