"""shared/metrics.py: names as Prometheus wants them, and documents, dashboard and alerts that name what there is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from shared import metrics
from shared.operations import QueueState
from shared.store import Claim
from tests.processes import ROOT
from tests.prometheus import Scraped

CATALOG = {described.name: described for described in metrics.catalog()}
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "endmark.json"
QUEUE = QueueState(
    now_ms=10_000,
    claimable=2,
    unfinished=6,
    running=3,
    oldest_ms=7_500,
    workers=1,
    slots=4,
    paused_by="key-1",
    paused_for_ms=1000,
)


def series() -> set[str]:
    """The names under which Prometheus stores what there is."""
    names = set()
    for name, described in CATALOG.items():
        names |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if described.kind == "histogram" else {name}
    return names


def named_in(text: str) -> set[str]:
    return set(re.findall(r"\bendmark_[a-z_]+", text))


@pytest.mark.parametrize("described", CATALOG.values(), ids=lambda described: described.name)
def test_a_name_says_what_it_counts_and_its_unit(described: metrics.Described) -> None:
    assert re.fullmatch(r"endmark_[a-z]+(_[a-z]+)*", described.name)
    assert described.name.endswith("_total") == (described.kind == "counter")
    if described.kind == "histogram":
        assert described.name.endswith("_seconds")
    assert not re.search(r"_(ms|milliseconds|kb|minutes)(_|$)", described.name)
    assert described.help.endswith(".")


def test_no_label_is_a_name_of_something_that_clients_choose() -> None:
    known = {"method", "route", "status", "result", "code", "loss", "direction", "what", "script", "version"}
    assert {label for described in CATALOG.values() for label in described.labels} <= known


def test_the_documents_list_every_metric_as_it_is() -> None:
    page = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `endmark_")]
    assert rows == [
        f"| `{metric.name}` | {metric.kind} | {', '.join(f'`{label}`' for label in metric.labels)} | {metric.help} |"
        for metric in CATALOG.values()
    ]
    assert named_in(page) <= series() | set(CATALOG)


def expressions_of(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    shown = named_in(" ".join(expressions_of(dashboard)))
    assert shown <= series()
    assert {re.sub(r"_bucket$", "", name) for name in shown} == set(CATALOG)
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


def test_the_alerts_name_metrics_and_labels_that_exist() -> None:
    rules = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text(encoding="utf-8"))
    for rule in rules["groups"][0]["rules"]:
        names = named_in(rule["expr"])
        assert names <= series(), rule["alert"]
        labels = {label for name in names for label in CATALOG[re.sub(r"_bucket$", "", name)].labels} | {"job", "le"}
        assert set(re.findall(r"[{,]\s*(\w+)=", rule["expr"])) <= labels, rule["alert"]
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"]
    tested = named_in((ROOT / "tests" / "deploy" / "alerts_test.yml").read_text(encoding="utf-8"))
    assert tested <= series()


def test_the_codes_that_alerts_look_for_are_counted_from_the_beginning() -> None:
    now = Scraped(metrics.exposition("", QUEUE)[0].decode())
    assert now.label_values("endmark_answers_total", "code") >= {"stream_incomplete", "stream_expired", "client_gone"}
    assert now.label_values("endmark_swept_jobs_total", "what") >= {"retried", "worker_lost"}
    assert now.label_values("endmark_attempts_lost_total", "loss") >= {"fenced"}
    assert now.label_values("endmark_jobs_ended_total", "code") >= {"none", "agent_error", "cancelled"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "deploy/prometheus/alerts.yml"),
        ("check", "config", "--syntax-only", "deploy/prometheus/prometheus.yml"),
        ("test", "rules", "tests/deploy/alerts_test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_agrees(arguments: tuple[str, ...]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: it comes with Prometheus")
    done = subprocess.run([promtool, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_scrape_config_parses() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))
    assert [scrape["job_name"] for scrape in config["scrape_configs"]] == ["endmark-api", "endmark-worker"]


def test_the_state_of_the_queue_is_told_in_base_units() -> None:
    told = Scraped(metrics.exposition("", QUEUE)[0].decode())
    assert told.value("endmark_queue_oldest_wait_seconds") == 2.5
    assert told.value("endmark_queue_waiting_turns") == 1
    assert told.value("endmark_queue_paused") == told.value("endmark_redis_up") == 1


def test_openmetrics_is_spoken_to_who_asks_for_it() -> None:
    body, content_type = metrics.exposition("application/openmetrics-text; version=1.0.0", None)
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


def test_what_is_not_on_a_list_is_other() -> None:
    before = Scraped(metrics.exposition("", None)[0].decode())
    metrics.job_ended("failed", "made-up-by-somebody")
    metrics.request_answered("BREW", metrics.UNMATCHED, 404)
    after = Scraped(metrics.exposition("", None)[0].decode())

    def more(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    assert more("endmark_jobs_ended_total", status="failed", code="other") == 1
    assert more("endmark_http_requests_total", method="other") == 1


def test_a_replay_is_not_late() -> None:
    def count() -> float:
        return Scraped(metrics.exposition("", None)[0].decode()).value("endmark_relay_lag_seconds_count")

    before = count()
    metrics.answer_ended(metrics.NO_CODE, finished_ms=1_000_000, opened_ms=1_000_000 + metrics.REPLAYED_MS + 1)
    assert count() == before
    metrics.answer_ended(metrics.NO_CODE, finished_ms=1_000_000, opened_ms=1_000_000)
    assert count() == before + 1


def test_only_the_first_attempt_has_waited() -> None:
    def count() -> float:
        return Scraped(metrics.exposition("", None)[0].decode()).value("endmark_job_wait_seconds_count")

    before = count()
    metrics.attempt_begun(Claim("job", 2, 2000, None, accepted_ms=1000))
    metrics.attempt_begun(Claim("job", 1, 2000, None))  # since when, nobody knows any more
    assert count() == before
    metrics.attempt_begun(Claim("job", 1, 2000, None, accepted_ms=1000))
    assert count() == before + 1
