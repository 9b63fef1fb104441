"""What a request asks for: forms of the target, and paths that mean something else than they look like."""

from tests.gateway.corpus import SHARED, Case, either, forwarded, refused, rejected, usual


def to(target: bytes) -> bytes:
    return usual(line=b"POST " + target + b" HTTP/1.1")


INFER = b"/inference/infer/"
NONE = {
    "authority": b"gateway:80", "asterisk": b"*", "relative": b"inference/infer/m", "empty-model": INFER, "no-slash": b"/inference/infer",
    "double-slash-first": b"//elsewhere" + INFER + b"m", "double-slash": b"/inference//infer/m", "double-slash-last": INFER + b"/m",
    "slash-behind": INFER + b"m/", "dots": b"/inference/x/../infer/m", "dots-to-admin": INFER + b"../../admin/dead-letters",
    "dots-in-model": INFER + b"../infer/m", "dots-behind": INFER + b"m/..", "dots-to-the-same": INFER + b"m/../m", "dot": INFER + b"./m",
    "encoded-dots": b"/inference/x/%2e%2e/infer/m", "encoded-dots-in-model": INFER + b"%2e%2e/infer/m",
    "encoded-slash-dots": INFER + b"m%2f..%2fm",
    "encoded-slash-before": INFER + b"%2fm", "twice-encoded": INFER + b"%256d", "twice-encoded-dots": INFER + b"%252e%252e%252fm",
    "overlong-dots": INFER + b"%c0%ae%c0%ae/m", "nul": INFER + b"m%00", "nul-between": INFER + b"m%00/predict",
    "crlf": INFER + b"m%0d%0aX-User-ID:%20bolt",
    "crlf-request": INFER + b"m%20HTTP/1.1%0d%0aHost:%20x%0d%0a%0d%0a", "lf": INFER + b"m%0a", "semicolon": INFER + b"m;client=bolt",
    "invalid-utf-8": INFER + b"m%ff", "surrogate": INFER + b"m%ed%a0%80", "percent": INFER + b"%", "percent-letters": INFER + b"%zz",
    "space": INFER + b"m%20", "backslash": b"\\inference\\infer\\m", "backslash-in-model": INFER + b"..\\m",
    "upper-case": b"/INFERENCE/INFER/m",
    "upper-case-model": INFER + b"M", "url-as-model": INFER + b"http://127.0.0.1/x", "address-as-model": INFER + b"127.0.0.1:80/predict",
    "user-as-model": INFER + b"x@127.0.0.1", "encoded-question": INFER + b"m%3fx", "encoded-hash": INFER + b"m%23x",
    "long-model": INFER + b"m" * 5_000,
    "predict": b"/predict/acme", "encoded-prefix-slash": b"%2finference/infer/m", "full-width": INFER + b"%ef%bd%8d",
    "star-in-model": INFER + b"*",
    "braces": INFER + b"%7bmodel_name%7d", "no-form": b"?" + INFER + b"m", "raw-unicode": INFER + b"m\xc3\xa9",
    "raw-byte": INFER + b"m\xff",
}  # fmt: skip

CASES: list[Case] = [
    *(refused(f"target-{name}", to(target), 307, 400, 404, 405, 414, 422) for name, target in NONE.items()),
    forwarded("target-query", to(INFER + b"m?x=1")),
    forwarded("target-query-with-crlf", to(INFER + b"m?x=%0d%0aX-User-ID:%20bolt")),
    forwarded("target-query-with-path", to(INFER + b"m?/../../admin")),
    forwarded("target-query-empty", to(INFER + b"m?")),
    either("target-query-raw-byte", to(INFER + b"m?\xff")),
    either("target-fragment", to(INFER + b"m#x"), 404),
    either("target-fragment-then-query", to(INFER + b"m#x?y"), 404),
    either("target-encoded-model", to(INFER + b"%6d"), 404),
    either("target-encoded-prefix", to(b"/inference/%69nfer/m"), 404),
    forwarded("target-absolute", to(b"http://gateway" + INFER + b"m")),
    either("target-absolute-with-port", to(b"http://gateway:8000" + INFER + b"m?x"), 404, 421),
    either("target-absolute-upper-case", to(b"HTTP://GATEWAY" + INFER + b"m"), 404),
    either("target-absolute-other-host", to(b"http://elsewhere" + INFER + b"m"), 404, 421),
    either("target-absolute-other-scheme", to(b"https://gateway" + INFER + b"m"), 404, 421),
    either("target-absolute-of-no-scheme-we-know", to(b"file://gateway" + INFER + b"m"), 404, 421),
    either("target-absolute-with-user", to(b"http://bolt@gateway" + INFER + b"m"), 404, 421),
    refused("target-absolute-without-path", to(b"http://gateway"), 400, 404, 405),
    refused("target-absolute-without-host", to(b"http:///inference/infer/m"), 400, 404),
    refused("target-absolute-in-a-path", to(b"/http://gateway" + INFER + b"m"), 400, 404, 405),
    rejected("target-with-raw-control", to(INFER + b"m\x01"), 400, 404),
    either("target-of-a-client-without-a-model", usual(line=b"POST /inference/infer/m HTTP/1.1", id=b"X-User-ID: other"), server=SHARED),
]  # fmt: skip
