"""`python -m edgelocal`, the same as the `edgelocal` command."""

from edgelocal.cli import main

main()
