"""`python -m mvmr` is the `mvmr` command."""

from mvmr.cli import main

if __name__ == "__main__":
    main()
