"""The whole line on a tiny model: what lies where, what the report says, and that the shipped files are the trained model."""

import json
import shutil
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.exits import ExitCode
from finetune_api.termination import parse
from finetune_trainer import backends, phases, plan
from finetune_trainer.batch import pad
from finetune_trainer.context import RunContext
from finetune_trainer.errors import ProofError
from finetune_trainer.qat.kernels import REFERENCE, kernel_of, reference_arithmetic
from finetune_trainer.qat.prepare import exact_layers
from finetune_trainer.reporting.session import ENV_TERMINATION_LOG
from finetune_trainer.results.report import quality
from finetune_trainer.row_order import order_of
from finetune_trainer.stages import convert, train, verify
from finetune_trainer.stages.data import Data
from finetune_trainer.stages.train import Trained
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.exact_models import SCHEMES, WIDE, tiny_mixture
from support.run_contexts import RecordingReporter
from support.tiny_jobs import STEPS, description, finetune, run, tiny_job
from support.tiny_model import SIZES, save_tiny_gemma3, save_tiny_model, save_with_tokenizer, write_jsonl
from torch.nn.functional import cross_entropy
from transformers import (
    ApertusConfig,
    ApertusForCausalLM,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where `run` trains
BOTH = {"outputs": {"artifacts": ["adapter", "quantized"]}}


@pytest.fixture(scope="module", params=[scheme.value for scheme in SCHEMES])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the report of a whole run."""
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_model(folder / "model", **(WIDE if request.param == "fp8-int4" else {}))
    report = run(tiny_job(folder, {"quantization": {"scheme": request.param}, **BOTH}), folder / "work")
    return folder, report


def test_every_weight_is_equal_and_no_logit_differs(finished: tuple[Path, dict[str, Any]]) -> None:
    proof = finished[1]["proof"]
    assert proof["weights_equal"] is True
    assert proof["max_logit_difference"] == 0.0
    assert proof["weights"] == 21
    assert proof["generated"]


def test_a_generation_config_that_contradicts_itself_is_shipped_as_it_was(tmp_path: Path) -> None:
    """Many a published model has one; transformers refuses to save it once the tokenizer's special tokens were written into it."""
    folder = save_tiny_model(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "pad_token_id": 2}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    run(tiny_job(tmp_path, BOTH), tmp_path / "work")
    shipped = json.loads((tmp_path / "work" / "model-torchao" / "generation_config.json").read_text())
    assert shipped | {"temperature": 0.6, "pad_token_id": 2} == shipped


def test_the_proof_says_whether_a_kernel_was_run(finished: tuple[Path, dict[str, Any]]) -> None:
    report = finished[1]
    runs = report["qat"]["scheme"] in ("int8", "int8-int4", "fp8-fp8") or (DEVICE.type == "cuda" and find_spec("mslk") is not None)
    assert report["proof"]["verified_by"] == ("weights and logits" if runs else "weights; kernel not run")
    assert bool(report["proof"]["kernel"]) == runs
    assert quality(report["losses"], report["proof"], "").verified_by == report["proof"]["verified_by"]


def test_the_report_has_the_losses_the_layers_and_the_sizes(finished: tuple[Path, dict[str, Any]]) -> None:
    report = finished[1]
    losses = report["losses"]
    assert all(losses[name] > 0 for name in ("base", "tuned", "ptq", "quantized"))
    chosen = report["qat"]["scheme"] in ("int4", "int8-int4", "fp8-int4")
    assert (losses["nearest"] is not None) == chosen
    assert losses["tuned"] < losses["base"]
    assert 0 < losses["agreement"] <= 1
    low, high = losses["shipped_over_base"]
    assert low <= losses["quantized"] - losses["base"] <= high
    assert report["qat"]["layers"] == 14
    assert report["qat"]["coverage"] == 1.0
    assert report["qat"]["skipped"] == {"lm_head": "output head"}
    assert report["training"]["steps"] == STEPS
    assert report["bytes"]["bytes_after"] < report["bytes"]["bytes_before"]
    assert set(report["seconds"]) >= {"Loading", "Training", "Evaluating", "Converting", "Verifying"}
    assert report["peakMemoryBytes"] > 0
    assert {"torch", "torchao", "transformers", "peft", "trl"} <= set(report["versions"])


def test_everything_is_published_and_nothing_half_written_stays(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    assert {path.name for path in (folder / "published").iterdir()} == {
        "README.md",
        "lora_model",
        "manifest.json",
        "model-torchao",
        "proof",
        "report.json",
    }
    assert not [path for path in folder.rglob("*") if path.name.endswith((".partial", ".replaced"))]
    assert not list((folder / "published").rglob("*.bin"))


def test_the_adapter_loads_in_plain_peft_and_comes_nearer_to_what_was_trained(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    recorded = load_file(folder / "work" / "proof" / "reference.safetensors")
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=recorded["logits"].dtype)
    model = PeftModel.from_pretrained(base, folder / "published" / "lora_model").to(DEVICE)
    tuned = logits_of(model, recorded)
    with model.disable_adapter():
        plain = logits_of(model, recorded)
    with_it, without = ((logits - recorded["logits"]).float().square().mean() for logits in (tuned, plain))
    assert with_it < without  # not 0: what was recorded is quantized, the adapter's model is not


def test_the_shipped_folder_loads_in_plain_transformers(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    model = AutoModelForCausalLM.from_pretrained(folder / "published" / "model-torchao").to(DEVICE)
    recorded = load_file(folder / "published" / "proof" / "reference.safetensors")
    with nullcontext() if kernel_of(model, DEVICE) == REFERENCE else reference_arithmetic(model):
        assert torch.equal(logits_of(model, recorded), recorded["logits"])
    assert AutoTokenizer.from_pretrained(folder / "published" / "model-torchao").chat_template


@torch.no_grad()
def logits_of(model: torch.nn.Module, recorded: dict[str, torch.Tensor]) -> torch.Tensor:
    """Those of the recorded batch, on the CPU."""
    batch = {name: recorded[name].to(DEVICE) for name in ("input_ids", "attention_mask")}
    logits: torch.Tensor = model(**batch, use_cache=False).logits
    return logits.cpu()


def test_an_export_with_one_other_code_is_refused_by_the_proof(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = finished
    shutil.copytree(folder / "work", tmp_path / "work")
    weights = tmp_path / "work" / "model-torchao" / "model.safetensors"
    change_one_code(weights)
    ctx = RunContext(description(folder / "job.yaml"), tmp_path / "work", tmp_path / "cache", RecordingReporter())
    with pytest.raises(ProofError, match="1 of 21 weights differ"):
        verify.run(ctx)


def test_a_difference_that_the_spec_accepts_is_said_and_shipped(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = finished
    shutil.copytree(folder / "work", tmp_path / "work")
    change_one_code(tmp_path / "work" / "model-torchao" / "model.safetensors")
    job = tiny_job(tmp_path, {"quantization": {"acceptInexact": True}})
    reporter = RecordingReporter()
    proof = verify.run(RunContext(description(job), tmp_path / "work", tmp_path / "cache", reporter))
    assert not proof.weights_equal
    assert "1 of 21 weights differ" in reporter.notes[-1]
    assert "quantization.acceptInexact is true" in reporter.notes[-1]


def test_what_is_shipped_keeps_the_base_models_tokenizer_licence_and_ways_of_padding(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"padding_side": "left"}
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "LICENSE.md").write_text("Pass this on.")
    (folder / "preprocessor_config.json").write_text("{}")
    run(tiny_job(tmp_path, BOTH), tmp_path / "work")
    quantized, adapter = tmp_path / "published" / "model-torchao", tmp_path / "published" / "lora_model"
    assert (quantized / "LICENSE.md").read_text() == "Pass this on."
    assert (quantized / "preprocessor_config.json").is_file()
    for shipped in (quantized, adapter):
        kept = json.loads((shipped / "tokenizer_config.json").read_text())
        assert (kept["padding_side"], kept.get("pad_token")) == ("left", None)


def test_of_a_multimodal_model_the_language_model_alone_is_trained_and_quantized(tmp_path: Path) -> None:
    save_tiny_gemma3(tmp_path / "model")
    report = run(tiny_job(tmp_path, BOTH), tmp_path / "work")
    trained = load_file(tmp_path / "published" / "lora_model" / "adapter_model.safetensors")
    assert report["proof"]["max_logit_difference"] == 0.0
    assert not [name for name in trained if "vision_tower" in name]
    assert any("language_model.layers.1.mlp.up_proj" in name for name in trained)
    skipped = report["qat"]["skipped"]
    assert skipped["model.vision_tower.encoder.layers.0.mlp.fc1"] == "not part of the language model"
    assert report["qat"]["layers"] == 14
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "published" / "lora_model")
    assert loaded.peft_config["default"].base_model_name_or_path == str(tmp_path / "model")


@pytest.fixture
def one_bad_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first conversion that follows writes one code wrong, the later ones none."""
    export, waiting = convert.run, [True]

    def run_once_badly(ctx: RunContext, trained: Trained, base_folder: Path) -> convert.Converted:
        converted = export(ctx, trained, base_folder)
        if waiting:
            waiting.clear()
            change_one_code(ctx.quantized / "model.safetensors")
        return converted

    monkeypatch.setattr(convert, "run", run_once_badly)


@pytest.mark.usefixtures("one_bad_export")
def test_a_run_whose_proof_failed_publishes_nothing_and_the_next_one_exports_anew(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, BOTH)
    folders = "--workdir", str(tmp_path / "work"), "--cache", str(tmp_path / "cache")
    assert finetune("run", str(job), *folders) == ExitCode.PROOF
    assert not (tmp_path / "published").exists()
    assert not (tmp_path / "work" / "report.json").exists()
    assert finetune("run", str(job), *folders) == ExitCode.SUCCEEDED
    assert json.loads((tmp_path / "published" / "report.json").read_text())["proof"]["holds"] is True


@pytest.mark.usefixtures("one_bad_export")
def test_what_is_accepted_though_inexact_says_so_wherever_it_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_TERMINATION_LOG, str(tmp_path / "last"))
    report = run(tiny_job(tmp_path, {"quantization": {"acceptInexact": True}, **BOTH}), tmp_path / "work")
    last = parse((tmp_path / "last").read_text())
    assert last is not None
    assert last.quality is not None
    assert last.quality.shipped_matches_trained is False
    assert report["proof"]["holds"] is False
    assert json.loads((tmp_path / "published" / "report.json").read_text())["proof"]["holds"] is False
    assert "DIFFER" in (tmp_path / "published" / "README.md").read_text()


def change_one_code(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    name = next(key for key in sorted(tensors) if key.endswith("_qdata"))
    codes = tensors[name].clone()
    codes.view(torch.int8)[0, 0] ^= 1
    save_file(tensors | {name: codes}, path, metadata=metadata)


def test_without_a_scheme_only_the_adapter_is_made(tmp_path: Path) -> None:
    report = run(tiny_job(tmp_path, {"quantization": {"scheme": "none"}}), tmp_path / "work")
    assert report["proof"] is None
    assert report["qat"] is None
    assert report["losses"]["tuned"] < report["losses"]["base"]
    assert not (tmp_path / "work" / "model-torchao").exists()


def test_a_mixture_learns_from_its_rows_alone_and_keeps_its_switches_of_the_routers_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switches = {"output_router_logits": True, "router_aux_loss_coef": 0.01}
    save_with_tokenizer(tiny_mixture(**switches), tmp_path / "model")
    base, learn, seen = AutoModelForCausalLM.from_pretrained(tmp_path / "model").to(DEVICE), train.run, []

    def noted(ctx: RunContext, loaded: Any, data: Data) -> Trained:
        batch = {name: values.to(DEVICE) for name, values in pad(data.train, 0).items()}
        with torch.no_grad():
            logits = base(batch["input_ids"], batch["attention_mask"], output_router_logits=False).logits
        seen.append(cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()))
        seen.append(learn(ctx, loaded, data))
        return seen[1]

    monkeypatch.setattr(train, "run", noted)
    changes = {"lora": {"targetModules": "q_proj,v_proj"}, "quantization": {"scheme": "none"}, "training": {"batchSize": 32}}
    run(tiny_job(tmp_path, changes), tmp_path / "work")
    plain, trained = seen
    assert trained.plan.steps == 1
    assert trained.final_loss == pytest.approx(float(plain), rel=1e-5)
    config = trained.model.get_base_model().config
    assert {name: getattr(config, name) for name in switches} == switches


def test_gpt2_whose_linear_layers_are_of_another_class_is_adapted_by_their_names(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=260, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, pad_token_id=2)
    save_with_tokenizer(GPT2LMHeadModel(config), tmp_path / "model")
    job = tiny_job(tmp_path, {"lora": {"targetModules": "c_attn,c_proj"}, "quantization": {"scheme": "none"}})
    run(job, tmp_path / "work")
    weights = load_file(tmp_path / "work" / "lora_model" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in weights} == {"c_attn", "c_proj"}
    assert all(weight.any() for weight in weights.values())


def test_a_model_with_weights_that_are_single_numbers_is_proved(tmp_path: Path) -> None:
    """Apertus' activation function has them."""
    save_with_tokenizer(ApertusForCausalLM(ApertusConfig(**SIZES)), tmp_path / "model")
    proof = run(tiny_job(tmp_path, BOTH), tmp_path / "work")["proof"]
    assert (proof["holds"], proof["max_logit_difference"]) == (True, 0.0)


def test_qat_from_the_first_step_has_no_reference_losses(tmp_path: Path) -> None:
    losses = run(tiny_job(tmp_path, {"quantization": {"qatPercent": 100}}), tmp_path / "work")["losses"]
    assert losses["tuned"] is None
    assert losses["ptq"] is None
    assert losses["quantized"] is not None


@pytest.mark.parametrize("scheme", ["int8-int4", "int4"])
def test_quantization_after_training_ships_what_ptq_measured(scheme: str, tmp_path: Path) -> None:
    changes = {"quantization": {"scheme": scheme, "qatPercent": 0}, **BOTH}
    report = run(tiny_job(tmp_path, changes), tmp_path / "work")
    assert report["losses"]["quantized"] == report["losses"]["ptq"]
    assert report["proof"]["weights_equal"]


def job_that_unlearns(folder: Path, **changes: Any) -> Path:
    """Trains to answer with one letter and is measured on answers of another."""
    held_out = write_jsonl(folder / "held.jsonl", [{"instruction": f"{index}?", "output": "z" * 30} for index in range(8)])
    rows = [{"instruction": f"{index}?", "output": "a" * 30} for index in range(40)]
    wanted = {"dataset": {"evaluation": {"source": f"file://{held_out}"}}, "training": {"learningRate": "1e-2"}}
    return tiny_job(folder, wanted | changes, rows)


def test_the_quality_gate_publishes_nothing(tmp_path: Path) -> None:
    from finetune_trainer.errors import QualityError

    with pytest.raises(QualityError, match=r"significantly above the base model's .* Nothing was published"):
        run(job_that_unlearns(tmp_path), tmp_path / "work")
    assert not (tmp_path / "published").exists()


def test_a_loss_above_the_limit_of_the_spec_publishes_nothing(tmp_path: Path) -> None:
    from finetune_trainer.errors import QualityError

    changes = {"quantization": {"qatPercent": 0, "groupSize": 64}, "quality": {"maxLossIncreasePercent": "0.001"}, **BOTH}
    changes["training"] = {"learningRate": "1e-2", "epochs": 8, "seed": 2}  # far enough from the start that 4 bits cost something
    with pytest.raises(
        QualityError, match=r"above the tuned one's .* quality\.maxLossIncreasePercent allows 0.001 %.* Nothing was published"
    ):
        run(tiny_job(tmp_path, changes), tmp_path / "work")
    assert not (tmp_path / "published").exists()


def test_the_quality_gate_can_only_warn(tmp_path: Path) -> None:
    run(job_that_unlearns(tmp_path, quality={"onFailure": "Warn"}), tmp_path / "work")
    assert json.loads((tmp_path / "published" / "manifest.json").read_text())["files"]


def test_nearest_values_are_measured_before_anything_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []
    measure = phases.measure

    def measured(model: Any, examples: Any, *, fake_quant: bool, keep_codes: bool) -> Any:
        chosen = {layer.exact.clip_ratio is not None and layer.exact.rounding_offset is not None for _, layer in exact_layers(model)}
        assert len(chosen) == 1
        seen.append((fake_quant, *chosen))
        return measure(model, examples, fake_quant=fake_quant, keep_codes=keep_codes)

    monkeypatch.setattr(phases, "measure", measured)
    losses = run(tiny_job(tmp_path, BOTH), tmp_path / "work")["losses"]
    assert seen == [(False, False), (True, False), (True, True)]
    assert losses["nearest"] != losses["ptq"]


@pytest.mark.parametrize(("percent", "times"), [(0, 1), (50, 1), (100, 0)])
def test_the_rounding_is_chosen_once_behind_the_tuning(percent: int, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    choose = phases.choose_rounding

    def choose_rounding(model: Any, examples: Any) -> None:
        choose(model, examples)
        calls.append(sum(layer.exact.rounding_offset is not None for _, layer in exact_layers(model)))

    monkeypatch.setattr(phases, "choose_rounding", choose_rounding)
    report = run(tiny_job(tmp_path, {"quantization": {"qatPercent": percent}, **BOTH}), tmp_path / "work")
    assert calls == [14] * times
    assert report["proof"]["weights_equal"]
    assert report["proof"]["max_logit_difference"] == 0.0


def test_each_epoch_reads_the_rows_in_the_order_of_their_lengths_whatever_the_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MICRO_BATCH_TOKENS", 64)
    read: list[int] = []
    known: list[Data] = []
    make, fill = train._trainer, train.pad

    def noted(ctx: Any, loaded: Any, data: Data, *rest: Any) -> Any:
        known.append(data)
        return make(ctx, loaded, data, *rest)

    def counted(examples: Any, *rest: Any) -> Any:
        read.extend(len(example.input_ids) for example in examples)
        return fill(examples, *rest)

    monkeypatch.setattr(train, "_trainer", noted)
    monkeypatch.setattr(train, "pad", counted)
    rows = [{"instruction": "please " * (index % 5), "output": "yes"} for index in range(21)]
    run(tiny_job(tmp_path, {"training": {"epochs": 2, "batchSize": 4, "seed": 7}}, rows), tmp_path / "work")
    lengths = [len(example.input_ids) for example in known[0].train]
    assert len(set(lengths)) > 1
    assert read == [lengths[index] for epoch in (0, 1) for index in order_of(lengths, 4, 7 + epoch)]


NOT_COUNTED = pytest.mark.xfail(
    backends.has_unsloth(), reason="unsloth puts a loss of its own in the place of trl's, which drops the count then", strict=True
)


@pytest.mark.parametrize(
    ("scheme", "takes_count"), [("none", True), ("int8-int4", True), pytest.param("none", False, marks=NOT_COUNTED), ("int8-int4", False)]
)
def test_a_step_that_is_cut_learns_what_a_whole_one_does(
    scheme: str, takes_count: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a model whose forward pass does not say that it takes how many tokens the whole step has."""
    rows = [{"instruction": "please " * (index % 5), "output": "yes" + ", indeed" * (index % 4)} for index in range(24)]
    found = []
    for tokens, takes in dict.fromkeys([(10**6, True), (10**6, takes_count), (1, takes_count)]):
        monkeypatch.setattr(plan, "MICRO_BATCH_TOKENS", tokens)
        monkeypatch.setattr(LlamaForCausalLM, "accepts_loss_kwargs", takes, raising=False)
        folder = tmp_path / f"{tokens}-{takes}"
        found.append(run(tiny_job(folder, {"quantization": {"scheme": scheme}}, rows), folder / "work"))
    for name, part in (("lastLoss", "training"), ("tuned", "losses")):
        assert [report[part][name] for report in found] == [pytest.approx(found[0][part][name], rel=1e-3)] * len(found)
