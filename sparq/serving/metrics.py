"""What the server has done, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from sparq.reporting import Report
from sparq.serving.conversations import Conversations


class Metrics:
    """Sums since the server started. Mean α is sparq_alpha_total / sparq_sparse_steps_total."""

    def __init__(self, conversations: Conversations) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"sparq_{name}", about, labels, registry=self._registry)

        def gauge(name: str, about: str) -> Gauge:
            return Gauge(f"sparq_{name}", about, registry=self._registry)

        self.requests = counter("requests", "requests, by how they ended: done, cancelled, failed", "outcome")
        self.waiting = gauge("requests_waiting", "requests in the queue")
        self._prompt = counter("prompt_tokens", "tokens of prompts")
        self._cached = counter("prompt_tokens_cached", "of these, those that a kept conversation held")
        self._new = counter("new_tokens", "tokens generated")
        self._prompt_seconds = counter("prompt_seconds", "from a request's turn to its first new token")
        self._decode_seconds = counter("decode_seconds", "from the first new token to the last")
        self._sparse = counter("sparse_steps", "decode steps of a layer that read a part of K and V")
        self._dense = counter("dense_steps", "decode steps of a layer that read all of K and V", "reason")
        self._read = counter("read_bytes", "bytes of K, V and the index that decode steps have read")
        self._dense_read = counter("dense_read_bytes", "bytes that they would have read densely")
        self._alpha = counter("alpha", "share of the scores that was attended, summed over sparse steps")
        gauge("conversations", "conversations kept").set_function(lambda: len(conversations))
        gauge("conversations_bytes", "bytes that they hold").set_function(lambda: conversations.nbytes)

    def add(self, prompt: int, cached: int, new: int, prompt_seconds: float, decode_seconds: float) -> None:
        self._prompt.inc(prompt)
        self._cached.inc(cached)
        self._new.inc(new)
        self._prompt_seconds.inc(prompt_seconds)
        self._decode_seconds.inc(decode_seconds)

    def add_report(self, report: Report) -> None:
        total = report.total
        self._sparse.inc(total.sparse_steps)
        for reason, steps in total.dense_steps.items():
            self._dense.labels(reason).inc(steps)
        self._read.inc(total.bytes_read)
        self._dense_read.inc(total.bytes_dense)
        if total.mean_alpha is not None:
            self._alpha.inc(total.mean_alpha * total.sparse_steps)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)
