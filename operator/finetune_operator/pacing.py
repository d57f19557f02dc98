"""How often something expensive is done: listing everything costs more the more there is, so it is done less often where it takes long."""

SHARE = 0.05  # of the time, at most


def pause_after(taken_seconds: float, least_seconds: float) -> float:
    """Seconds to wait before something is done again that took so long."""
    return max(least_seconds, taken_seconds / SHARE - taken_seconds)
