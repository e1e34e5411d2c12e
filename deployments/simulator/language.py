"""Words instead of a model: the text of answers, the counting of tokens, embeddings. Pure.

A token is a word between white space. The words of an answer follow from the engine's seed and
the prompt, so that the same request has the same answer in every run.
"""

from __future__ import annotations

import hashlib
import math
import random
import sys
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Final

_TEXT: Final = """
a about above after again air all along also always among an and animal another answer any are
around as ask at away back bank be because become been before began begin being below between big
bird boat body book both bring build but by call came can car carry cause change city clear close
cold color come could country course cover cross cut dark day deep did different do does done door
down draw dry during each early earth east eat end enough even ever every eye face fact fall
family far farm fast father feel few field find fire first fish five food foot for form found four
free friend from full game garden gave get girl give go gold good great green ground grow had half
hand hard has have head hear heat help her here high hill him his hold home horse hot hour house
how hundred idea if in inch into is island it just keep kind king know land large last late laugh
law lead learn leave left less let letter life light like line list listen little live long look
low made make man many map mark may mean measure might mile mind minute money moon more morning
most mother mountain move much music must name near need never new next night north note nothing
notice now number ocean of off often old on once one only open or order other our out over own
page paper part pass pattern people piece place plain plan plant play point power press question
quick quiet rain reach read ready real red remember rest right river road rock room round rule run
sail same saw say school sea second see seem sentence set seven ship short should show side simple
since sing six size sky sleep slow small snow so some song soon sound south space stand star start
state stay step still stone stood stop story street strong study such summer sun sure table take
talk ten than that the their them then there these they thing think this those though thought
three through time to together too took top toward town travel tree true try turn two under unit
until up us use valley very voice wait walk want war warm was watch water wave way we week weight
well went were west what wheel when where which while white who whole why will wind window winter
wish with without wood word work world would write year yes yet you young your
"""
_WORDS: Final = tuple(_TEXT.split())
_SEQUENCE_LENGTH: Final = 8191
"""The number of words before they repeat; a prime, so that answers start anywhere."""

_LONGEST_MINIMUM: Final = 1000
"""The longest string or array that a schema can require."""

BLOCK: Final = 16
"""Tokens of a prompt that are cached together: vLLM's default block size."""


class Vocabulary:
    """The engine's endless sequence of words; every answer is a part of it."""

    def __init__(self, seed: int) -> None:
        words = random.Random(seed).choices(_WORDS, k=_SEQUENCE_LENGTH)
        self._tokens = [" " + word for word in words]
        self._seed = seed

    def tokens(self, prompt: str, choice: int, length: int) -> list[str]:
        """Return an answer's tokens; all but the first begin with a space."""
        start = zlib.crc32(prompt.encode(), self._seed & 0xFFFFFFFF) + 977 * choice
        start %= _SEQUENCE_LENGTH
        tokens = self._tokens[start : start + length]
        while len(tokens) < length:
            tokens += self._tokens[: length - len(tokens)]
        if tokens:
            tokens[0] = tokens[0][1:]
        return tokens


class PrefixCache:
    """The cached prefixes of prompts, in blocks; the least recently used are dropped first.

    As in vLLM, the last token of a prompt is always computed: a fully cached prompt reports less
    than its length.
    """

    def __init__(self, blocks: int) -> None:
        self._capacity = blocks
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def take(self, prompt: Sequence[object]) -> int:
        """Return how many tokens of a prompt were cached, and cache the whole of it."""
        cached, key, hitting = 0, 0, True
        for start in range(0, (len(prompt) - 1) // BLOCK * BLOCK if self._capacity else 0, BLOCK):
            key = hash((key, *prompt[start : start + BLOCK]))
            hitting = hitting and key in self._blocks
            cached += BLOCK if hitting else 0
            self._blocks[key] = None
            self._blocks.move_to_end(key)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)
        return cached


def embed(text: str, dimensions: int, seed: int) -> array[float]:
    """Return the unit vector of a text, as 32-bit floats.

    Equal texts have equal vectors. Unlike a model's, similar texts have unrelated vectors.
    """
    digest = hashlib.shake_128(f"{seed} {text}".encode()).digest(2 * dimensions)
    values = array("h", digest)
    if sys.byteorder == "big":
        values.byteswap()
    length = math.sqrt(sum(value * value for value in values)) or 1.0
    return array("f", [value / length for value in values])


def minimal_json(schema: Any, definitions: Mapping[str, Any] | None = None) -> Any:
    """Return the smallest value that fits the common parts of a JSON schema: types, required
    properties, enumerations, lower bounds, references to its own definitions."""
    if not isinstance(schema, Mapping):
        return {}
    if definitions is None:
        definitions = schema.get("$defs") or schema.get("definitions") or {}
    if isinstance(reference := schema.get("$ref"), str):
        return minimal_json(definitions.get(reference.rpartition("/")[2]), definitions)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key):
            return minimal_json(schema[key][0], definitions)
    return _minimal_of_type(schema, definitions)


def _minimal_of_type(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Any:
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = kind[0] if kind else None
    if kind == "string":
        return "x" * min(int(schema.get("minLength", 0)), _LONGEST_MINIMUM)
    if kind in ("integer", "number"):
        return max(schema.get("minimum", 0), schema.get("exclusiveMinimum", -1) + 1)
    if kind == "boolean":
        return False
    if kind == "null":
        return None
    if kind == "array":
        item = minimal_json(schema.get("items"), definitions)
        return [item] * min(int(schema.get("minItems", 0)), _LONGEST_MINIMUM)
    properties = schema.get("properties") or {}
    required = schema.get("required") or []
    return {name: minimal_json(properties.get(name, {}), definitions) for name in required}
