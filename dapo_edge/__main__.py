"""`python -m dapo_edge` is `dapo-edge`."""

from dapo_edge.cli_start import main

main()
