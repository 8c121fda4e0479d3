import json
import math
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conftest import HashRouter, byte_tokenizer, lively_model
from dlp_lora import Context, DLPLoRAError, Engine, MiniMLP, Mixture, RouterError, TopP, load

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'dlp-lora[lm-eval]'")

from lm_eval import simple_evaluate
from lm_eval.api import registry
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from dlp_lora.integrations.lm_eval import NAME, DLPLoRALM, EngineLM, register
from dlp_lora.serve.adapters import AdapterManager
from dlp_lora.serve.keys import Keys
from dlp_lora.serve.server import local_service
from dlp_lora.serve.settings import ServerSettings
from serving import double_engine, listening

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.clients

# Contexts of many lengths; two requests whose tokens are the same but for where the context ends; and choices of one
# token, whose logits HFLM computes once.
PAIRS = [
    ("What is 12 times 7?", " It is 84."),
    ("What is 12 times 7?", " 84"),
    ("Q: 3 km in metres? A:", " 3000"),
    ("Q: 3 km in metres? A: 30", "00"),
    ("A poem about rain ", "falls"),
    ("yes or no? ", "y"),
    ("yes or no? ", "n"),
    ("yes or no? y", "es"),
    ("", "no context"),
    ("Is it é?", " é"),
]
LINES = [
    {"question": "What is 2 plus 3?", "choices": ["5", "6", "I do not know"], "gold": 0},
    {"question": "Which day follows Monday?", "choices": ["Friday", "Tuesday", "Monday"], "gold": 1},
    {"question": "Name a colour.", "choices": ["red", "seven", "a dog"], "gold": 0},
    {"question": "Three?", "choices": ["3", "4", "5"], "gold": 0},
]


def instances(kind: str, pairs: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=pair, idx=i, metadata=("mine", i, 1))
        for i, pair in enumerate(pairs)
    ]


def routed(engine: Engine, context: str) -> Mixture:
    """What is chosen for a context, step by step."""
    assert engine.router is not None
    (row,) = engine.router.probabilities([Context(context.strip())]).tolist()
    return engine.policy(dict(zip(engine.router.names, row, strict=True)))


def by_hand(engine: Engine, context: str, continuation: str, mixture: Mapping[str, float]) -> tuple[float, bool]:
    """The log-likelihood in one forward pass, and whether greedy decoding gives the continuation."""
    rest = context.rstrip()  # lm-eval counts the spaces between them to the continuation
    tokens = engine.tokenizer(context + continuation)["input_ids"]
    start = len(engine.tokenizer(rest)["input_ids"])
    if not rest:
        tokens, start = [engine.tokenizer.eos_token_id, *tokens], 1
    with engine.fixed(mixture), torch.no_grad():
        logits = engine.model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    places = range(start, len(tokens))
    greedy = all(int(logits[i - 1].argmax()) == tokens[i] for i in places)
    return math.fsum(float(logits[i - 1, tokens[i]]) for i in places), greedy


@pytest.mark.parametrize("batch_size", [1, 3, 64, "auto"])
def test_a_likelihood_is_measured_under_the_mixture_of_its_context_alone(
    make_engine: Callable[..., Engine], batch_size: int | str
) -> None:
    engine = make_engine()
    lm = EngineLM(engine, batch_size=batch_size, max_batch_size=4)
    found = lm.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    for (context, continuation), (likelihood, is_greedy) in zip(PAIRS, found, strict=True):
        expected = by_hand(engine, context, continuation, routed(engine, context))
        assert likelihood == pytest.approx(expected[0], rel=1e-5)
        assert is_greedy == expected[1]


