"""How seldom something dear is done: a listing of everything costs more the more there is, so it is done less often where it takes long."""

SHARE = 0.05  # of the time, at most


def pause_after(taken_seconds: float, least_seconds: float) -> float:
    """Seconds until it is done again, when it took so long."""
    return max(least_seconds, taken_seconds / SHARE - taken_seconds)
