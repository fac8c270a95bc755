"""What ONNX Runtime's CUDA provider has kernels for, of standard operators at opset 18.

From the table of kernels in ONNX Runtime's documentation (docs/OperatorKernels.md, 1.25) and from its source
(core/providers/cuda: the checks in cuda_execution_provider.cc, the memory types of kernels). Earlier releases may have
fewer. Never compared with a provider that ran.
"""

from __future__ import annotations

from collections.abc import Mapping

_REAL = "float32 float64"
_FLOAT = f"{_REAL} bfloat16"
_NUMBER = f"{_REAL} int32 int64"
_ANY = f"{_FLOAT} int32 int64 uint8 bool"

# Types of the input that decides (`DECIDING`), and the operators that have a kernel for them.
_GROUPS: tuple[tuple[str, str], ...] = (
    (
        _REAL,
        "ArgMax ArgMin AveragePool BatchNormalization Ceil Conv ConvTranspose Cos DepthToSpace Einsum Elu Floor "
        "GlobalAveragePool GlobalMaxPool HardSigmoid HardSwish InstanceNormalization IsInf LRN LeakyRelu Log "
        "LogSoftmax PRelu Reciprocal ReduceLogSum ReduceLogSumExp ReduceSumSquare Round Selu Sin Softplus Softsign "
        "SpaceToDepth ThresholdedRelu",
    ),
    (
        _ANY,
        "Cast Concat Expand Flatten Gather GatherElements Identity Reshape ReverseSequence ScatterElements ScatterND "
        "Slice Split Squeeze Transpose Trilu Unsqueeze",
    ),
    (_FLOAT, "Erf Exp Gemm IsNaN LayerNormalization MatMul Relu Sigmoid Softmax Sqrt Sum Tanh"),
    (_NUMBER, "CumSum Greater GreaterOrEqual Less LessOrEqual Range ReduceMax ReduceMin TopK"),
    (f"{_NUMBER} bfloat16 uint8", "Abs Add Div Mul Sign Sub Where"),
    (f"{_NUMBER} bfloat16", "Max Min Mod Neg Pow ReduceSum Tile"),
    ("bool", "And Not Or Xor"),
    (f"{_REAL} int32", "ReduceL1 ReduceL2 ReduceMean ReduceProd"),
    (f"{_REAL} int64 uint8", "Clip"),
    (f"{_NUMBER} bool", "Equal"),
    (f"{_FLOAT} int64 bool", "GatherND"),
    ("float32", "GridSample"),
    (f"{_REAL} uint8", "MaxPool"),
    (f"{_REAL} bool", "Pad"),
    (f"{_REAL} int32 uint8", "Resize"),
    ("float32 int64", "OneHot"),
)
KERNELS: Mapping[str, frozenset[str]] = {
    operator: frozenset(types.split()) for types, operators in _GROUPS for operator in operators.split()
}

# Of these operators not the first input's type decides but that of this one.
DECIDING: Mapping[str, int] = {"Where": 1, "OneHot": 2}

# Inputs that a kernel reads on the host: what the device computes for them is copied back first.
ON_HOST: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(["CumSum", "Expand", "Reshape", "Split", "Squeeze", "Tile", "TopK", "Trilu", "Unsqueeze"], (1,)),
    **dict.fromkeys((name for name in KERNELS if name.startswith("Reduce")), (1,)),
    "OneHot": (1, 2),
    "Pad": (1, 2, 3),
    "Range": (0, 1, 2),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
}
