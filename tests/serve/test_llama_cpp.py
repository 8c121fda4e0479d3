"""The parts of the llama.cpp backend that need no llama.cpp: files of adapters, refusals, and the check of a build."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from commands import run
from conftest import byte_tokenizer, lively_model
from dlp_lora.bank.peft_format import Adapter, read_adapter
from dlp_lora.errors import AdapterError, ModelError
from dlp_lora.serve.llama_cpp.adapter_file import check_model_type, layer_names, permuted, write_gguf
from dlp_lora.serve.llama_cpp.library import check_runs

gguf = pytest.importorskip("gguf", reason='gguf is not installed: pip install "dlp-lora[demo]"')


@pytest.fixture(scope="module")
def adapter(lively_adapters: Path) -> Adapter:
    return read_adapter(lively_adapters / "units", "units")


def test_a_written_adapter_has_llama_cpps_names_its_order_of_rows_and_the_scaling(
    adapter: Adapter, tmp_path: Path
) -> None:
    config = lively_model().config
    write_gguf(tmp_path / "units.gguf", adapter, config, architecture="llama")
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "units.gguf").tensors}
    assert len(tensors) == 2 * len(adapter.modules)
    for kind, name in (("q_proj", "attn_q"), ("v_proj", "attn_v")):
        lora = adapter.modules[f"model.layers.1.self_attn.{kind}"]
        b = lora.b * lora.scaling
        b = permuted(b, config.num_attention_heads) if kind == "q_proj" else b
        torch.testing.assert_close(tensors[f"blk.1.{name}.weight.lora_a"], lora.a)
        torch.testing.assert_close(tensors[f"blk.1.{name}.weight.lora_b"], b)


def test_rows_are_permuted_head_by_head() -> None:
    rows = torch.arange(8.0)[:, None]
    assert permuted(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_other_architectures_are_refused_by_name() -> None:
    with pytest.raises(
        ModelError, match=r"models of type 'gpt2' cannot be converted for llama\.cpp, only those of gem"
    ):
        check_model_type("gpt2")


def test_a_layer_that_llama_cpp_does_not_have_is_refused_by_name(adapter: Adapter) -> None:
    other = replace(adapter, modules={"model.layers.0.other_proj": next(iter(adapter.modules.values()))})
    with pytest.raises(AdapterError, match=r"units changes model\.layers\.0\.other_proj, which llama\.cpp does not"):
        layer_names(other, lively_model().config, "llama")


def test_a_build_for_another_cpu_ends_only_the_child_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("dlp_lora.serve.llama_cpp.library.find_spec", lambda name: name)
    dies = "import os, signal; os.kill(os.getpid(), signal.SIGILL)"
    monkeypatch.setattr("dlp_lora.serve.llama_cpp.library.PROBE", dies)
    with pytest.raises(ModelError, match=r"built for instructions that this machine does not run.*GGML_NATIVE=OFF"):
        check_runs(tmp_path / "model.gguf")


def test_the_commands_say_what_llama_cpp_needs(
    lively_adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lively_model().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    ask = ("generate", "Hello", "--model", tmp_path, "--adapters", lively_adapters, "--fixed", "math")
    monkeypatch.setattr("dlp_lora.serve.llama_cpp.library.find_spec", lambda name: None)
    for options, message in (
        (("--gguf", "model.gguf"), "--gguf is for --backend llama.cpp"),
        (("--backend", "llama.cpp"), "as a GGUF file; give it with --gguf FILE"),
        (("--backend", "llama.cpp", "--gguf", "model.gguf"), 'pip install "dlp-lora[llama-cpp]"'),
        (("--backend", "llama.cpp", "--dtype", "float32"), "--dtype is for --backend local; leave it out"),
    ):
        result = run(*ask, *options)
        assert result.exit_code == 1
        assert message in " ".join(result.stderr.split())
