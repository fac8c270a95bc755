"""Training state <-> the bytes of a checkpoint, pure.

    payload   a safetensors file: the tensors; metadata `format`, `version`, `fingerprint`, `progress` (JSON)
    magic     8 bytes, b"ELCKPT\\r\\n"
    digest    32 bytes, sha256 of payload and magic

The seal (magic and digest) comes last so that the payload can be hashed in one pass and stays aligned; without its
last 40 bytes a checkpoint is a plain safetensors file. The seal has the same form in every version of the format:
damage is told from a newer version before anything inside is believed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgelocal.errors import CheckpointError, DivergedError
from edgelocal.storage.decode import unique
from edgelocal.storage.tensors import Array, Chunks, Read, TensorFormatError, encode, parse, reader

FORMAT = "edgelocal-checkpoint"
VERSION = 1
MAGIC = b"ELCKPT\r\n"
_DIGEST_BYTES = hashlib.sha256().digest_size
SEAL_BYTES = len(MAGIC) + _DIGEST_BYTES
PIECE_BYTES = 1 << 20  # of a checkpoint that is hashed


class DamagedCheckpointError(CheckpointError):
    """The bytes are not those that were written: an older generation may still be whole."""


@dataclass(frozen=True, eq=False)
class TrainingState:
    """Where training stands.

    `progress` holds JSON values with string keys (epoch, step, random state, ...), `tensors` parameters, optimizer
    slots and buffers by name. Tensors that were read are read-only: views of bytes in memory, or read from the file
    each time they are asked for.
    """

    progress: dict[str, Any]
    tensors: Mapping[str, Array]


def encode_state(state: TrainingState, fingerprint: str) -> Chunks:
    """The chunks of a checkpoint. They share the tensors' memory, which must not change until they are written; tensors
    that are made when asked for are asked for one at a time.

    Size: tensor bytes + progress + about 100 bytes a tensor + 300.

    Raises:
        DivergedError: a tensor or a number in `progress` is not finite; such a state is never written.
    """
    for name in state.tensors:
        if not _is_finite(state.tensors[name]):
            raise DivergedError(
                f"tensor {name!r} holds a value that is not finite, so this state is not saved: "
                "training diverged; resume from the last checkpoint with a lower learning rate"
            )
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "fingerprint": fingerprint,
        "progress": _progress_text(state.progress),
    }
    chunks = encode(state.tensors, metadata).followed_by(MAGIC)
    digest = hashlib.sha256()
    for index in range(len(chunks)):  # by index, so that no name holds a chunk while the next is made
        digest.update(chunks[index])
    return chunks.followed_by(digest.digest())


def decode_state(data: bytes | memoryview, fingerprint: str) -> TrainingState:
    """The bytes of a checkpoint -> TrainingState, with tensors as read-only views of `data`; errors as `read_state`."""
    return read_state(*reader(data), fingerprint)


def read_state(read: Read, nbytes: int, fingerprint: str) -> TrainingState:
    """A checkpoint of `nbytes` bytes -> TrainingState, whose tensors call `read` when they are asked for.

    It is read through twice, in pieces and tensor by tensor. Peak memory: the largest tensor.

    Raises:
        DamagedCheckpointError: cut short, or a bit is not as written.
        CheckpointError: whole, but of a newer format, with another fingerprint than `fingerprint`, or not finite.
    """
    payload = _unseal(read, nbytes)
    with _well_formed():
        tensors, metadata = parse(read, payload)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"this is not an edgelocal checkpoint: format {metadata.get('format')!r}, not {FORMAT!r}")
    _check_version(metadata.get("version", ""))
    found = metadata.get("fingerprint")
    if found != fingerprint:
        raise CheckpointError(
            f"the checkpoint belongs to another bundle or configuration: found fingerprint {found!r}, expected "
            f"{fingerprint!r}; resume with the bundle and options it was written with, "
            "or start anew with --resume never and a new --out folder"
        )
    with _well_formed():
        for name in tensors:
            if not _is_finite(tensors[name]):
                raise CheckpointError(f"tensor {name[:64]!r} of the checkpoint holds a value that is not finite")
    return TrainingState(_parse_progress(metadata.get("progress", "")), tensors)


@contextlib.contextmanager
def _well_formed() -> Iterator[None]:
    try:
        yield
    except TensorFormatError as error:
        raise CheckpointError(
            f"the checkpoint is sealed but malformed ({error}): it was not written by edgelocal"
        ) from None


def _unseal(read: Read, nbytes: int) -> int:
    """Bytes of the payload, once the seal shows that it is what was written."""
    if nbytes < SEAL_BYTES:
        raise DamagedCheckpointError(f"the checkpoint has {nbytes} bytes, fewer than its {SEAL_BYTES}-byte seal")
    payload, sealed = nbytes - SEAL_BYTES, nbytes - _DIGEST_BYTES
    if read(payload, sealed) != MAGIC:
        raise DamagedCheckpointError("the checkpoint does not end in its seal: it is cut short, extended or damaged")
    digest = hashlib.sha256()
    for begin in range(0, sealed, PIECE_BYTES):
        digest.update(read(begin, min(begin + PIECE_BYTES, sealed)))
    if digest.digest() != read(sealed, nbytes):
        raise DamagedCheckpointError("the sha256 of the checkpoint does not match its seal: it is damaged")
    return payload


def _check_version(text: str) -> None:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise CheckpointError(f"the checkpoint has format version {text[:32]!r}, expected a number")
    if int(text) > VERSION:
        raise CheckpointError(
            f"the checkpoint has format version {text}, this edgelocal reads up to {VERSION}: upgrade edgelocal"
        )


def _is_finite(tensor: Array) -> bool:
    """By the extremes, which carry any NaN or infinity, so that no mask of the tensor's shape is made."""
    if tensor.dtype.kind != "f" or tensor.size == 0:
        return True
    with np.errstate(invalid="ignore"):
        extremes = (tensor.min(), tensor.max())
    return all(bool(np.isfinite(value)) for value in extremes)


def _progress_text(progress: dict[str, Any]) -> str:
    try:
        return json.dumps(progress, sort_keys=True, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise DivergedError(f"the training progress cannot be saved: {error}; expected finite numbers only") from None


def _parse_progress(text: str) -> dict[str, Any]:
    try:
        progress = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the training progress in the checkpoint is not valid JSON: {error}") from None
    if not isinstance(progress, dict):
        raise CheckpointError(f"the training progress in the checkpoint is a {type(progress).__name__}, not an object")
    return progress
