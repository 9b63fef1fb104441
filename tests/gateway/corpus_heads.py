"""Line ends, header names and values, who the client is, and what is said about the connection."""

from tests.gateway.corpus import (
    BODY,
    BOLT,
    LENGTH,
    LINE,
    SHARED,
    SMUGGLED,
    TE,
    Case,
    either,
    forwarded,
    ok,
    refused,
    rejected,
    request,
    several,
    usual,
)  # fmt: skip

LINE_ENDS = [
    either("lf-everywhere", usual().replace(b"\r\n", b"\n")),
    rejected("cr-everywhere", usual().replace(b"\r\n", b"\r") + b"\r\n\r\n"),
    rejected("cr-in-a-value", usual(b"X: a\rb")),
    rejected("cr-in-a-name", usual(b"X\r: a")),
    rejected("lf-in-a-name", usual(b"X\n: a")),
    rejected("cr-before-crlf", usual(b"X: a\r")),
    either("lf-in-one-header", usual(b"X: a\nY: b")),
    either("lf-then-the-client", usual(b"X: a\nX-User-ID: acme", id=b"")),
    either("fold", usual(b"X: a\r\n b")),
    either("fold-of-the-client", usual(id=b"X-User-ID:\r\n acme"), 422),
    either("fold-behind-the-client", usual(id=b"X-User-ID: acme\r\n bolt"), 422, server=SHARED),
    either("fold-of-what-goes-up", usual(b"Accept: a\r\n b")),
    rejected("fold-first", request(LENGTH, body=BODY, line=LINE + b"\r\n X: y")),
    either("crlf-before", b"\r\n" + usual()),
    rejected("end-behind-lf", LINE + b"\r\nHost: x\r\nContent-Length: 0\r\n\n" + SMUGGLED),
    rejected("end-behind-cr", LINE + b"\r\nHost: x\r\nContent-Length: 0\r\n\rX" + SMUGGLED),
]  # fmt: skip

HEADERS = {
    "no-colon": b"X", "no-name": b": a", "space-before-colon": b"X : a", "space-in-name": b"X Y: a", "nul-in-name": b"X\x00: a",
    "nul-in-value": b"X: a\x00b", "control-in-name": b"X\x01: a", "delete-in-name": b"X\x7f: a", "bracket-in-name": b"X(y): a",
    "latin-in-name": b"X\xe9: a", "slash-in-name": b"X/y: a", "quote-in-name": b'"X": a', "at-in-name": b"@: a",
    "space-before-colon-of-the-client": b"X-User-ID : bolt", "nul-behind-the-client": b"X-User-ID\x00: bolt",
    "nul-in-what-goes-up": b"Accept: a\x00b",
}  # fmt: skip
NAMES_AND_VALUES = [
    *(rejected(f"header-{name}", usual(header)) for name, header in HEADERS.items()),
    either("header-control-in-value", usual(b"X: a\x01b")),
    either("header-control-in-what-goes-up", usual(b"Accept: a\x01b")),
    either("header-delete-in-what-goes-up", usual(b"Accept: a\x7fb")),
    forwarded("header-utf-8-in-value", usual("X: é".encode())),
    forwarded("header-empty", usual(b"X:")),
    rejected("header-too-long", usual(b"X: " + b"x" * 70_000), 400, 431),
    rejected("header-name-too-long", usual(b"X" * 70_000 + b": a"), 400, 431),
    rejected("headers-too-many", usual(*[b"X: y"] * 15_000), 400, 431),
    either("headers-many", usual(*[b"X: y"] * 1_000), 431),
]  # fmt: skip

