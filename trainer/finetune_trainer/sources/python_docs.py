"""builtin://python-docs: Python's own language reference, shipped with every Python, as instruction rows.

Called by sources/builtin.py. Pure and deterministic for one Python version; the demo trains on it.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

SHORTEST_CHARACTERS = 100
LONGEST_CHARACTERS = 480  # about 110 tokens
MOST_ROWS = 384
_OPENING_WORDS = 6
_UNDERLINE = re.compile(r"[*=\-~^]{3,}")
_NOT_PROSE = re.compile(r"[ \t]|[*\-+|\[]\s?|\d+\.\s|Changed in version|New in version|Deprecated since|Added in version")


@dataclass(frozen=True)
class Paragraph:
    """One paragraph of prose and the title of the section it stands in."""

    section: str
    text: str


def instruction_rows(topics: Mapping[str, str], limit: int = MOST_ROWS) -> list[dict[str, str]]:
    """Rows {instruction, output}: explain a section, from a paragraph's opening words.

    Args:
        topics: text by name, as in pydoc_data.topics; the order of the names does not matter.
        limit: most rows; a longer list is thinned evenly, so that every section keeps its share.

    Returns:
        At most `limit` rows, each paragraph once, ordered by topic.
    """
    unique = {item.text: item for name in sorted(topics) for item in paragraphs(topics[name])}
    kept = list(unique.values())
    count = min(limit, len(kept))
    return [_row(kept[index * len(kept) // count]) for index in range(count)]


def paragraphs(text: str) -> Iterator[Paragraph]:
    """The paragraphs of prose of one topic that are neither too short nor too long, with their section's title."""
    section = ""
    for block in re.split(r"\n\s*\n", text):
        lines = block.strip("\n").split("\n")
        if len(lines) >= 2 and _UNDERLINE.fullmatch(lines[1].strip()):
            section = lines[0].replace('"', "").strip()
            continue
        prose = " ".join(block.split())
        if section and not any(line.startswith((" ", "\t")) for line in lines) and _is_sentence(prose):
            yield Paragraph(section, prose)


def _is_sentence(prose: str) -> bool:
    return SHORTEST_CHARACTERS <= len(prose) <= LONGEST_CHARACTERS and prose.endswith(".") and not _NOT_PROSE.match(prose)


def _row(item: Paragraph) -> dict[str, str]:
    opening = " ".join(item.text.split()[:_OPENING_WORDS])
    return {"instruction": f"Explain this about Python's {item.section}: {opening} ...", "output": item.text}
