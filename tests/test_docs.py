"""The blocks of README and docs: they run here on a tiny model, or say why not and are checked against the code."""

import ast
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from typer.main import get_command

import dlp_lora
from commands import run
from conftest import byte_tokenizer, lively_model
from dlp_lora import DLPLoRAError, MiniMLP
from dlp_lora.cli.app import app
from dlp_lora.router import MiniMLPConfig
from dlp_lora.tasks import Example, Task, write_task

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

import doc_blocks  # noqa: E402
from doc_blocks import Block, commands  # noqa: E402

PAGES = doc_blocks.pages()
BLOCKS = [block for page in PAGES for block in doc_blocks.blocks(page)]
FROM_NOTHING = ("docs/tutorial.md",)  # the other pages find a bundle and what belongs to it
NAMES = ("math", "poems", "units")
# What a block may do beside the program itself. They are read, never run.
OTHER_COMMANDS = (
    "pip",
    "make",
    "python",
    "curl",
    "source",
    "export",
    "cd",
    "git",
    "docker",
    "apt-get",
    "vllm",
    "lm_eval",
    "serve",
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, lively_adapters: Path) -> Path:
    """A folder with what the pages name: a model, adapters, tasks, a router and a bundle."""
    root = tmp_path_factory.mktemp("docs")
    model = root / "path-or-hub-id"
    lively_model().save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    shutil.copytree(lively_adapters, root / "adapters")
    for name in NAMES:
        examples = tuple(Example(prompt=f"Tell me of {name} {i}.", answer=f"It is {name} {i}.") for i in range(12))
        write_task(root / "data" / name, Task(name=name, train=examples[:9], test=examples[9:]))
    router = MiniMLP(NAMES, byte_tokenizer().backend_tokenizer, MiniMLPConfig(dim=8, hidden=8))
    router.save_pretrained(root / "router")
    engine = dlp_lora.load(model, adapters=root / "adapters", router=router)
    engine.save_pretrained(root / "bundle")
    shutil.copytree(root / "bundle", root / "demo" / "bundle")
    (root / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "Is it warm in Rome?"}]}\n')
    (root / "examples.jsonl").write_text('{"prompt": "Which law holds?", "answer": "The law of it."}\n' * 4)
    return root


