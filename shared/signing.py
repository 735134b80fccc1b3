"""Signatures of Standard Webhooks (https://www.standardwebhooks.com), as OpenAI's SDKs verify them. No I/O."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence

SECRET_PREFIX = "whsec_"  # noqa: S105  # what every secret begins with
MIN_KEY_BYTES, MAX_KEY_BYTES = 24, 64  # the specification's own bounds


def signing_key(secret: str) -> bytes:
    """The key that `whsec_<base64>` stands for. Raises ValueError with a message that does not repeat the secret."""
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not secret.startswith(SECRET_PREFIX) or not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
        raise ValueError(f"must be whsec_ and the base64 of {MIN_KEY_BYTES} to {MAX_KEY_BYTES} bytes")
    return key


def signature_header(keys: Sequence[bytes], event_id: str, timestamp_s: int, body: bytes) -> str:
    """The value of `webhook-signature`: one signature for each key, so that a secret can be changed without a gap."""
    content = b"%s.%d.%s" % (event_id.encode(), timestamp_s, body)
    digests = [hmac.new(key, content, hashlib.sha256).digest() for key in keys]
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)
