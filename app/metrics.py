"""What the service measures, in Prometheus' format."""

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from etl.models import registry

if TYPE_CHECKING:
    import polars as pl

METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
TRAINED = re.compile(r"-(\d{8}T\d{6})-[0-9a-f]{6}$")  # the end of a run's id


DRIFT = {  # name -> column, and what it is
    "etl_model_scored_rows": ("rows", "Rows scored in the newest hour"),
    "etl_model_scored_hour_seconds": ("hour", "When the newest hour with scores began, since 1970"),
    "etl_model_drift_psi": ("psi", "Stability index of the newest hour's predictions against its training's"),
    "etl_model_drift_divergence": ("divergence", "Of the newest hour's predictions from the true probability, nats"),
}


class Requests:
    """How many requests there were and how long each took, by what they asked for."""

    def __init__(self, short: tuple[str, ...]):
        """`short`: paths that are answered before there is a route."""
        self.registry, self._short = CollectorRegistry(), short
        ProcessCollector(registry=self.registry)
        labels = ("route", "method", "status")
        self._counter = Counter("etl_api_requests", "Requests that were answered", labels, registry=self.registry)
        about = "From a request's head to the end of its answer"
        self._histogram = Histogram(
            "etl_api_request_seconds", about, ("route",), registry=self.registry, buckets=SECONDS
        )
        self._kept: dict[tuple[str, str, int], tuple[Any, Any]] = {}

    def count(self, scope: dict[str, Any], status: int, took: float) -> None:
        route, path = scope.get("route"), scope["path"]
        name = getattr(route, "path", None) or (path if path in self._short else "other")
        name = name.removeprefix("/v1")  # the same, whichever way it is called
        method = scope["method"] if scope["method"] in METHODS else "other"
        key = name, method, status
        if key not in self._kept:
            self._kept[key] = self._counter.labels(name, method, str(status)), self._histogram.labels(name)
        counter, histogram = self._kept[key]
        counter.inc()
        histogram.observe(took)


def written(
    requests: Requests, model: registry.Model | None, problem: str | None, ready: Any, drift: "pl.DataFrame | None"
) -> bytes:
    """All of it as text, with what is served now. `ready`: the answer of /ready. `drift`: as `etl.models.scores` has
    it, None when it cannot be read; of each model the newest hour is told."""
    now, state = datetime.now(UTC), CollectorRegistry()

    def gauge(name: str, about: str, value: float | None, **labels: str) -> None:
        made = Gauge(name, about, [*labels], registry=state)
        if value is not None:
            (made.labels(**labels) if labels else made).set(value)

    if model:
        gauge("etl_model_info", "The model that is served", 1, model_id=model.model_id, run_id=model.run_id)
        trained = TRAINED.search(model.run_id)
        if trained:
            at = datetime.strptime(trained[1], "%Y%m%dT%H%M%S").replace(tzinfo=UTC)
            gauge("etl_model_age_seconds", "Since its training was due", (now - at).total_seconds())
    gauge(
        "etl_model_usable", "Whether the published model is the one that is served", float(bool(model and not problem))
    )
    if drift is not None:
        newest = drift.unique("alias", keep="last", maintain_order=True).to_dicts()
        for name, (column, about) in DRIFT.items():
            made = Gauge(name, about, ["alias", "model_id"], registry=state)
            for line in newest:
                if line[column] is not None:
                    value = line[column].timestamp() if column == "hour" else line[column]
                    made.labels(line["alias"], line["model_id"]).set(value)
    gauge("etl_lake_published", "Whether a snapshot of the lake is published", float(ready.ready))
    if ready.as_of:
        gauge("etl_lake_lag_seconds", "Since the newest row in it", (now - ready.as_of).total_seconds())
        gauge("etl_lake_batch", "The number of the published batch", ready.batch)
    return generate_latest(requests.registry) + generate_latest(state)
