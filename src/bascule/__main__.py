"""`python -m bascule` is the `bascule` command."""

from bascule.cli.main import main

main()
