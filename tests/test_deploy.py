"""What deploy/ ships: the commands of the Dockerfile run in a clean environment, and the unit is one."""

import os
import re
import subprocess
import sys
from pathlib import Path
from shutil import copytree, which

import pytest

ROOT = Path(__file__).parents[1]


def instructions(kind: str) -> list[str]:
    text = (ROOT / "deploy" / "Dockerfile").read_text().replace("\\\n", " ")
    return re.findall(rf"^{kind} (.+)$", text, re.MULTILINE)


def test_the_image_copies_what_the_package_is_built_from() -> None:
    for line in instructions("COPY"):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source


@pytest.mark.clients
@pytest.mark.timeout(1200)
def test_the_commands_of_the_image_run_in_a_clean_environment(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    for line in instructions("COPY"):
        for source in line.split()[:-1]:
            if (ROOT / source).is_dir():
                copytree(ROOT / source, tmp_path / source)
            else:
                (tmp_path / source).write_bytes((ROOT / source).read_bytes())
    torch = next(line.removeprefix("TORCH=") for line in instructions("ARG") if line.startswith("TORCH="))
    path = f"{tmp_path / 'venv' / 'bin'}:/usr/bin:/bin"
    # The registry at hand instead of PyTorch's.
    env = {**os.environ, "PATH": path, "TORCH": torch, "TORCH_INDEX": ""}
    env.pop("PYTHONPATH", None)
    for command in instructions("RUN"):
        if command.startswith("useradd"):
            continue
        done = subprocess.run(["sh", "-ec", command], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr[-2000:])


@pytest.mark.clients
def test_systemd_reads_the_unit(tmp_path: Path) -> None:
    if which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze")
    unit = (ROOT / "deploy" / "dlp-lora.service").read_text().replace("/opt/dlp-lora/bin/dlp-lora", "/bin/true")
    (tmp_path / "dlp-lora.service").write_text(unit)
    done = subprocess.run(["systemd-analyze", "verify", tmp_path / "dlp-lora.service"], capture_output=True, text=True)
    assert "dlp-lora.service:" not in done.stderr, done.stderr
