"""`python -m trackers WORK_FOLDER TRACKER [--measure]`: follows the step in the work folder; rank 0 of the step starts it."""

from __future__ import annotations

import sys

from trackers import TRACKERS
from trackers.following import main

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], "--measure" in sys.argv[3:], TRACKERS)
