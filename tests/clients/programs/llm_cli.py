"""The ``llm`` command. A model of one's own is named in its ``extra-openai-models.yaml``."""

import json
import os
import subprocess
from pathlib import Path

folder = Path(os.environ["LLM_USER_PATH"])
folder.mkdir()
common = f"api_base: {os.environ['URL']}/v1, api_key_name: frontline, supports_tools: true"
folder.joinpath("extra-openai-models.yaml").write_text(
    f"- {{model_id: frontline, model_name: model, service_tier: true, {common}}}\n"
    f"- {{model_id: missing, model_name: no/such, service_tier: true, {common}}}\n"
)
folder.joinpath("keys.json").write_text(json.dumps({"frontline": os.environ["KEY"]}))


def llm(*arguments, tier="priority", model="frontline"):
    command = ["llm", "-m", model, "-o", "service_tier", tier, "-o", "max_tokens", "12"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    return done.stdout.strip(), done.stderr.strip()


text, usage = llm("Tell me of the sea", "--no-stream", "-u")
streamed, again = llm("Tell me of the sea", "-u")
print(
    json.dumps(
        {
            "text": text,
            "streamed": streamed,
            "usage": [usage, again],
            "unknown_model": llm("x", model="missing")[1],
            "bad_tier": llm("x", tier="gold")[1],
        }
    )
)
