import json
import math
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import reference
from conftest import make_adapter, tiny_model
from dlp_lora.bank.adapter_files import content_hash, find_adapters
from dlp_lora.bank.attach import attach, linear_layers
from dlp_lora.bank.bank import AdapterBank
from dlp_lora.bank.peft_format import LoraWeights, check_base_name, read_adapter, write_adapter
from dlp_lora.errors import AdapterError
from dlp_lora.policy import Mixture

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def made(base: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("made") / "squad", seed=1)


@pytest.fixture
def squad(made: Path, tmp_path: Path) -> Path:
    """A sound adapter of rank 4 on q_proj and v_proj, to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "squad"))


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def key(module: str, half: str) -> str:
    return f"base_model.model.{module}.lora_{half}.weight"


# What is read


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 3, "lora_alpha": 7},
        {"r": 8, "lora_alpha": 8, "use_rslora": True},
        {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"},
        {"r": 4, "target_modules": r".*layers\.1\..*(q|up)_proj"},
        {"r": 4, "layers_to_transform": [1]},
        {"r": 4, "exclude_modules": ["v_proj"]},
        {"r": 4, "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 6}},
        {"r": 4, "alpha_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 6}},
        {"r": 4, "rank_pattern": {r"layers\.1\..+": 7, "q_proj": 2}, "alpha_pattern": {"^model.layers.0.*q_proj": 5}},
        {"r": 4, "use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"v_proj": 3}},
        # A pattern is a whole path segment: "proj" is not the end of "q_proj".
        {"r": 4, "rank_pattern": {"proj": 9}, "alpha_pattern": {"self_attn": 3}},
        {"r": 4, "init_lora_weights": "gaussian", "lora_dropout": 0.3},
        {"r": 4, "init_lora_weights": "orthogonal"},
        {"r": 4, "init_lora_weights": False},
    ],
    ids=str,
)
def test_an_adapter_has_the_ranks_and_scalings_that_peft_uses(
    config: dict[str, Any], base: PreTrainedModel, tmp_path: Path
) -> None:
    folder = make_adapter(base, tmp_path / "it", seed=1, **config)
    peft_model = PeftModel.from_pretrained(tiny_model("llama"), folder)
    layers = {n: m for n, m in peft_model.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    adapter = read_adapter(folder)
    assert adapter.modules.keys() == layers.keys()
    assert {n: lora.rank for n, lora in adapter.modules.items()} == {n: m.r["default"] for n, m in layers.items()}
    for name, lora in adapter.modules.items():
        assert lora.scaling == pytest.approx(layers[name].scaling["default"], rel=1e-12)
        assert torch.equal(lora.a, layers[name].lora_A["default"].weight)
        assert torch.equal(lora.b, layers[name].lora_B["default"].weight)


def test_an_adapter_is_named_after_its_folder_unless_it_is_given_a_name(squad: Path) -> None:
    adapter = read_adapter(squad)
    assert (adapter.name, adapter.path, adapter.base_model) == ("squad", squad, None)
    assert read_adapter(str(squad), "qa").name == "qa"


def test_an_adapter_tells_the_base_model_it_was_trained_on(squad: Path) -> None:
    edit_config(squad, base_model_name_or_path="Qwen/Qwen2-1.5B")
    assert read_adapter(squad).base_model == "Qwen/Qwen2-1.5B"


def test_a_config_with_settings_of_later_versions_that_are_off_is_read(squad: Path) -> None:
    edit_config(squad, use_something=False, something_config=None, others=[], more={})
    assert len(read_adapter(squad).modules) == 4


def test_a_config_of_an_early_peft_is_read(squad: Path) -> None:
    early = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (squad / CONFIG).write_text(json.dumps({**early, "init_lora_weights": True, "fan_in_fan_out": False}))
    assert {lora.scaling for lora in read_adapter(squad).modules.values()} == {2.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_are_read_in_the_precision_they_were_saved_in(dtype: torch.dtype, squad: Path) -> None:
    edit_weights(squad, lambda tensors: tensors.update({k: t.to(dtype) for k, t in tensors.items()}))
    assert read_adapter(squad).modules[Q0].a.dtype == dtype


# What PEFT makes and we refuse


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora=True: DoRA rescales the weight's columns.*retrain with use_dora=False"),
        ({"lora_bias": True}, r"it holds '.*lora_B\.bias'.*a trained bias on B .*retrain with lora_bias=False"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication=.*a base with repeated layers"),
        ({"target_modules": ["embed_tokens"]}, "it holds '.*embed_tokens.lora_embedding_A'; expected only lora_A and"),
        ({"init_lora_weights": "pissa"}, "was initialised with 'pissa', which changes the base.*convert it to a plain"),
        ({"init_lora_weights": "olora"}, "was initialised with 'olora', which changes the base.*convert it to a plain"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens=.*an activated LoRA applies only after its"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.filterwarnings("ignore")
def test_what_peft_trains_but_no_mixture_equals_is_refused(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = make_adapter(tiny_model("qwen2"), tmp_path / "exotic", seed=1, **config)
    with pytest.raises(AdapterError, match=rf"exotic .*{message}"):
        read_adapter(folder)


@pytest.mark.parametrize(
    "init", ["pissa", "PiSSA", "pissa_niter_16", "olora", "OLoRA", "loftq", "corda", "lora_ga", "an-unknown-one"]
)
def test_an_initialisation_that_changes_the_base_is_refused(init: str, squad: Path) -> None:
    edit_config(squad, init_lora_weights=init)
    with pytest.raises(AdapterError, match=f"squad was initialised with '{init}', which changes the base weights"):
        read_adapter(squad)


@pytest.mark.parametrize(
    "setting",
    [
        {"use_qalora": True},
        {"megatron_config": {"hidden_size": 32}},
        {"arrow_config": {"top_k": 2}},
        {"kasa_config": {"beta": 0.1}},
        {"use_bdlora": {"nblocks": 2}},
        {"monteclora_config": {"num_samples": 4}},
        {"a_setting_of_tomorrow": "on", "peft_version": "99.1.0"},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_a_setting_that_may_change_the_result_is_refused_by_its_name(setting: dict[str, Any], squad: Path) -> None:
    edit_config(squad, **setting)
    with pytest.raises(AdapterError, match=rf"squad cannot be fused exactly: {next(iter(setting))}="):
        read_adapter(squad)


@pytest.mark.parametrize("kind", ["IA3", "LOHA", "PROMPT_TUNING", None])
def test_an_adapter_that_is_no_lora_is_refused(kind: str | None, squad: Path) -> None:
    edit_config(squad, peft_type=kind)
    with pytest.raises(AdapterError, match=f"squad is a {kind} adapter; only peft_type LORA can be fused"):
        read_adapter(squad)


# Damaged folders


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=rf"nowhere has no {CONFIG}; expected a PEFT adapter folder"):
        read_adapter(tmp_path / "nowhere")


def test_a_folder_without_a_config_is_refused(squad: Path) -> None:
    (squad / CONFIG).unlink()
    with pytest.raises(AdapterError, match=rf"squad has no {CONFIG}; expected a PEFT adapter folder"):
        read_adapter(squad)


@pytest.mark.parametrize("text", ['{"peft_type": "LORA",', "", "\xff\xfe", "<html>Not found</html>"])
def test_a_config_that_is_no_json_is_refused(text: str, squad: Path) -> None:
    (squad / CONFIG).write_bytes(text.encode("latin-1"))
    with pytest.raises(AdapterError, match=rf"squad/{CONFIG} cannot be read as JSON: "):
        read_adapter(squad)


def test_a_config_that_is_no_object_is_refused(squad: Path) -> None:
    (squad / CONFIG).write_text("[1]")
    with pytest.raises(AdapterError, match=rf"squad/{CONFIG} holds a list; expected a JSON object"):
        read_adapter(squad)


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": "8"},
        {"lora_alpha": None},
        {"lora_alpha": math.nan},
        {"r": 0},
        {"r": "4"},
        {"r": True},
        {"alpha_pattern": {"q_proj": "8"}},
    ],
    ids=str,
)
def test_a_rank_or_alpha_that_is_no_number_is_refused(change: dict[str, Any], squad: Path) -> None:
    edit_config(squad, **change)
    with pytest.raises(AdapterError, match=rf"squad: its config says rank .* and alpha .* for {Q0}; expected a whole"):
        read_adapter(squad)


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_is_no_object_is_refused(setting: str, squad: Path) -> None:
    edit_config(squad, **{setting: ["q_proj"]})
    with pytest.raises(AdapterError, match=rf"{CONFIG} has {setting}=\['q_proj'\]; expected an object of module names"):
        read_adapter(squad)


def test_a_folder_without_weights_is_refused(squad: Path) -> None:
    (squad / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=rf"squad has no {WEIGHTS} \(found no weights\)"):
        read_adapter(squad)


def shard(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    for i, keys in enumerate((sorted(tensors)[:4], sorted(tensors)[4:]), start=1):
        save_file({k: tensors[k] for k in keys}, folder / f"adapter_model-0000{i}-of-00002.safetensors")
    (folder / f"{WEIGHTS}.index.json").write_text("{}")


def test_weights_in_other_files_than_peft_reads_are_refused_for_that(squad: Path, tmp_path: Path) -> None:
    sharded = Path(shutil.copytree(squad, tmp_path / "sharded"))
    shard(sharded)
    with pytest.raises(AdapterError, match=r"its weights are in 2 shards .*PEFT reads one file; join them") as error:
        read_adapter(sharded)
    assert "can run code" not in str(error.value)
    (squad / WEIGHTS).rename(squad / "adapter_model.fp16.safetensors")
    with pytest.raises(AdapterError, match=r"adapter_model\.fp16\.safetensors\); PEFT reads that name alone: rename"):
        read_adapter(squad)
    shutil.copy(squad / "adapter_model.fp16.safetensors", squad / "adapter_model.bf16.safetensors")
    with pytest.raises(AdapterError, match=r"PEFT reads that name alone: choose one and rename it"):
        read_adapter(squad)


def test_an_adapter_of_mlx_is_called_one(tmp_path: Path) -> None:
    folder = tmp_path / "mlx"
    folder.mkdir()
    save_file({f"{Q0}.lora_a": torch.ones(32, 4), f"{Q0}.lora_b": torch.ones(4, 32)}, folder / "adapters.safetensors")
    (folder / CONFIG).write_text(json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 20.0}}))
    with pytest.raises(AdapterError, match=r"mlx is an adapter of mlx, whose A and B lie the other way round"):
        read_adapter(folder)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}))
    with pytest.raises(AdapterError, match=r"has no .*but adapters\.safetensors, as mlx writes it"):
        read_adapter(folder)
    (folder / "adapters.safetensors").rename(folder / WEIGHTS)
    with pytest.raises(AdapterError, match=r"holds lora_a and lora_b, as mlx writes them"):
        read_adapter(folder)


def test_a_config_with_a_byte_order_mark_is_read_and_a_key_twice_is_refused(squad: Path) -> None:
    text = (squad / CONFIG).read_text()
    (squad / CONFIG).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert len(read_adapter(squad).modules) == 4
    (squad / CONFIG).write_text(text.replace('"r": 4', '"r": 4, "r": 8'))
    with pytest.raises(AdapterError, match=rf"{CONFIG} cannot be read as JSON: the key 'r' is in one object twice"):
        read_adapter(squad)


@pytest.mark.parametrize(
    "change",
    [
        {"alpha_pattern": {"*q_proj": 4}},
        {"rank_pattern": {"q_proj(": 4}},
        {"target_modules": "*q_proj"},
        {"exclude_modules": "[v_proj"},
        {"layers_pattern": ["(h"], "layers_to_transform": [0]},
        {"modules_to_save": ["(head"]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_pattern_that_is_no_regular_expression_is_refused_by_name(change: dict[str, Any], squad: Path) -> None:
    edit_config(squad, **change)
    with pytest.raises(
        AdapterError, match=rf"{CONFIG} has {next(iter(change))} '.*', which is not a regular expression"
    ):
        read_adapter(squad)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool])
def test_integer_weights_are_refused(dtype: torch.dtype, squad: Path) -> None:
    edit_weights(squad, lambda tensors: tensors.update({k: torch.ones(t.shape).to(dtype) for k, t in tensors.items()}))
    for weights in (True, False):
        with pytest.raises(AdapterError, match=r"squad holds \w+ numbers in '.*'; expected floating-point LoRA"):
            read_adapter(squad, weights=weights)


def test_weights_that_were_never_gathered_are_refused(squad: Path) -> None:
    edit_weights(squad, lambda tensors: tensors.update({k: torch.zeros(0) for k in tensors}))
    with pytest.raises(AdapterError, match=r"which are empty: .*\(ZeRO-3, FSDP\); gather them before saving"):
        read_adapter(squad)


@pytest.mark.parametrize("name", ["a=1", "a,b", "a=1,b", " a", "a ", "", "a\nb"])
def test_a_name_that_no_mixture_can_hold_is_refused(name: str, squad: Path) -> None:
    with pytest.raises(AdapterError, match=r"cannot be written in a mixture such as math=0\.6,units=0.4; rename it"):
        read_adapter(squad, name)


def test_an_adapter_that_changes_nothing_is_told(squad: Path) -> None:
    edit_weights(squad, lambda tensors: [t.zero_() for k, t in tensors.items() if "lora_B" in k])
    with pytest.warns(UserWarning, match="squad changes nothing: all of its lora_B are zero"):
        read_adapter(squad)


def test_settings_that_are_ignored_are_named_once_read(squad: Path) -> None:
    edit_config(squad, lora_dtype="AUTO", velora_config={"scale": 1.0}, loftq_config={"loftq_bits": 4})
    with pytest.warns(UserWarning, match="are ignored") as told:
        read_adapter(squad)
    messages = [str(warning.message) for warning in told]
    assert any(m.endswith("settings of the training alone are ignored: loftq_config, velora_config") for m in messages)
    assert any(m.endswith("settings that PEFT does not know are ignored, as PEFT does: lora_dtype") for m in messages)


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("Qwen/Qwen2-1.5B", "/data/Qwen2-1.5B/"),
        (r"C:\models\Qwen2-1.5B", "Qwen/Qwen2-1.5B"),
        ("/home/ada/.cache/huggingface/hub/models--Qwen--Qwen2-1.5B/snapshots/8a16abf2848eda07", "./Qwen2-1.5B"),
        ("/home/ada/.cache/modelscope/hub/Qwen/Qwen2-1___5B", "qwen/qwen2-1.5b"),
        (r"D:\hub\models--Qwen--Qwen2-1.5B\snapshots\8a16abf2848eda07", "Qwen/Qwen2-1.5B"),
    ],
)
def test_a_base_is_known_by_its_name_wherever_it_lay(told: str, name: str, squad: Path) -> None:
    edit_config(squad, base_model_name_or_path=told)
    adapter = read_adapter(squad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_base_name(adapter, name, strict=True)
    with pytest.raises(AdapterError, match="says it was trained on"):
        check_base_name(adapter, name.replace("1", "7"), strict=True)


def test_an_adapter_without_weights_gets_them_from_its_folder(squad: Path) -> None:
    shapes = read_adapter(squad, weights=False)
    assert not shapes.is_loaded
    for module, lora in shapes.with_weights().modules.items():
        assert torch.equal(lora.a, load_file(squad / WEIGHTS)[key(module, "A")])
    made_here = replace(shapes, entries={})
    with pytest.raises(AdapterError, match="'squad' was never in a folder: its weights cannot be read again"):
        made_here.with_weights()
    edit_weights(squad, lambda tensors: tensors.update({key(Q0, "A"): torch.ones(5, 32)}))
    with pytest.raises(AdapterError, match="squad was written again since it was read"):
        shapes.with_weights()


def test_pickled_weights_are_refused_unread(squad: Path) -> None:
    (squad / WEIGHTS).rename(squad / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin, which can run code.*safe_serialization=True"):
        read_adapter(squad)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_weights_are_refused(size: int, squad: Path) -> None:
    (squad / WEIGHTS).write_bytes((squad / WEIGHTS).read_bytes()[:size])
    with pytest.raises(AdapterError, match=rf"squad/{WEIGHTS} is truncated or not a safetensors file .*copy it again"):
        read_adapter(squad)


def test_a_text_file_in_the_place_of_the_weights_is_refused(squad: Path) -> None:
    (squad / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    with pytest.raises(AdapterError, match=rf"squad/{WEIGHTS} is truncated or not a safetensors file"):
        read_adapter(squad)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("half", ["A", "B"])
def test_weights_that_diverged_are_refused(number: float, half: str, squad: Path) -> None:
    edit_weights(squad, lambda tensors: tensors[key(Q0, half)].view(-1)[3:4].fill_(number))
    with pytest.raises(AdapterError, match=f"squad holds NaN or infinite numbers in '.*{Q0}.lora_{half}.weight'"):
        read_adapter(squad)


@pytest.mark.parametrize(("gone", "left"), [("A", "B"), ("B", "A")])
def test_half_a_lora_is_refused(gone: str, left: str, squad: Path) -> None:
    edit_weights(squad, lambda tensors: tensors.pop(key(Q0, gone)))
    with pytest.raises(AdapterError, match=f"squad has only lora_{left} for {Q0}; expected both lora_A and lora_B"):
        read_adapter(squad)


@pytest.mark.parametrize(
    ("half", "shape"), [("A", (5, 32)), ("B", (32, 5)), ("A", (4, 32, 1)), ("B", (128,)), ("B", (4, 32))], ids=str
)
def test_weights_of_another_rank_than_the_config_says_are_refused(
    half: str, shape: tuple[int, ...], squad: Path
) -> None:
    edit_weights(squad, lambda tensors: tensors.update({key(Q0, half): torch.zeros(shape)}))
    with pytest.raises(AdapterError, match=rf"squad: {Q0} has lora_A \(.*\) and lora_B \(.*\); its config says rank 4"):
        read_adapter(squad)


@pytest.mark.parametrize(
    "extra",
    [
        f"base_model.model.{Q0}.lora_B.bias",
        f"base_model.model.{Q0}.lora_magnitude_vector",
        f"base_model.model.{Q0}.lora_E",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_embedding_B",
    ],
)
def test_tensors_beside_the_loras_are_refused(extra: str, squad: Path) -> None:
    edit_weights(squad, lambda tensors: tensors.update({extra: torch.ones(4, 32)}))
    with pytest.raises(AdapterError, match=f"squad cannot be fused exactly: it holds '{extra}'; expected only lora_A"):
        read_adapter(squad)


def test_weights_without_a_tensor_are_refused(squad: Path) -> None:
    save_file({}, squad / WEIGHTS)
    with pytest.raises(AdapterError, match="squad holds no weights; expected lora_A and lora_B tensors"):
        read_adapter(squad)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 20) | st.floats() | st.sampled_from(["", "q_proj", "none", "8"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["q_proj", "r"]), inner, max_size=2),
    max_leaves=3,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_a_config_says_it_is_read_as_peft_means_it_or_refused(squad: Path, data: st.DataObject) -> None:
    sound = (squad / CONFIG).read_text()
    config = json.loads(sound)
    for setting in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=2)):
        config[setting] = data.draw(JSON)
    (squad / CONFIG).write_text(json.dumps(config))
    try:
        modules, refusal = read_adapter(squad).modules, str(squad)
    except AdapterError as error:
        modules, refusal = {}, str(error)
    finally:
        (squad / CONFIG).write_text(sound)
    assert str(squad) in refusal
    for module, lora in modules.items():
        assert lora.scaling == pytest.approx(reference.scaling(config, module))


# A folder of adapters


def test_adapters_are_found_by_folder_name(adapters: Mapping[str, Path]) -> None:
    root = adapters["math"].parent
    (root / "notes.txt").write_text("not an adapter")
    (root / "empty").mkdir()
    assert list(find_adapters(root).items()) == [(name, root / name) for name in ("math", "poems", "units")]
    assert find_adapters(str(root)) == find_adapters(root)


def test_a_folder_that_lost_its_config_is_found_and_refused_by_name(adapters: Mapping[str, Path]) -> None:
    (adapters["math"] / CONFIG).unlink()
    found = find_adapters(adapters["math"].parent)
    assert "math" in found
    with pytest.raises(AdapterError, match=f"math has no {CONFIG}"):
        read_adapter(found["math"])


def test_a_place_without_adapters_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="nowhere is not a folder; expected a folder of PEFT adapter folders"):
        find_adapters(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match=rf"holds no adapter: no folder in it has an {CONFIG}"):
        find_adapters(tmp_path)
    with pytest.raises(AdapterError, match="squad is itself an adapter; expected a folder of adapter folders, or"):
        find_adapters(made)


# Writing one


def test_a_mixture_written_as_an_adapter_gives_peft_the_logits_of_the_fused_one(
    adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    mixture = Mixture({"math": 0.5, "units": -0.3, "poems": 1.2})
    read = {name: read_adapter(path, name) for name, path in adapters.items()}
    fused: dict[str, LoraWeights] = {}
    for module in sorted({m for adapter in read.values() for m in adapter.modules}):
        parts = [(w, read[name].modules[module]) for name, w in mixture.items() if module in read[name].modules]
        a = torch.cat([lora.a for _, lora in parts])
        b = torch.cat([w * lora.scaling / 3 * lora.b for w, lora in parts], dim=1)
        fused[module] = LoraWeights(a=a, b=b, scaling=3.0)
    assert len({lora.rank for lora in fused.values()}) > 1
    write_adapter(tmp_path / "out", fused, base_model="tiny", rank=16)

    ids = torch.arange(10).reshape(2, 5)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "out")(ids).logits
        model = tiny_model("llama")
        bank = AdapterBank(linear_layers(model), read.values())
        attach(model, bank)
        plain = model(ids).logits
        bank.fuse([mixture])
        ours = model(ids).logits
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert (ours - plain).abs().max() > 0.1 * theirs.abs().max()


def test_a_written_adapter_is_read_back_with_the_same_deltas(adapters: Mapping[str, Path], tmp_path: Path) -> None:
    read = read_adapter(adapters["units"])
    write_adapter(tmp_path / "out", read.modules, base_model="tiny", rank=11)
    written = read_adapter(tmp_path / "out")
    assert written.base_model == "tiny"
    assert {lora.rank for lora in written.modules.values()} == {11}
    wanted, found = reference.deltas(adapters["units"]), reference.deltas(tmp_path / "out")
    assert found.keys() == wanted.keys()
    for module in wanted:
        torch.testing.assert_close(found[module], wanted[module], rtol=0, atol=1e-7)


def test_a_lora_is_never_cut_to_a_lower_rank(squad: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{Q0} has rank 4, which does not fit into rank=3; raise it"):
        write_adapter(tmp_path / "out", read_adapter(squad).modules, rank=3)
    assert not (tmp_path / "out").exists()


# Identity


def test_the_content_hash_is_that_of_the_content(squad: Path, tmp_path: Path) -> None:
    before = content_hash(squad)
    moved = Path(shutil.copytree(squad, tmp_path / "elsewhere"))
    (moved / "README.md").write_text("a model card")
    assert content_hash(moved) == before
    edit_weights(moved, lambda tensors: tensors[key(Q0, "B")].view(-1)[5:6].add_(1e-6))
    assert content_hash(moved) != before
    edit_config(squad, lora_alpha=9)
    assert content_hash(squad) != before


def test_what_an_interrupted_save_leaves_behind_is_no_adapter(llama: PreTrainedModel, tmp_path: Path) -> None:
    make_adapter(llama, tmp_path / "math", seed=1)
    make_adapter(llama, tmp_path / ".math.x1.partial", seed=2)
    assert list(find_adapters(tmp_path)) == ["math"]
