"""What /metrics tells a Prometheus server; each server has a registry of its own."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

ROUTES = frozenset({"/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions"})
"""Paths that get a label of their own; whatever else people ask for is `other`, so that labels stay bounded."""
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_RATES = (1, 2, 5, 10, 20, 40, 60, 80, 120, 200, 400, 800)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        registry = CollectorRegistry(auto_describe=True)
        self._registry = registry
        self._requests = Counter(
            "wrinklefree_requests", "Requests answered.", ["method", "route", "status"], registry=registry
        )
        self._prompt_tokens = Counter("wrinklefree_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._completion_tokens = Counter("wrinklefree_completion_tokens", "Tokens produced.", registry=registry)
        self._first_token = Histogram(
            "wrinklefree_time_to_first_token_seconds",
            "From the arrival of a request to its first text, with the time in line.",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._rate = Histogram(
            "wrinklefree_tokens_per_second",
            "Tokens a second of a request, from its first text to its last.",
            buckets=_RATES, registry=registry,
        )  # fmt: skip
        self._waiting = Gauge("wrinklefree_requests_waiting", "Requests in line for the engine.", registry=registry)
        self._slots = Gauge("wrinklefree_slots_in_use", "Requests that the engine works on.", registry=registry)
        self._ready = Gauge("wrinklefree_ready", "1 when the model is loaded.", registry=registry)

    def watch(
        self, *, waiting: Callable[[], float], slots_in_use: Callable[[], float], ready: Callable[[], float]
    ) -> None:
        """Read these gauges from here on."""
        self._waiting.set_function(waiting)
        self._slots.set_function(slots_in_use)
        self._ready.set_function(ready)

    def answered(self, method: str, path: str, status: int) -> None:
        """Count an answer."""
        known_method = method if method in {"GET", "POST", "HEAD", "OPTIONS"} else "other"
        self._requests.labels(known_method, path if path in ROUTES else "other", str(status)).inc()

    def first_text(self, seconds: float) -> None:
        """Note how long a request waited for its first text."""
        self._first_token.observe(seconds)

    def generated(self, *, prompt_tokens: int, completion_tokens: int, seconds: float) -> None:
        """Count a finished or broken-off generation; `seconds` since its first text, 0 where there was none."""
        self._prompt_tokens.inc(prompt_tokens)
        self._completion_tokens.inc(completion_tokens)
        if completion_tokens > 1 and seconds > 0:
            self._rate.observe((completion_tokens - 1) / seconds)

    def render(self) -> tuple[bytes, str]:
        """The text that Prometheus reads, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4