REQUEST_LINES = {
    "no-version": b"POST /inference/infer/m", "http-0.9-get": b"GET /inference/infer/m", "nothing": b"x",
    "http-1,1": LINE[:-3] + b"1,1", "http-1.10": LINE + b"0", "http-01.1": LINE[:-3] + b"01.1", "http-9.9": LINE[:-3] + b"9.9",
    "http-2.0": LINE[:-3] + b"2.0", "lower-case": LINE[:-8] + b"http/1.1", "other": LINE[:-8] + b"HTCPCP/1.0",
    "tab": LINE.replace(b" ", b"\t"), "space-in-target": b"POST /inference/infer/m x HTTP/1.1", "space-before": b" " + LINE,
    "nul": b"POST /inference/infer/m\x00 HTTP/1.1", "nul-before": b"\x00" + LINE, "cr": b"POST /inference/infer/m\r HTTP/1.1",
    "header-as-target": b"POST /inference/infer/m HTTP/1.1\tX-User-ID:bolt HTTP/1.1",
}  # fmt: skip
VERSIONS = [
    *(rejected(f"line-{name}", usual(line=line), 400, 404, 405, 501, 505) for name, line in REQUEST_LINES.items()),
    either("line-two-spaces", usual(line=LINE.replace(b" ", b"  "))),
    either("line-space-behind", usual(line=LINE + b" ")),
    either("line-http-1.2", usual(line=LINE[:-1] + b"2"), 505),
    forwarded("line-http-1.0", usual(line=LINE[:-1] + b"0")),
    forwarded("line-http-1.0-without-host", usual(line=LINE[:-1] + b"0", host=b"")),
    forwarded("line-http-1.0-kept-alive", usual(b"Connection: keep-alive", line=LINE[:-1] + b"0")),
    refused("line-too-long", usual(line=b"POST /inference/infer/" + b"m" * 70_000 + b" HTTP/1.1"), 400, 404, 414, 422, 431),
    rejected("http-2-preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00" + SMUGGLED, 400, 505),
    rejected("tls", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100 + b"\r\n\r\n"),
]  # fmt: skip

OTHER_METHODS = (b"GET", b"DELETE", b"PUT", b"PATCH", b"OPTIONS", b"TRACE")
METHODS = [
    *(refused(f"{method.decode().lower()}-with-a-request-as-body",
              request(b"Content-Length: %d" % len(SMUGGLED), body=SMUGGLED, line=method + LINE[4:]), 400, 405, 501)
      for method in OTHER_METHODS),
    refused("head", request(line=b"HEAD" + LINE[4:]), 405),
    refused("get-with-chunks", request(TE, body=b"8\r\nsmuggled\r\n0\r\n\r\n", line=b"GET" + LINE[4:]), 405),
    refused("lower-case-method", usual(line=b"post" + LINE[4:]), 400, 405, 501),
    refused("unknown-method", usual(line=b"POSTX" + LINE[4:]), 400, 405, 501),
    refused("method-override", usual(b"X-HTTP-Method-Override: POST", line=b"PUT" + LINE[4:]), 405),
    refused("connect", b"CONNECT gateway:80 HTTP/1.1\r\nHost: gateway:80\r\n\r\n", 400, 404, 405, 501),
    rejected("connect-and-a-request", b"CONNECT gateway:80 HTTP/1.1\r\nHost: gateway:80\r\n\r\n" + SMUGGLED, 400, 404, 405, 501),
]  # fmt: skip

HOSTS = [
    refused("host-none", usual(host=b"")),
    refused("host-twice", usual(b"Host: elsewhere")),
    refused("host-twice-the-same", usual(b"Host: gateway")),
    refused("host-with-space", usual(host=b"Host: gateway elsewhere")),
    refused("host-with-path", usual(host=b"Host: gateway/inference")),
    refused("host-list", usual(host=b"Host: gateway, elsewhere")),
    refused("host-with-user", usual(host=b"Host: acme@gateway")),
    refused("host-with-letters-as-port", usual(host=b"Host: gateway:eighty")),
    forwarded("host-empty", usual(host=b"Host:")),
    forwarded("host-v6", usual(host=b"Host: [::1]:8000")),
    rejected("host-with-space-before-colon", usual(host=b"Host : gateway")),
]  # fmt: skip

