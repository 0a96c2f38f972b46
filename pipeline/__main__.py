"""`python -m pipeline`: the same as `slipway`."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
