"""docs/troubleshooting.md, generated from the errors, their states and the sentences below: `python -m finetune_trainer.troubleshooting` writes it.

A test holds the page to this, and each sentence to the code that says it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune_api.exits import PERMANENT, REASONS
from finetune_api.states import STATES, Reason

from finetune_trainer.errors import FineTuneError

DOCS_FILE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"


@dataclass(frozen=True)
class Symptom:
    """One sentence that a run says.

    Attributes:
        says: a part of it, as the code has it; … stands for what differs from run to run.
        why: how it comes to that.
        mend: what to do.
    """

    says: str
    why: str
    mend: str


TOPICS: dict[str, tuple[Symptom, ...]] = {
    "Out of memory": (
        Symptom(
            "Out of memory",
            "The process found no more memory, on the GPU or on the host, and could say so.",
            "Lower `training.maxLength` or `lora.rank`, set `model.dtype: bfloat16`, or raise `resources.memory` or take a GPU with more.",
        ),
        Symptom(
            "The fresh process that proves the exported model",
            "Verifying loads the exported model a second time; that process found no memory, or was killed for it.",
            "Raise `resources.memory`; the run goes on at converting, no optimizer step is repeated.",
        ),
        Symptom(
            "No space is left on the disk",
            "Checkpoints, the exported model or a download filled the disk.",
            "Raise `storage.workspace.size`, or free some space under `--workdir`; what is complete stays and is gone on from.",
        ),
    ),
    "Slow training": (
        Symptom(
            "Training took … s for … steps on the CPU",
            "There was no GPU, or the job asked for none.",
            "Set `resources.gpus` to 1, or run it on a machine with a GPU.",
        ),
        Symptom("PyTorch computed with … of … cores", "OMP_NUM_THREADS keeps PyTorch from the others.", "Unset it."),
        Symptom(
            "Training computed in float32",
            "`model.dtype` asks for float32, or `auto` took it, as it does on every CPU.",
            "Set `model.dtype: bfloat16`.",
        ),
        Symptom(
            "A step took up to … micro-batches",
            "Memory was too short for larger ones: by the estimate, or because it ran out. Each of them reads all weights anew.",
            "Raise `resources.memory`, take a GPU with more, or lower `training.maxLength`.",
        ),
        Symptom(
            "Choosing scales and rounding of the weights took",
            "At the switch, every weight of a 4-bit grid is rounded by what its layer computes. Of a large model trained for few steps that is a large part.",
            "Train with an 8-bit scheme, which has nothing to choose, or leave it: a longer training takes no longer for it.",
        ),
        Symptom(
            "Measuring held-out losses took",
            "All held-out rows are measured for base, tuned, nearest values, PTQ and quantized model, and for the adapter where it is shipped.",
            "Lower `dataset.evaluation.percent`, or give it a smaller source.",
        ),
        Symptom(
            "Mirroring checkpoints took",
            "Training waits while a checkpoint is copied to S3.",
            "Raise `training.checkpointEvery`, use a nearer bucket, or a workspace that lasts, which needs no mirror.",
        ),
        Symptom("Fetching the model took", "Each pod downloads the model anew.", "Set `storage.cache.persistentVolumeClaim`."),
        Symptom(
            "Fetching and tokenizing the data took",
            "Every attempt reads all rows.",
            "Remove rows that teach nothing new, or put the file nearer to the cluster.",
        ),
    ),
    "A model that will not load: its path": (
        Symptom("does not exist; correct the path.", "The path is misspelt, or relative.", "Write the whole path: `file:///models/base`."),
        Symptom("is a file, but a model is a folder with config.json and safetensors; name the folder.", "The source names one of its files.", "Name the folder."),
        Symptom("has no config.json; it must name the folder of a transformers model.", "It is a folder above or below the model's, or an empty prefix.", "Name the folder that holds config.json."),
        Symptom("has no such revision; correct the branch, tag or commit after '@'.", "The Hub has the repository, but not this revision.", "Correct it, or leave it out for the newest."),
    ),
    "A model that will not load: its format": (
        Symptom("has weights only as .bin or .pt, which can run code when loaded; convert them to safetensors.", "Pickle files run whatever code they hold.", "Convert them on a machine that may: `save_pretrained` writes safetensors."),
        Symptom("has a config.json but no .safetensors file; upload the weights as safetensors.", "The weights are missing, or in another format such as GGUF.", "Upload them as safetensors."),
        Symptom("needs a Python package that is not installed here (", "transformers' code of this architecture imports more than the trainer brings, as Gemma 3n's timm and Pillow.", "Build the trainer's image with the package, or choose another model."),
        Symptom("The model in … does not load (…); ", "A file is damaged or a shard is missing.", "Download it again; the words in the brackets are the library's own."),
        Symptom("choose a model whose architecture transformers … knows, or download this one again", "The architecture is newer than the trainer image, or config.json is damaged.", "Use a newer image, choose another model, or download it again."),
        Symptom("which is no causal language model; choose one that is.", "It reads images or sound, or fills gaps in a text.", "Choose a model that writes text."),
        Symptom("but config.json makes it …; download both again from one place.", "Weights and config.json are of two models.", "Take both from one place."),
        Symptom("weights, the first is …; download it again.", "The files lack weights that the architecture has.", "Download it again, all shards."),
        Symptom("The tokenizer in … does not load", "tokenizer.json is missing or damaged.", "Put the files beside the weights that the tokenizer's `save_pretrained` writes."),
    ),
    "A model that will not load: what it depends on": (
        Symptom("needs Python code of its own (auto_map in tokenizer_config.json); set spec.model.trustRemoteCode to true if you trust it.", "The tokenizer is not part of transformers.", "Read that code; if you trust it, set `model.trustRemoteCode: true`."),
        Symptom("brings Python code of its own (auto_map in config.json); set spec.model.trustRemoteCode to true if you trust it.", "The architecture is not part of transformers.", "Read that code; if you trust it, set `model.trustRemoteCode: true`."),
        Symptom("spec.lora.targetModules: LoRA on … trains what is no linear layer", "A mixture of experts keeps its experts in tensors that are no layers; LoRA reaches them, but no scheme quantizes them.", "Name the attention's layers alone where they are half of the weights, or set `quantization.scheme: none`."),
        Symptom(", so exact quantization-aware training could not merge its adapter; ", "The layer is a linear one with a forward pass of its own, as Falcon's, or one whose weight the model reads by itself; such a layer is never quantized.", "Leave it out of `lora.targetModules`, or set `quantization.scheme: none`."),
        Symptom(" of this model share one weight, which no scheme can quantize; choose scheme none.", "Layers of the model, such as Zamba's attention, use one weight together; each has an adapter of its own, so what would be shipped differs.", "Set `quantization.scheme: none`."),
        Symptom("does not suit this model (…); name the layers that do, such as q_proj,v_proj.", "peft has no adapter for one of the layers, such as a Mamba block's out_proj; `all-linear` leaves them out.", "Name the layers: `lora.targetModules: q_proj,k_proj,v_proj,o_proj`."),
        Symptom(", whose weight this model's code reads by itself, so that an adapter there would change nothing; leave it out.", "The model never calls the layer, as Mamba its dt_proj; `all-linear` leaves it out.", "Leave it out of `lora.targetModules`."),
        Symptom("makes its logits otherwise than by its output head from its last hidden state", "Between the last hidden state and the logits the model computes more than the trainer's loss knows of, such as another layer or a cap of another name.", "Choose another model; none of this architecture can be trained."),
        Symptom("this model computes other logits in training mode than where it serves", "Part of the model's code is for training or for serving alone, as RWKV's division of weights; what would be shipped is not what was trained.", "Try `model.dtype: float32`, set `quantization.scheme: none`, or accept the difference with `quantization.acceptInexact: true`."),
        Symptom("finds no GPU in this pod; ", "The node's driver is older than PyTorch's CUDA, or the device plugin gave no GPU.", "Renew the driver (CUDA 13 needs the 580 series or newer), check the device plugin."),
        Symptom("but PyTorch is built for ", "The GPU is of a generation that PyTorch's CUDA has left behind, such as V100, or newer than PyTorch.", "Choose a node whose GPU has compute capability 7.5 or newer; a laptop may train on the CPU."),
        Symptom("of this model's linear weights, less than half", "The group size of the scheme does not divide the layers' input sizes.", "Take the scheme and group size that the sentence names."),
        Symptom("is quantized already (", "LoRA and quantization-aware training need the original weights.", "Set `model.source` to the model that it was made from."),
        Symptom("has values that are not finite (NaN or infinite), with which nothing can be trained", "The model's file is damaged, or was saved from a training that diverged.", "Download it again, or choose another one."),
        Symptom("holds no job description of this version", "Operator and trainer image are of different versions.", "Use the image that belongs to the operator."),
    ),
    "A model that will not load: memory": (
        Symptom(
            "Out of memory",
            "In stage Loading: the weights alone do not fit. They take 4 bytes a parameter in float32, 2 in bfloat16.",
            "Set `model.dtype: bfloat16`, raise `resources.memory`, or choose a smaller model.",
        ),
    ),
    "Wrong data": (
        Symptom("is empty, but a dataset needs at least one row; check what wrote it.", "The file has no row.", "Check what wrote it."),
        Symptom("is not UTF-8 text", "It is in another encoding, compressed, or Parquet.", "Save it as UTF-8 JSON Lines, one object a line."),
        Symptom("is not JSON (…); write one JSON object a line.", "A line is cut off, or one JSON document spans many lines.", "Write one object a line: `jq -c .[] rows.json > rows.jsonl`."),
        Symptom("but a row has messages, prompt and completion, instruction and output, or text; rename the columns.", "The columns have other names.", "Rename them."),
        Symptom("but the dataset's form is …; add it or set dataset.format.", "Rows of several forms, or `dataset.format` names another one.", "Keep to one form in a file."),
        Symptom("has no assistant turn, so there is nothing to learn from it; add one or drop the row.", "Only answers are trained.", "Add the answer, or drop the row."),
        Symptom("no row has a completion that fits into training.maxLength", "Every row is cut off before its answer begins.", "Raise `training.maxLength`, or shorten the prompts."),
        Symptom("rows were cut at training.maxLength (… tokens) and do not learn where to end.", "They are longer; what is behind that length is not trained, their end neither.", "Raise `training.maxLength`, or shorten or split the rows."),
        Symptom("holds conversations, but the model has no chat template", "A base model knows no turns.", "Use its instruction-tuned sibling, or prompt and completion columns."),
        Symptom("the model's chat template makes no use of the row's …; choose a model that is made for tools, or remove them.", "The template knows no tools, or no calls, so that nothing of them would be trained.", "Train a model whose chat template renders them, or write the calls into the contents."),
        Symptom("the model's chat template does not render the whole … of turn …, so that it would not be trained; ", "Templates of reasoning models drop what stands before </think>; others know no reasoning, or no text beside a call.", "Take out of the row what the template leaves out, or write the row as prompt and completion texts."),
        Symptom("in its midst, behind which nothing would be trained; remove it.", "The text of an answer has the token that ends a turn.", "Remove it from the text; the template writes it."),
        Symptom("has columns that are not read: ", "No form of a row has a column of that name.", "Nothing, if nothing in it is to be learnt; else rename it."),
        Symptom("refuses the conversation (…); change its turns", "Two turns of one role in a row, or a role that it does not know.", "Change the turns."),
        Symptom("fails on the conversation (…); correct the template, or change the turns if other rows pass", "The template is wrong, loops for ever, or does what no template may; or it needs of a row what it lacks.", "Correct the template (chat_template.jinja, or in tokenizer_config.json), or change the turns if other rows pass."),
        Symptom("use the tokenizer that belongs to the model.", "The tokenizer has more tokens than the model has embeddings.", "Take both from one place."),
        Symptom("the model's chat template writes the turns before turn … otherwise once it is there; ", "What a model was asked is then no beginning of what it is to learn.", "Choose a model with another template, or write the row as prompt and completion texts."),
        Symptom("examples, since the model's chat template writes an answer otherwise once others follow.", "Some templates drop what was thought in earlier answers: each answer is trained behind the history that it has at inference.", "Nothing; an epoch has more steps. Rows of one answer cost less."),
        Symptom("held-out rows are also trained on, so losses look better than they are.", "The held-out file has rows of the dataset, or two rows have an answer or a part in common.", "Remove them from one of the two files."),
        Symptom("The loss of held-out row", "The trained model computes NaN or infinity there.", "Lower `training.learningRate`, or set `model.dtype: float32`."),
        Symptom("The longest row has … tokens, but the model has … positions", "The model learnt an embedding for each position, and has no more.", "Set `training.maxLength` to that number; longer rows are cut."),
        Symptom("is enough for a single optimizer step, which is a quantization-aware one,", "`quality.maxLossIncreasePercent` has nothing to compare with.", "Add rows or epochs, lower `training.batchSize`, or remove the limit."),
        Symptom("is not finite at training.learningRate", "The learning rate is too high, or a row is broken.", "Lower it; checkpoints of earlier steps are kept."),
    ),
    "Access": (
        Symptom("or is empty; create it with the keys", "The Secret is missing in the job's namespace.", "Create it, then set `runPolicy.rerun` to a new string."),
        Symptom("; the accepted keys are", "The Secret has keys of other names.", "Name them as the sentence says."),
        Symptom("the bucket does not exist, or these credentials may not see it; create it or correct its name", "The bucket's name is wrong, or is another account's.", "Create it, or correct the name."),
        Symptom("these credentials may not do this, or the access key or secret key is wrong; correct the credentials or the bucket's policy", "The server refused what the run must do.", "The user needs to list, read, write and delete below the prefix."),
        Symptom("no credentials were given, and the server asks for some", "The bucket is not public, and no field names a Secret; on a laptop there are no AWS keys.", "Create a Secret and name it in the field that the sentence names; on a laptop set the keys, or `AWS_PROFILE` to a profile of `~/.aws`."),
        Symptom("needs a Hub token with write access, and none was given; ", "There is no token.", "Give one: a Secret in a cluster, `HF_TOKEN` or `hf auth login` on a laptop."),
        Symptom("does not exist on the Hub, or is private, and no token was given", "Without a token the Hub does not say which.", "Correct the name, or give a token: a Secret in a cluster, `HF_TOKEN` or `hf auth login` on a laptop."),
        Symptom("is gated, and no token was given", "The model's owner asks for consent, and wants to know whose.", "Accept the terms, and give a token of that account."),
        Symptom("; give one that is valid and allowed to do this (key HF_TOKEN).", "The token is wrong, expired, or may only read.", "Make one with write access."),
        Symptom("make the repository private on the Hub, name another repository, or set private: false.", "The destination has `private: true`, but the repository was there before and is public, and so would the model be.", "Do one of the three; after the first, set `runPolicy.rerun` to a new string."),
        Symptom("is gated; accept its terms on the Hub and use a token of that account (key HF_TOKEN).", "The model's owner asks for consent.", "Accept the terms with the account of the token."),
        Symptom("does not exist on the Hub, or this token may not see it", "The Hub does not tell a stranger whether a private repository exists.", "Correct the name, or give a token that may see it."),
    ),
    "Certificates": (
        Symptom("put its authority's certificate into the ConfigMap of the chart's trainer.caBundle", "S3 or the Hub has a certificate of a private authority, or a proxy puts its own in its place.", "[installing.md](installing.md) says how."),
        Symptom("to a file with its authority's certificate.", "The same, on a laptop.", "Export the variable; the file is in PEM form."),
        Symptom("is for another name; write the name that it is for, or give the server a certificate for this one.", "The endpoint is written as an address or a short name.", "Write the name that is in the certificate."),
        Symptom("has expired or is not valid yet; renew it, or set this machine's clock.", "Nobody renewed it, or the clock is wrong.", "Renew it, or set the clock."),
        Symptom("which is no readable file of certificates in PEM form; correct it.", "The file is missing from the image or the machine, or is something else.", "Correct the path."),
        Symptom("answers without TLS; write ", "The endpoint says https, but the server speaks plain HTTP at that port.", "Correct the endpoint."),
    ),
    "A run that was stopped": (
        Symptom("is passed over: ", "A checkpoint was not finished, or its files are not what its seal says.", "Nothing: the one before it is used."),
        Symptom("The model, its dtype or the data has changed since the checkpoint of step", "A source has other content under the same name, or `model.dtype` is auto and the run moved between a GPU and a CPU.", "Nothing, if that was meant; else pin a revision, or set `model.dtype`."),
        Symptom("is not taken up: ", "A file of an earlier publication is gone, unreadable, or has other bytes.", "Nothing: it is made and published again."),
        Symptom("Another run is at work in", "Two runs in one working directory would remove each other's checkpoints.", "Wait for its end, or give this one another `--workdir`."),
        Symptom("was not mirrored: ", "S3 refused or did not answer; the training went on.", "Mend what the sentence names: what is not mirrored ends with the pod."),
        Symptom("Checkpoints end with this pod", "Nothing that the job names outlasts it.", "Set `storage.checkpoints.uri` or `storage.workspace.persistentVolumeClaim`."),
    ),
}  # fmt: skip

_HEAD = """<!-- Generated from trainer/finetune_trainer by `make crd`; do not edit. -->
# When something goes wrong

