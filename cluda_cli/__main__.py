"""`python -m cluda_cli`: the same as the `cluda` command."""

from cluda_cli.cli import main

if __name__ == "__main__":
    main()
