"""Graphs in ONNX Runtime, and the blocks that run on them. Nothing else knows the runtime."""
