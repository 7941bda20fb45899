"""`python -m hostagent.cli`."""

from hostagent.cli import main

main()
