"""Which models fit which GPUs: writes the table of docs/gpu.md by the arithmetic of the doctor.

``python scripts/gpu_table.py`` writes it again; a test checks that it is true.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO))

from app.config.model import MOST_AUTO_SLOTS  # noqa: E402
from deployments.engines.base import Launch  # noqa: E402
from deployments.engines.registry import adapter_named  # noqa: E402
from deployments.preflight.memory import (  # noqa: E402
    Fit,
    ModelShape,
    fit,
    kv_bytes_per_token,
    kv_room,
    weight_bytes,
)

PAGE: Final = REPO / "docs" / "gpu.md"
BEGIN, END = "<!-- scripts/gpu_table.py -->\n", "<!-- end -->\n"

GPUS: Final = {
    "24 GB (L4)": 23034, "48 GB (L40S)": 46068, "80 GB (H100)": 81559, "141 GB (H200)": 143771,
}  # fmt: skip
"""The memory that ``nvidia-smi`` reports for each size, in MiB."""
CONTEXTS: Final = (32768, 16384, 8192, 4096)


@dataclass(frozen=True, slots=True)
class Model:
    """A model: parameters in billions, bytes of each, and its shape as in ``config.json``."""

    billions: float
    bytes_each: float
    layers: int
    kv_heads: int
    context: int

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return int(self.billions * 1e9 * self.bytes_each)

    @property
    def shape(self) -> ModelShape:
        """Its shape; all of these have heads of 128 numbers, and a KV cache of 16 bits."""
        return ModelShape(True, self.layers, self.kv_heads, 256, self.context, "bfloat16", False)


MODELS: Final = {
    "Qwen3-4B": Model(4.02, 2, 36, 8, 40960),
    "Llama-3.1-8B": Model(8.03, 2, 32, 8, 131072),
    "Qwen3-8B": Model(8.19, 2, 36, 8, 40960),
    "Qwen3-14B": Model(14.77, 2, 40, 8, 40960),
    "Qwen3-30B-A3B": Model(30.53, 2, 48, 4, 40960),
    "Qwen3-32B": Model(32.76, 2, 64, 8, 40960),
    "Qwen3-32B, FP8": Model(32.76, 1.03, 64, 8, 40960),
    "Llama-3.3-70B, FP8": Model(70.55, 1.03, 80, 8, 131072),
}
"""Parameters and shapes as published with each model. Some layers of FP8 models are not FP8."""


def best(model: Model, mebibytes: int) -> Fit | None:
    """Return what fits on a GPU with vLLM's defaults; the longest context fits four times."""
    for context in CONTEXTS:
        args = {"max_model_len": context}
        launch = Launch("m", "m", "127.0.0.1", 0, 1, "", "python", args)
        needs = adapter_named("vllm").needs(launch, {})
        assert needs is not None
        room = kv_room(mebibytes << 20, weight_bytes(model.weights, model.shape, needs), needs)
        fits = fit(room, model.shape, needs)
        if fits is not None and fits.longest >= 4:
            return fits
    return None


def slots(fits: Fit) -> int:
    """Return the number of slots for what fits: a multiple of four, or of 16 from 32 on."""
    step = 16 if fits.usual >= 32 else 4
    return min(MOST_AUTO_SLOTS, fits.usual // step * step)


def table() -> str:
    """Return the table as Markdown."""
    lines = [
        f"| model | weights | KV cache of a token | {' | '.join(GPUS)} |",
        f"|{'---|' * (3 + len(GPUS))}",
    ]
    needs = adapter_named("vllm").needs(Launch("m", "m", "", 0, 1, "", ""), {})
    assert needs is not None
    for name, model in MODELS.items():
        cells = [_cell(best(model, size)) for size in GPUS.values()]
        token = kv_bytes_per_token(model.shape, needs) / 1024
        weights = f"{model.weights / 1e9:.1f} GB"
        lines.append(f"| {name} | {weights} | {token:.0f} KiB | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _cell(fits: Fit | None) -> str:
    return "no" if fits is None else f"`{slots(fits)}` x `{fits.context}`"


def filled(page: str) -> str:
    """Return the page with the table in its place."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
