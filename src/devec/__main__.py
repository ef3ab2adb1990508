"""Entry point of ``python -m devec``."""

from devec.cli import main

if __name__ == "__main__":
    main()
