"""Bytes at rest: tensors and state in files that survive a crash."""
