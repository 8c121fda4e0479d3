"""A bundle is read again while the server runs, and adapters that come with examples are chosen by the router."""

import asyncio
import gc
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import dlp_lora
from conftest import byte_tokenizer, lively_model, make_adapter
from dlp_lora import AdapterError, Engine, MiniMLP, TopK, TopP
from dlp_lora.engine.base import Base
from dlp_lora.engine.bundle import generation_of, write_bundle
from dlp_lora.engine.outline import read_outline
from dlp_lora.serve.adapters import AdapterManager, BundleMark
from dlp_lora.serve.answers import Answers, Piece
from dlp_lora.serve.errors import APIError
from dlp_lora.serve.keys import Access, Keys
from dlp_lora.serve.schema import CompletionRequest
from dlp_lora.serve.server import local_service, make_service
from dlp_lora.serve.service import Service
from dlp_lora.serve.settings import ServerSettings
from dlp_lora.serve.vllm.backend import VLLMBackend, VLLMSettings
from dlp_lora.serve.watch import watch
from dlp_lora.tasks import Example, Task
from dlp_lora.training.extend import add_tasks, remove_tasks
from dlp_lora.training.router import RouterTrainingArgs, train_router
from serving import over_http, until
from vllm_stand_in import standing_in

pytestmark = pytest.mark.filterwarnings("ignore:.*changes nothing")  # the adapter that vLLM servers are checked with

ASKED = {
    "math": "What is {i} plus {i}?",
    "units": "Convert {i} kilometres to miles!",
    "poems": "Tell a tale about king number {i}.",
    "codes": "print(x[{i}]) # {i}",
}


def task(name: str, num: int = 60) -> Task:
    examples = tuple(Example(prompt=ASKED[name].format(i=i), answer=f"{name} {i}") for i in range(num))
    return Task(name=name, train=examples, test=())


def asked(name: str) -> str:
    return ASKED[name].format(i=77)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    lively_model().double().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def router() -> MiniMLP:
    args = RouterTrainingArgs(epochs=12, batch_size=32)
    found, _ = train_router([task("math"), task("units")], byte_tokenizer().backend_tokenizer, args)
    assert isinstance(found, MiniMLP)
    return add_tasks(found, [task("poems", 32)])


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters, of which "math" and "math2" will have the same name."""
    root = tmp_path_factory.mktemp("shelf")
    for seed, name in enumerate(("math", "math2", "units", "poems", "codes", "tales")):
        make_adapter(lively_model(), root / name, seed=seed, scale=0.3)
    return root


@pytest.fixture
def bundle(base: Path, router: MiniMLP, shelf: Path, tmp_path: Path) -> Path:
    """Math, units and poems."""
    engine = dlp_lora.load(base, adapters={n: shelf / n for n in ("math", "units", "poems")}, router=router)
    engine.save_pretrained(tmp_path / "bundle")
    return tmp_path / "bundle"


def rewrite(bundle: Path, base: Path, router: MiniMLP, shelf: Path) -> None:
    """The bundle again: another math, the same units, codes in the place of poems, and another policy."""
    router = remove_tasks(add_tasks(router, [task("codes", 32)]), ["poems"])
    adapters = {"math": shelf / "math2", "units": shelf / "units", "codes": shelf / "codes"}
    engine = dlp_lora.load(base, adapters=adapters, router=router, policy=TopK(1))
    engine.save_pretrained(bundle)


class Running:
    """A server of a bundle, in this process; `engine` computes its answers."""

    def __init__(self, service: Service, engine: Engine, bundle: Path, shelf: Path) -> None:
        self.service, self.engine = service, engine
        self.manager = AdapterManager(service, folders=[shelf], bundle=bundle)

    def post(self, path: str, body: Any = None) -> httpx.Response:
        return over_http(self.service, self.manager, path, {} if body is None else body, key="A")

    def complete(self, prompt: str, **body: Any) -> Any:
        response = self.post("/v1/completions", {"prompt": prompt, "max_tokens": 24, **body})
        assert response.status_code == 200, response.text
        return response.json()

    def chosen(self, prompt: str) -> set[str]:
        return set(self.post("/v1/route", {"prompt": prompt}).json()["mixture"])

    @property
    def models(self) -> list[str]:
        listed = over_http(self.service, self.manager, "/v1/models", key="A").json()
        return sorted(card["id"] for card in listed["data"])


@pytest.fixture
def running(request: pytest.FixtureRequest, bundle: Path, base: Path, shelf: Path) -> Iterator[Running]:
    """With the local backend and adapters in memory or on disk, or on a server that speaks vLLM's routes."""
    settings, keys = ServerSettings(served_model_name="tiny"), Keys({}, admin="A")
    if (kind := getattr(request, "param", "local")) != "vllm":
        engine = dlp_lora.load(bundle, budget_mb=1e-6 if kind == "disk" else None)
        service = local_service(engine, settings, keys, name="tiny")
        yield Running(service, engine, bundle, shelf)
        service.backend.close()
        return
    engine, outline = dlp_lora.load(base, adapters={"unused": shelf / "tales"}), read_outline(bundle)
    with standing_in(engine) as server:
        backend = VLLMBackend(outline, [server.url], settings=VLLMSettings(poll_s=0.1))
        yield Running(make_service(outline, backend, settings, keys, name="tiny"), engine, bundle, shelf)
        backend.close()


