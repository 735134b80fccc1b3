"""Where a webhook may go, as far as its URL and the address say."""

from __future__ import annotations

import pytest

from shared.destinations import Destination, DestinationError, destination, is_public


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://example.org", Destination("https", "example.org", 443, "/")),
        ("https://Example.ORG/Hooks?a=B", Destination("https", "example.org", 443, "/Hooks?a=B")),
        ("https://example.org?a=b", Destination("https", "example.org", 443, "/?a=b")),
        ("https://example.org:8443/a@b", Destination("https", "example.org", 8443, "/a@b")),
        ("https://xn--bcher-kva.example/", Destination("https", "xn--bcher-kva.example", 443, "/")),
        ("https://8.8.8.8/", Destination("https", "8.8.8.8", 443, "/")),
        ("https://[2606:4700:0::1111]:1024/", Destination("https", "2606:4700::1111", 1024, "/")),
        ("https://example.org/%2e%2e", Destination("https", "example.org", 443, "/%2e%2e")),
    ],
)
def test_a_url_is_taken_apart(url: str, expected: Destination) -> None:
    assert destination(url, public_only=True) == expected
    assert destination(url, public_only=False) == expected


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.org",
        "//example.org/",
        "https:example.org",
        "https:///path",
        "HTTPS://example.org/",
        "file:///etc/passwd",
        "gopher://example.org/",
        "https://user@example.org/",
        "https://user:password@example.org/",
        "https://example.org@127.0.0.1/",
        "https://example.org\\@127.0.0.1/",
        "https://example.org/\\",
        "https://example.org/#fragment",
        "https://example.org/a b",
        "https://example.org/\r\nHost: x",
        "https://example.org/\n",
        " https://example.org/",
        "https://example.org/é",
        "https://bücher.example/",
        "https://example.org。/",
        "https://%65xample.org/",
        "https://example..org/",
        "https://example.org./",
        "https://.example.org/",
        "https://-example.org/",
        "https://" + "a" * 64 + ".org/",
        "https://" + "a." * 127 + "org/",
        "https://example.org:/",
        "https://example.org:0/",
        "https://example.org:65536/",
        "https://example.org:443x/",
        "https://127.1/",
        "https://2130706433/",
        "https://0x7f000001/",
        "https://0177.0.0.1/",
        "https://8.8.8.8.8/",
        "https://[::1/",
        "https://[::1]x/",
        "https://[fe80::1%25eth0]/",
        "https://[8.8.8.8]/",
        "https://2606:4700::1111/",
        "https://example.org/" + "a" * 2048,
    ],
)
def test_what_is_not_plainly_a_url_is_refused(url: str) -> None:
    with pytest.raises(DestinationError) as raised:
        destination(url, public_only=False)
    assert "password" not in str(raised.value).replace("a user name or a password", "")


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/",
        "https://example.org:22/",
        "https://example.org:80/",
        "https://localhost/",
        "https://LOCALHOST:8443/",
        "https://a.localhost/",
        "https://127.0.0.1/",
        "https://10.0.0.1/",
        "https://169.254.169.254/latest/meta-data/",
        "https://[::1]/",
        "https://[::ffff:127.0.0.1]/",
        "https://[fd00:ec2::254]/",
    ],
)
def test_a_client_may_not_name_what_the_operator_may(url: str) -> None:
    with pytest.raises(DestinationError):
        destination(url, public_only=True)
    destination(url, public_only=False)


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "0.1.2.3", "10.1.1.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254"),
        *("168.63.129.16", "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.0.192", "192.0.2.1"),
        *("192.88.99.1", "192.168.1.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "224.0.1.1"),
        *("239.255.255.250", "240.0.0.1", "255.255.255.255"),
        *("::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254"),
        *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::808:808", "100::1", "2001::1", "2001:0:808:808::1"),
        *("2001:db8::1", "2002:7f00:1::1", "2002:a9fe:a9fe::", "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254"),
        *("fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "ff0e::1", "4000::1"),
        *("", "localhost", "127.1", "0x7f.1"),
    ],
)
def test_an_address_that_is_not_of_the_internet_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("1.1.1.1", "8.8.8.8", "100.63.255.255", "172.32.0.1", "192.169.0.1", "223.255.255.255"),
        *("2606:4700::1111", "2a00:1450::1", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"),
    ],
)
def test_an_address_of_the_internet_is_public(address: str) -> None:
    assert is_public(address)


def test_what_is_logged_of_a_url_is_neither_path_nor_query() -> None:
    assert destination("https://[2606:4700::1111]/token?secret", public_only=True).origin == (
        "https://[2606:4700::1111]:443"
    )
