"""Memory and time of training on an NVIDIA GPU: PyTorch and edgelocal side by side, every variant in its own process.

    python benchmarks/cuda.py --device cuda [--networks resnet32,resnet110,resnet50] [--rounds 3] [--minutes 9]
    python benchmarks/cuda.py --write [docs/cuda.md]     # draw the page from what was measured, and nothing else

Rounds are interleaved; medians count, and ratios of times within a round. What is measured goes into --result at once
and is not measured again, so the same command goes on where a shorter loan of a GPU ended; `--prepare` exports the
bundles, for which no GPU is needed, and they are kept beside the result. docs/cuda.md says what each variant is.
"""

import sys
from pathlib import Path

from cuda_bench import main

if __name__ == "__main__":
    # This file's name is that of NVIDIA's own package, which PyTorch may look for.
    sys.path.remove(str(Path(__file__).parent))
    main(__doc__)
