"""A run that lacks nothing, and runs that are slow for one reason each, with what is said of them."""

from dataclasses import replace

from finetune_trainer.results.hints import Measured

QUICK = Measured(
    stages={"Loading": 10.0, "Training": 200.0, "Evaluating": 5.0},
    parts={"model": 4.0, "data": 4.0, "switch": 5.0, "mirror": 5.0},
    steps=100,
    device="cuda",
    dtype="bfloat16",
    computes_bfloat16=True,
    threads=8,
    cores=8,
    micro_batches=2,
    enough=2,
    in_cluster=True,
    keeps_models=False,
)

CASES: list[tuple[str, Measured, str]] = [
    (
        "the CPU of a pod",
        replace(QUICK, device="cpu", stages={"Training": 900.0}),
        "Training took 900 s for 100 steps on the CPU: set resources.gpus to 1.",
    ),
    (
        "the CPU of a laptop",
        replace(QUICK, device="cpu", stages={"Training": 900.0}, in_cluster=False),
        "Training took 900 s for 100 steps on the CPU: a machine with a GPU is faster.",
    ),
    ("idle cores", replace(QUICK, device="cpu", threads=1), "PyTorch computed with 1 of 8 cores: unset OMP_NUM_THREADS."),
    (
        "float32 on a machine that computes bfloat16",
        replace(QUICK, dtype="float32"),
        "Training computed in float32, though this GPU has bfloat16 arithmetic: "
        "model.dtype bfloat16 takes half the memory for the weights, and mostly less time.",
    ),
    (
        "a pod's GPU with little memory",
        replace(QUICK, micro_batches=8),
        "A step took up to 8 micro-batches where 2 would do, for memory was short: "
        "choose a resources.gpuType with more memory, or lower training.maxLength.",
    ),
    (
        "a pod with little memory",
        replace(QUICK, device="cpu", micro_batches=8),
        "A step took up to 8 micro-batches where 2 would do, for memory was short: raise resources.memory, or lower training.maxLength.",
    ),
    (
        "a laptop with little memory",
        replace(QUICK, micro_batches=16, enough=1, in_cluster=False),
        "A step took up to 16 micro-batches where 1 would do, for memory was short: "
        "use a machine with more memory, or lower training.maxLength.",
    ),
    (
        "the choice of the rounding",
        replace(QUICK, parts={"rounding": 60.0}),
        "Choosing scales and rounding of the weights took 60 of 215 s, whatever the number of steps: "
        "8 bits need no such choice (quantization.scheme int8 or fp8-fp8).",
    ),
    (
        "held-out rows",
        replace(QUICK, stages={"Training": 100.0, "Evaluating": 40.0}, parts={"switch": 30.0}),
        "Measuring held-out losses took 70 of 140 s: hold out fewer rows (dataset.evaluation).",
    ),
    (
        "checkpoints",
        replace(QUICK, parts={"mirror": 60.0}),
        "Mirroring checkpoints took 60 of 215 s: raise training.checkpointEvery, choose a nearer storage.checkpoints.uri, "
        "or let the workspace last (storage.workspace.persistentVolumeClaim).",
    ),
    (
        "a model that is fetched each time",
        replace(QUICK, parts={"model": 100.0}),
        "Fetching the model took 100 of 215 s: a claim keeps it for the next run (storage.cache.persistentVolumeClaim).",
    ),
    (
        "data",
        replace(QUICK, parts={"data": 100.0}),
        "Fetching and tokenizing the data took 100 of 215 s: give dataset.source fewer rows, or a nearer place.",
    ),
]
