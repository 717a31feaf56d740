"""Whether a content object or a text is the content itself: what a URL,
a path or an id points to may change.
"""

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any

_OF_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_=\r\n"
_HEAD = 64  # characters of base64 that tell an image; the smallest one has no fewer bytes than 24
_LEAST = 24
# How the bytes of each known format begin (RFC 2083, JFIF and Exif, GIF89a, RFC 9649, BMP, TIFF
# 6.0, ISO 14496-12, ISO 18181-2). The two bytes of a bare JPEG XL stream are not among them: they
# are "/wo", as in "/world/cat".
_IMAGE = re.compile(
    rb"\x89PNG\r\n\x1a\n"
    rb"|\xff\xd8\xff[\xc0-\xc4\xdb\xe0-\xef\xfe]"
    rb"|GIF8[79]a"
    rb"|RIFF....WEBP"
    rb"|BM....\0\0\0\0"
    rb"|II\*\0|MM\0\*"
    rb"|....ftyp(?:avif|avis|heic|heix|heim|heis|hevc|hevx|mif1|msf1)"
    rb"|\0\0\0\x0cJXL \r\n\x87\n",
    re.DOTALL,
)
# Fields whose value says what plain strings of a request are.
_KINDS = ("modality", "modalities", "media_type", "input_type")
_MEDIA = re.compile("image|audio|video", re.IGNORECASE)


def is_inline(content: str) -> bool:
    """Whether *content* is a ``data:`` URL, or base64 of an image of a known format."""
    if content[:5].lower() == "data:":
        return True
    text = content.encode()
    if text.translate(None, _OF_BASE64):
        return False
    head = text[: 2 * _HEAD].translate(bytes.maketrans(b"-_", b"+/"), b"\r\n=")[:_HEAD]
    try:
        begin = base64.b64decode(head[: len(head) // 4 * 4])
    except binascii.Error:
        return False
    return len(begin) >= _LEAST and _IMAGE.match(begin) is not None


def names_media(fields: Mapping[str, Any]) -> bool:
    """Whether a body says that its strings are images, audio or video."""
    return any(_says_media(fields.get(name)) for name in _KINDS)


def _says_media(value: object) -> bool:
    if isinstance(value, str):
        return _MEDIA.search(value) is not None
    return isinstance(value, list) and any(_says_media(item) for item in value if isinstance(item, str))
