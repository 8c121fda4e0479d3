"""Tries a bundle on a real vLLM, end to end: starts `dlp-lora serve --backend vllm`, asks it over HTTP, shows which
sentence used which adapters, and compares the answers with those of the model in this process.

    python scripts/try_vllm.py --bundle runs/demo/bundle --vllm-python .venv-vllm/bin/python
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time

import httpx

import dlp_lora

QUESTIONS = (
    "Convert 3 kilometres to metres.",
    "Look at the list 20, 27, 34, 41 and name the next number.",
    "Convert 24 metres to centimetres. Look at the list 15, 19, 23, 27 and name the next number.",
)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--vllm-python", required=True, help="Python of an environment that has vLLM")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # which ends the server, too
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    command = [
        *(sys.executable, "-m", "dlp_lora", "serve", "--bundle", options.bundle, "--port", "0", "--backend", "vllm"),
        *("--served-model-name", "demo", "--vllm-python", options.vllm_python),
        *("--vllm-args", "--dtype float32 --enforce-eager", "--max-context", "1024"),
    ]
    started = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        address = wait_for_address(process)
        print(f"the server is up after {time.perf_counter() - started:.0f} s: {address}\n")
        answers = [ask(address, question, options.tokens) for question in QUESTIONS]
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    print("the server has ended" if code == 0 else f"the server ended with {code}")
    engine = dlp_lora.load(options.bundle)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        chat = [{"role": "user", "content": question}]
        here = engine.generate(chat, max_new_tokens=options.tokens, do_sample=False)
        same = "the same answer" if here.text == answer else f"another answer, {here.text!r},"
        print(f"{question} {same} as from the model in this process")


def wait_for_address(process: "subprocess.Popen[str]") -> str:
    """Reads what the server writes until it says where it is."""
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"the API at (\S+)/v1", line):
            return found[1]
        if not line.startswith("{"):
            print(line, end="")
    raise SystemExit("the server did not start")


def ask(address: str, question: str, num_tokens: int) -> str:
    """Asks a question; shows the answer by sentence, and gives its text."""
    body = {"model": "demo", "messages": [{"role": "user", "content": question}], "max_tokens": num_tokens}
    print(question, flush=True)
    started = time.perf_counter()
    answer = httpx.post(f"{address}/v1/chat/completions", json={**body, "temperature": 0}, timeout=300).json()
    (choice,) = answer["choices"]
    print(f"    {answer['usage']['completion_tokens']} tokens, {time.perf_counter() - started:.1f} s")
    for sentence in choice["dlp"]["trace"]:
        used = ", ".join(f"{name} {weight:.0%}" for name, weight in sentence["mixture"].items()) or "base model"
        print(f"    {sentence['text'].strip()!r:<60} {used}")
    print()
    text: str = choice["message"]["content"]
    return text


if __name__ == "__main__":
    main()
