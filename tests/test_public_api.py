import subprocess
import sys

import pytest

import dlp_lora
from dlp_lora import FusionPolicy, Only, Router, Segmenter, SentenceSegmenter, Threshold, TopK, TopP, Uniform

DOCUMENTED = [
    *("AdapterError", "ArrowRouter", "BundleError", "Context", "DLPLoRAError", "EncoderRouter", "Engine"),
    *("FusionPolicy", "Generation", "MiniMLP", "Mixture", "ModelError", "Only", "Piece", "PromptError"),
    *("PrototypeRouter", "Router", "RouterError", "RoutingLog", "RoutingSettings", "Segmenter", "Sentence"),
    *("SentenceSegmenter", "Stream", "Switching"),
    *("TaskError", "Threshold", "TopK", "TopP", "TrainingError", "Uniform", "load", "load_router"),
]


def test_all_is_what_is_documented_in_order() -> None:
    assert dlp_lora.__all__ == DOCUMENTED == sorted(DOCUMENTED)


def test_dir_lists_what_is_public() -> None:
    assert set(DOCUMENTED) <= set(dir(dlp_lora))


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'dlp_lora' has no attribute 'Lora'"):
        dlp_lora.Lora  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Lora'"):
        from dlp_lora import Lora  # noqa: F401


@pytest.mark.parametrize(
    "code", ["import dlp_lora", "from dlp_lora import DLPLoRAError, TopP, SentenceSegmenter", "import dlp_lora.policy"]
)
def test_what_needs_no_torch_does_not_import_it(code: str) -> None:
    subprocess.run([sys.executable, "-c", f"{code}; import sys; assert 'torch' not in sys.modules"], check=True)


def test_load_is_a_function_whatever_was_imported_before() -> None:
    code = "import dlp_lora.engine.loading; import dlp_lora; assert dlp_lora.load is dlp_lora.engine.loading.load"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_can_be_imported_and_has_a_docstring_of_its_own() -> None:
    for name in dlp_lora.__all__:
        public = getattr(dlp_lora, name)
        assert public.__name__ == name
        doc = vars(public).get("__doc__") if isinstance(public, type) else public.__doc__
        # A dataclass without one is given its signature.
        assert doc, name
        assert not doc.startswith(f"{name}("), name


def test_every_public_method_has_a_docstring() -> None:
    for name in dlp_lora.__all__:
        public = getattr(dlp_lora, name)
        if not isinstance(public, type) or getattr(public, "_is_protocol", False):
            continue
        for attribute, value in vars(public).items():
            if not attribute.startswith("_") and (callable(value) or isinstance(value, property)):
                assert value.__doc__ or attribute in ("forward",), f"{name}.{attribute}"


def test_every_error_is_a_dlp_lora_error() -> None:
    errors = [getattr(dlp_lora, name) for name in dlp_lora.__all__ if name.endswith("Error")]
    assert len(errors) == 8
    assert all(issubclass(error, dlp_lora.DLPLoRAError) for error in errors)


def test_the_parts_of_the_package_are_what_their_protocols_ask_for() -> None:
    for policy in (TopP(), Threshold(), TopK(), Only("math"), Uniform()):
        assert isinstance(policy, FusionPolicy)
    assert isinstance(SentenceSegmenter(), Segmenter)
    assert not isinstance(object(), Router)
    assert not isinstance(object(), Segmenter)
