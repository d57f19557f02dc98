"""Tiny models gain nothing from threads, and lose much where other tests run beside them."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
