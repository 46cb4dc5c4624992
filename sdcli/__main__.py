"""`python -m sdcli` is `sdcli`: what launchers such as torchrun start."""

from sdcli.cli import main

main()