on_each_backend = pytest.mark.parametrize("running", ["local", "vllm"], indirect=True)


def text_of(engine: Engine, prompt: str, **settings: Any) -> str:
    return engine.generate(prompt, max_new_tokens=settings.pop("max_new_tokens", 24), **settings).text


@pytest.mark.parametrize("running", ["local", "disk", "vllm"], indirect=True)
def test_a_stream_goes_on_as_it_began_and_later_requests_get_the_new_bundle(
    running: Running, bundle: Path, base: Path, router: MiniMLP, shelf: Path
) -> None:
    expected = text_of(dlp_lora.load(bundle), asked("math"), max_new_tokens=120)
    running.complete(asked("math"), max_tokens=1)  # vLLM's mixtures are written from the files when they are needed
    rewrite(bundle, base, router, shelf)
    body = CompletionRequest(prompt=asked("math"), max_tokens=120)
    slow = running.engine.model.get_input_embeddings().register_forward_pre_hook(lambda *_: time.sleep(0.005))

    async def stream() -> str:
        text, reloading = "", None
        async with Answers(running.service, running.service.completion(body, Access(adapters=None))) as answers:
            async for got in answers.items():
                match got:
                    case (_, Piece() as piece):
                        text += piece.text
                        reloading = reloading or asyncio.create_task(asyncio.to_thread(running.manager.reload))
        assert reloading is not None
        assert reloading.done()  # before the last token
        told = await reloading
        assert (told["added"], told["removed"], told["replaced"]) == (["codes"], ["poems"], ["math"])
        return text

    assert asyncio.run(stream()) == expected
    slow.remove()
    assert running.models == ["codes", "math", "tiny", "tiny:base", "units"]
    fresh = dlp_lora.load(bundle)
    for name in ("math", "units", "codes", "poems"):
        choice = running.complete(asked(name))["choices"][0]
        assert choice["text"] == text_of(fresh, asked(name))
        assert running.chosen(asked(name)) == ({name} if name != "poems" else set())
    assert text_of(fresh, asked("math")) != expected[:24]


@on_each_backend
def test_kv_of_an_adapter_that_was_replaced_is_not_used_again(
    running: Running, bundle: Path, base: Path, router: MiniMLP, shelf: Path
) -> None:
    def ask(name: str) -> tuple[str, bool]:
        answer = running.complete("The same prompt", model=name)
        return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0

    before = {name: ask(name)[0] for name in ("math", "units", "tiny:base")}
    assert all(ask(name) == (text, True) for name, text in before.items())
    rewrite(bundle, base, router, shelf)
    assert running.post("/v1/reload").status_code == 200
    expected = text_of(dlp_lora.load(bundle), "The same prompt", mixture={"math": 1.0})
    assert ask("math") == (expected, False)
    assert expected != before["math"]
    assert ask("math") == (expected, True)
    assert ask("units") == (before["units"], True)  # the same adapter as before
    assert ask("tiny:base") == (before["tiny:base"], True)


def _damage(bundle: Path) -> None:
    (bundle / "bundle.json").write_text("{")


def _cut(bundle: Path) -> None:
    weights = bundle / "adapters" / "math" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])


def _lose(bundle: Path) -> None:
    shutil.rmtree(bundle / "adapters" / "units")


def _change_base(bundle: Path) -> None:
    _change(bundle, fingerprint={"config": {}, "tensors": "of another", "values": "model"})


