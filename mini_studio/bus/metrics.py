"""Prometheus metrics of the event log, served by every process at `/metrics`."""

from prometheus_client import Counter, Gauge, Histogram

EVENTS_OUT = Counter("mini_studio_events_out", "Events published.", ["topic", "type"])
EVENTS_IN = Counter("mini_studio_events_in", "Events handled.", ["consumer", "topic", "type"])
RETRIES = Counter("mini_studio_event_retries", "Deliveries put off because something was away.", ["consumer"])
DEAD_LETTERS = Counter("mini_studio_dead_letters", "Records put into a dead-letter topic.", ["consumer", "topic"])
HANDLER_SECONDS = Histogram("mini_studio_handler_seconds", "Time a handler took.", ["consumer", "type"])
LAG = Gauge("mini_studio_consumer_lag", "Records behind the end of the log.", ["consumer", "topic", "partition"])
OUTBOX_PENDING = Gauge("mini_studio_outbox_pending", "Documents whose events are not on the log yet.")
