"""How a field of the API is declared: its description, its class, and whether any code serves it yet.

The CRD, the offline verdicts, the digests and the docs are all generated from what stands here, so a field is described once.
Must not import anything of ours.
"""

from collections.abc import Iterator
from enum import StrEnum
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel
from pydantic.fields import FieldInfo


class FieldClass(StrEnum):
    """What an edit of the field does to a job that exists (docs: "Changing the spec")."""

    TRAIN = "train"  # changes the weights: the old Job stops, a new run trains
    RUN = "run"  # a new Job, which starts from what the same trainDigest already has
    LIVE = "live"  # patched onto the Job, without a new run


class ApiModel(BaseModel):
    """A frozen object of the API: camelCase on the wire, unknown fields refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=to_camel, populate_by_name=True, use_enum_values=False)

    def wire(self, *, defaults: bool = False) -> dict[str, Any]:
        """The object as JSON values under its wire names; without `defaults`, only what differs from them."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=not defaults, exclude_none=True)


def spec_field(
    description: str,
    *,
    default: Any = ...,
    field_class: FieldClass | None = None,
    not_yet: str = "",
    served: tuple[str | int, ...] = (),
    **constraints: Any,
) -> Any:
    """A field of the spec.

    Args:
        description: unit, default and effect, for `kubectl explain`.
        field_class: what an edit does; None inherits the class of the object that holds the field.
        not_yet: a sentence when no code serves the field yet; rules.py makes CEL rule and offline verdict of it, which refuse any value but the default.
        served: with `not_yet`, the values that are served already; of a list, its items.
    """
    marks: dict[str, Any] = {}
    if field_class is not None:
        marks["fieldClass"] = field_class.value
    if not_yet:
        marks["notYet"] = not_yet
        marks["served"] = list(served)
    factory = {"default_factory": default} if callable(default) else {"default": default}
    return Field(description=description, json_schema_extra={"x-finetune": marks}, **factory, **constraints)


def marks_of(info: FieldInfo) -> dict[str, Any]:
    """The marks that `spec_field` put on a field; empty for a plain pydantic field."""
    extra = info.json_schema_extra
    marks = extra.get("x-finetune", {}) if isinstance(extra, dict) else {}
    return marks if isinstance(marks, dict) else {}


def nested_model(annotation: Any) -> type[ApiModel] | None:
    """The API object inside an annotation such as `X`, `X | None` or `tuple[X, ...]`, or None for a leaf."""
    if isinstance(annotation, type) and issubclass(annotation, ApiModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := nested_model(part))), None)


def leaves(
    model: type[ApiModel], inherited: FieldClass | None = None, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], FieldInfo, FieldClass | None]]:
    """Every leaf field of a model as (wire path, field, class); list items share the path of their list."""
    for info_name, info in model.model_fields.items():
        here = (*path, info.alias or info_name)
        declared = marks_of(info).get("fieldClass")
        field_class = FieldClass(declared) if declared else inherited
        inner = nested_model(info.annotation)
        if inner is None:
            yield here, info, field_class
        else:
            yield from leaves(inner, field_class, here)
