"""Tiny models gain nothing from threads, and lose much where other tests run beside them. Unsloth, where it is installed, is imported before transformers."""

import os

from finetune_trainer import backends

os.environ.setdefault("OMP_NUM_THREADS", "1")
if backends.has_unsloth():
    backends.import_unsloth()
