"""The manifest of a bundle as frozen dataclasses: pure values, no files.

`parse_manifest(bytes)` and `render_manifest(Manifest)` are inverse to each other. The reader is strict: an unknown
or missing key, a value of the wrong type, a duplicate key or a size over its cap is a `BundleError` that names the
place. Shapes hold integers and the one symbol "N", the batch.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field

from edgelocal.decode import decode, expect, unique
from edgelocal.errors import BundleError

SCHEMA = 1
FORMAT = "edgelocal-bundle"
MAX_MANIFEST_BYTES = 4 << 20
MAX_TENSORS = 65_536
MAX_RANK = 8
MAX_NAME = 256
DTYPES = ("float32", "int64", "bool")
BATCH = "N"
LOSSES = ("cross_entropy", "bce", "mse")
PAD_MODES = ("reflect", "zero")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph. `shape` may hold "N" for the batch."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str

    @property
    def kind(self) -> str:
        """ "param", "opt", "buf", "rand", or "" for anything else."""
        head, slash, _ = self.name.partition("/")
        return head if slash else ""

    def resolve(self, batch: int) -> tuple[int, ...]:
        """The shape with N replaced by `batch`."""
        return tuple(batch if isinstance(d, str) else d for d in self.shape)

    def elements_per_sample(self) -> int:
        """Elements of a tensor of batch 1."""
        return math.prod(self.resolve(1))


@dataclass(frozen=True)
class MaskSpec:
    """A random Bernoulli mask the runner feeds: input `name` is True with probability `keep`."""

    name: str
    keep: float


@dataclass(frozen=True)
class GraphSpec:
    """An ONNX file of the bundle and its signature, in graph order."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class BlockSpec:
    """A block: consecutive units trained by one local loss.

    `head` is the auxiliary network in inference mode (block output -> logits); the last block, which ends in the
    network's own head, has none. `masks` lists the random inputs of the step graph.
    """

    name: str
    units: tuple[str, ...]
    step: GraphSpec
    forward: GraphSpec
    head: GraphSpec | None
    weights: str
    masks: tuple[MaskSpec, ...]

    def state(self) -> tuple[TensorSpec, ...]:
        """Tensors the step graph reads and writes anew: parameters, optimizer slots, buffers."""
        return tuple(t for t in self.step.inputs if t.kind in ("param", "opt", "buf"))


@dataclass(frozen=True)
class RuleSpec:
    """The local-learning rule and its settings, as given at export."""

    name: str
    depth: int
    tau: float
    d_min: int
    tail: str


@dataclass(frozen=True)
class InputSpec:
    """Shape of one sample (channels first for images) and its normalisation, one value per channel.

    Bytes are scaled to [0, 1] first; then (x - mean) / std. With dtype int64 (token ids) values are taken as they are.
    """

    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class TaskSpec:
    """`loss` is cross_entropy, bce or mse; `classes` is the width of the last output."""

    loss: str
    classes: int
    label_smoothing: float
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class OptimizerSpec:
    """The optimizer inside the step graphs; `hyper` are its scalar inputs (besides lr) with their defaults."""

    name: str
    hyper: dict[str, float]


@dataclass(frozen=True)
class AugmentSpec:
    """Training-time augmentation: pad by `pad` pixels (`mode` reflect or zero), crop back, mirror half of them."""

    pad: int
    mode: str
    flip: bool


@dataclass(frozen=True)
class DefaultsSpec:
    """What `train` uses when the command line says nothing."""

    batch: int
    epochs: int
    lr: float
    lr_schedule: str


@dataclass(frozen=True)
class FileSpec:
    """Size in bytes and sha256 (hex) of a file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything the device knows about a bundle before it opens another file."""

    network: str
    seed: int
    units: tuple[str, ...]
    rule: RuleSpec
    input: InputSpec
    task: TaskSpec
    optimizer: OptimizerSpec
    augment: AugmentSpec
    defaults: DefaultsSpec
    blocks: tuple[BlockSpec, ...]
    predict: GraphSpec
    versions: dict[str, str]
    files: dict[str, FileSpec]
    format: str = FORMAT
    schema: int = field(default=SCHEMA)


def render_manifest(manifest: Manifest) -> bytes:
    """Manifest -> JSON bytes, stable for equal values."""
    return json.dumps(dataclasses.asdict(manifest), sort_keys=True, allow_nan=False, separators=(",", ":")).encode()


