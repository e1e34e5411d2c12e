"""Reads and writes forms with a file (``multipart/form-data``, RFC 7578). Pure.

Parts are found by ``multipart``. What goes to an engine is written anew: parts that an engine could
read in another way do not get there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from multipart import (
    MultipartError,
    MultipartSegment,
    ParserLimitReached,
    PushMultipartParser,
    parse_options_header,
)

from app.core import errors
from app.protocol.json_body.scan import Steps
from app.protocol.json_body.spliced import Spliced

MOST_PARTS: Final = 64
LONGEST_TEXT: Final = 32 * 1024
"""The longest field that is no file, in bytes."""
LONGEST_HEAD: Final = 4 * 1024
"""The longest line in the head of a part, in bytes."""
_CHUNK: Final = 256 * 1024
"""How much is read at a time: 0.1 ms."""
_HEAD_OF_FILE: Final = 64 * 1024

_TYPE: Final = "multipart/form-data"
_BOUNDARY: Final = re.compile(r"[^\r\n\0]{1,70}")
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}(\[\])?")
_MEDIA_TYPE: Final = re.compile(r"[A-Za-z0-9.+-]{1,64}/[A-Za-z0-9.+-]{1,64}")
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._ -]")
_PLAIN: Final = frozenset({"", "7bit", "8bit", "binary"})


@dataclass(frozen=True, slots=True)
class File:
    """A file of a form.

    Attributes:
        pieces: its bytes, in order.
        name: its name, of letters that are safe in a header.
        media_type: its media type.
    """

    pieces: tuple[bytes, ...]
    name: str
    media_type: str

    def __len__(self) -> int:
        return sum(map(len, self.pieces))

    @property
    def head(self) -> bytes:
        """Its first bytes, at least 64 KiB of them if it has as many."""
        head = b""
        for piece in self.pieces:
            if len(head) >= _HEAD_OF_FILE:
                break
            head += piece
        return head


@dataclass(frozen=True, slots=True)
class Form:
    """A form with one file.

    Attributes:
        texts: the values of its other fields, in order, by name.
        file: the file.
    """

    texts: Mapping[str, tuple[str, ...]]
    file: File

    @property
    def last_texts(self) -> dict[str, str]:
        """The last value of each of them, which counts in most parsers."""
        return {name: values[-1] for name, values in self.texts.items()}


def boundary_of(content_type: bytes) -> str | None:
    """Return the boundary that a content type names, empty if none or an odd one; ``None`` if it
    is no form's.
    """
    essence, parameters = parse_options_header(content_type.decode("latin-1"))
    if essence != _TYPE:
        return None
    boundary = parameters.get("boundary", "")
    return boundary if _BOUNDARY.fullmatch(boundary) else ""


def read_form(content_type: bytes, body: bytes | memoryview, file_field: str) -> Steps[Form]:
    """Read a form whose only file is in ``file_field``, yielding every few milliseconds.

    Raises:
        InvalidRequest: it is no such form, or exceeds a bound.
    """
    boundary = boundary_of(content_type)
    if not boundary:
        raise _malformed("its Content-Type names no boundary")
    parts = _Parts(file_field)
    parser = PushMultipartParser(
        boundary.encode("latin-1"),
        max_header_size=LONGEST_HEAD,
        max_segment_count=MOST_PARTS,
        strict=True,
    )
    data = memoryview(body)
    try:
        for at in range(0, len(data), _CHUNK):
            for event in parser.parse(bytes(data[at : at + _CHUNK])):
                if isinstance(event, MultipartSegment):
                    parts.begin(event)
                elif event is None:
                    parts.end()
                else:
                    parts.add(event)
            if parser.closed:
                break
            yield
        parser.close()
    except ParserLimitReached as error:
        bounds = f"at most {MOST_PARTS} parts, and {LONGEST_HEAD} bytes a line of a part's head"
        raise _malformed(f"{error} ({bounds})") from error
    except MultipartError as error:
        raise _malformed(str(error)) from error
    return parts.form()


class _Parts:
    """What has been read of a form."""

    def __init__(self, file_field: str) -> None:
        self._file_field = file_field
        self._texts: dict[str, list[str]] = {}
        self._file: File | None = None
        self._part: MultipartSegment
        self._pieces: list[bytes] = []

    def begin(self, part: MultipartSegment) -> None:
        """Check the head of a part."""
        name = part.name or ""
        if not _NAME.fullmatch(name):
            raise _malformed("a part has no name, or a strange one")
        if (part.filename is not None) is not (name == self._file_field):
            why = "must be a file" if name == self._file_field else "may not be a file"
            raise errors.InvalidRequest(f"'{name}' {why}.", param=name, code="invalid_type")
        if str(part.header("Content-Transfer-Encoding", "")).lower() not in _PLAIN:
            raise _malformed(f"'{name}' has a Content-Transfer-Encoding")
        if part.filename is not None and self._file is not None:
            raise errors.InvalidRequest(
                "Only one file may be sent.", param=name, code="invalid_value"
            )
        self._part, self._pieces = part, []

    def add(self, piece: bytes) -> None:
        """Take some of a part's value."""
        self._pieces.append(piece)
        if self._part.filename is None and self._part.bytes_received > LONGEST_TEXT:
            name = self._part.name
            raise errors.InvalidRequest(
                f"'{name}' is longer than {LONGEST_TEXT} bytes.", param=name, code="invalid_value"
            )

    def end(self) -> None:
        """Keep a part, which is whole."""
        name, file_name = self._part.name or "", self._part.filename
        if file_name is None:
            self._texts.setdefault(name, []).append(_text(name, b"".join(self._pieces)))
            return
        media_type = self._part.content_type or ""
        if not _MEDIA_TYPE.fullmatch(media_type):
            media_type = "application/octet-stream"
        safe_name = _UNSAFE.sub("_", file_name)[-100:] or "file"
        self._file = File(tuple(self._pieces), safe_name, media_type)

    def form(self) -> Form:
        """Return all of it."""
        if not self._file:
            raise errors.InvalidRequest(
                f"You must provide a '{self._file_field}' that is not empty.",
                param=self._file_field,
            )
        return Form({name: tuple(values) for name, values in self._texts.items()}, self._file)


def write_form(
    form: Form, texts: Iterable[tuple[str, str]], file_field: str, boundary: bytes
) -> Spliced:
    """Return the body of a form with the file of ``form`` and these texts.

    ``boundary`` must be unguessable, so that nothing in the file or the texts can be one.
    """
    parts: list[bytes | memoryview] = []
    for name, text in texts:
        head = f'Content-Disposition: form-data; name="{name}"\r\n\r\n'
        parts.append(b"--%b\r\n%b%b\r\n" % (boundary, head.encode(), text.encode()))
    head = (
        f'Content-Disposition: form-data; name="{file_field}"; filename="{form.file.name}"\r\n'
        f"Content-Type: {form.file.media_type}\r\n\r\n"
    )
    parts += [b"--%b\r\n%b" % (boundary, head.encode()), *form.file.pieces]
    parts.append(b"\r\n--%b--\r\n" % boundary)
    return Spliced(parts, b"multipart/form-data; boundary=" + boundary)


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise errors.InvalidRequest(
            f"'{name}' is not valid UTF-8.", param=name, code="invalid_value"
        ) from None


def _malformed(why: str) -> errors.InvalidRequest:
    return errors.InvalidRequest(
        f"The request body is not a valid form: {why}.", code="invalid_value"
    )
