"""`python -m teams_hpc` is `teams-hpc`."""

from teams_hpc.cli import main

main()