IDS = {
    "encoded-crlf": b"acme%0d%0aX-User-ID:%20bolt", "path": b"../acme", "list": b"acme, bolt", "semicolon": b"acme;bolt",
    "latin": b"acm\xe9", "utf-8": "acmé".encode(), "full-width": b"\xef\xbd\x81cme", "space": b"acme bolt", "tab": b"acme\tbolt",
    "quoted": b'"acme"', "dash-first": b"-acme", "long": b"a" * 64, "percent": b"%61cme", "star": b"*", "quote": b"' or 1=1 --",
}  # fmt: skip
CLIENTS = [
    forwarded("client-of-none", usual(id=b""), server=SHARED),
    forwarded("client-lower-case-name", usual(id=b"x-user-id: acme")),
    forwarded("client-without-a-model-of-its-own", usual(id=b"X-User-ID: ACME"), server=SHARED),
    *(refused(f"client-{name}", usual(id=b"X-User-ID: " + value), 400, 422) for name, value in IDS.items()),
    refused("client-twice", usual(b"X-User-ID: bolt"), 400, 422),
    either("client-twice-the-same", usual(b"X-User-ID: acme"), 422),
    either("client-empty", usual(id=b"X-User-ID:"), 422, server=SHARED),
    refused("client-empty-and-another", usual(b"X-User-ID: bolt", id=b"X-User-ID:"), 400, 422),
    either("client-with-spaces-around", usual(id=b"X-User-ID: \t acme \t "), 422),
    either("client-underscored", usual(b"X_User_ID: bolt", id=b""), server=SHARED),
    either("client-underscored-beside", usual(b"X_User_ID: bolt")),
    either("client-dotted-beside", usual(b"X.User.ID: bolt")),
    either("client-named-by-connection", usual(b"Connection: x-user-id")),
    either("client-named-by-connection-to-close", usual(b"Connection: close, X-User-ID")),
    either("client-named-by-connection-before", usual(id=b"Connection: X-User-ID\r\nX-User-ID: bolt"), server=BOLT),
    either("client-in-the-query", usual(line=b"POST /inference/infer/m?X-User-ID=bolt&client_code=bolt HTTP/1.1")),
    either("authorization-twice", usual(b"Authorization: Bearer a", b"Authorization: Bearer b"), 401),
    either("organization-beside", usual(b"OpenAI-Organization: bolt"), 401, 404, 422),
]  # fmt: skip

CONNECTION = {
    "te-trailers": b"TE: trailers\r\nConnection: TE", "keep-alive": b"Keep-Alive: timeout=1\r\nConnection: keep-alive",
    "proxy-connection": b"Proxy-Connection: keep-alive", "proxy-authorization": b"Proxy-Authorization: Basic eDp5",
    "host-named": b"Connection: host", "content-type-named": b"Connection: content-type\r\nContent-Type: application/json",
    "cookie": b"Cookie: session=1", "forwarded-for": b"X-Forwarded-For: 127.0.0.1", "forwarded-host": b"X-Forwarded-Host: elsewhere",
    "forwarded": b"Forwarded: for=127.0.0.1;host=elsewhere", "original-url": b"X-Original-URL: /admin",
    "rewrite-url": b"X-Rewrite-URL: /admin",
    "forwarded-prefix": b"X-Forwarded-Prefix: /admin", "max-forwards": b"Max-Forwards: 0", "via": b"Via: 1.1 elsewhere",
    "content-encoding": b"Content-Encoding: gzip", "content-type-twice": b"Content-Type: application/json\r\nContent-Type: text/plain",
    "request-id": b"X-Request-ID: a b\tc", "traceparent": b"traceparent: 00-\xff", "range": b"Range: bytes=0-1",
    "upgrade-h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__",
    "upgrade-websocket": b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
                         b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eHh4eHh4eHh4eHh4eHh4eA==",
    "upgrade-alone": b"Upgrade: h2c", "upgrade-tls": b"Connection: Upgrade\r\nUpgrade: TLS/1.0",
    "expect": b"Expect: 100-continue", "expect-upper-case": b"Expect: 100-CONTINUE", "expect-other": b"Expect: 200-ok",
    "expect-twice": b"Expect: 100-continue\r\nExpect: 100-continue", "expect-list": b"Expect: 100-continue, x",
}  # fmt: skip
HOPS = [
    *(either(f"head-{name}", usual(headers), 415, 417, 422, 426) for name, headers in CONNECTION.items()),
    either("expect-on-http-1.0", usual(b"Expect: 100-continue", line=LINE[:-1] + b"0")),
    several("upgrade-and-a-request", usual(b"Connection: Upgrade", b"Upgrade: h2c") + SMUGGLED,
            ok(), ok(BOLT, b"smuggled")),
    refused("websocket-get", request(b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13",
            b"Sec-WebSocket-Key: eHh4eHh4eHh4eHh4eHh4eA==", line=b"GET" + LINE[4:]), 400, 403, 404, 405, 426),
]  # fmt: skip

CASES: list[Case] = [
    *LINE_ENDS, *NAMES_AND_VALUES, *VERSIONS, *METHODS, *HOSTS, *CLIENTS, *HOPS,
]  # fmt: skip
