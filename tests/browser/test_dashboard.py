"""The dashboard as an operator sees it, in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from playwright.sync_api import Page, expect

from shared.jobs import Status
from tests.browser.conftest import ADMIN, Open
from tests.deployment import Deployment, script

EVIL = '<script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">'


@contextmanager
def a_running_job(service: Deployment, gate: Path, **steps: object) -> Iterator[str]:
    """A job that says `Hello ` and goes on once the gate is there; its id."""
    with service.client() as client:
        stream = client.chat.completions.create(
            model="endmark",
            messages=script(**({"say": ["Hello "], "then": "hang"} | steps)),
            stream=True,
            extra_body={"session_id": gate.name, "on_disconnect": "continue"},
        )
        job_id = next(stream).id
        try:
            yield job_id
        finally:
            with service.http(key=ADMIN) as http:
                http.post(f"/v1/jobs/{job_id}/cancel")
            stream.close()


def succeed(service: Deployment, text: str, **options: Any) -> str:
    """The id of a job that answers with this text."""
    with service.client() as client:
        messages: list[Any] = [{"role": "user", "content": text}]
        job_id: str = client.chat.completions.create(model="endmark", messages=messages, **options).id
        return job_id


def fail(service: Deployment, **options: Any) -> None:
    with service.client() as client, pytest.raises(openai.APIError):
        client.chat.completions.create(model="endmark", messages=script(say=["half"], then="raise"), **options)


def has_no_horizontal_scroll(page: Page) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"))


def test_an_operator_finds_a_running_job_sees_it_speak_and_cancels_it(
    service: Deployment, open_page: Open, tmp_path: Path
) -> None:
    fail(service)
    page = open_page("/dashboard/jobs")
    expect(page.get_by_role("row", name="agent_error").first).to_be_visible()
    steps = {"say": ["tick "], "times": 100_000, "every_s": 0.05}
    with a_running_job(service, tmp_path / "speaks", **steps) as job_id:
        row = page.locator(f"#job-{job_id}")
        expect(row).to_be_visible()  # the list has noticed by itself
        page.get_by_role("link", name="running").click()
        expect(page.get_by_role("row", name="agent_error")).to_have_count(0)
        row.get_by_role("link").first.click()
        transcript = page.locator("#transcript")
        expect(transcript).to_contain_text("tick tick tick")
        before = len(transcript.inner_text())
        page.wait_for_function("n => document.querySelector('#transcript').innerText.length > n + 20", arg=before)
        page.get_by_text("Cancel…").click()
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator("#status")).to_have_text("cancelled")
        expect(transcript).to_contain_text("cancelled: cancelled")
        service.wait_for_status(job_id, Status.CANCELLED)


def test_what_a_job_says_comes_in_its_order_and_its_end_is_told(
    service: Deployment, open_page: Open, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    steps = {"waits_for": str(gate), "reasoning": ["hm"], "tools": ["search"], "say": ["found"], "then": None}
    with ThreadPoolExecutor() as pool, service.client() as client:
        answer = pool.submit(
            client.chat.completions.create,
            model="endmark",
            messages=script(**steps),
            extra_body={"session_id": "order"},
        )
        page = open_page("/dashboard/jobs?status=running")
        page.locator("tbody tr").first.get_by_role("link").first.click()
        expect(page.locator("#status")).to_have_text("running")
        gate.touch()
        expect(page.locator("#status")).to_have_text("succeeded")
        assert answer.result().choices[0].message.content == "found"
        expect(page.locator("#transcript > div")).to_have_text(["hm", "search: completed", "found", "succeeded: stop"])
        expect(page.locator("body")).to_contain_text("Ask for the same")


def test_nothing_that_a_job_says_is_more_than_text(service: Deployment, open_page: Open, tmp_path: Path) -> None:
    job_id = succeed(service, EVIL, metadata={EVIL[:60]: EVIL}, extra_body={"session_id": EVIL})
    page = open_page(f"/dashboard/jobs/{job_id}")
    expect(page.locator("#transcript .text")).to_have_text(EVIL)
    expect(page.locator(".message .text").first).to_have_text(EVIL)
    expect(page.locator("#transcript .end")).to_have_text("succeeded: stop")
    steps = {"say": [EVIL], "reasoning": [EVIL], "tools": [EVIL]}
    with a_running_job(service, tmp_path / EVIL.replace("/", ""), **steps) as running_id:
        page.goto(f"/dashboard/jobs/{running_id}")
        expect(page.locator("#transcript > div")).to_have_text([EVIL, f"{EVIL}: completed", EVIL])
        for path in ("/dashboard/jobs", f"/dashboard/jobs/{job_id}/entries", "/dashboard/workers", "/dashboard/"):
            page.goto(path)
            expect(page.locator("h1")).to_be_visible()
            assert page.locator("main script, main img").count() == 0
    assert page.evaluate("window.hacked") is None


def test_a_job_that_goes_while_it_is_looked_at_says_so(service: Deployment, open_page: Open) -> None:
    job_id = succeed(service, "soon gone")
    page = open_page(f"/dashboard/jobs/{job_id}")
    expect(page.locator("#transcript .end")).to_have_text("succeeded: stop")
    with service.http(key=ADMIN) as http:
        assert http.delete(f"/v1/jobs/{job_id}").status_code == 200
    page.evaluate("import('/dashboard/static/live.js').then((live) => live.refresh())")
    expect(page.get_by_role("status")).to_contain_text("This job is gone")
    expect(page.get_by_text("Retry…")).to_have_count(0)


def test_a_list_keeps_the_readers_place_while_jobs_come(service: Deployment, open_page: Open) -> None:
    first = succeed(service, "first", extra_body={"session_id": "place"})
    for _ in range(12):
        succeed(service, "more", extra_body={"session_id": "place"})
    page = open_page("/dashboard/jobs?session=api:place", viewport={"width": 900, "height": 400})
    link = page.locator(f"#job-{first}").get_by_role("link").first
    link.focus()
    link.scroll_into_view_if_needed()
    handle = link.element_handle()
    before = link.bounding_box()
    newest = succeed(service, "newest", extra_body={"session_id": "place"})
    expect(page.locator(f"#job-{newest}")).to_be_attached()
    expect(link).to_be_focused()
    assert before is not None
    page.wait_for_function("([node, y]) => Math.abs(node.getBoundingClientRect().y - y) < 2", arg=[handle, before["y"]])


def test_all_jobs_of_a_filter_are_retried_after_a_look_at_them(service: Deployment, open_page: Open) -> None:
    for _ in range(2):
        fail(service, metadata={"batch": "b1"})
    page = open_page("/dashboard/jobs")
    page.get_by_text("Filters").click()
    page.get_by_label("Metadata key").fill("batch")
    page.get_by_label("… is").fill("b1")
    page.get_by_role("button", name="Filter").click()
    expect(page.locator("tbody tr")).to_have_count(2)
    page.get_by_role("button", name="Retry…").click()
    expect(page.locator("#matched")).to_have_text("2 jobs")
    page.get_by_role("button", name="Retry 2 jobs").click()
    expect(page.get_by_role("status")).to_contain_text("2 of 2 jobs")
    page.get_by_role("link", name="Back to the list").click()
    expect(page.locator("tbody tr")).to_have_count(4)


def test_the_queue_is_paused_and_resumed_and_the_trail_tells(service: Deployment, open_page: Open) -> None:
    page = open_page("/dashboard/queue")
    page.get_by_text("Pause…").click()
    page.get_by_label("For").select_option("600")
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_text("Paused by")).to_be_visible()
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(succeed, service, "late", extra_body={"session_id": "late"})
        expect(page.get_by_role("cell", name="the queue is paused by key-")).to_be_visible()
        page.get_by_role("button", name="Resume").click()
        expect(page.get_by_text("The queue goes on.")).to_be_visible()
        answer.result()
    page.get_by_role("link", name="Audit").click()
    expect(page.locator("tbody tr").first).to_contain_text("queue.resume")
    page.get_by_role("link", name="Workers").click()
    expect(page.get_by_text("scripted")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_fits_a_phone_in_both_schemes(service: Deployment, open_page: Open, scheme: str) -> None:
    job_id = succeed(service, "w" * 500, metadata={"k" * 60: "v" * 400})
    fail(service)
    phone = {"viewport": {"width": 360, "height": 700}, "color_scheme": scheme}
    page = open_page("/dashboard/", **phone)
    expect(page.locator(".chart svg").first).to_be_visible()
    back = {"light": "rgb(246, 247, 249)", "dark": "rgb(16, 18, 22)"}[scheme]
    expect(page.locator("body")).to_have_css("background-color", back)
    for path in (
        "",
        "jobs",
        f"jobs/{job_id}",
        f"jobs/{job_id}/entries",
        "queue",
        "workers",
        "audit",
        "bulk?action=retry",
    ):
        page.goto(f"/dashboard/{path}")
        expect(page.locator("h1")).to_be_visible()
        assert has_no_horizontal_scroll(page), path


def test_a_keyboard_is_enough(service: Deployment, open_page: Open, tmp_path: Path) -> None:
    with a_running_job(service, tmp_path / "keys") as job_id:
        page = open_page(f"/dashboard/jobs/{job_id}", key=None)
        expect(page.get_by_label("Admin key")).to_be_focused()
        page.keyboard.type(ADMIN)
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_have_text("running")
        page.keyboard.press("Tab")
        skip = page.get_by_role("link", name="Skip to the content")
        expect(skip).to_be_focused()
        expect(skip).to_have_css("outline-style", "solid")
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        expect(page.locator("#confirm-cancel summary")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name="Cancel")).to_be_visible()  # nobody goes on before it is drawn
        page.keyboard.press("Tab")
        expect(page.get_by_role("button", name="Cancel")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_have_text("cancelled")


def test_without_javascript_jobs_are_read_and_cancelled(service: Deployment, open_page: Open, tmp_path: Path) -> None:
    with a_running_job(service, tmp_path / "plain") as job_id:
        page = open_page(f"/dashboard/jobs/{job_id}", java_script_enabled=False)
        expect(page.locator("#transcript")).to_contain_text("Hello")
        page.get_by_text("Cancel…").click()
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator("#status")).to_have_text("cancelled")


def test_a_link_on_another_site_leads_to_the_page_and_a_form_there_to_nothing(
    service: Deployment, open_page: Open, tmp_path: Path
) -> None:
    with a_running_job(service, tmp_path / "csrf") as job_id:
        page = open_page(f"/dashboard/jobs/{job_id}")
        url = f"{service.base_url}/dashboard/jobs/{job_id}"
        html = f'<a href="{url}">look</a><form method="post" action="{url}/cancel"><button>win</button></form>'
        page.goto("data:text/html," + html.replace('"', "'"))
        page.get_by_role("link", name="look").click()
        expect(page.locator("#status")).to_have_text("running")
        page.goto("data:text/html," + html.replace('"', "'"))
        page.get_by_role("button", name="win").click()
        expect(page.get_by_role("alert")).to_contain_text("must be sent by a page of the dashboard")
        assert service.job_field(job_id, "status") == "running"
