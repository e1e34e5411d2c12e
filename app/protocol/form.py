"""Reads and writes forms with a file (``multipart/form-data``, RFC 7578), without copying it. Pure.

The body is in memory as a whole already, so only the places of its parts are looked for. What goes
to an engine is written anew: parts that an engine could read in another way do not get there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from app.core import errors
from app.protocol.json_body.scan import Steps
from app.protocol.json_body.spliced import Spliced

MOST_PARTS: Final = 64
LONGEST_TEXT: Final = 32 * 1024
"""The longest field that is no file, in bytes."""
LONGEST_HEAD: Final = 4 * 1024
"""The longest head of a part, in bytes."""
_FIRST_CHUNK: Final = 1024
_CHUNK: Final = 256 * 1024
"""How much is searched at a time: 0.1 ms."""

_TYPE: Final = b"multipart/form-data"
_BOUNDARY: Final = re.compile(
    rb""";[ \t]*boundary=(?:"([^"\\]{1,70})"|([!#$%&'*+.^_`|~0-9A-Za-z/:?=()-]{1,70}))""", re.I
)
_PADDING: Final = re.compile(rb"[ \t]{0,64}\r\n")
_DISPOSITION: Final = re.compile(rb"form-data[ \t]*(;.*)?", re.I | re.S)
_PARAMETER: Final = re.compile(rb';[ \t]*([a-z*]+)=(?:"([^"\r\n]*)"|([^;"\s]*))', re.I)
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}(\[\])?")
_MEDIA_TYPE: Final = re.compile(r"[A-Za-z0-9.+-]{1,64}/[A-Za-z0-9.+-]{1,64}")
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._ -]")
_PLAIN: Final = frozenset({"", "7bit", "8bit", "binary"})


@dataclass(frozen=True, slots=True)
class Form:
    """A form with one file.

    Attributes:
        texts: the values of its other fields, in order, by name.
        file: the file's bytes, which may be a part of the request's body.
        file_name: the file's name, of letters that are safe in a header.
        file_type: the file's media type.
    """

    texts: Mapping[str, tuple[str, ...]]
    file: memoryview
    file_name: str
    file_type: str


def boundary_of(content_type: bytes) -> bytes | None:
    """Return the boundary that a content type names; ``None`` if it is no form's."""
    essence, _, parameters = content_type.partition(b";")
    if essence.strip(b" \t").lower() != _TYPE:
        return None
    found = _BOUNDARY.search(b";" + parameters)
    if found is None:
        return b""
    return (found[1] or found[2]).rstrip(b" ")


def read_form(content_type: bytes, body: bytes | memoryview, file_field: str) -> Steps[Form]:
    """Read a form whose only file is in ``file_field``, yielding every few milliseconds.

    Raises:
        InvalidRequest: it is no such form, or exceeds a bound.
    """
    boundary = boundary_of(content_type)
    if not boundary:
        raise _malformed("its Content-Type names no boundary")
    data, texts = memoryview(body), dict[str, list[str]]()
    file: tuple[memoryview, str, str] | None = None
    dashed = b"--" + boundary
    at = 0
    if bytes(data[: len(dashed)]) != dashed:
        at = 2 + (yield from _find(data, b"\r\n" + dashed, 0))
    for _ in range(MOST_PARTS + 1):
        at += len(dashed)
        if bytes(data[at : at + 2]) == b"--":
            break
        name, file_name, file_type, start = _head(data, at)
        end = yield from _find(data, b"\r\n" + dashed, start)
        value, at = data[start:end], end + 2
        if (file_name is not None) is not (name == file_field):
            why = "must be a file" if name == file_field else "may not be a file"
            raise errors.InvalidRequest(f"'{name}' {why}.", param=name, code="invalid_type")
        if file_name is None:
            texts.setdefault(name, []).append(_text(name, value))
        elif file is not None:
            raise errors.InvalidRequest(
                "Only one file may be sent.", param=file_field, code="invalid_value"
            )
        else:
            file = value, file_name, file_type
    else:
        raise _malformed(f"it has more than {MOST_PARTS} parts")
    if file is None or not len(file[0]):
        raise errors.InvalidRequest(
            f"You must provide a '{file_field}' that is not empty.", param=file_field
        )
    return Form({name: tuple(values) for name, values in texts.items()}, *file)


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
        f'Content-Disposition: form-data; name="{file_field}"; filename="{form.file_name}"\r\n'
        f"Content-Type: {form.file_type}\r\n\r\n"
    )
    parts += [b"--%b\r\n%b" % (boundary, head.encode()), form.file, b"\r\n--%b--\r\n" % boundary]
    return Spliced(parts, b"multipart/form-data; boundary=" + boundary)