def test_the_router_never_sees_a_continuation(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(router=(router := HashRouter()))
    EngineLM(engine, batch_size=4).loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    assert router.asked == [Context(text) for text in dict.fromkeys(context.strip() for context, _ in PAIRS)]


def test_a_plain_forward_pass_would_let_the_continuation_choose(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    (context, continuation), *_ = PAIRS
    alone, together = routed(engine, context), routed(engine, context + continuation)
    assert alone != together
    of_alone, of_together = (by_hand(engine, context, continuation, mixture)[0] for mixture in (alone, together))
    assert abs(of_alone - of_together) > 0.1


def test_wrapping_an_engine_changes_nothing_about_it(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    before = engine.generate("Tell me of rain.", max_new_tokens=16, do_sample=False)
    EngineLM(engine)
    assert engine.generate("Tell me of rain.", max_new_tokens=16, do_sample=False).tokens == before.tokens


@pytest.mark.parametrize("kv_policy", ["keep", "recompute"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_generating_is_what_the_engine_generates(
    make_engine: Callable[..., Engine], kv_policy: str, batch_size: int
) -> None:
    engine = make_engine(kv_policy=kv_policy)
    lm = EngineLM(engine, batch_size=batch_size)
    prompts = ["Tell me of rain.", "What is 12 times 7?", "Name a colour.", "?"]
    requests = instances("generate_until", [(prompt, {"until": [], "max_gen_toks": 24}) for prompt in prompts])
    found = lm.generate_until(requests, disable_tqdm=True)
    answers = [engine.generate(prompt, max_new_tokens=24, do_sample=False) for prompt in prompts]
    assert found == [answer.text for answer in answers]
    switched = [any(sentence.switched for sentence in answer.trace[1:]) for answer in answers]
    assert sum(switched) >= 3


def test_a_chat_is_routed_by_what_is_said_in_it(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(router=(router := HashRouter()))
    lm = EngineLM(engine)
    context = lm.apply_chat_template([{"role": "user", "content": "Tell me of rain."}])
    assert context != "Tell me of rain."
    lm.loglikelihood(instances("loglikelihood", [(context, "It falls.")]), disable_tqdm=True)
    assert router.asked == [Context("Tell me of rain.")]


def test_an_answer_that_a_task_begins_is_routed_as_a_begun_answer(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(router=(router := HashRouter()))
    lm = EngineLM(engine)
    chat = [{"role": "user", "content": "Tell me of rain."}, {"role": "assistant", "content": "It falls. And"}]
    context = lm.apply_chat_template(chat, add_generation_prompt=False)
    lm.loglikelihood(instances("loglikelihood", [(context, " then it dries.")]), disable_tqdm=True)
    asked = list(router.asked)
    assert f"{asked[0].answer}{asked[0].sentence}" == "It falls. And"
    router.asked.clear()
    engine.generate(chat, max_new_tokens=1, do_sample=False)
    assert router.asked == asked


@pytest.mark.parametrize("mixture", [{}, {"math": 0.6, "units": 0.4}])
def test_a_mixture_fixed_from_outside_holds(make_engine: Callable[..., Engine], mixture: dict[str, float]) -> None:
    engine = make_engine(router=(router := HashRouter()))
    # lm-eval 0.4.13 shares logits among requests of the same tokens, and takes the wrong ones where contexts differ.
    lm = EngineLM(engine, batch_size=4, logits_cache=False)
    with engine.fixed(mixture):
        found = lm.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
        (whole,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [("It rains.",)]), disable_tqdm=True)
    expected = [by_hand(engine, *pair, mixture)[0] for pair in PAIRS]
    assert [likelihood for likelihood, _ in found] == pytest.approx(expected, rel=1e-5)
    assert whole == pytest.approx(by_hand(engine, "", "It rains.", mixture)[0], rel=1e-5)
    assert router.asked == []


def test_whole_texts_are_refused_as_they_have_no_context(make_engine: Callable[..., Engine]) -> None:
    lm = EngineLM(make_engine())
    with pytest.raises(ValueError, match="mine: a text whose likelihood is measured as a whole has no context"):
        lm.loglikelihood_rolling(instances("loglikelihood_rolling", [("It rains.",)]))


def test_what_cannot_be_used_is_said(make_engine: Callable[..., Engine], bundle: Path) -> None:
    with pytest.raises(RouterError, match="no router to choose adapters; train one"):
        EngineLM(make_engine(router=None))
    with pytest.raises(ValueError, match="dlp_lora takes no argument bundel; of lm-eval's it takes batch_size, "):
        DLPLoRALM(bundle=bundle, bundel="x")
    with pytest.raises(ValueError, match="bundle= holds adapters and router"):
        DLPLoRALM(bundle=bundle, router=bundle / "router")
    with pytest.raises(ValueError, match="give bundle=, or model=, adapters= and router="):
        DLPLoRALM(model="somewhere")


def test_the_model_args_are_a_bundle_or_its_parts(bundle: Path) -> None:
    model, adapters, router = bundle.parent / "model", bundle / "adapters", bundle / "router"
    whole = DLPLoRALM.create_from_arg_string(f"bundle={bundle},p=0.9,dtype=bfloat16", {"batch_size": 2})
    parts = DLPLoRALM.create_from_arg_obj({"model": model, "adapters": adapters, "router": router})
    assert whole.engine.policy == TopP(0.9)
    assert whole.engine.model.dtype == torch.bfloat16
    assert whole.batch_size == 2
    request = instances("loglikelihood", PAIRS)
    of_bundle = EngineLM(load(bundle)).loglikelihood(request, disable_tqdm=True)
    assert parts.loglikelihood(request, disable_tqdm=True) == of_bundle


def test_the_entry_point_is_what_lm_eval_registers() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["lm_eval.models"].items()
    models = registry.Registry("model", base_cls=LM)
    models.register(name, target=EntryPoint(name, value, "lm_eval.models"))
    assert name == NAME
    assert models.get(name) is DLPLoRALM


def test_tasks_of_choices_and_of_answers_are_evaluated(bundle: Path, tasks: Path) -> None:
    register()
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results = simple_evaluate(
        model=NAME,
        model_args={"bundle": str(bundle)},
        tasks=["mine_choice", "mine_answer"],
        batch_size=3,
        task_manager=manager,
        bootstrap_iters=0,
    )
    assert results is not None
    engine = load(bundle)
    chosen = [best_choice(engine, line) for line in LINES]
    samples = sorted(results["samples"]["mine_choice"], key=lambda sample: sample["doc_id"])
    for sample, line in zip(samples, LINES, strict=True):
        context = prompt(line)
        expected = [by_hand(engine, context, f" {c}", routed(engine, context))[0] for c in line["choices"]]
        assert [response[0] for response in sample["filtered_resps"]] == pytest.approx(expected, rel=1e-5)
    accuracy = sum(c == line["gold"] for c, line in zip(chosen, LINES, strict=True)) / len(LINES)
    assert results["results"]["mine_choice"]["acc,none"] == accuracy
    samples = sorted(results["samples"]["mine_answer"], key=lambda sample: sample["doc_id"])
    said = [engine.generate(prompt(line), max_new_tokens=12, do_sample=False).text for line in LINES]
    assert [sample["resps"][0][0] for sample in samples] == said


PROGRAMS = [
    pytest.param(["dlp_lora", "lm-eval"], id="dlp-lora lm-eval"),
    pytest.param(
        ["lm_eval"],
        id="lm_eval",
        marks=pytest.mark.skipif(
            not hasattr(registry, "import_plugins"), reason="this release of lm-eval reads no entry points"
        ),
    ),
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_command_line_evaluates_a_bundle(bundle: Path, tasks: Path, tmp_path: Path, program: list[str]) -> None:
    out = tmp_path / "out"
    command = [
        *(sys.executable, "-m", *program, "--model", NAME, "--model_args", f"bundle={bundle},p=0.9"),
        *("--tasks", "mine_choice,mine_answer", "--include_path", str(tasks)),
        *("--output_path", str(out), "--batch_size", "2"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **offline}, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = out.rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    engine = load(bundle, policy=TopP(0.9))
    right = [best_choice(engine, line) == line["gold"] for line in LINES]
    assert results["mine_choice"]["acc,none"] == sum(right) / len(right)
    assert "mine_answer" in done.stdout


class FirstLine(HashRouter):
    """Reads the first line of a prompt alone."""

    def probabilities(self, contexts: Sequence[Context]) -> torch.Tensor:
        return super().probabilities([replace(each, prompt=each.prompt.partition("\n")[0]) for each in contexts])


class TestOverHTTP:
    """lm-eval's own client of completions, against the server. It sends a context and its continuation as one prompt,
    so that the router reads both: the scores are ours where that chooses the same adapters.
    """

    @pytest.fixture
    def engine(self, lively_adapters: Path) -> Engine:
        return double_engine(lively_adapters, router=FirstLine())

    @pytest.fixture
    def client(self, engine: Engine, tmp_path: Path) -> Iterator[Callable[[str], LM]]:
        """Makes the client of a model of the server."""
        for module in ("aiohttp", "tenacity", "requests"):
            pytest.importorskip(module, reason="lm-eval's client needs lm-eval[api]")
        engine.tokenizer.save_pretrained(tmp_path)
        service = local_service(engine, ServerSettings(), Keys({}), name="tiny")
        with listening(service, AdapterManager(service)) as address:
            yield lambda model: registry.get_model("local-completions")(
                model=model,
                base_url=f"{address}/v1/completions",
                tokenizer=str(tmp_path),
                tokenizer_backend="huggingface",
                batch_size=3,
            )
        service.backend.close()

    @pytest.mark.parametrize(
        "model, mixture",
        [("tiny:base", {}), ("math", {"math": 1.0}), ("math=0.6,units=0.4", {"math": 0.6, "units": 0.4})],
    )
    def test_likelihoods_under_a_mixture_are_ours(
        self, engine: Engine, client: Callable[[str], LM], model: str, mixture: dict[str, float]
    ) -> None:
        requests = instances("loglikelihood", PAIRS)
        found = client(model).loglikelihood(requests, disable_tqdm=True)
        with engine.fixed(mixture):
            expected = EngineLM(engine, logits_cache=False).loglikelihood(requests, disable_tqdm=True)
        assert [likelihood for likelihood, _ in found] == pytest.approx([e for e, _ in expected], abs=1e-4)
        assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]

    def test_a_routed_task_has_our_scores(self, engine: Engine, client: Callable[[str], LM], tasks: Path) -> None:
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        of_both = [
            simple_evaluate(model=model, tasks=["mine_choice", "mine_answer"], task_manager=manager, bootstrap_iters=0)
            for model in (client("tiny"), EngineLM(engine))
        ]
        found, expected = ({**results} for results in of_both if results is not None)
        assert found["results"]["mine_choice"] == expected["results"]["mine_choice"]
        for theirs, ours in zip(*(samples_of(each, "mine_choice") for each in (found, expected)), strict=True):
            likelihoods = [[likelihood for likelihood, _ in each["filtered_resps"]] for each in (theirs, ours)]
            assert likelihoods[0] == pytest.approx(likelihoods[1], abs=1e-4)
        said = [[sample["resps"] for sample in samples_of(each, "mine_answer")] for each in (found, expected)]
        assert said[0] == said[1]
        assert len({routed(engine, prompt(line)) for line in LINES}) > 1


def samples_of(results: Mapping[str, Any], task: str) -> list[Any]:
    return sorted(results["samples"][task], key=lambda sample: sample["doc_id"])


def prompt(line: Mapping[str, Any]) -> str:
    return f"Question: {line['question']}\nAnswer:"


def best_choice(engine: Engine, line: Mapping[str, Any]) -> int:
    context = prompt(line)
    scores = [by_hand(engine, context, f" {c}", routed(engine, context))[0] for c in line["choices"]]
    return scores.index(max(scores))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, lively_adapters: Path) -> Path:
    """A bundle of three adapters and a router that nobody trained: it mixes two or three of them at every text."""
    root = tmp_path_factory.mktemp("lm_eval")
    lively_model().save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    torch.manual_seed(0)
    router = MiniMLP(("math", "poems", "units"), byte_tokenizer().backend_tokenizer)
    load(root / "model", adapters=lively_adapters, router=router).save_pretrained(root / "bundle")
    return root / "bundle"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two tasks of lm-eval over one file of questions."""
    root = tmp_path_factory.mktemp("tasks")
    (root / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(root / "lines.jsonl")}, "cache_dir": str(root / "cache")},
        "test_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "num_fewshot": 0,
    }
    choice = {
        "task": "mine_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    answer = {
        "task": "mine_answer",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": [], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (choice, answer):
        (root / f"{task['task']}.yaml").write_text(yaml.safe_dump({**common, **task}))
    return root


def test_without_lm_eval_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [
        name for name in sys.modules if name.split(".")[0] == "lm_eval" or name == "dlp_lora.integrations.lm_eval"
    ]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(DLPLoRAError, match=r"run `pip install 'dlp-lora\[lm-eval\]'`"):
        import dlp_lora.integrations.lm_eval  # noqa: F401
