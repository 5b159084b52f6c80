"""`python -m dapo_edge` is `dapo-edge`."""

from dapo_edge.cli import main

main()
