"""The manifest of a bundle as frozen dataclasses: pure values, no files.

Shapes hold integers and the one symbol "N", the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

SCHEMA = 1
FORMAT = "edgelocal-bundle"
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
