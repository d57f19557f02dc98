"""Which models the line works for: every causal language model that transformers knows, tiny and with random weights, through a whole job.

`make bench-architectures` tries what is missing, each in a process of its own: LoRA, the switch, exact int8-int4 steps, export and proof; where the scheme is refused, scheme
none. Each twice: in float32 as on a CPU, and in bfloat16 with activations computed again, as on a GPU. What came out is kept in benchmarks/results/architectures.json, and docs/models.md is written from it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import transformers
from transformers.models.auto import modeling_auto

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "architectures.json"
PAGE = ROOT / "docs" / "models.md"
SECONDS = 300
LARGEST = 60_000_000  # weights; what its configuration does not make smaller is not tried

ENCODERS = (
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES,
)
"""Whose models are no decoders, though transformers has a decoder of theirs."""
NO_TEXT = {"bert-generation", "git", "moshi", "trocr", "whisper", "xlnet"}

UNLESS_NONE = {"sliding_window": 64, "final_logit_softcapping": 0.5, "logits_soft_cap": 0.5}
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 260),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "lru_width"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "mamba_d_ssm"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "linear_num_value_heads", "linear_num_heads", "mamba_n_heads"), 4
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "linear_num_key_heads", "index_n_heads"), 2),
    **dict.fromkeys(
        ("head_dim", "attention_head_dim", "global_head_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16
    ),
    **dict.fromkeys(("qk_head_dim", "v_head_dim", "index_head_dim", "index_topk", "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "state_size", "mamba_d_state", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "mamba_d_head", "mamba_dt_rank", "time_step_rank"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "expand", "mamba_expand"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "n_groups"), 1),
    "pad_token_id": 2,
    "eos_token_id": 0,
    "bos_token_id": 1,
    **UNLESS_NONE,
}
SENSES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "depth": 1, "num_heads": 2}
SENSES |= {"image_size": 28, "patch_size": 14, "out_hidden_size": SIZES["hidden_size"]}
"""Of the towers of a multimodal model."""
OWN_SIZES: dict[str, dict[str, Any]] = {  # an attribute that is None stays as the type's own configuration has it
    "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "falcon": {"head_dim": None, "new_decoder_architecture": True},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
                     "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [128] * 4},
    "gemma4_text": {"head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4, "num_kv_shared_layers": 0,
                    "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 0},
    "jamba": {"num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba2": {"num_heads": 8},
    "qwen3_5_text": {"num_hidden_layers": 4},
    "qwen3_next": {"num_hidden_layers": 4},
    "rwkv": {"rescale_every": 1},  # as in a deep one, whose weights are divided where it serves
    "zamba": {"num_hidden_layers": None},
    "zamba2": {"num_hidden_layers": None},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", nargs="+", default=candidates(), help="model types of transformers; all of them otherwise")
    parser.add_argument("--fresh", action="store_true", help="try again what was tried already")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(outcome(chosen.one)))
        return
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if known.get("transformers") != transformers.__version__:
        known = {"transformers": transformers.__version__, "types": {}}
    wanted = [name for name in chosen.types if chosen.fresh or name not in known["types"]]
    with ThreadPoolExecutor(2) as pool:
        for name, found in zip(wanted, pool.map(tried, wanted), strict=True):
            print(f"{name}: {found}", flush=True)
            known["types"][name] = found
            RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(known), encoding="utf-8")


def candidates() -> list[str]:
    return [
        name
        for name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if name not in NO_TEXT and not any(name in kind for kind in ENCODERS)
    ]


def tried(name: str) -> dict[str, Any]:
    """What came out for a type, in a process that may die or hang."""
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, "--one", name], capture_output=True, text=True, timeout=SECONDS, check=True
        )
    except subprocess.TimeoutExpired:
        return {"outcome": "failed", "said": f"no end after {SECONDS} s"}
    except subprocess.CalledProcessError as error:
        if error.returncode < 0:
            return {"outcome": "failed", "said": f"killed by signal {-error.returncode}"}
        return {"outcome": "failed", "said": f"exit code {error.returncode}: {(error.stderr.strip().splitlines() or [''])[-1][:200]}"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def outcome(name: str) -> dict[str, Any]:
    """proved (quantized, and equal to what was trained), adapter (scheme none alone), failed, or not tried; with the sentence that says why."""
    from finetune_trainer.errors import FineTuneError, SpecError

    with tempfile.TemporaryDirectory() as folder:
        try:
            save_tiny(name, Path(folder) / "model")
        except Exception as error:  # noqa: BLE001 whatever a configuration says of sizes that are not its own
            return {"outcome": "not tried", "said": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
        try:
            report = jobs_of(Path(folder), "int8-int4")
            return {"outcome": "proved", "layers": report["qat"]["layers"], "coverage": round(report["qat"]["coverage"], 2)}
        except SpecError as refusal:
            try:
                jobs_of(Path(folder), "none")
            except FineTuneError as error:
                return {"outcome": "failed", "said": _sentence(error, folder)}
            return {"outcome": "adapter", "said": str(refusal)}
        except FineTuneError as error:
            return {"outcome": "failed", "said": _sentence(error, folder)}


def _sentence(error: Exception, folder: str) -> str:
    """Without the folder, which is another one each time."""
    return str(error).replace(f"{folder}/", "")[:300]


def save_tiny(name: str, folder: Path) -> None:
    """A model of this type with random weights, and the byte tokenizer."""
    import torch
    from support.tiny_model import save_with_tokenizer

    with torch.device("meta"):
        size = transformers.AutoModelForCausalLM.from_config(tiny_config(name)).num_parameters()
    if size > LARGEST:
        raise ValueError(f"its configuration makes {size / 1e6:,.0f} million weights, whatever its common sizes are")
    torch.manual_seed(0)
    save_with_tokenizer(transformers.AutoModelForCausalLM.from_config(tiny_config(name)), folder)


def tiny_config(name: str) -> transformers.PreTrainedConfig:
    """The type's configuration with those of the sizes that it has, or, of a multimodal model, that its parts have."""
    kind = transformers.CONFIG_MAPPING[name]
    usual = kind()
    text = usual.get_text_config()
    if text is usual:
        return kind(**sizes_of(usual))
    parts = {part: config for part in kind.sub_configs if (config := getattr(usual, part, None)) is not None}
    return kind(**{part: sizes_of(config) if config is text else _known(config, SENSES) for part, config in parts.items()})