def _rename_base(bundle: Path) -> None:
    _change(bundle, name="somebody/else", origin="hub", path=None, fingerprint=None)


def _change(bundle: Path, **base: Any) -> None:
    data = json.loads((bundle / "bundle.json").read_text())
    data["base_model"] |= base
    (bundle / "bundle.json").write_text(json.dumps(data))


@pytest.mark.parametrize("harm", [_damage, _cut, _lose, _change_base, _rename_base])
def test_a_broken_bundle_is_refused_and_the_old_one_stays(running: Running, bundle: Path, harm: Any) -> None:
    answers = {name: running.complete(asked(name))["choices"][0]["text"] for name in ("math", "poems")}
    harm(bundle)
    refused = running.post("/v1/reload")
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "bundle_refused"
    assert running.models == ["math", "poems", "tiny", "tiny:base", "units"]
    assert {name: running.complete(asked(name))["choices"][0]["text"] for name in answers} == answers


@on_each_backend
@pytest.mark.parametrize("name, kind", [("tales", "of gpt2"), ("tiny", "tales")], ids=["unfit", "the served name"])
def test_of_a_bundle_with_an_adapter_that_cannot_be_used_nothing_is_taken(
    running: Running, bundle: Path, router: MiniMLP, shelf: Path, tmp_path: Path, name: str, kind: str
) -> None:
    make_adapter(lively_model("gpt2"), tmp_path / "of gpt2", seed=9, target_modules=["c_attn"])
    folders = {"of gpt2": tmp_path / "of gpt2", "tales": shelf / "tales"}
    base = running.engine.model.config._name_or_path
    before = running.complete(asked("math"))["choices"][0]["text"]
    write_bundle(
        bundle,
        base=Base.of(base, bundle=bundle),
        adapters={"math": shelf / "math2", "codes": shelf / "codes", name: folders[kind]},
        router=None,
        settings=running.engine.settings,
    )
    refused = running.post("/v1/reload")
    assert refused.status_code == 400
    assert name in refused.json()["error"]["message"]
    assert running.models == ["math", "poems", "tiny", "tiny:base", "units"]
    assert running.complete(asked("math"))["choices"][0]["text"] == before


@pytest.mark.parametrize("path", ["/v1/reload", "/v1/load_lora_adapter"])
def test_an_adapter_that_cannot_take_the_place_of_another_leaves_it_there(
    running: Running, bundle: Path, base: Path, router: MiniMLP, shelf: Path, path: str
) -> None:
    before = running.complete(asked("math"))["choices"][0]["text"]
    rewrite(bundle, base, router, shelf)
    body = {"lora_name": "math", "lora_path": "math2", "load_inplace": True, "examples": examples("codes")}
    with running.engine.fixed({"math": 1.0}):  # a use of it outside the server, which cannot be given another one
        refused = running.post(path, body)
        assert refused.status_code == 400
        assert "rows still run with the adapter 'math'" in refused.json()["error"]["message"]
        assert running.models == ["math", "poems", "tiny", "tiny:base", "units"]
        assert running.complete(asked("math"))["choices"][0]["text"] == before
        assert (running.chosen(asked("math")), running.chosen(asked("codes"))) == ({"math"}, set())
    gc.collect()  # the copies of the block's context, which the requests in it have made
    assert running.post(path, {"lora_name": "math", "lora_path": "math2", "load_inplace": True}).status_code == 200
    assert running.complete(asked("math"))["choices"][0]["text"] != before


@on_each_backend
def test_while_an_adapter_is_replaced_requests_never_miss_it(running: Running) -> None:
    seen: set[frozenset[str]] = set()
    names: set[tuple[str, ...]] = set()
    has_ended = threading.Event()

    def look() -> None:
        tokens = tuple(running.service.encoder.tokenizer(asked("math"))["input_ids"])
        while not has_ended.is_set():
            names.add(running.service.backend.adapters)
            row = running.service.backend.prompt_router.start_row(tokens, call=running.service.call)
            seen.add(frozenset(row.mixture))

    looking = threading.Thread(target=look)
    looking.start()
    for path in ("math2", "math") * 3:
        body = {"lora_name": "math", "lora_path": path, "load_inplace": True}
        assert running.post("/v1/load_lora_adapter", body).status_code == 200
    has_ended.set()
    looking.join()
    assert seen == {frozenset({"math"})}
    assert names == {("math", "units", "poems")}


