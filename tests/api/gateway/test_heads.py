"""What of a head passes the gateway, and which heads it takes."""

import pytest

from api.gateway import head
from api.gateway.headers import Answered, Headers, passed_up
from mini_studio.errors import Upstream

HOST = (b"host", b"studio:8000")


@pytest.mark.parametrize(
    ("version", "headers", "says"),
    [
        ("2.0", [HOST], "only HTTP/1.1"),
        ("1.1", [], "no Host"),
        ("1.1", [HOST, HOST], "more than once"),
        ("1.1", [(b"host", b"a b")], "no name"),
        ("1.1", [HOST, (b"x-user-id", b"a"), (b"x-user-id", b"a")], "x-user-id is there more than once"),
        ("1.1", [HOST, (b"connection", b"close, X-User-ID")], "Connection names x-user-id"),
        ("1.1", [HOST, (b"transfer-encoding", b"gzip, chunked")], "chunked"),
        ("1.0", [HOST, (b"transfer-encoding", b"chunked")], "HTTP/1.1"),
        ("1.1", [HOST, (b"transfer-encoding", b"chunked"), (b"content-length", b"2")], "a length and"),
    ],
)
def test_heads_that_could_be_read_in_two_ways(version: str, headers: Headers, says: str) -> None:
    with pytest.raises(head.Unclear, match=says):
        head.check(version, b"POST", headers)


def test_usual_heads() -> None:
    assert head.check("1.1", b"POST", [HOST, (b"connection", b"keep-alive, TE"), (b"te", b"trailers")]) == HOST[1]
    assert head.check("1.0", b"POST", []) is None


@pytest.mark.parametrize(
    ("url", "found"),
    [(b"/a?x=%0a", b"/a?x=%0a"), (b"http://STUDIO/a", b"/a"), (b"http://studio:1", b"/"), (b"/m%2Fn", b"/m%2Fn")],
)
def test_targets(url: bytes, found: bytes) -> None:
    assert head.target(url, b"POST", HOST[1]) == found


@pytest.mark.parametrize(
    "url",
    [b"http://elsewhere/a", b"http://a@studio/a", b"ftp://studio/a", b"a", b"*", b"/a#b", b"/%zz", b"/%ff", b"/m%0a"],
)
def test_targets_that_are_refused(url: bytes) -> None:
    with pytest.raises(head.Unclear):
        head.target(url, b"POST", HOST[1])


def test_what_is_passed_up() -> None:
    given = [HOST, (b"authorization", b"secret"), (b"cookie", b"a"), (b"accept", b"x"), (b"content-length", b"2")]
    assert passed_up(given) == [(b"accept", b"x"), (b"accept-encoding", b"identity")]
    assert passed_up([(b"accept-encoding", b"br")]) == [(b"accept-encoding", b"br")]


def test_what_is_passed_back() -> None:
    answered = Answered(
        [(b"Content-Length", b"2"), (b"Connection", b"X-Hop"), (b"X-Hop", b"1"), (b"Date", b"now"), (b"X-Own", b"\xe9")]
    )
    assert (answered.headers, answered.length, answered.lines) == ([(b"x-own", b"\xe9")], 2, b"x-own: \xe9\r\n")


@pytest.mark.parametrize(
    "headers",
    [
        [(b"Content-Length", b"2"), (b"content-length", b"2")],
        [(b"Content-Length", b"2"), (b"Transfer-Encoding", b"chunked")],
        [(b"Transfer-Encoding", b"chunked"), (b"Transfer-Encoding", b"chunked")],
        [(b"Transfer-Encoding", b"gzip")],
        [(b"Content-Length", b"+2")],
    ],
)
def test_answers_without_a_clear_length(headers: Headers) -> None:
    with pytest.raises(Upstream):
        Answered(headers)