def sizes_of(usual: transformers.PreTrainedConfig) -> dict[str, Any]:
    """For a language model's configuration."""
    sizes = _known(usual, SIZES)
    if "kv_lora_rank" in sizes:  # latent attention: a head of keys for each of queries, and only a part of it rotated
        sizes |= {"num_key_value_heads": 4, "head_dim": 8}
    return {size: value for size, value in (sizes | OWN_SIZES.get(usual.model_type, {})).items() if value is not None}


def _known(config: transformers.PreTrainedConfig, sizes: dict[str, Any]) -> dict[str, Any]:
    return {size: value for size, value in sizes.items() if _has(config, size)}


def _has(config: transformers.PreTrainedConfig, size: str) -> bool:
    """Whether a configuration has this attribute, and one value of it for all layers."""
    try:
        return hasattr(config, size) and not (size in UNLESS_NONE and getattr(config, size) is None)
    except RuntimeError:  # its layers have values of their own
        return False


def jobs_of(folder: Path, scheme: str) -> dict[str, Any]:
    """The report of the second of two jobs on the model in a folder: as on a CPU, and as on a GPU."""
    import torch
    from finetune_trainer import base_model
    from finetune_trainer.stages import train

    torch.set_num_threads(1)
    job_of(folder, scheme, "float32")
    with mock.patch.object(train, "recomputes_activations", lambda model, **_: base_model.recomputes_activations(model, on_gpu=True)):
        return job_of(folder, scheme, "bfloat16")


def job_of(folder: Path, scheme: str, dtype: str) -> dict[str, Any]:
    """The report of a job on the model in a folder."""
    from support.tiny_jobs import run, tiny_job

    artifacts = ["adapter"] if scheme == "none" else ["adapter", "quantized"]
    changes = {"model": {"dtype": dtype}, "quantization": {"scheme": scheme}, "quality": {"onFailure": "Warn"}}
    destinations = [{"uri": f"file://{folder}/published-{scheme}-{dtype}"}]
    return run(
        tiny_job(folder, changes | {"outputs": {"artifacts": artifacts, "destinations": destinations}}), folder / f"{scheme}-{dtype}"
    )


def page(known: dict[str, Any]) -> str:
    """docs/models.md."""
    types = dict(sorted(known["types"].items()))
    of = {
        kind: {name: found for name, found in types.items() if found["outcome"] == kind}
        for kind in ("proved", "adapter", "failed", "not tried")
    }
    return f"""# Models

<!-- Written by `make bench-architectures`. -->

Every causal language model that transformers {known["transformers"]} knows, made tiny with random weights and led through two whole jobs on a CPU, in float32 and,
as on a GPU, in bfloat16 with activations computed again: LoRA on all linear layers, the switch, exact int8-int4 steps, export, the proof and publication; where the scheme is refused, with `quantization.scheme: none`. That shows that
the line works for an architecture's layers. It says nothing of the memory that a real one takes, or of how well it learns. Of multimodal models the language model is
trained, on text.

**Trained, quantized and proved** ({len(of["proved"])}): {_names(of["proved"])}.

**Adapter alone** ({len(of["adapter"])}), since the scheme refuses them, mostly mixtures of experts, whose experts are no linear layers: {_names(of["adapter"])}.

**Fail** ({len(of["failed"])}):

{_reasons(of["failed"])}

**Not tried** ({len(of["not tried"])}), as no tiny model was made of them:

{_reasons(of["not tried"])}
"""


def _names(found: dict[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in found)


def _reasons(found: dict[str, Any]) -> str:
    lines = ("| " + " | ".join((f"`{name}`", item["said"].replace("|", "\\|"))) + " |" for name, item in found.items())
    return "\n".join(("| type | why |", "|---|---|", *lines))


if __name__ == "__main__":
    main()
