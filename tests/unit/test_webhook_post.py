"""One webhook, sent once: to the address that was checked, and without waiting for ever."""

from __future__ import annotations

import datetime
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from shared.destinations import Destination
from shared.webhooks import AttemptResult
from tests.endpoints import Endpoint, serving
from worker import webhook_post
from worker.webhook_post import WebhookPoster

NAME = "hooks.example"


class FakeNames:
    """A name server that says something else each time, and counts."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def __call__(self, *_: object) -> list[str]:
        self.asked += 1
        return self.answers[min(self.asked, len(self.answers)) - 1]


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with serving() as endpoint:
        yield endpoint


@pytest.fixture
async def poster() -> AsyncIterator[WebhookPoster]:
    poster = WebhookPoster(timeout_s=10)
    yield poster
    poster.close()


async def post(
    poster: WebhookPoster, endpoint: Endpoint, path: str = "/", *, host: str = "127.0.0.1", public_only: bool = False
) -> AttemptResult:
    to = Destination(endpoint.scheme, host, endpoint.port, path)
    return await poster.post(to, {"content-type": "application/json"}, b"{}", public_only=public_only)


async def test_it_is_a_post_with_the_name_as_its_host(endpoint: Endpoint) -> None:
    poster = WebhookPoster(timeout_s=10, resolve=FakeNames(["127.0.0.1"]))
    result = await post(poster, endpoint, "/path?a=b", host=NAME)
    assert (result.status_code, result.error) == (200, None)
    [received] = endpoint.received
    assert (received.path, received.body) == ("/path?a=b", b"{}")
    assert received.headers["host"] == f"{NAME}:{endpoint.port}"


# -- addresses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["::1"], ["::ffff:127.0.0.1"], ["10.0.0.1", "127.0.0.1"], []])
async def test_a_name_without_a_public_address_is_not_connected_to(endpoint: Endpoint, addresses: list[str]) -> None:
    poster = WebhookPoster(timeout_s=10, resolve=FakeNames(addresses))
    result = await post(poster, endpoint, host=NAME, public_only=True)
    assert (result.status_code, result.error) == (None, "address_refused")
    assert endpoint.received == []


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "2130706433", "0x7f.1", "127.1"])
async def test_whatever_the_system_takes_for_this_machine_is_refused(
    poster: WebhookPoster, endpoint: Endpoint, host: str
) -> None:
    result = await post(poster, endpoint, host=host, public_only=True)
    assert result.error == "address_refused"
    assert endpoint.received == []


async def test_a_name_that_changes_its_address_is_asked_for_it_once(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook_post, "is_public", lambda address: address == "127.0.0.2")
    names = FakeNames(["127.0.0.1", "127.0.0.2"], ["127.0.0.1"])
    with serving("127.0.0.2", port=endpoint.port) as public:
        poster = WebhookPoster(timeout_s=10, resolve=names)
        assert (await post(poster, endpoint, host=NAME, public_only=True)).status_code == 200
        assert (len(public.received), endpoint.received, names.asked) == (1, [], 1)
        assert (await post(poster, endpoint, host=NAME, public_only=True)).error == "address_refused"
        assert (len(public.received), endpoint.received) == (1, [])


async def test_the_next_address_is_tried_if_one_does_not_answer(endpoint: Endpoint) -> None:
    poster = WebhookPoster(timeout_s=10, resolve=FakeNames(["127.0.0.3", "127.0.0.1"]))
    assert (await post(poster, endpoint, host=NAME)).status_code == 200


async def test_proxies_of_the_environment_are_not_used(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url())
        poster = WebhookPoster(timeout_s=10)
        assert (await post(poster, endpoint)).status_code == 200
        assert proxy.received == []


# -- endpoints that do not do what they should -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "status_code", "error"),
    [
        ("/status/204", 204, None),
        ("/status/500", 500, None),
        ("/redirect", 307, None),
        ("/endless", 200, None),
        ("/half", 200, None),
        ("/refuse", None, "not_http"),
        ("/garbage", None, "not_http"),
    ],
)
async def test_what_an_endpoint_answers_is_told(
    poster: WebhookPoster, endpoint: Endpoint, path: str, status_code: int | None, error: str | None
) -> None:
    result = await post(poster, endpoint, path)
    assert (result.status_code, result.error) == (status_code, error)
    assert len(endpoint.received) == 1


async def test_an_endpoint_that_hangs_is_left(endpoint: Endpoint) -> None:
    poster = WebhookPoster(timeout_s=0.2)
    result = await post(poster, endpoint, "/hang")
    assert (result.status_code, result.error) == (None, "timeout")
    assert result.duration_ms >= 200


async def test_a_name_that_does_not_exist_is_told(poster: WebhookPoster, endpoint: Endpoint) -> None:
    assert (await post(poster, endpoint, host="a..b")).error == "name_not_resolved"


async def test_an_endpoint_that_is_not_there_is_told(poster: WebhookPoster) -> None:
    with serving() as gone:
        pass
    assert (await post(poster, gone)).error == "not_connected"


# -- TLS ---------------------------------------------------------------------------------------------------------------


class Certified:
    """An endpoint with a certificate for `hooks.example`, and a file with the certificate that vouches for it."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        self.authority, private = folder / "authority.pem", folder / "key.pem"
        self.authority.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(self.authority, private)
        self.endpoint = stack.enter_context(serving(tls=tls))


@pytest.fixture
def certified(tmp_path: Path) -> Iterator[Certified]:
    with ExitStack() as stack:
        yield Certified(tmp_path, stack)


async def test_a_certificate_for_the_name_is_accepted(certified: Certified, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certified.authority))
    poster = WebhookPoster(timeout_s=10, resolve=FakeNames(["127.0.0.1"]))
    assert (await post(poster, certified.endpoint, host=NAME)).status_code == 200


async def test_a_certificate_for_another_name_is_refused(certified: Certified, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certified.authority))
    poster = WebhookPoster(timeout_s=10, resolve=FakeNames(["127.0.0.1"]))
    assert (await post(poster, certified.endpoint, host="other.example")).error == "tls_failed"
    assert certified.endpoint.received == []


async def test_a_certificate_that_nobody_vouches_for_is_refused(certified: Certified) -> None:
    poster = WebhookPoster(timeout_s=10, resolve=FakeNames(["127.0.0.1"]))
    assert (await post(poster, certified.endpoint, host=NAME)).error == "tls_failed"
    assert certified.endpoint.received == []
