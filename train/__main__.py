"""`python -m nc.train` is the command `ncollapse`."""

from nc.train.cli import main

if __name__ == "__main__":
    main()
