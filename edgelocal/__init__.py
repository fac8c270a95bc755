"""edgelocal: train neural networks block by block on small devices, inside a memory budget."""

__version__ = "0.1.0"
