"""Responses as openai-node sees them. Skipped where there is no node, or where npm cannot fetch the SDK."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.contract.test_responses import ALL, steps
from tests.deployment import KEY, Deployment

SDK = "openai@7.55.0"


@pytest.fixture(scope="module")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with our script and the SDK."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text('{"private": true}')
    shutil.copy(Path(__file__).with_name("responses.mjs"), folder)
    command = ["npm", "install", "--no-audit", "--no-fund", "--prefer-offline", SDK]
    try:
        installed = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm did not fetch {SDK} in time")
    if installed.returncode:
        pytest.skip(f"npm cannot fetch {SDK}: {installed.stderr[-200:]}")
    return folder


def test_openai_node_sees_whole_failed_and_cancelled_responses_as_they_are(
    service: Deployment, node_folder: Path
) -> None:
    scripts = {"everything": steps(**ALL), "failing": steps(say=["a"], then="raise"), "hanging": steps(then="hang")}
    completed = subprocess.run(
        ["node", "responses.mjs", json.dumps(scripts)],
        cwd=node_folder,
        env=os.environ | {"OPENAI_BASE_URL": f"{service.base_url}/v1", "OPENAI_API_KEY": KEY},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    found: dict[str, Any] = json.loads(completed.stdout)
    numbers = found["streamed"]["numbers"]
    items = ["reasoning", "mcp_call", "function_call", "message"]
    failed = {"kind": "APIError", "code": "agent_error"}
    assert found == {
        "whole": {"status": "completed", "text": "Hello", "items": items},
        "streamed": {"numbers": list(range(len(numbers))), "last": "response.completed"},
        "helper": {"events": len(found["replay"]) + 5, "text": "Hello", "status": "completed"},
        "replay": found["helperReplay"],
        "helperReplay": list(range(5, found["helper"]["events"])),
        "failedWhole": {"kind": "InternalServerError", "code": "agent_error"},
        "failedStream": failed,
        "failedHelper": failed,
        "cancelled": ["queued", "cancelled", "response.incomplete", "cancelled"],
        "cancelledHelper": "response.incomplete",
        "items": ["message"],
        "deleted": {"kind": "NotFoundError", "code": "not_found"},
    }