def parse_manifest(data: bytes) -> Manifest:
    """JSON bytes -> Manifest.

    Raises:
        BundleError: too large, no JSON, another format, a newer schema, or a value that breaks the rules above.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"manifest.json has {len(data)} bytes, the limit is {MAX_MANIFEST_BYTES}")
    try:
        raw = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
        json.dumps(raw, ensure_ascii=False).encode()  # half of a surrogate pair is no text and names no file
    except (ValueError, RecursionError) as error:
        raise BundleError(f"manifest.json is not valid JSON ({error}); export the bundle again") from None
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
    manifest: Manifest = decode(Manifest, raw, "manifest")
    _check(manifest)
    return manifest


def _check(manifest: Manifest) -> None:
    """Rules that types cannot express."""
    expect(len(manifest.blocks) > 0, "manifest.blocks", "at least one block", 0)
    names = [block.name for block in manifest.blocks]
    expect(len(set(names)) == len(names), "manifest.blocks", "a name of its own for each block", names)
    graphs = [manifest.predict]
    for block in manifest.blocks:
        graphs += [g for g in (block.step, block.forward, block.head) if g is not None]
        expect(block.weights in manifest.files, f"block {block.name}", "weights listed in files", block.weights)
    count = 0
    for graph in graphs:
        expect(graph.file in manifest.files, graph.file, "a file listed in files", graph.file)
        for tensor in graph.inputs + graph.outputs:
            count += 1
            _check_tensor(tensor, f"{graph.file}: {tensor.name[:64]}")
    expect(count <= MAX_TENSORS, "manifest", f"at most {MAX_TENSORS} tensors", count)
    for name, entry in manifest.files.items():
        _check_path(name)
        expect(entry.size >= 0 and len(entry.sha256) == 64, name, "a size and a sha256", entry)
    shape = manifest.input.shape
    expect(0 < len(shape) <= MAX_RANK and min(shape) > 0, "manifest.input.shape", "a positive shape", shape)
    _check_choices(manifest)
    widths = {len(manifest.input.mean), len(manifest.input.std)}
    expect(all(s > 0 for s in manifest.input.std), "manifest.input.std", "positive deviations", manifest.input.std)
    expect(
        manifest.input.dtype in ("float32", "int64"), "manifest.input.dtype", "float32 or int64", manifest.input.dtype
    )
    expect(widths <= {1, shape[0]}, "manifest.input", f"1 or {shape[0]} means and deviations", widths)


def _check_choices(manifest: Manifest) -> None:
    """Settings outside what this version knows would train something else without a word."""
    task, augment, defaults = manifest.task, manifest.augment, manifest.defaults
    expect(task.loss in LOSSES, "manifest.task.loss", f"one of {LOSSES}", task.loss)
    expect(task.classes > 0, "manifest.task.classes", "at least 1", task.classes)
    expect(0 <= task.label_smoothing < 1, "manifest.task.label_smoothing", "0 <= s < 1", task.label_smoothing)
    expect(augment.mode in PAD_MODES, "manifest.augment.mode", f"one of {PAD_MODES}", augment.mode)
    expect(augment.pad >= 0, "manifest.augment.pad", "at least 0", augment.pad)
    expect(defaults.batch > 0, "manifest.defaults.batch", "at least 1", defaults.batch)
    expect(defaults.epochs > 0, "manifest.defaults.epochs", "at least 1", defaults.epochs)
    for block in manifest.blocks:
        for mask in block.masks:
            expect(0 <= mask.keep <= 1, f"block {block.name}: {mask.name[:64]}", "a probability", mask.keep)


def _check_tensor(tensor: TensorSpec, where: str) -> None:
    expect(0 < len(tensor.name) <= MAX_NAME, where, f"a name of 1 to {MAX_NAME} characters", tensor.name)
    expect(len(tensor.shape) <= MAX_RANK, where, f"at most {MAX_RANK} dimensions", tensor.shape)
    expect(all(d == BATCH or (type(d) is int and d > 0) for d in tensor.shape), where, "positive dims", tensor.shape)
    expect(tensor.dtype in DTYPES, where, f"one of {DTYPES}", tensor.dtype)
    expect(tensor.elements_per_sample() < 1 << 40, where, "fewer than 2^40 elements", tensor.shape)


def _check_path(name: str) -> None:
    parts = name.split("/")
    plain = all(p not in ("", ".", "..") and "\\" not in p and "\0" not in p for p in parts)
    expect(plain and ":" not in name and len(name) <= MAX_NAME, "manifest.files", "a plain relative path", name)
