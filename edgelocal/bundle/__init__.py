"""What comes from the workstation: the folder, its manifest, its ONNX files."""
