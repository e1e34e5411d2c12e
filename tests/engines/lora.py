"""A LoRA adapter of random weights, made by the engine's own torch."""

import subprocess
from functools import cache

ADAPTER = "tuned/smollm2"
ADAPTER_PRICES = {"input": 3, "output": 7}

_MAKE = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
folder, base = Path(sys.argv[1]), Path(sys.argv[2])
config = json.loads((base / "config.json").read_text())
torch.manual_seed(1)
rank, width = 8, config["hidden_size"]
head = config.get("head_dim") or width // config["num_attention_heads"]
widths = {"q_proj": width, "v_proj": head * config["num_key_value_heads"]}
weights = {}
for layer in range(config["num_hidden_layers"]):
    for name, out in widths.items():
        place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
        weights[place + ".lora_A.weight"] = torch.randn(rank, width) * 0.2
        weights[place + ".lora_B.weight"] = torch.randn(out, rank) * 0.2
folder.mkdir(parents=True, exist_ok=True)
save_file(weights, folder / "adapter_model.safetensors")
(folder / "adapter_config.json").write_text(json.dumps({
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none",
    "target_modules": sorted(widths), "base_model_name_or_path": str(base),
}))
"""


@cache
def make_lora(folder, model, python):
    """Write an adapter of a model's attention into a folder; ``python`` is an engine's."""
    subprocess.run([python, "-c", _MAKE, str(folder), model], check=True, timeout=300)
