"""`python -m coda` is the console script `coda`."""

from coda.cli import main

main()
