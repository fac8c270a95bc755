"""What this machine is and has: memory, cores, packages."""
