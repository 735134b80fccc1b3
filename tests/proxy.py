"""A TCP proxy in a thread of its own, between a process and its Redis, that can be slow, silent, cut or closed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

HOST = "127.0.0.1"


class Proxy:
    """A context manager. `delay_s` is what each request waits on its way; replies come as they are."""

    def __init__(self, target_port: int) -> None:
        self.port = 0
        self.delay_s = 0.0
        self._target_port = target_port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._handlers: set[asyncio.Task[None]] = set()
        self._flowing: asyncio.Event = asyncio.Event()
        self._flowing.set()

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    def __enter__(self) -> Proxy:
        self._thread.start()
        self.open()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # -- faults --------------------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """Resets every connection, whatever is on its way."""
        self._loop.call_soon_threadsafe(self._cut)

    def close(self) -> None:
        """Resets every connection and refuses new ones, until `open`."""
        self._do(self._close())

    def open(self) -> None:
        self._do(self._listen())

    def silence(self) -> None:
        """Passes nothing on, in neither direction, and keeps every connection, until `resume`."""
        self._loop.call_soon_threadsafe(self._flowing.clear)

    def resume(self) -> None:
        self._loop.call_soon_threadsafe(self._flowing.set)

    # -- inside of the thread ------------------------------------------------------------------------------------------

    def _do(self, what: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(timeout=10)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, HOST, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._turn()  # a connection that was accepted just now gets its handler first
        handlers = list(self._handlers)
        for handler in handlers:
            handler.cancel()
        self._cut()
        await asyncio.gather(*handlers, return_exceptions=True)
        await self._turn()  # a transport that was aborted closes its socket only then

    async def _turn(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    def _cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handler = asyncio.current_task()
        assert handler is not None
        self._handlers.add(handler)
        self._writers.add(writer)
        try:
            with suppress(OSError, asyncio.CancelledError):  # asyncio's callback cannot bear a cancelled handler
                there_reader, there_writer = await asyncio.open_connection(HOST, self._target_port)
                self._writers.add(there_writer)
                try:
                    async with asyncio.TaskGroup() as ways:
                        ways.create_task(self._pump(reader, there_writer, delayed=True))
                        ways.create_task(self._pump(there_reader, writer, delayed=False))
                finally:
                    self._writers.discard(there_writer)
                    there_writer.transport.abort()
        finally:
            self._handlers.discard(handler)
            self._writers.discard(writer)
            writer.transport.abort()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, delayed: bool) -> None:
        """Until either end is gone; then the other end is, too."""
        try:
            while chunk := await source.read(65536):
                if delayed and self.delay_s:
                    await asyncio.sleep(self.delay_s)
                await self._flowing.wait()
                sink.write(chunk)
                await sink.drain()
        except OSError:
            pass
        sink.transport.abort()
