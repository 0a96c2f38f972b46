"""The command `slipway`, which is also `python -m pipeline`."""

from __future__ import annotations

import gc


def main() -> None:
    # What is imported stays. Looking through it for garbage again and again would be a tenth of the time of `slipway plan`.
    gc.disable()
    from pipeline.command import cli

    gc.freeze()
    gc.enable()
    cli.main()


if __name__ == "__main__":
    main()
