"""The plug-in's mixtures, without vLLM: which adapter a name is written as, and how much of the disk they may take.

`tests/engines` asks a real vLLM.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import dlp_lora
from conftest import byte_tokenizer, lively_model
from dlp_lora import AdapterError
from dlp_lora.bank.adapter_files import WEIGHTS_FILE
from dlp_lora.bank.limits import rounded
from dlp_lora.integrations.vllm import ServedMixtures


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    lively_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def test_a_name_is_one_adapter_that_peft_applies_as_the_engine_does(
    model: str, lively_adapters: Path, tmp_path: Path
) -> None:
    engine = dlp_lora.load(model, adapters=lively_adapters)
    engine.save_pretrained(tmp_path / "bundle")
    ids = torch.arange(20)[None]
    for number, bundle in enumerate((lively_adapters, tmp_path / "bundle")):
        mixtures = ServedMixtures(bundle, cache=tmp_path / str(number), cache_mb=100)
        for text in ("math=1", "math=0.6,units=0.4", "poems=0.3,units=0.3,math=0.4"):
            peft = PeftModel.from_pretrained(lively_model(), mixtures.path(model, text))
            weights = {name: float(weight) for name, _, weight in (part.partition("=") for part in text.split(","))}
            with engine.fixed(rounded(weights)):
                expected = engine.model(ids).logits
            torch.testing.assert_close(peft(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert len(list(tmp_path.glob("0/dlp-*"))) == 3


def test_a_name_has_one_path_and_the_same_weights_have_one_name(
    model: str, lively_adapters: Path, tmp_path: Path
) -> None:
    mixtures = ServedMixtures(lively_adapters, cache=tmp_path, cache_mb=100)
    path = mixtures.path(model, "math=0.6,units=0.4")
    assert mixtures.path(model, "units=0.4,math=0.6") == mixtures.path(model, "math=0.601,units=0.399") == path
    assert mixtures.path(model, "math=0.4,units=0.6") != path


@pytest.mark.parametrize(
    "text, error, message",
    [
        ("nobody=1", AdapterError, "no adapter 'nobody'; there are math, poems, units"),
        ("", ValueError, "the mixture is empty; ask for the base model by its name"),
        ("math=x", ValueError, "math=x"),
    ],
)
def test_a_name_that_is_no_mixture_is_refused(
    model: str, lively_adapters: Path, tmp_path: Path, text: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ServedMixtures(lively_adapters, cache=tmp_path, cache_mb=100).path(model, text)


NAMES = ("math=1", "units=1", "poems=1", "math=0.5,poems=0.5")  # the last one fills up its ranks with zeros


def test_mixtures_take_at_most_their_room_on_disk_and_those_that_are_written_stay(
    model: str, lively_adapters: Path, tmp_path: Path
) -> None:
    large = ServedMixtures(lively_adapters, cache=tmp_path / "large", cache_mb=100)
    sizes = [size_of(large.path(model, name)) for name in NAMES]
    unfilled = sum((lively_adapters / name / WEIGHTS_FILE).stat().st_size for name in ("math", "poems"))
    with pytest.raises(AdapterError, match=r"^0 mixtures are written"):
        ServedMixtures(lively_adapters, cache=tmp_path / "0", cache_mb=unfilled / 2**20).path(model, NAMES[-1])
    assert not [*(tmp_path / "0").iterdir()]
    for num_fitting in range(1, len(NAMES)):
        cache, budget_mb = tmp_path / str(num_fitting), sum(sizes[:num_fitting]) / 2**20
        mixtures = ServedMixtures(lively_adapters, cache=cache, cache_mb=budget_mb)
        paths = [mixtures.path(model, name) for name in NAMES[:num_fitting]]
        for name in NAMES[num_fitting:]:
            with pytest.raises(AdapterError, match=f"^{num_fitting} mixtures are written, and with another one .* MB"):
                mixtures.path(model, name)
        assert [mixtures.path(model, name) for name in NAMES[:num_fitting]] == paths
        assert sorted(cache.iterdir()) == sorted(paths)


def test_mixtures_of_an_earlier_process_make_room(model: str, lively_adapters: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from dlp_lora.integrations.vllm import ServedMixtures; "
        "ServedMixtures(Path(sys.argv[1]), cache=Path(sys.argv[2]), cache_mb=100).path(sys.argv[3], 'units=1')"
    )
    subprocess.run([sys.executable, "-c", code, str(lively_adapters), str(tmp_path), model], check=True)
    (old,) = tmp_path.iterdir()
    mixtures = ServedMixtures(lively_adapters, cache=tmp_path, cache_mb=size_of(old) / 2**20)
    path = mixtures.path(model, "math=1")
    assert [*tmp_path.iterdir()] == [path]


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
