"""Metrics for Prometheus: vLLM's quantities under `dlp_lora_`, and those of routing."""

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from dlp_lora.engine.trace import Sentence
from dlp_lora.serve.backend import Done, Stats

# from a step of a small model to a long queue
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
ROUTING_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
BASE = "base"  # the label of the base model in the counts of sentences by adapter
REMOVED = "removed"  # the label of answers by an adapter that was removed meanwhile


class Metrics:
    """The totals of a server; `stats` returns its backend's state.

    Only existing names become labels, and `forget` removes those of a removed adapter.
    """

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_BackendStats(stats))

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"dlp_lora_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"dlp_lora_{name}", text, labels, buckets=buckets, registry=self.registry)

        self.http_requests = counter("http_requests", "Answers to HTTP requests.", "path", "status")
        self.rejected = counter("requests_rejected", "Requests that were refused.", "reason")
        self.succeeded = counter("request_success", "Answers that ended.", "model", "finished_reason")
        self.aborted = counter("requests_aborted", "Answers whose client left, or whose time was up.", "reason")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.", "model")
        self.generation_tokens = counter("generation_tokens", "Tokens of answers.", "model")
        self.first_token = histogram("time_to_first_token_seconds", "From request to first token.", SECONDS, "model")
        self.inter_token = histogram("inter_token_latency_seconds", "Between two tokens.", SECONDS, "model")
        self.latency = histogram("e2e_request_latency_seconds", "From request to end.", SECONDS, "model")
        self.queue_time = histogram("request_queue_time_seconds", "Waiting for the prompt.", SECONDS, "model")
        self.prompt_time = histogram("request_prefill_time_seconds", "Reading the prompt.", SECONDS, "model")
        self.answer_time = histogram("request_decode_time_seconds", "Answering.", SECONDS, "model")
        self.request_prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS, "model")
        self.request_answer = histogram("request_generation_tokens", "Tokens of an answer.", TOKENS, "model")
        self.sentences = counter("sentences", "Sentences that an adapter took part in.", "adapter")
        self.switches = counter("switches", "Sentences that began under another mixture, by adapter.", "adapter")
        self.abstentions = counter("abstentions", "Sentences for which no adapter fitted.")
        self.route_time = histogram("route_seconds", "Choosing the mixture of a sentence.", ROUTING_SECONDS)
        self.fuse_time = histogram("fuse_seconds", "Fusing the mixture of a sentence.", ROUTING_SECONDS)
        self.encode_time = histogram("encode_seconds", "Encoding the context again at a switch.", SECONDS)

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def forget(self, adapter: str) -> None:
        """Removes the series of a removed adapter."""
        by_model = (
            *(self.prompt_tokens, self.generation_tokens, self.first_token, self.inter_token, self.latency),
            *(self.queue_time, self.prompt_time, self.answer_time, self.request_prompt, self.request_answer),
        )
        for metric in by_model:
            metric.remove_by_labels({"model": adapter})
        self.succeeded.remove_by_labels({"model": adapter})
        for metric in (self.sentences, self.switches):
            metric.remove_by_labels({"adapter": adapter})


@dataclass
class Meter:
    """Follows one answer."""

    metrics: Metrics
    label: str
    adapters: Callable[[], Collection[str]]  # that there are
    since_s: float = field(default_factory=time.perf_counter)
    _last_s: float | None = None

    def __post_init__(self) -> None:
        self._is_adapter = self.label in self.adapters()

    def token(self) -> None:
        """Counts a token."""
        now, label = time.perf_counter(), self._label
        if self._last_s is None:
            self.metrics.first_token.labels(label).observe(now - self.since_s)
        else:
            self.metrics.inter_token.labels(label).observe(now - self._last_s)
        self.metrics.generation_tokens.labels(label).inc()  # of answers that do not end, too, as in vLLM
        self._last_s = now

    def done(self, done: Done) -> None:
        """Counts the end of the answer."""
        m, label = self.metrics, self._label
        m.succeeded.labels(label, done.reason).inc()
        m.prompt_tokens.labels(label).inc(done.usage.prompt_tokens)
        m.request_prompt.labels(label).observe(done.usage.prompt_tokens)
        m.request_answer.labels(label).observe(done.usage.completion_tokens)
        m.latency.labels(label).observe(time.perf_counter() - self.since_s)
        m.queue_time.labels(label).observe(done.times.queued_s)
        m.prompt_time.labels(label).observe(done.times.prompt_s)
        m.answer_time.labels(label).observe(done.times.answer_s)
        there = set(self.adapters())
        for sentence in done.generation.trace:
            self._sentence(sentence, there)

    @property
    def _label(self) -> str:
        return self.label if not self._is_adapter or self.label in self.adapters() else REMOVED

    def _sentence(self, sentence: Sentence, there: Collection[str]) -> None:
        m = self.metrics
        for name in [name for name in sentence.mixture if name in there] or [BASE]:
            m.sentences.labels(name).inc()
            if sentence.switched:
                m.switches.labels(name).inc()
        if sentence.abstained:
            m.abstentions.inc()
        if sentence.probabilities:
            m.route_time.observe(sentence.route_ms / 1e3)
        m.fuse_time.observe(sentence.fuse_ms / 1e3)
        if sentence.switched and sentence.encode_ms:
            m.encode_time.observe(sentence.encode_ms / 1e3)


class _BackendStats(Collector):
    """The backend's numbers at the time of reading."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        s = self._stats()
        gauges: dict[str, tuple[str, float]] = {
            "num_requests_running": ("Requests that are read or answered.", s.reading + s.decoding),
            "num_requests_waiting": ("Requests that wait.", s.waiting),
            "num_rows_decoding": ("Rows that each step gives a token.", s.decoding),
            "kept_cache_bytes": ("KV of finished rows that is kept.", s.kept_bytes),
        }
        counters: dict[str, tuple[str, float]] = {
            "steps": ("Decoding steps.", s.num_steps),
            "step_tokens": ("Tokens that steps gave; by steps, the mean batch.", s.num_step_tokens),
            "read_tokens": ("Tokens that were encoded in prompts and contexts.", s.num_read_tokens),
            "prefix_cache_hits": ("Tokens of prompts whose KV was kept.", s.num_cached_tokens),
            "route_busy_seconds": ("Time spent on routing.", s.route_s),
            "fuse_busy_seconds": ("Time spent on fusing.", s.fuse_s),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"dlp_lora_{name}", text, value=value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"dlp_lora_{name}", text, value=value)

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Describes no metrics in advance, because the backend may not run yet."""
        return iter(())