@on_each_backend
def test_an_adapter_that_goes_before_its_request_begins_is_an_unknown_model(running: Running) -> None:
    asked = running.service.completion(CompletionRequest(prompt="Hi", model="units"), Access(adapters=None))
    assert running.post("/v1/unload_lora_adapter", {"lora_name": "units"}).status_code == 200

    async def ask() -> None:
        async with Answers(running.service, asked) as answers:
            await answers.whole()

    with pytest.raises(APIError, match=r"The model .units. does not exist\. There are tiny, tiny:base, math, poems;"):
        asyncio.run(ask())


def test_an_adapter_that_goes_while_it_answers_stays_in_no_metric(running: Running) -> None:
    asked = running.service.completion(CompletionRequest(prompt="Hi", model="units"), Access(adapters=None))

    async def ask() -> None:
        async with Answers(running.service, asked) as answers:
            items = answers.items()
            await anext(items)
            running.manager.unload("units")
            async for _ in items:
                pass

    asyncio.run(ask())
    text = running.service.metrics.text().decode()
    assert '"units"' not in text
    assert 'dlp_lora_request_generation_tokens_sum{model="removed"} 16.0' in text


@pytest.mark.parametrize(
    "running, name, way",
    [("disk", "units", "reload"), ("disk", "poems", "load"), ("vllm", "units", "reload"), ("vllm", "math", "load")],
    indirect=["running"],
)
def test_a_changed_adapter_that_is_not_loaded_yet_is_unavailable_until_it_is_read_again(
    running: Running, bundle: Path, base: Path, router: MiniMLP, shelf: Path, name: str, way: str
) -> None:
    """Units has other files with the same weights, math has other weights, and the files of poems are gone."""
    rewrite(bundle, base, router, shelf)
    refused = running.post("/v1/completions", {"prompt": "x", "model": name})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    error = refused.json()["error"]
    assert error["code"] == "adapter_changed"
    assert f"the files of the adapter '{name}' changed on disk" in error["message"]
    assert "POST /v1/reload, or loading the adapter again, takes them in" in error["message"]
    if way == "reload":
        assert running.post("/v1/reload").status_code == 200
    else:
        body = {"lora_name": name, "lora_path": name, "load_inplace": True}
        assert running.post("/v1/load_lora_adapter", body).status_code == 200
    expected = text_of(dlp_lora.load(base, adapters={name: shelf / name}), "x", mixture={name: 1.0})
    assert running.complete("x", model=name)["choices"][0]["text"] == expected


def test_settings_of_the_start_outlive_a_reload(bundle: Path, base: Path, router: MiniMLP, shelf: Path) -> None:
    engine = dlp_lora.load(bundle, kv_policy="keep")
    service = local_service(engine, ServerSettings(), Keys({}, admin="A"), name="tiny")
    server = Running(service, engine, bundle, shelf)
    rewrite(bundle, base, router, shelf)
    assert server.post("/v1/reload").status_code == 200
    assert (service.call.settings.policy, service.call.settings.kv_policy) == (TopK(1), "keep")
    service.backend.close()


def examples(name: str) -> list[dict[str, str]]:
    return [{"prompt": one.prompt, "answer": one.answer} for one in task(name, 32).train]


def test_examples_teach_the_router_and_unloading_makes_it_forget(running: Running) -> None:
    others = {name: running.chosen(asked(name)) for name in ("math", "units", "poems")}
    assert running.chosen(asked("codes")) == set()
    loaded = running.post(
        "/v1/load_lora_adapter", {"lora_name": "c", "lora_path": "codes", "examples": examples("codes")}
    )
    assert loaded.json()["is_routed"] is True
    assert "the router may choose it" in loaded.json()["message"]
    assert running.chosen(asked("codes")) == {"c"}
    assert {name: running.chosen(asked(name)) for name in others} == others
    choice = running.complete(asked("codes"))["choices"][0]
    with running.engine.fixed({"c": 1.0}):
        assert choice["text"] == text_of(running.engine, asked("codes"))
    assert running.post("/v1/unload_lora_adapter", {"lora_name": "c"}).status_code == 200
    assert running.chosen(asked("codes")) == set()
    again = running.post("/v1/load_lora_adapter", {"lora_name": "c", "lora_path": "tales"})
    assert again.json()["is_routed"] is False  # another adapter, of which the router knows nothing


