"""`python -m ncollapse.train` is the command `ncollapse`."""

from ncollapse.train.cli import main

if __name__ == "__main__":
    main()
