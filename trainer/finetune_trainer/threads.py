"""How PyTorch's threads wait for each other on a CPU that other processes use too. Called by cli.py before torch is imported.

By default a thread of GNU's OpenMP, which PyTorch's Linux builds bring along, spins for milliseconds before it sleeps. Beside another busy process it
spins while the thread it waits for has no core: a step took 93 s instead of 17 s (BENCHMARKS.md, "The main job"). A pod has no CPU limit and
is seldom alone, nor is a laptop.
"""

import os

_SPINS = "1000"  # GNU's own number where it knows of more threads than cores; sleeping at once takes longer on an idle machine


def wait_briefly() -> None:
    """Shortens the spinning, unless the user has set how threads wait."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