Start with the sentence. `kubectl describe ftj NAME` has it as `message`; on a laptop it is the last line. It names the field or the file, what was found, and
the mend. A traceback, for a bug report, is in `debug.log` in the working directory of `finetune run` and `finetune preflight`; every command prints it with `FINETUNE_DEBUG=1`.
`finetune validate` and `finetune preflight` say the same before anything trains. [status.md](status.md) lists every state, [exit-codes.md](exit-codes.md) every exit code.

## Every class of failure

| error | exit code | reason | what it means | retried by Kubernetes | what to do |
|---|---|---|---|---|---|
"""

_OUTSIDE = """
The kernel's end of a pod leaves no sentence of the trainer's: reason **OOMKilled**, exit code 137. {means} {action}
"""


def markdown() -> str:
    """The page."""
    oom = STATES[Reason.OOM_KILLED]
    outside = _OUTSIDE.format(means=_sentence(oom.means), action=_sentence(oom.action))
    return _HEAD + "".join(f"{line}\n" for line in _classes()) + outside + "".join(f"{line}\n" for line in _topics())


def _classes() -> Iterator[str]:
    for kind in FineTuneError.__subclasses__():
        reason = REASONS[kind.exit_code]
        state, retried = STATES[reason], "no" if kind.exit_code in PERMANENT else "yes"
        yield f"| {kind.__name__} | {kind.exit_code.value} | {reason} | {state.means} | {retried} | {state.action} |"


def _topics() -> Iterator[str]:
    for topic, symptoms in TOPICS.items():
        yield f"\n## {topic}\n\n| it says | why | what to do |\n|---|---|---|"
        for symptom in symptoms:
            yield f"| {symptom.says.strip(' ;')} | {symptom.why} | {symptom.mend} |"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


if __name__ == "__main__":
    DOCS_FILE.write_text(markdown(), encoding="utf-8")
