"""Reads the short bodies of routes that are no inference, within limits of length and time."""

from __future__ import annotations

import asyncio
from typing import Final

from fastapi import Request

from app.core import errors

_WITHIN_S: Final = 10.0
"""The time for a whole body, however its pieces arrive. A short one needs one packet or two."""


async def read_short_body(request: Request, longest: int) -> bytes:
    """Return the body of a request.

    Raises:
        BodyTooLarge: it has more than ``longest`` bytes.
        RequestTimeout: it did not arrive within ten seconds.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(_WITHIN_S):
            async for piece in request.stream():
                body += piece
                if len(body) > longest:
                    raise errors.BodyTooLarge(longest)
    except TimeoutError:
        raise errors.RequestTimeout from None
    return bytes(body)
