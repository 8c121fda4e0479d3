"""The llm command: a prompt, a stream, counted tokens, a second turn."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml


def main(address: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "LLM_USER_PATH": folder, "OPENAI_API_KEY": "k"}
        models = [{"model_id": "tiny", "model_name": "tiny", "api_base": f"{address}/v1"}]
        (Path(folder) / "extra-openai-models.yaml").write_text(yaml.safe_dump(models))

        def llm(*args: str) -> str:
            command = [str(Path(sys.executable).parent / "llm"), *args]
            return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout

        first = llm("-m", "tiny", "-o", "max_tokens", "12", "Tell me a tale")
        assert first.strip()
        assert llm("-m", "tiny", "-c", "-o", "max_tokens", "12", "And then?").strip()
        logs = json.loads(llm("logs", "--json", "-n", "2"))
        assert all(entry["output_tokens"] for entry in logs)


main(sys.argv[1])
