"""The trainer: one FineTuneJob in, one verified and published model out."""

VERSION = "0.1.0"
