# SPDX-License-Identifier: Apache-2.0
"""The agent's Prometheus metrics.

Promises that no number comes from the records: what is counted is messages, outcomes and states of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from veil.client.agent import Tally
from veil.common.errors import InputError


class _Collected(Collector):
    def __init__(self, tally: Tally, working: Callable[[], Mapping[str, bool]]) -> None:
        self._tally, self._working = tally, working

    def collect(self) -> Iterable[Metric]:
        rounds = CounterMetricFamily("veil_site_rounds", "rounds answered, by outcome", labels=["outcome"])
        for outcome, count in {"released": self._tally.released, **self._tally.refused}.items():
            rounds.add_metric([outcome], count)
        working = GaugeMetricFamily("veil_site_working", "1 when this part did its work a moment ago", labels=["part"])
        for part, fine in self._working().items():
            working.add_metric([part], float(fine))
        return [rounds, working]


def serve_metrics(address: str, tally: Tally, working: Callable[[], Mapping[str, bool]]) -> Callable[[], None]:
    """Serve http://address/metrics from a thread.

    Args:
        address: host:port.
        tally: what the agent did.
        working: name of a part to whether it works.

    Returns:
        what ends it.

    Raises:
        InputError: when the address cannot be bound.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(tally, working))
    host, _, port = address.rpartition(":")
    try:
        server, thread = start_http_server(int(port), addr=host.strip("[]"), registry=registry)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"agent.metrics_address = {address} ({error})", "an address that is free", "choose another"
        ) from None

    def end() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return end
