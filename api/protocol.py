"""uvicorn's HTTP protocol with a limit on the head of a request, which its httptools protocol lacks."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 512 * 1024  # request line and headers; one read of the socket may carry 256 KB of body behind them


class LimitedHttpToolsProtocol(HttpToolsProtocol):
    """Refuses a request whose head does not end within MAX_HEAD_BYTES with a 400, and closes the connection."""

    _unfinished_head_bytes = 0

    def data_received(self, data: bytes) -> None:
        self._unfinished_head_bytes += len(data)
        super().data_received(data)
        if self._unfinished_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The request's headers are too large.")

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._unfinished_head_bytes = -(1 << 62)  # the body has limits of its own

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._unfinished_head_bytes = 0
