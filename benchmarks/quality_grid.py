"""Which cells `make bench-quality` makes, in the order of what they teach: what was tried first, on one seed and one scheme; then the grid."""

from dataclasses import replace

from quality_cell import Recipe

SEEDS, DATA, BITS = (0, 1, 2), ("docstrings", "bodies"), (4, 3)
OURS = Recipe("", 0, "exact", switch=80, distill=0.5, adapt_peak=0.4, rounding=True)
_TRIED = Recipe("docstrings", 0, "exact", 4, steps=50, switch=25, distill=0.5)
_FIRST = replace(_TRIED, switch=0, distill=0.0)

TRIED = {
    "50 steps, plain LoRA": Recipe("docstrings", 0, "lora", steps=50),
    "from the first step": _FIRST,
    "half, one cosine": _TRIED,
    "from the first step, twice the rate": replace(_FIRST, peak=2e-3),
    "from the first step, rounding": replace(_FIRST, rounding=True),
    "half, one cosine, teacher alone": replace(_TRIED, distill=1.0),
    "half, one cosine, no teacher": replace(_TRIED, distill=0.0),
    "from the first step, rank 64": replace(_FIRST, rank=64),
    "one cosine, 70 %": replace(_TRIED, switch=15),
    "half, one cosine, temperature 2": replace(_TRIED, temperature=2.0),
    "half, one cosine, scales every 10 steps": replace(_TRIED, refit=10),
    "from the first step, scales every 10 steps": replace(_FIRST, refit=10),
    "half, one cosine, largest value": replace(_TRIED, least_squares=False),
}
"""Half as many steps as the grid's: what pays is looked for here, and confirmed there."""


def _grid() -> dict[str, Recipe]:
    cells: dict[str, Recipe] = {}
    for seed in SEEDS:
        for bits in BITS:
            for data in DATA:
                cells[f"{data}-{seed}-lora"] = Recipe(data, seed, "lora")
                cells[f"{data}-{seed}-{bits}bit-exact"] = replace(OURS, data=data, seed=seed, bits=bits)
                cells[f"{data}-{seed}-{bits}bit-split"] = Recipe(data, seed, "split", bits)
    return cells


CELLS: dict[str, Recipe] = {
    **{f"tried-{name.replace(',', '').replace(' %', '').replace(' ', '-')}": recipe for name, recipe in TRIED.items()},
    **_grid(),
}
