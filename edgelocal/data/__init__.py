"""Samples: files of many formats, the order they come in, batches of float32."""
