"""The command `slipway`, which is also `python -m pipeline`."""

from __future__ import annotations

import gc
import signal


def main() -> None:
    # Until the command stands, which knows what Ctrl-C means, it ends the process at once and without a traceback, unless
    # whoever started us has it ignored.
    heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heeded:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # What is imported stays. Looking through it for garbage again and again would be a tenth of the time of `slipway plan`.
    gc.disable()
    from pipeline.command import cli

    gc.freeze()
    gc.enable()
    if heeded:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


if __name__ == "__main__":
    main()
