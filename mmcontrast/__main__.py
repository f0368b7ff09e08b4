"""`python -m mmcontrast`, and so `torchrun -m mmcontrast train CONFIG`."""

from mmcontrast.cli import main

main()
