"""The one engine and the loop over fixed data: optimizer, memory layouts, schedules, state, evaluation."""
