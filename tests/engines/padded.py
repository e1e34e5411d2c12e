"""A model whose attention heads can be shared by two: SmolLM2 has nine, with three of keys.

Heads are added whose weights are all zero. What they add to a layer's output is zero as well, so
the model says what it said before.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

_LENGTH = 8
"""Bytes of a safetensors file that tell the length of its header."""


def pad_heads(model: Path, into: Path, *, heads: int, of_keys: int) -> None:
    """Write a Llama model, of one safetensors file, with so many heads into a new folder.

    Args:
        model: the folder of the model.
        into: the folder to make.
        heads: how many of queries there are to be.
        of_keys: how many of keys and values; as many queries share one as before.
    """
    shutil.copytree(model, into)
    config = json.loads((model / "config.json").read_text())
    size, hidden = config["head_dim"], config["hidden_size"]
    assert heads * config["num_key_value_heads"] == of_keys * config["num_attention_heads"]
    config |= {"num_attention_heads": heads, "num_key_value_heads": of_keys}
    (into / "config.json").write_text(json.dumps(config))
    shapes = {
        "q_proj.weight": [heads * size, hidden],
        "k_proj.weight": [of_keys * size, hidden],
        "v_proj.weight": [of_keys * size, hidden],
        "o_proj.weight": [hidden, heads * size],
    }
    weights = (model / "model.safetensors").read_bytes()
    start = _LENGTH + int.from_bytes(weights[:_LENGTH], "little")
    header, data, at = json.loads(weights[_LENGTH:start]), [], 0
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        first, last = tensor["data_offsets"]
        piece = weights[start + first : start + last]
        for ending, shape in shapes.items():
            if name.endswith(ending):
                piece = _pad(piece, tensor["shape"], shape)
                tensor["shape"] = shape
        tensor["data_offsets"] = [at, at + len(piece)]
        at += len(piece)
        data.append(piece)
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % _LENGTH)
    head = len(words).to_bytes(_LENGTH, "little") + words
    (into / "model.safetensors").write_bytes(head + b"".join(data))


def _pad(piece: bytes, old: list[int], new: list[int]) -> bytes:
    """Return a matrix with rows and columns of zeros added at its end."""
    width = len(piece) // (old[0] * old[1])
    row, more = old[1] * width, bytes((new[1] - old[1]) * width)
    rows = (piece[at : at + row] + more for at in range(0, len(piece), row))
    return b"".join(rows) + bytes((new[0] - old[0]) * new[1] * width)
