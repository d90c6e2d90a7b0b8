"""`python -m rlctl`: the command line where no script is wanted, as under torchrun."""

from rlctl.cli import main

main()
