"""The manifest of a bundle as frozen dataclasses: pure values, no files.

Shapes hold integers and the one symbol "N", the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from edgelocal.bundle.memory_spec import MemorySpec

SCHEMA = 4
FORMAT = "edgelocal-bundle"
BATCH = "N"
GRAPH_BYTES, NODE_BYTES, UNKNOWN_NODES = 192 << 10, 4608, 1000
LOSSES = ("cross_entropy", "bce", "mse")
PAD_MODES = ("reflect", "zero")
TARGETS = ("cpu", "cuda", "both")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class MaskSpec:
    """A random Bernoulli mask the runner feeds: input `name` is True with probability `keep`."""

    name: str
    keep: float


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """An ONNX file of the bundle and its signature, in graph order.

    Graphs of equal `structure` differ in names only. `in_place` are the inputs over which their new value may be
    written: whatever else reads them has run by then. `nodes` counts nodes, on which the size in memory depends.
    Bundles of schema 1 have none of the three.
    """

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    structure: str | None = None
    in_place: tuple[str, ...] | None = None
    nodes: int | None = None

    @property
    def key(self) -> str:
        """Equal for graphs of which one can be loaded for all."""
        return self.structure or self.file

    @property
    def overwriting(self) -> frozenset[str]:
        """The outputs that are written over the inputs whose new values they are."""
        return frozenset(f"new/{name}" for name in self.in_place or ())


@dataclass(frozen=True)
class MacsSpec:
    """Multiply-accumulate operations for one sample: of the block itself and of its auxiliary network; `recomputed` are
    those of both that the step does a second time to need less memory, on top of `training`."""

    forward: int
    forward_auxiliary: int
    training: int
    training_auxiliary: int
    recomputed: int = 0

    @property
    def step(self) -> int:
        """All of a training step, for one sample."""
        return self.training + self.training_auxiliary + self.recomputed


@dataclass(frozen=True)
class AccumulationSpec:
    """The second form of a step: `gradient` adds the gradients of a micro-batch to `acc/...`, `apply` updates."""

    gradient: GraphSpec
    apply: GraphSpec


@dataclass(frozen=True)
class BlockMemorySpec:
    """The memory models of a block's graphs; `head` is None where the block has none."""

    step: MemorySpec
    gradient: MemorySpec
    apply: MemorySpec
    forward: MemorySpec
    head: MemorySpec | None = None


def graph_bytes(spec: GraphSpec) -> int:
    """Bytes of a loaded graph: its nodes, kernels and plan in the runtime (measured, docs/memory.md)."""
    nodes = spec.nodes if spec.nodes is not None else UNKNOWN_NODES
    return GRAPH_BYTES + NODE_BYTES * nodes


@dataclass(frozen=True)
class OrtTrainingSpec:
    """A block as artifacts of ONNX Runtime's on-device training: the models of a training step and of evaluation, and
    the paths of the optimizer's model and of the checkpoint. Tensors have the names they have in the artifacts."""

    training: GraphSpec
    evaluation: GraphSpec
    optimizer: str
    checkpoint: str


@dataclass(frozen=True)
class TargetSpec:
    """What of a block differs for a second target: step and gradient graph of the same signatures, their memory models,
    and the multiply-accumulates of a sample that the step does twice (`MacsSpec.recomputed`)."""

    step: GraphSpec
    gradient: GraphSpec
    step_memory: MemorySpec
    gradient_memory: MemorySpec
    recomputed: int


@dataclass(frozen=True)
class BlockSpec:
    """A block: consecutive units trained by one local loss.

    `head` is the auxiliary network in inference mode (block output -> logits); the last block, which ends in the
    network's own head, has none. `masks` lists the random inputs of the step graph. `depth` is the depth of the
    auxiliary network, None for the last block. Bundles of schema 1 have no accumulation, memory, macs and depth.
    With `ort_training` the files of step and gradient graph may be missing: then they only tell of the state. `cuda`
    is what stands in for the graphs above on a CUDA device, in a bundle for both targets; None where they serve both
    (`edgelocal.bundle.targets`).
    """

    name: str
    units: tuple[str, ...]
    step: GraphSpec
    forward: GraphSpec
    head: GraphSpec | None
    weights: str
    masks: tuple[MaskSpec, ...]
    accumulation: AccumulationSpec | None = None
    memory: BlockMemorySpec | None = None
    macs: MacsSpec | None = None
    depth: int | None = None
    ort_training: OrtTrainingSpec | None = None
    cuda: TargetSpec | None = None

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


@dataclass(frozen=True, slots=True)
class FileSpec:
    """Size in bytes and sha256 (hex) of a file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True)
class FrontierSpec:
    """A way to train the network: bytes of the largest block's working set with batches of `batch` samples, and MACs of
    training a sample, what is done a second time included. `kind` is "partition", or what it is compared with: "bp",
    "checkpointing", "per-unit", "linear". The MACs are counted; with `estimated` the working set is a guess, else it is
    the prediction of a memory model."""

    kind: str
    blocks: int
    working_set_bytes: int
    training_macs: int
    chosen: bool
    batch: int
    estimated: bool


@dataclass(frozen=True)
class Manifest:
    """Everything the device knows about a bundle before it opens another file.

    `target` is what the graphs of training were written for, `precision` the type of the inputs of their matrix
    products; None before schema 4: the CPU, float32.
    """

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
    frontier: tuple[FrontierSpec, ...] | None = None
    target: str | None = None
    precision: str | None = None
    format: str = FORMAT
    schema: int = field(default=SCHEMA)

    @property
    def runtimes(self) -> tuple[str, ...]:
        """What the blocks can be trained with: "portable", their step graphs; "ort-training", the artifacts."""
        portable = all(block.step.file in self.files for block in self.blocks)
        artifacts = all(block.ort_training is not None for block in self.blocks)
        return ("portable",) * portable + ("ort-training",) * artifacts


def graphs_of(manifest: Manifest) -> tuple[GraphSpec, ...]:
    """Every graph that a bundle describes."""
    own = [graph for block in manifest.blocks for graph in (block.step, block.forward, block.head)]
    second = [g for b in manifest.blocks if b.accumulation for g in (b.accumulation.gradient, b.accumulation.apply)]
    artifacts = [
        g for b in manifest.blocks if b.ort_training for g in (b.ort_training.training, b.ort_training.evaluation)
    ]
    others = [graph for b in manifest.blocks if b.cuda for graph in (b.cuda.step, b.cuda.gradient)]
    return (manifest.predict, *(graph for graph in own if graph is not None), *second, *artifacts, *others)
