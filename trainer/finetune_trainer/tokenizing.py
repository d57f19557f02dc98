"""What the model's tokenizer makes of rows: its chat template, its end of a sequence, token ids with labels.

Called by stages/data.py. Chat templates that print today's date print 26 Jul 2024, whatever the day: the same rows are the same token ids, and a run
that goes on after midnight keeps its checkpoints.
"""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, tzinfo
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from finetune_trainer import rendering
from finetune_trainer.chat_template import Render, TemplateError
from finetune_trainer.conversation import Messages
from finetune_trainer.dataset import Dataset
from finetune_trainer.errors import DataError
from finetune_trainer.example import IGNORED, Example
from finetune_trainer.failures import first_line
from finetune_trainer.rendering import Segment

RENDER_SECONDS = 30
"""Of one conversation, which takes milliseconds; one that does not end would take for ever."""


def examples(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[Example]]:
    """Those of each row, however long they are.

    Raises:
        DataError: a tokenizer without an end-of-sequence token, or a row that rendering.py refuses.
    """
    template, eos, adds_bos = _template(tokenizer), _eos(tokenizer), _adds_bos(tokenizer)
    for row in rows:
        texts = rendering.render(row, rows.form, template, eos, rows.name)
        begun = "".join(piece.text for piece in texts[0]).startswith(str(tokenizer.bos_token))
        bos = adds_bos and not begun and not rendering.is_conversation(row, rows.form, has_template=template is not None)
        yield [tokenize(text, tokenizer, bos=bos) for text in texts]


def preview(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the first example, with what is trained between ⟦ and ⟧."""
    first = rendering.render(next(iter(rows)), rows.form, _template(tokenizer), _eos(tokenizer), rows.name)[0]
    return rendering.preview(first)


def tokenize(segments: Sequence[Segment], tokenizer: PreTrainedTokenizerBase, *, bos: bool) -> Example:
    """Token ids of the segments one after the other.

    Args:
        bos: whether the beginning-of-sequence token stands first; rendered chat templates bring their own.
    """
    input_ids: list[int] = [tokenizer.bos_token_id] if bos else []
    labels: list[int] = [IGNORED] * len(input_ids)
    text = ""
    for segment in segments:
        text += segment.text
        whole = input_ids[: int(bos)] + tokenizer(text, add_special_tokens=False)["input_ids"]
        # A tokenizer may treat the beginning of a text in its own way, so the whole is tokenized; the piece alone only where a token
        # reaches across its border, since at inference the prompt ends there.
        fits = whole[: len(input_ids)] == input_ids
        tokens = whole[len(input_ids) :] if fits else tokenizer(segment.text, add_special_tokens=False)["input_ids"]
        input_ids += tokens
        labels += tokens if segment.trained else [IGNORED] * len(tokens)
    return Example(input_ids, labels)


def _template(tokenizer: PreTrainedTokenizerBase) -> Render | None:
    if not tokenizer.chat_template:
        return None

    def render(messages: Messages, generation_prompt: bool, /, **variables: Any) -> str:
        try:
            with _fixed_date(), _time_limit():
                return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt, **variables))
        except RecursionError as error:
            raise TemplateError("it calls itself without end") from error
        except _TooLongError as error:
            raise TemplateError(f"it is not done after {RENDER_SECONDS} s") from error
        except Exception as error:  # it is a program: a division by zero or a range without end is its own mistake too
            refused = type(error) is jinja2.TemplateError  # what raise_exception raises; the engine's own errors are of classes below it
            raise TemplateError(first_line(error) or type(error).__name__, refused=refused) from error

    return render


class _TooLongError(Exception):
    """A template loops."""


@contextmanager
def _time_limit() -> Iterator[None]:
    """Ends a loop without end, which would hold a GPU until the job's deadline; in the main thread alone, where Python runs signal handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGALRM, _raise_too_long)
    timer = signal.setitimer(signal.ITIMER_REAL, RENDER_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def _raise_too_long(*_: object) -> None:
    raise _TooLongError


class _FixedDate(datetime):
    """A clock that stands at the date which Llama's templates fall back to."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> "_FixedDate":
        return cls(2024, 7, 26, tzinfo=tz)


@contextmanager
def _fixed_date() -> Iterator[None]:
    # strftime_now reads transformers' own import of datetime; a function that is handed to the template reaches it as mere text.
    clock = chat_template_utils.datetime
    chat_template_utils.datetime = _FixedDate
    try:
        yield
    finally:
        chat_template_utils.datetime = clock


def _eos(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.eos_token:
        raise DataError(
            "The model's tokenizer has no end-of-sequence token, so a model that is trained with it would never stop; set eos_token in its tokenizer_config.json."
        )
    return str(tokenizer.eos_token)


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
