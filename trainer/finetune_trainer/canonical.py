"""The same bytes for the same content: safetensors writes a file's metadata in the order of a hash map, which is another one in every process.

Called by stages/convert.py, since torchao describes each of its tensors in the metadata. Then a model that is converted again, after a kill, is the same
files with the same digests, and nothing is uploaded twice.
"""

import json
from pathlib import Path


def sort_metadata(path: Path) -> None:
    """Sorts the metadata of a safetensors file by name, in place; tensors and their offsets stay as they are.

    Source of the format: 8 bytes little-endian length of the header, the header as JSON, the tensors (safetensors' README).
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # as it is for what the library wrote; what would not fit stays in its order
            file.seek(8)
            file.write(text.ljust(length))
