"""Where a body ends: Content-Length, Transfer-Encoding, chunks."""

from tests.gateway.corpus import (
    ACME,
    BODY,
    BOLT,
    CHUNKS,
    LENGTH,
    LINE,
    MARK,
    MAX_BODY,
    SHARED,
    SMUGGLED,
    TE,
    Case,
    Expected,
    either,
    forwarded,
    ok,
    refused,
    rejected,
    request,
    several,
    usual,
)  # fmt: skip

INNER = b"0\r\n\r\n" + SMUGGLED
WHOLE = b"Content-Length: %d" % len(INNER)
SHORT = b"Content-Length: 5"
BOTH_CODINGS = {
    "plain": b"Transfer-Encoding: chunked",
    "upper-case": b"TRANSFER-ENCODING: CHUNKED",
    "no-space": b"Transfer-Encoding:chunked",
    "tab": b"Transfer-Encoding:\tchunked",
    "trailing-tab": b"Transfer-Encoding: chunked\t",
    "vertical-tab": b"Transfer-Encoding: \x0bchunked",
    "form-feed": b"Transfer-Encoding: chunked\x0c",
    "nul": b"Transfer-Encoding: chunked\x00",
    "xchunked": b"Transfer-Encoding: xchunked",
    "chunk": b"Transfer-Encoding: chunk",
    "quoted": b'Transfer-Encoding: "chunked"',
    "parameter": b"Transfer-Encoding: chunked;q=1",
    "identity": b"Transfer-Encoding: identity",
    "identity-after": b"Transfer-Encoding: chunked, identity",
    "identity-before": b"Transfer-Encoding: identity, chunked",
    "comma": b"Transfer-Encoding: ,chunked",
    "twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    "other-first": b"Transfer-Encoding: cow\r\nTransfer-Encoding: chunked",
    "other-last": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: cow",
    "space-before-colon": b"Transfer-Encoding : chunked",
    "tab-before-colon": b"Transfer-Encoding\t: chunked",
    "folded": b"Transfer-Encoding:\r\n chunked",
    "in-a-fold": b"X: y\r\n Transfer-Encoding: chunked",
    "behind-lf": b"X: y\nTransfer-Encoding: chunked",
    "behind-cr": b"X: y\rTransfer-Encoding: chunked",
    "behind-cr-cr-lf": b"X: y\r\r\nTransfer-Encoding: chunked",
    "nul-in-name": b"Transfer-Encoding\x00: chunked",
    "empty": b"Transfer-Encoding:",
    "non-breaking-space": b"Transfer-Encoding: \xa0chunked",
    "named-by-connection": b"Connection: Transfer-Encoding\r\nTransfer-Encoding: chunked",
}  # fmt: skip
"""Each beside a Content-Length. `in-a-fold` may be unfolded to a value of `X`; the strict server refuses that too."""

