"""Keeps the libraries' own progress bars and notices out of a run's output, which has a bar and sentences of its own.

Called by cli.py before the first heavy import. Errors still come through.
"""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Sets the switches that each library reads when it is imported."""
    # Its compiled kernels are for other builds of torch than a laptop's; what we use of torchao needs none.
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("torch.utils._pytree", "torchao", "datasets", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # What it says in a traceback, it raises too; memory/dry_run.py asks many a model that can't be traced.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    for module in ("torchao", "transformers", "trl", "peft", "accelerate"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{module}\b")
    # Patterns that peft itself has made, for a mixture's experts.
    warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys", category=RuntimeWarning)


def quiet_bars() -> None:
    """Puts the progress bars of transformers away; imports it."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
