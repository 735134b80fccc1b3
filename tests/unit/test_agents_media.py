"""The question of a turn: its text, its files, and where they are put."""

from __future__ import annotations

import asyncio
import base64
import shutil
import stat
from pathlib import Path

import pytest

from tests.speaking import a_turn
from worker.agents import media
from worker.agents.contract import AgentError
from worker.agents.media import EncodedFile, decode, divide, files_of, files_on_disk, safe_filename, text_of

PNG = base64.b64encode(b"\x89PNG").decode()
IMAGE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
REPORT = {"type": "file", "file": {"filename": "report.pdf", "file_data": base64.b64encode(b"%PDF").decode()}}
SOUND = {"type": "input_audio", "input_audio": {"format": "mp3", "data": base64.b64encode(b"ID3").decode()}}


def named(filename: str | None, media_type: str | None = None) -> EncodedFile:
    return EncodedFile(filename=filename, media_type=media_type, encoded="")


def test_the_question_is_the_last_message_of_the_user() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    conversation = divide(a_turn(messages=messages, owns_history=True))
    assert conversation.question == messages[1]
    assert conversation.earlier == messages[:1]


def test_where_the_session_owns_the_history_the_question_is_the_last_message_of_the_user_wherever_it_is() -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "user", "content": "What is the answer?"},
        {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "ask"}}]},
        {"role": "tool", "content": "42", "tool_call_id": "c"},
    ]
    conversation = divide(a_turn(messages=messages, owns_history=False))
    assert conversation.question == messages[1]
    assert not conversation.earlier


def test_a_list_that_does_not_end_with_the_user_is_to_be_continued() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "tool", "content": "42", "tool_call_id": "c"}]
    conversation = divide(a_turn(messages=messages, owns_history=True))
    assert conversation.question["content"] == media.CONTINUE
    assert conversation.earlier == messages


def test_text_parts_are_joined_with_a_space() -> None:
    parts = [{"type": "text", "text": "one"}, IMAGE, {"type": "text", "text": "two"}]
    assert text_of({"role": "user", "content": parts}) == "one two"


async def test_no_file_takes_the_place_of_another(tmp_path: Path) -> None:
    names = ["2-a.txt", "a.txt", "a.txt", "A.TXT", "3-a.txt"]
    files = [EncodedFile(filename=name, media_type=None, encoded=PNG) for name in names]
    async with files_on_disk(files, parent=tmp_path) as paths:
        assert len({Path(path).name.casefold() for path in paths}) == len(names)


async def test_an_agent_may_remove_its_files(tmp_path: Path) -> None:
    async with files_on_disk(files_of({"role": "user", "content": [REPORT]}), parent=tmp_path) as [path]:
        shutil.rmtree(Path(path).parent)


async def test_files_are_written_for_this_user_only_and_removed_at_the_end(tmp_path: Path) -> None:
    files = files_of({"role": "user", "content": [IMAGE, REPORT, REPORT, SOUND]})
    async with files_on_disk(files, parent=tmp_path) as paths:
        names = [Path(path).name for path in paths]
        assert names == ["image.png", "report.pdf", "3-report.pdf", "audio.mp3"]
        assert [Path(path).read_bytes() for path in paths] == [b"\x89PNG", b"%PDF", b"%PDF", b"ID3"]
        assert stat.S_IMODE(Path(paths[0]).parent.stat().st_mode) == 0o700
    assert list(tmp_path.iterdir()) == []


async def test_files_are_removed_when_the_run_is_cancelled(tmp_path: Path) -> None:
    written = asyncio.Event()

    async def run() -> None:
        async with files_on_disk(files_of({"content": [IMAGE]}), parent=tmp_path):
            written.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(run())
    await written.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list(tmp_path.iterdir()) == []


async def test_a_file_that_cannot_be_decoded_leaves_nothing_behind(tmp_path: Path) -> None:
    broken = {"type": "file", "file": {"filename": "a.txt", "file_data": "data:text/plain;base64,%%%"}}
    with pytest.raises(AgentError, match="not valid base64"):
        async with files_on_disk(files_of({"content": [IMAGE, broken]}), parent=tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


async def test_no_files_make_no_directory(tmp_path: Path) -> None:
    async with files_on_disk([], parent=tmp_path) as paths:
        assert paths == []
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("filename", "safe"),
    [
        ("report.pdf", "report.pdf"),
        ("../../etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("/abs/olute.txt", "olute.txt"),
        ("..", "file"),
        (".ssh", "ssh"),
        ("a\x00b\n.txt", "ab.txt"),
        ("dir/", "file"),
        ("", "file"),
        (None, "file"),
    ],
)
def test_a_filename_is_only_a_name(filename: str | None, safe: str) -> None:
    assert safe_filename(named(filename)) == safe


def test_a_file_without_a_name_is_called_after_its_type() -> None:
    assert safe_filename(named(None, "image/png")) == "image.png"
    assert safe_filename(named(None, "application/pdf")) == "file.pdf"


def test_a_long_filename_keeps_its_extension_and_its_characters() -> None:
    name = safe_filename(named("ü" * 400 + ".pdf"))
    assert name.endswith("ü.pdf")
    assert len(name.encode()) <= media.MAX_FILENAME_BYTES


@pytest.mark.parametrize(
    ("encoded", "content"),
    [
        ("aGk=", b"hi"),
        ("aG\nk=", b"hi"),
        ("data:text/plain;base64,aGk=", b"hi"),
        ("DATA:text/plain;charset=utf-8;BASE64,aGk=", b"hi"),
        ("data:text/plain,h%69", b"hi"),
    ],
)
def test_files_come_as_data_urls_or_bare_base64(encoded: str, content: bytes) -> None:
    assert decode(EncodedFile(filename=None, media_type=None, encoded=encoded)) == content


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}, "remote URL"),
        ({"type": "file", "file": {"file_id": "file-1"}}, "no data"),
    ],
)
def test_a_file_that_is_elsewhere_is_refused(part: dict[str, object], message: str) -> None:
    with pytest.raises(AgentError, match=message):
        files_of({"content": [part]})
