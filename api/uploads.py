"""Multipart bodies, parsed as they stream in: the file's bytes go to a callback, the fields are small and counted."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from mini_studio.errors import BadRequest, Invalid, TooLarge
from mini_studio.settings import Uploads

MAX_FIELDS = 50
MAX_FIELD_BYTES = 64 * 1024
MAX_HEADER_BYTES = 16 * 1024
MAX_SHOWN_FILENAME = 255

OnChunk = Callable[[bytes], Awaitable[None]]
BeforeFile = Callable[[dict[str, str]], None]
"""Is shown the fields that stand before the file, and may refuse them."""


@dataclass
class Form:
    """The fields of a form, and how the client called the file."""

    fields: dict[str, str]
    filename: str | None


@dataclass
class Part:
    header_name: bytearray = field(default_factory=bytearray)
    header_value: bytearray = field(default_factory=bytearray)
    headers: dict[bytes, bytes] = field(default_factory=dict)
    name: str = ""
    is_file: bool = False
    text: bytearray = field(default_factory=bytearray)


class FormReader:
    """Turns the parser's callbacks into fields, and file bytes that wait in `ready` for the stream loop."""

    def __init__(self, file_fields: tuple[str, ...], before_file: BeforeFile) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.ready: list[bytes] = []
        self.files = 0
        self.ended = False
        self._file_fields = file_fields
        self._before_file = before_file
        self._part = Part()

    def callbacks(self) -> dict[str, Callable[..., None]]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header(self._part.header_name, data[start:end]),
            "on_header_value": lambda data, start, end: self._header(self._part.header_value, data[start:end]),
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def _begin(self) -> None:
        self._part = Part()

    def _header(self, into: bytearray, piece: bytes) -> None:
        into += piece
        if len(into) > MAX_HEADER_BYTES:
            raise BadRequest("a part's header is too long")

    def _header_end(self) -> None:
        part = self._part
        part.headers[bytes(part.header_name).lower()] = bytes(part.header_value)
        part.header_name, part.header_value = bytearray(), bytearray()

    def _headers_finished(self) -> None:
        part = self._part
        _, options = parse_options_header(part.headers.get(b"content-disposition", b""))
        part.name = options.get(b"name", b"").decode("utf-8", "replace")
        part.is_file = b"filename" in options and part.name in self._file_fields
        if b"filename" in options and not part.is_file:
            raise Invalid(f"{part.name[:100]}: unexpected file; the file field is {' or '.join(self._file_fields)}")
        if part.is_file:
            self.files += 1
            if self.files > 1:
                raise Invalid(f"{part.name}: only one file at a time")
            self._before_file(self.fields)
            self.filename = shown(options[b"filename"])

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._part.is_file:
            self.ready.append(data[start:end])
            return
        self._part.text += data[start:end]
        if len(self._part.text) > MAX_FIELD_BYTES:
            raise TooLarge(f"{self._part.name[:100]}: a field may have {MAX_FIELD_BYTES} bytes")

    def _end(self) -> None:
        part = self._part
        if part.is_file:
            return
        if len(self.fields) >= MAX_FIELDS:
            raise TooLarge(f"a form may have {MAX_FIELDS} fields")
        try:
            self.fields[part.name] = part.text.decode()
        except UnicodeDecodeError:
            raise Invalid(f"{part.name[:100]}: is not UTF-8") from None

    def _finish(self) -> None:
        self.ended = True


def shown(filename: bytes) -> str | None:
    """The client's filename, for display only: its last part, without control characters, cut."""
    text = filename.decode("utf-8", "replace").replace("\\", "/").rpartition("/")[2]
    return "".join(c for c in text if c.isprintable())[:MAX_SHOWN_FILENAME] or None


def boundary_of(request: Request, limits: Uploads) -> bytes:
    """The boundary, after what can be refused before a byte is read."""
    content_type, options = parse_options_header(request.headers.get("content-type", ""))
    if content_type != b"multipart/form-data" or not options.get(b"boundary"):
        raise Invalid('file: send multipart/form-data, for instance curl -F "file=@dataset.jsonl"')
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limits.max_bytes + MAX_FIELDS * MAX_FIELD_BYTES:
        raise TooLarge(f"file: larger than {limits.max_bytes} bytes (MINI_STUDIO_UPLOADS__MAX_BYTES)")
    return options[b"boundary"]


async def read_multipart(
    request: Request,
    *,
    on_chunk: OnChunk,
    limits: Uploads,
    file_fields: tuple[str, ...] = ("file",),
    before_file: BeforeFile = lambda _: None,
) -> Form:
    """Read the whole form; the one file's bytes go to `on_chunk`. Raises `Invalid`, `TooLarge`, `BadRequest`."""
    reader = FormReader(file_fields, before_file)
    try:
        parser = MultipartParser(boundary_of(request, limits), reader.callbacks())  # type: ignore[arg-type]
        async for chunk in request.stream():
            parser.write(chunk)
            for piece in reader.ready:
                await on_chunk(piece)
            reader.ready.clear()
        parser.finalize()
    except FormParserError as error:
        raise BadRequest(f"the body is not well-formed multipart/form-data: {error}") from None
    except ClientDisconnect:
        raise BadRequest("the client hung up before the end") from None
    if not reader.ended:
        raise BadRequest("the body ends in the middle of the form")
    if not reader.files:
        raise Invalid(f"{file_fields[0]}: is missing; send the dataset as a file in this form field")
    return Form(reader.fields, reader.filename)
