"""A real browser, and a running service for it to look at."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

from tests.deployment import KEY, Deployment, deployed

ADMIN = "sk-admin-key"
WAIT_MS = 15_000  # for what a page is to show
expect.set_options(timeout=WAIT_MS)
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no chromium on PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Iterator[Deployment]:
    """The service with operators and a second tenant."""
    folder = tmp_path_factory.mktemp("service")
    prefix = f"test-{secrets.token_hex(4)}"
    with deployed(folder, redis_url, prefix, admin_keys=ADMIN, api_keys=f"{KEY},acme:sk-acme") as deployment:
        yield deployment


class Watched:
    """What a page did beside what it shows."""

    def __init__(self, page: Page, base_url: str) -> None:
        self.complaints: list[str] = []  # errors of scripts and on the console, violations of the policy included
        self.elsewhere: list[str] = []  # requests to others
        self._base_url = base_url
        page.on("console", self._note_message)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", self._note_request)

    def _note_message(self, message: ConsoleMessage) -> None:
        # That a job or a session is gone is an answer, which the browser also writes down as an error.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.complaints.append(message.text)

    def _note_request(self, request: Request) -> None:
        if not request.url.startswith((self._base_url, "data:")):
            self.elsewhere.append(request.url)


@pytest.fixture
def open_page(browser: Browser, service: Deployment) -> Iterator[Open]:
    """Opens a page of the dashboard, logged in; afterwards it has neither complained nor asked anybody else."""
    with ExitStack() as stack:
        watched: list[Watched] = []

        def start(path: str = "/dashboard/", *, key: str | None = ADMIN, **options: Any) -> Page:
            context = browser.new_context(base_url=service.base_url, **options)
            stack.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(WAIT_MS)
            watched.append(Watched(page, service.base_url))
            page.goto(path)
            if key is not None:
                page.get_by_label("Admin key").fill(key)
                page.get_by_role("button", name="Log in").click()
                expect(page.get_by_role("navigation", name="Pages")).to_be_visible()
                page.wait_for_load_state()
            return page

        yield start
    assert [complaint for one in watched for complaint in one.complaints] == []
    assert [url for one in watched for url in one.elsewhere] == []