def _find(data: memoryview, needle: bytes, start: int) -> Steps[int]:
    """Return the place of a delimiter at or after ``start``."""
    size = _FIRST_CHUNK
    while start < len(data):
        found = bytes(data[start : start + size + len(needle) - 1]).find(needle)
        if found >= 0:
            return start + found
        start += size
        size = min(2 * size, _CHUNK)
        yield
    raise _malformed("it ends without its boundary")


def _head(data: memoryview, at: int) -> tuple[str, str | None, str, int]:
    """Return a part's name, the name and type of its file, and where its value begins.

    The file's name is ``None`` if the part is no file.
    """
    raw = bytes(data[at : at + LONGEST_HEAD])
    padding = _PADDING.match(raw)
    length = raw.find(b"\r\n\r\n")
    if padding is None or length < 0:
        raise _malformed("a part has no head, or one that is too long")
    # Where there is no header, the two line breaks are the same ones as the padding's.
    lines = raw[padding.end() : max(length, padding.end())].split(b"\r\n")
    headers = dict(_header(line) for line in lines if line)
    found = _DISPOSITION.fullmatch(headers.get("content-disposition", b""))
    if found is None:
        raise _malformed("a part has no 'Content-Disposition: form-data'")
    given = {
        key.lower(): quoted or plain for key, quoted, plain in _PARAMETER.findall(found[1] or b"")
    }
    name = given.get(b"name", b"").decode("latin-1")
    if not _NAME.fullmatch(name):
        raise _malformed("a part has no name, or a strange one")
    if headers.get("content-transfer-encoding", b"").decode("latin-1").lower() not in _PLAIN:
        raise _malformed(f"'{name}' has a Content-Transfer-Encoding")
    file_name = None
    if b"filename" in given or b"filename*" in given:
        file_name = given.get(b"filename", b"").decode("utf-8", "replace")
        file_name = _UNSAFE.sub("_", file_name)[-100:] or "file"
    media_type = headers.get("content-type", b"").decode("latin-1").partition(";")[0].strip()
    if not _MEDIA_TYPE.fullmatch(media_type):
        media_type = "application/octet-stream"
    return name, file_name, media_type, at + length + 4


def _header(line: bytes) -> tuple[str, bytes]:
    name, _, value = line.partition(b":")
    return name.strip().lower().decode("latin-1"), value.strip()


def _text(name: str, value: memoryview) -> str:
    if len(value) > LONGEST_TEXT:
        raise errors.InvalidRequest(
            f"'{name}' is longer than {LONGEST_TEXT} bytes.", param=name, code="invalid_value"
        )
    try:
        return bytes(value).decode()
    except UnicodeDecodeError:
        raise errors.InvalidRequest(
            f"'{name}' is not valid UTF-8.", param=name, code="invalid_value"
        ) from None


def _malformed(why: str) -> errors.InvalidRequest:
    return errors.InvalidRequest(
        f"The request body is not a valid form: {why}.", code="invalid_value"
    )


def last(values: Sequence[str]) -> str:
    """Return the value of a field that is sent several times: the last, as in most parsers."""
    return values[-1]
