"""`python -m shiva_search` is the command line."""

from shiva_search.cli import main

main()