def test_an_adapter_in_place_of_another_is_chosen_for_its_examples(running: Running) -> None:
    body = {"lora_name": "poems", "lora_path": "codes", "load_inplace": True, "examples": examples("codes")}
    assert running.post("/v1/load_lora_adapter", body).json()["is_routed"] is True
    assert running.chosen(asked("codes")) == {"poems"}
    assert running.chosen(asked("poems")) == set()


def test_what_was_taught_outlives_a_reload(
    running: Running, bundle: Path, base: Path, router: MiniMLP, shelf: Path
) -> None:
    body = {"lora_name": "mine", "lora_path": "tales", "examples": examples("poems")}
    # Its prompts are those of poems, which the next bundle does not have.
    assert running.post("/v1/load_lora_adapter", body).status_code == 200
    rewrite(bundle, base, router, shelf)
    assert running.post("/v1/reload").json()["removed"] == ["poems"]
    assert running.chosen(asked("poems")) == {"mine"}
    assert running.chosen(asked("codes")) == {"codes"}


def test_what_was_taught_for_an_adapter_of_the_bundle_stays_with_the_adapter_that_took_its_place(
    running: Running,
) -> None:
    body = {"lora_name": "poems", "lora_path": "codes", "load_inplace": True, "examples": examples("codes")}
    assert running.post("/v1/load_lora_adapter", body).status_code == 200
    assert running.post("/v1/reload").json()["replaced"] == []
    assert running.chosen(asked("codes")) == {"poems"}
    assert running.chosen(asked("poems")) == set()


def test_a_bundle_that_was_written_while_the_server_started_is_read_again(
    bundle: Path, base: Path, router: MiniMLP, shelf: Path
) -> None:
    mark = BundleMark.of(bundle)
    engine = dlp_lora.load(bundle)
    rewrite(bundle, base, router, shelf)
    service = local_service(engine, ServerSettings(), Keys({}, admin="A"), name="tiny")
    manager = AdapterManager(service, bundle=mark)
    ended = watch(manager, bundle, 0.02)
    until(lambda: "codes" in service.backend.adapters)
    ended.set()
    assert manager.generation == generation_of(bundle) > mark.generation
    told = over_http(service, manager, "/v1/completions", {"prompt": "Tell", "model": "math", "max_tokens": 16})
    expected = dlp_lora.load(bundle).generate("Tell", mixture={"math": 1.0}, max_new_tokens=16).text
    assert told.json()["choices"][0]["text"] == expected
    service.backend.close()


def test_a_reload_that_fails_is_tried_again(
    running: Running, bundle: Path, base: Path, router: MiniMLP, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, failures = running.service.backend.put_adapters, [AdapterError("not every backend could load it"), OSError()]

    def fails(folders: Any) -> None:
        if failures:
            raise failures.pop()
        put(folders)

    monkeypatch.setattr(running.service.backend, "put_adapters", fails)
    ended = watch(running.manager, bundle, 0.02)
    rewrite(bundle, base, router, shelf)
    until(lambda: "poems" not in running.models)
    ended.set()
    assert not failures


@pytest.mark.parametrize(
    "given, param",
    [
        ([], "examples"),
        ("all of them", "examples"),
        ([{"prompt": "x"}], "examples.0.answer"),
        ([{"prompt": " ", "answer": "y"}], "examples.0.prompt"),
        ([{"prompt": "x", "answer": ""}], "examples.0.answer"),
        ([{"prompt": "x", "answer": "y", "weight": 1}], "examples.0.weight"),
        ([{"prompt": 1, "answer": "y"}], "examples.0.prompt"),
    ],
    ids=str,
)
def test_examples_that_teach_nothing_are_named_and_nothing_is_loaded(running: Running, given: Any, param: str) -> None:
    response = running.post("/v1/load_lora_adapter", {"lora_name": "c", "lora_path": "codes", "examples": given})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert "c" not in running.models


def test_a_bundle_that_was_written_is_read_again_by_itself(
    running: Running, bundle: Path, base: Path, router: MiniMLP, shelf: Path
) -> None:
    ended = watch(running.manager, bundle, 0.02)
    rewrite(bundle, base, router, shelf)
    deadline = time.monotonic() + 30
    while "poems" in running.models:
        assert time.monotonic() < deadline, "it is not read again"
        time.sleep(0.02)
    ended.set()
    assert isinstance(running.service.call.settings.policy, TopK)
    assert isinstance(running.engine.settings.policy, TopP)
