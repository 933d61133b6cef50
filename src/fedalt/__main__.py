"""`python -m fedalt` is `fedalt`."""

from fedalt.cli import main

if __name__ == "__main__":
    main()
