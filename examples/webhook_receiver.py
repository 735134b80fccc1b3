"""Receives webhooks and says what it is told: `WEBHOOK_SECRET=whsec_... python examples/webhook_receiver.py`.

Endmark beside it: `ENDMARK_WEBHOOK_URL=http://127.0.0.1:8910/ ENDMARK_WEBHOOK_SECRET=whsec_... make run`.
"""

import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from openai import InvalidWebhookSignatureError, OpenAI

client = OpenAI(api_key="not-needed", webhook_secret=os.environ["WEBHOOK_SECRET"])
seen: set[str] = set()


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        try:
            event = client.webhooks.unwrap(body, dict(self.headers))
        except (InvalidWebhookSignatureError, ValueError):
            self.send_error(400)
            return
        if event.id not in seen:  # an event may come twice
            seen.add(event.id)
            print(event.type, event.data.id, flush=True)
        self.send_response(204)
        self.end_headers()


ThreadingHTTPServer(("127.0.0.1", int(os.environ.get("PORT", "8910"))), Receiver).serve_forever()
