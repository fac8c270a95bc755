"""The manifest as bytes: JSON behind a seal, read strictly.

`parse_manifest(bytes)` and `render_manifest(Manifest)` are inverse to each other. The file begins with its seal, the
sha256 of the JSON object without it, so that any changed bit is found. An unknown or missing key, a value of the wrong
type, a duplicate key or a size over its cap is a `BundleError` that names the place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from edgelocal.bundle.checks import check
from edgelocal.bundle.spec import (
    FORMAT,
    SCHEMA,
    Manifest,
)
from edgelocal.errors import BundleError
from edgelocal.storage.decode import DecodeError, decode, unique

MAX_MANIFEST_BYTES = 4 << 20
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
SEAL = b'{"seal":"'


def render_manifest(manifest: Manifest) -> bytes:
    """Manifest -> JSON bytes, stable for equal values."""
    body = json.dumps(_plain(manifest), sort_keys=True, allow_nan=False, separators=(",", ":"))
    return seal(body.encode())


def _plain(value: Any) -> Any:
    """JSON values; fields that may be left out are, where there is nothing to say."""
    if dataclasses.is_dataclass(value):
        own = ((f, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {f.name: _plain(v) for f, v in own if v is not None or f.default is not None}
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def seal(body: bytes) -> bytes:
    """A JSON object with its seal put in front: the sha256 of `body` itself."""
    return SEAL + hashlib.sha256(body).hexdigest().encode() + b'",' + body[1:]


def parse_manifest(data: bytes) -> Manifest:
    """JSON bytes -> Manifest.

    Raises:
        BundleError: too large, changed since it was sealed, no JSON, another format, a newer schema, or a value that
            breaks the rules above.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"manifest.json has {len(data)} bytes, the limit is {MAX_MANIFEST_BYTES}")
    body = b"{" + data[len(SEAL) + 64 + 2 :]
    if not data.startswith(SEAL):
        raise BundleError("manifest.json does not describe an edgelocal bundle: it does not begin with a seal")
    if data != seal(body):
        raise BundleError(
            "manifest.json is damaged, or was edited: its seal is not that of its text; copy the bundle again"
        )
    try:
        raw = json.loads(body.decode("utf-8"), object_pairs_hook=unique)
        json.dumps(raw, ensure_ascii=False).encode()  # half of a surrogate pair is no text and names no file
    except (ValueError, RecursionError) as error:
        raise BundleError(f"manifest.json is not valid JSON ({error}); export the bundle again") from None
    control = next((text for text in _texts(raw) if not is_plain(text)), None)
    if control is not None:  # a terminal would obey it
        raise BundleError(f"manifest.json has text with control characters, {control[:80]!r}: export the bundle again")
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise BundleError(f"manifest.json does not describe an edgelocal bundle (format is not {FORMAT!r})")
    schema = raw.get("schema")
    if type(schema) is not int or schema < 1:
        raise BundleError(f"manifest.json has schema {schema!r}, expected a positive integer")
    if schema > SCHEMA:
        raise BundleError(
            f"this bundle has schema {schema}, this edgelocal reads up to {SCHEMA}: upgrade edgelocal on the device, "
            "or export with a matching version"
        )
    try:
        manifest: Manifest = decode(Manifest, raw, "manifest")
        check(manifest)
    except DecodeError as error:
        raise BundleError(str(error)) from None
    return manifest


def _texts(value: Any) -> Iterator[str]:
    """All strings and keys of a JSON value."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def is_plain(text: str) -> bool:
    """Whether a terminal only shows it: no control characters, line separators or halves of surrogate pairs."""
    return not _CONTROL.search(text)
