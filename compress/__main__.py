"""`python -m compress` is `edgestill`."""

from compress.cli import main

main()