BOTH = [
    *(rejected(f"cl-te-{name}", request(WHOLE, te, body=INNER), 400, 501) for name, te in BOTH_CODINGS.items()),
    rejected("te-cl", request(TE, SHORT, body=CHUNKS + SMUGGLED)),
    rejected("te-cl-smuggled-in-a-chunk", request(TE, b"Content-Length: 4", body=b"%x\r\n%s\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED))),
    rejected("te-cl-of-nothing", request(TE, b"Content-Length: 0", body=CHUNKS)),
    rejected("cl-te-and-connection-close", request(b"Connection: close", LENGTH, TE, body=CHUNKS)),
    rejected("te-cl-named-by-connection", request(b"Connection: content-length", TE, LENGTH, body=CHUNKS)),
    either("underscore-te", usual(b"Transfer_Encoding: chunked")),
    either("underscore-cl", request(b"Content_Length: 3", TE, body=CHUNKS)),
    either("underscore-cl-alone", request(b"Content_Length: 99", LENGTH, body=BODY)),
]  # fmt: skip

CODINGS = [
    forwarded("te", request(TE, body=CHUNKS)),
    forwarded("te-in-upper-case", request(b"TRANSFER-ENCODING: CHUNKED", body=CHUNKS)),
    either("te-with-tabs-around", request(b"Transfer-Encoding:\tchunked\t", body=CHUNKS)),
    *(
        rejected(f"te-{name}", request(te, body=CHUNKS), 400, 411, 501)
        for name, te in BOTH_CODINGS.items()
        if name not in ("plain", "upper-case", "no-space", "tab", "trailing-tab", "comma", "in-a-fold", "folded", "twice", "empty",
                        "named-by-connection", "behind-cr-cr-lf", "nul-in-name")
    ),
    rejected("te-gzip", request(b"Transfer-Encoding: gzip, chunked", body=CHUNKS), 400, 501),
    rejected("te-twice", request(TE, TE, body=CHUNKS), 400, 501),
    rejected("te-twice-in-a-list", request(b"Transfer-Encoding: chunked, chunked", body=CHUNKS), 400, 501),
    rejected("te-on-http-1.0", request(TE, body=CHUNKS, line=LINE[:-1] + b"0"), 400, 411, 501, 505),
    rejected("te-on-http-1.0-kept-alive", request(b"Connection: keep-alive", TE, body=CHUNKS + SMUGGLED, line=LINE[:-1] + b"0"),
             400, 411, 501, 505),
    either("te-named-by-connection", request(b"Connection: transfer-encoding", TE, body=CHUNKS)),
]  # fmt: skip

LENGTHS = {
    "plus": b"+15", "minus": b"-15", "hex": b"0xf", "underscore": b"1_5", "two": b"15 15", "list-different": b"15, 16",
    "list-with-nothing": b"15,", "semicolon": b"15;", "fraction": b"15.0", "exponent": b"1.5e1", "empty": b"",
    "letters": b"fifteen", "quoted": b'"15"', "arabic-digits": b"\xd9\xa1\xd9\xa5", "superscript": b"1\xb2", "nul": b"15\x00",
    "vertical-tab": b"\x0b15", "folded": b"1\r\n 5", "overflow-to-15": b"18446744073709551631",
    "overflow": b"9" * 40, "minus-nothing": b"-0",
}  # fmt: skip
CONTENT_LENGTHS = [
    *(rejected(f"cl-{name}", request(b"Content-Length: " + value, body=BODY), 400, 411, 413) for name, value in LENGTHS.items()),
    either("cl-zeros-before", request(b"Content-Length: 00015", body=BODY)),
    forwarded("cl-with-spaces-around", request(b"Content-Length:  \t15 \t", body=BODY)),
    either("cl-twice", request(LENGTH, LENGTH, body=BODY)),
    either("cl-list-of-the-same", request(b"Content-Length: 15, 15", body=BODY)),
    rejected("cl-two-different", request(LENGTH, b"Content-Length: 16", body=BODY + b"x")),
    rejected("cl-nothing-and-some", request(b"Content-Length: 0", LENGTH, body=BODY)),
    rejected("cl-some-and-nothing", request(b"Content-Length: %d" % len(SMUGGLED), b"Content-Length: 0", body=SMUGGLED)),
    rejected("cl-with-space-before-colon", request(b"Content-Length : 15", body=BODY)),
    rejected("cl-behind-lf", request(b"X: y\nContent-Length: 15", body=BODY)),
    rejected("cl-behind-cr", request(b"Content-Length: 0", b"X: y\rContent-Length: 15", body=BODY)),
    either("cl-named-by-connection", usual(b"Connection: close, content-length")),
    rejected("cl-greatest", request(b"Content-Length: 9223372036854775807", body=BODY), 400, 413),
    refused("cl-over-the-limit", request(b"Content-Length: %d" % (MAX_BODY + 1), body=b"x" * (MAX_BODY + 1)), 413),
    rejected("te-over-the-limit", request(TE, body=b"%x\r\n%s\r\n" % (MAX_BODY + 1, b"x" * (MAX_BODY + 1)) + INNER), 413),
    several("cl-none-and-a-body", request(body=BODY + b"\r\n\r\n"), ok(ACME, b"", 400, 411), Expected((400,)), closed=True),
    forwarded("cl-and-a-request-as-body", request(b"Content-Length: %d" % len(SMUGGLED), body=SMUGGLED), body=SMUGGLED),
    several("cl-shorter-than-the-body", request(SHORT, body=BODY), ok(ACME, BODY[:5]), Expected((400,)), closed=True),
    several("cl-nothing-and-a-request", request(b"Content-Length: 0", body=SMUGGLED), ok(ACME, b""), ok(BOLT, MARK)),
]  # fmt: skip

SIZES = {
    "minus": b"-f", "plus": b"+f", "0x": b"0xf", "underscore": b"0_f", "letter": b"g", "empty": b"", "space-before": b" f",
    "tab-before": b"\tf", "overflow": b"1000000000000000f", "overflow-by-zeros-behind": b"f" + b"0" * 16,
    "nul": b"f\x00", "comma": b"f,f", "two": b"f f", "quoted": b'"f"', "vertical-tab": b"f\x0b", "fraction": b"f.0",
    "lf-in-extension": b"f;a\nb", "cr-in-extension": b"f;a\rb", "nul-in-extension": b"f;\x00",
}  # fmt: skip
CHUNK_SIZES = [
    *(rejected(f"chunk-{name}", request(TE, body=size + b"\r\n" + BODY + b"\r\n" + INNER), 400, 413) for name, size in SIZES.items()),
    rejected("chunk-greatest", request(TE, body=b"f" * 16 + b"\r\n" + b"x" * (MAX_BODY + 1)), 400, 413),
    forwarded("chunk-upper-case", request(TE, body=b"F\r\n" + BODY + b"\r\n0\r\n\r\n")),
    forwarded("chunk-zeros-before", request(TE, body=b"0000f\r\n" + BODY + b"\r\n0000\r\n\r\n")),
    either("chunk-space-after", request(TE, body=b"f \r\n" + BODY + b"\r\n0\r\n\r\n")),
    either("chunk-extension", request(TE, body=b'f;a=b;c="d;e"\r\n' + BODY + b"\r\n0;f\r\n\r\n")),
    rejected("chunk-extension-flood", request(TE, body=b"f;" + b"a=b;" * 64_000 + b"\r\n" + BODY + b"\r\n0\r\n\r\n"), 400, 413, 431),
    either("chunk-of-a-byte-each", request(TE, body=b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n")),
]  # fmt: skip

CHUNK_ENDS = [
    rejected("chunk-lf-after-size", request(TE, body=b"f\n" + BODY + b"\r\n0\r\n\r\n")),
    rejected("chunk-lf-after-data", request(TE, body=b"f\r\n" + BODY + b"\n0\r\n\r\n")),
    rejected("chunk-cr-after-size", request(TE, body=b"f\r" + BODY + b"\r\n0\r\n\r\n")),
    rejected("chunk-cr-after-data", request(TE, body=b"f\r\n" + BODY + b"\r0\r\n\r\n")),
    rejected("chunk-nothing-after-data", request(TE, body=b"f\r\n" + BODY + b"0\r\n\r\n" + SMUGGLED)),
    rejected("chunk-other-bytes-after-data", request(TE, body=b"f\r\n" + BODY + b"xx0\r\n\r\n" + SMUGGLED)),
    rejected("chunk-shorter-than-its-data", request(TE, body=b"3\r\n" + BODY + b"\r\n" + INNER)),
    rejected("chunk-longer-than-its-data", request(TE, body=b"11\r\n" + BODY + b"\r\n" + INNER)),
    rejected("chunk-lf-after-the-last", request(TE, body=b"f\r\n" + BODY + b"\r\n0\n\n" + SMUGGLED)),
    rejected("chunk-minus-nothing-last", request(TE, body=b"f\r\n" + BODY + b"\r\n-0\r\n\r\n" + SMUGGLED)),
    rejected("chunk-request-in-place-of-the-end", request(TE, body=b"f\r\n" + BODY + b"\r\n0\r\n" + SMUGGLED)),
    several("chunks-and-a-request", request(TE, body=CHUNKS + SMUGGLED), ok(), ok(BOLT, MARK)),
    forwarded("chunks-of-a-request", request(TE, body=b"%x\r\n%s\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)), body=SMUGGLED),
    forwarded("chunks-of-nothing", request(TE, body=b"0\r\n\r\n"), body=b""),
]  # fmt: skip

TRAILER_FIELDS = {
    "client": b"X-User-ID: bolt", "cl": b"Content-Length: 3", "te": b"Transfer-Encoding: chunked", "host": b"Host: elsewhere",
    "authorization": b"Authorization: Bearer x", "connection": b"Connection: close", "own": b"X-Own: 1",
}  # fmt: skip
TRAILERS = [
    *(either(f"trailer-{name}", request(TE, b"Trailer: X-Own", body=CHUNKS[:-2] + field + b"\r\n\r\n"))
      for name, field in TRAILER_FIELDS.items()),
    rejected("trailer-without-colon", request(TE, body=CHUNKS[:-2] + b"x\r\n\r\n")),
    rejected("trailer-behind-lf", request(TE, body=CHUNKS[:-2] + b"X: y\n\n" + SMUGGLED)),
    rejected("trailer-with-nul", request(TE, body=CHUNKS[:-2] + b"X: \x00\r\n\r\n")),
    rejected("trailer-flood", request(TE, body=CHUNKS[:-2] + b"X: y\r\n" * 40_000 + b"\r\n"), 400, 413, 431),
]  # fmt: skip

PIPELINES = [
    several("pipeline", usual() + usual(id=b"X-User-ID: bolt") + usual(id=b""), ok(), ok(BOLT), ok(SHARED)),
    several("pipeline-of-chunks", request(TE, body=CHUNKS) * 2 + usual(id=b""), ok(), ok(), ok(SHARED)),
    several("pipeline-second-is-no-http", usual() + b"no http at all\r\n\r\n", ok(), Expected((400,)), closed=True),
    several("pipeline-second-has-both", usual() + request(TE, LENGTH, body=CHUNKS) + SMUGGLED, ok(), Expected((400,)), closed=True),
    several("pipeline-second-has-a-bad-chunk", usual() + request(TE, body=b"-f\r\n" + INNER), ok(), Expected((400,)), closed=True),
    rejected("pipeline-first-is-no-http", b"no http at all\r\n\r\n" + SMUGGLED),
    rejected("pipeline-first-has-two-lengths", request(LENGTH, b"Content-Length: 0", body=BODY) + SMUGGLED),
    several("pipeline-behind-an-unknown-model", usual(line=b"POST /inference/infer/none HTTP/1.1") + usual(), Expected((404,)), ok()),
    several("pipeline-behind-a-wrong-client", usual(id=b"X-User-ID: ../acme") + usual(), Expected((400, 422)), ok()),
    several("pipeline-behind-get", usual(line=b"GET /inference/infer/m HTTP/1.1") + usual(), Expected((405,)), ok()),
    several("pipeline-behind-connection-close", usual(b"Connection: close") + SMUGGLED, ok(), closed=True),
    several("pipeline-behind-other-pages", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + usual(), Expected((200,)), ok()),
    several("blank-lines-between", usual() + b"\r\n" + usual(), ok(), ok()),
]  # fmt: skip

CASES: list[Case] = [
    *BOTH, *CODINGS, *CONTENT_LENGTHS, *CHUNK_SIZES, *CHUNK_ENDS, *TRAILERS, *PIPELINES,
]  # fmt: skip
