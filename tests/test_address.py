"""Addresses and join strings as people write them."""

from __future__ import annotations

import pytest

from fedsweep.address import Address, known_address, parse_address
from fedsweep.errors import UsageError

PIN = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:5000", Address("127.0.0.1", 5000)),
        ("node7:1", Address("node7", 1)),
        ("[::1]:5000", Address("::1", 5000)),
        (f"node7:5000#sha256:{PIN}", Address("node7", 5000, PIN)),
        (f"[2001:db8::1]:5000#sha256:{PIN}", Address("2001:db8::1", 5000, PIN)),
    ],
)
def test_an_address_goes_round(text, address):
    assert parse_address(text) == address
    assert str(address) == text
    assert address.place == text.partition("#")[0]


def test_capitals_in_a_fingerprint_make_no_difference():
    assert parse_address(f"a:1#sha256:{PIN.upper()}").pin == PIN


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "a", "a:", ":5000", "a:0", "a:65536", "a:0000070000", "a:-1", "a:5e3", "a:٥", "a:1 ", "a:1#"),
        *("a:1#sha256:", "a:1#sha256:" + "g" * 64, f"a:1#md5:{PIN}", f"a:1#sha256:{PIN}0", f"a:1#sha256:{PIN}#"),
        f"#sha256:{PIN}",
    ],
)
@pytest.mark.parametrize("option", ["--manager", "--join"])
def test_what_is_no_address_is_refused(text, option):
    with pytest.raises(UsageError, match=f"^{option} .*: (expected HOST:PORT|the fingerprint is missing)"):
        parse_address(text, option)


def test_a_join_string_has_its_fingerprint():
    with pytest.raises(UsageError) as caught:
        parse_address("node7:5000", "--join")
    assert str(caught.value) == "--join node7:5000: the fingerprint is missing; copy all of HOST:PORT#sha256:…"


def test_of_a_wrong_address_no_more_is_repeated_than_can_be_read():
    with pytest.raises(UsageError) as caught:
        parse_address("\x1b[2J" + "x" * 10_000)
    assert len(str(caught.value)) < 250
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "content", [None, "", "[]", "{}", "null", '{"host": 1}', '{"host": "a", "port": "x"}', "\udcff"]
)
def test_a_file_that_says_nothing_is_no_address(tmp_path, content):
    if content is not None:
        (tmp_path / "manager.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert known_address(tmp_path) is None
