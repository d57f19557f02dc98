"""What both halves agree on: the FineTuneJob, its rules and digests, and the contracts between operator and trainer."""
