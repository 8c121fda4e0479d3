import json
import shutil
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from conftest import tiny_model
from dlp_lora.bank.fingerprint import Fingerprint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def fingerprint(folder: Path) -> Fingerprint:
    found = Fingerprint.of(folder)
    assert found is not None
    return found


def test_the_same_files_have_the_same_fingerprint_wherever_they_lie(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    assert fingerprint(copy) == fingerprint(model)
    assert Fingerprint.from_dict(json.loads(json.dumps(fingerprint(model).to_dict()))) == fingerprint(model)
    tiny_model().save_pretrained(copy, max_shard_size="20KB")  # the same tensors in several files
    (copy / "model.safetensors").unlink()
    assert len(list(copy.glob("*.safetensors"))) > 1
    assert fingerprint(copy) == fingerprint(model)


def test_another_model_is_told_apart_and_how(model: Path, tmp_path: Path) -> None:
    known = fingerprint(model)
    tiny_model(seed=1).save_pretrained(tmp_path / "weights")
    assert known.differences(fingerprint(tmp_path / "weights")) == ["its weights are others, or stored otherwise"]
    tiny_model("qwen2").save_pretrained(tmp_path / "other")
    found = known.differences(fingerprint(tmp_path / "other"))
    assert "its model_type is 'qwen2', not 'llama'" in found
    assert found[-1] == "its tensors have other names or shapes"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_attention_heads": 2, "transformers_version": "9"}))
    assert known.differences(fingerprint(model)) == ["its num_attention_heads is 2, not 4"]


def test_a_gguf_file_has_a_fingerprint_of_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(bytes(range(256)) * 4096)
    known = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == known
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert known.differences(fingerprint(tmp_path)) == ["its weights are others, or stored otherwise"]
    file.write_bytes(data + b"more")
    assert known.differences(fingerprint(tmp_path)) == ["its tensors have other names or shapes"]


@pytest.mark.parametrize("damage", ["emptied", "cut", "gone"])
def test_a_folder_without_whole_weights_has_none(model: Path, damage: str) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[: 50 if damage == "cut" else 0])
    if damage == "gone":
        file.unlink()
    assert Fingerprint.of(model) is None


def test_a_file_of_gigabytes_is_read_at_a_few_places(model: Path) -> None:
    file = model / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt"})
    header = {
        f"layer.{i}": {"dtype": "BF16", "shape": [4096, 4096], "data_offsets": [i << 25, i + 1 << 25]}
        for i in range(480)
    }
    text = json.dumps(header).encode()
    with file.open("wb") as opened:  # 16 GB, of which the disk holds nothing
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + (480 << 25))
    start = time.process_time()
    assert Fingerprint.of(model) is not None
    assert time.process_time() - start < 1