@pytest.fixture
def here(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the workspace as the current folder: a page may write into it."""
    shutil.copytree(workspace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def to_run(page: str) -> list[Block]:
    """The blocks of a page that CI runs."""
    return [b for b in BLOCKS if b.page == page and b.language in ("python", "bash") and b.tier == "ci" and b.is_run]


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if to_run(block.page)}))
def test_a_page_runs_from_top_to_bottom(
    page: str, here: Path, unchecked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dlp_lora.default_model.is_converted", lambda: True)
    monkeypatch.setattr("dlp_lora.default_model.default_model", lambda: here / "path-or-hub-id")
    namespace: dict[str, Any] = {"dlp_lora": dlp_lora}
    if page in FROM_NOTHING:
        for folder in ("adapters", "router", "bundle", "data", "demo"):
            shutil.rmtree(here / folder)
    else:
        namespace["engine"] = dlp_lora.load("bundle")
    for block in to_run(page):
        if block.language == "python":
            exec(compile("\n" * block.line + block.text, str(ROOT / page), "exec"), namespace)
            continue
        for line in commands(block.text):
            words, stdin = parsed(line, here)
            if words[0] == "dlp-lora":
                result = run(*words[1:], stdin=stdin)
                assert result.exit_code == 0, (block.place, line, result.output, result.exception)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "bash"], ids=lambda block: block.place)
def test_every_command_and_option_exists(block: Block) -> None:
    for line in commands(block.text):
        words, _ = parsed(line, Path())
        if words[0] == "dlp-lora":
            check_command(words[1:])
        else:
            check_other(words)


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language == "python" and not b.is_run], ids=lambda block: block.place
)
def test_python_that_is_not_run_names_what_exists(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("dlp_lora"):
            try:
                module = importlib.import_module(str(node.module))
            except DLPLoRAError as error:  # of an extra that is not installed here
                pytest.skip(str(error))
            for alias in node.names:
                assert hasattr(module, alias.name), block.place


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in ("json", "toml", "yaml")], ids=lambda b: b.place)
def test_data_is_well_formed(block: Block) -> None:
    if block.language == "toml":
        tomllib.loads(block.text)
    elif block.language == "yaml":
        yaml.safe_load(block.text)
    else:
        try:
            json.loads(block.text)
        except json.JSONDecodeError:
            for line in block.text.splitlines():
                json.loads(line)


def test_every_block_names_its_language_and_every_exception_its_reason() -> None:
    known = {"bash", "python", "text", "json", "toml", "yaml", "nginx"}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"^```\n(?!\n|$)(?=[^`])", re.sub(r"^```\w+\n.*?^```$", "", text, flags=re.S | re.M), re.M)
    assert {block.language for block in BLOCKS} <= known
    for block in BLOCKS:
        assert re.fullmatch(r"|run: models|not run: .{8,}", block.note), block.place


def test_no_command_stands_outside_a_fenced_block() -> None:
    """An indented block would be neither run nor checked."""
    for page in PAGES:
        prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        assert not re.search(r"^ {4}(dlp-lora|pip|curl|python|from|import)\b", prose, re.MULTILINE), page


def test_the_readme_shows_what_the_demo_recorded() -> None:
    """The example of the README is the demo's prompt of two questions."""
    example = json.loads((ROOT / "results" / "demo.json").read_text())["serial"]
    found = [block for block in BLOCKS if block.page == "README.md"]
    i = next(i for i, block in enumerate(found) if block.language == "python")
    assert example["prompt"] in found[i].text
    shown = "".join(f"{sentence['text'].strip()} {sentence['mixture']}\n" for sentence in example["trace"])
    assert found[i + 1].text == shown


def test_the_readme_can_be_read_in_four_minutes() -> None:
    text = re.sub(r"<!--.*?-->", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert sum(any(c.isalnum() for c in word) for word in text.split()) <= 900


def test_the_site_builds_without_a_dead_link(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install --group dev")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").is_file()


@pytest.mark.models
@pytest.mark.timeout(3600)
def test_the_readme_prints_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains the demo as the README says, which takes minutes, and runs its example."""
    monkeypatch.chdir(tmp_path)
    assert run("demo", "--out", "demo").exit_code == 0
    found = [block for block in BLOCKS if block.page == "README.md"]
    i = next(i for i, block in enumerate(found) if block.tier == "models")
    done = subprocess.run([sys.executable, "-c", found[i].text], capture_output=True, text=True, check=True)
    assert done.stdout == found[i + 1].text


def parsed(line: str, folder: Path) -> tuple[list[str], str]:
    """The words of a command and what it reads: of `echo X | command`, or of `command < file`."""
    stdin = ""
    if " | " in line:
        first, line = line.split(" | ", 1)
        assert first.startswith("echo "), line
        stdin = shlex.split(first)[1] + "\n"
    words = shlex.split(line)
    for sign in ("<", ">"):
        if sign in words:
            i = words.index(sign)
            if sign == "<" and (folder / words[i + 1]).is_file():
                stdin = (folder / words[i + 1]).read_text()
            words = words[:i]
    return words, stdin


def check_command(words: list[str]) -> None:
    """Reads the words as the program would, without running the command."""
    group, name = get_command(app), "dlp-lora"
    context = click.Context(group, info_name=name)
    command: Any = group
    while hasattr(command, "get_command") and words and not words[0].startswith("-"):
        name, *words = words
        command = command.get_command(context, name)
        assert command is not None, f"there is no command {name}"
        context = click.Context(command, info_name=name, parent=context)
    if not {"--help", "--version"} & set(words):
        command.make_context(name, list(words))


def check_other(words: list[str]) -> None:
    """Commands of other programs: targets, extras and scripts of this project exist."""
    while words and "=" in words[0]:  # variables
        words = words[1:]
    program = words[0]
    assert program in OTHER_COMMANDS, f"{program} is none of {', '.join(OTHER_COMMANDS)}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for word in words:
        if extras := re.search(r"^(?:dlp-lora|\.)\[([\w,-]+)\]", word):
            assert set(extras[1].split(",")) <= set(project["project"]["optional-dependencies"]), word
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets), words
    if program == "python" and words[1].endswith(".py"):
        source = (ROOT / words[1]).read_text()
        for option in (word for word in words[2:] if word.startswith("--")):
            assert f'"{option}"' in source, f"{words[1]} has no option {option}"
