"""Checks the versions that pyproject.toml promises: the lowest of each dependency, and Pythons that are not here.

python scripts/check_versions.py --out results/versions.json

With `uv`: installs the lowest promised version of every direct dependency on Python 3.11, and runs the tests of the
inner loop there. For later Pythons, which need not be installed, it asks whether wheels of all dependencies exist, and
lets ruff and mypy read the code as that version would.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LATER = ("3.12", "3.13", "3.14")
PACKAGES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "jaxtyping", "typer", "rich")
TESTERS = ("pytest", "pytest-timeout", "beartype", "httpx", "hypothesis")
INNER_LOOP = "not ci and not models and not engines and not clients"


def main() -> None:
    """Writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--work", type=Path, help="folder for the environment (about 7 GB); a temporary one by default")
    parser.add_argument("--uv", default="uv", help="the program uv")
    parser.add_argument("--later-only", action="store_true", help="keep the record of the lowest versions as it is")
    args = parser.parse_args()
    record: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {}
    if not args.later_only:
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            record["lowest"] = lowest(args.uv, args.work or Path(folder))
    record["later"] = {python: later(python) for python in LATER}
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


def lowest(uv: str, folder: Path) -> dict[str, Any]:
    """Installs the lowest promised versions and runs the inner loop."""
    env = folder / "lowest"
    python = env / "bin" / "python"
    if not python.is_file():
        _run(uv, "venv", "--quiet", "--python", "3.11", env)
    _run(uv, "pip", "install", "--quiet", "--python", python, "--resolution", "lowest-direct", f"{ROOT}[eval,serve]")
    _run(uv, "pip", "install", "--quiet", "--python", python, *TESTERS)
    shown = json.loads(_run(uv, "pip", "list", "--python", python, "--format", "json").stdout)
    versions = {package["name"]: package["version"] for package in shown}
    options = ("-m", INNER_LOOP, "-p", "no:cacheprovider", "-W", "ignore::UserWarning")
    tests = _run(python, "-m", "pytest", ROOT / "tests", *options, check=False).stdout
    summary = tests.strip().splitlines()[-1].strip("= ")
    failed = sorted(set(re.findall(r"^(?:FAILED|ERROR) (\S+)", tests, re.MULTILINE)))
    return {
        "python": _run(python, "-V").stdout.split()[1],
        "versions": {name: versions[name] for name in PACKAGES},
        "tests": summary,
        "failed": failed,
    }


def later(python: str) -> dict[str, Any]:
    """Whether wheels of all dependencies exist for a Python, and whether ruff and mypy accept the code as its."""
    tag = python.replace(".", "")
    wheels = _run(
        *(sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"),
        *("--python-version", python, "--only-binary", ":all:", "--target", "unused"),
        *_requirements(),
        check=False,
    )
    found = json.loads(wheels.stdout)["install"] if wheels.returncode == 0 else []
    resolved = {item["metadata"]["name"]: item["metadata"]["version"] for item in found}
    # These rules ask for what the lowest Python does not know yet.
    rules = ("--target-version", f"py{tag}", "--extend-ignore", "UP,B912")
    ruff = _run(sys.executable, "-m", "ruff", "check", "--quiet", *rules, "src", check=False)
    mypy = _run(sys.executable, "-m", "mypy", "--python-version", python, check=False)
    return {
        "wheels": {name: resolved.get(name) for name in PACKAGES} if found else wheels.stderr.strip()[-400:],
        "num_wheels": len(found),
        "ruff": ruff.returncode == 0,
        "mypy": mypy.returncode == 0,
    }


def _requirements() -> list[str]:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["serve"]]


def _run(*command: str | Path, check: bool = True) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([str(part) for part in command], cwd=ROOT, env=env, capture_output=True, text=True)
    if check and done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done


if __name__ == "__main__":
    main()
