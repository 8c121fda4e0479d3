"""The serve benchmark: `dlp-lora serve` with any backend under load, beside other servers; and with the local backend
beside the engine and the plain base in this process, too.

A server is a separate process, and this process is its client. All of them take turns, round by round. With another
backend, no model is loaded in this process: it would take the GPU's memory from vLLM.
"""

import gc
import json
import random
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle, islice, pairwise
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from dlp_lora.bank.adapter_files import CONFIG_FILE
from dlp_lora.engine.base import Base
from dlp_lora.engine.bundle import Bundle, read_bundle, write_bundle
from dlp_lora.engine.loading import load
from dlp_lora.engine.prompts import as_batch, encode_prompt
from dlp_lora.lab.bench.case import PROMPTS, BenchArgs, NumAdapters, Row, begin, record
from dlp_lora.lab.bench.load import Answer, Body, Target, ask, ask_beside, latency, ms_per_token, tokens_per_s
from dlp_lora.lab.bench.memory import bandwidth_gb_s
from dlp_lora.lab.bench.models import mini_mlp
from dlp_lora.lab.bench.random_adapters import write_random_adapters
from dlp_lora.lab.bench.server import Server, agree, serving
from dlp_lora.lab.bench.timing import Run, interleave
from dlp_lora.policy import Mixture, RoutingSettings
from dlp_lora.progress import OnProgress, Progress, unseen
from dlp_lora.router import load_tokenizer
from dlp_lora.tasks import PROCEDURAL, procedural_task

MODEL = "bench"  # what clients call the routed model
ENGINE, BASE = "engine.stream", "base, generate"
LOADS = ("fixed", "keep", "recompute")
PARTS = ("load", "chunk", "memory", "disk")
PARTS_OF_ALL = ("load",)  # the others are about the scheduler, the memory and the bank of the local backend
BACKENDS = ("local", "vllm", "llama.cpp")
# The benchmark sets these options of the server.
SET = {"--bundle", "-b", "--model", "-m", "--adapters", "-a", "--router", "-r", "--dtype", "--device"} | {
    *("--backend", "--backend-url", "--adapter-dir", "--budget-mb", "--served-model-name", "--host", "--port"),
    *("--api-key", "--keys", "--admin-key"),
}
NUM_ROUTED = 4  # random adapters of a bundle that is made here
WEIGHTS = ((0.6, 0.4), (0.7, 0.3))
BESIDE = 8  # of the requests in a round: so many are answered by the engine and by the base, too
ONE_CONTEXT = {"prompt_routing": "questions"}  # of the routed pairs, whose switches are measured
OURS = ("model", "ignore_eos")  # fields of a request that not every other server knows
KEEPS_NO_KV = ("--cache-mb", "0")  # where prompts come again
WARM_UP_TOKENS = 8
CHUNK_TOKENS = 256  # of a prompt that the server reads at once
LONG_TOKENS = 1000  # of a prompt that is read while another answer runs
LONG_ANSWER = 160  # tokens of the answer that runs meanwhile
MEMORY_TOKENS = 400  # of each prompt while memory is measured
ON_DISK = 1000
BUDGET_MB = 64
ASKED_ON_DISK = 16

Draws = Callable[[int], list[dict[str, Any]]]
"""Gives the requests of a round."""


@dataclass(frozen=True, kw_only=True)
class ServeArgs(BenchArgs):
    """What is measured."""

    rounds: Annotated[int, "Rounds after the warm-up."] = 3
    bundle: Annotated[
        str | None,
        "Bundle whose adapters and router are served. [default: random adapters, a router of random weights]",
    ] = None
    backend: Annotated[
        Literal["local", "vllm", "llama.cpp"], "The program that computes the tokens: PyTorch, vLLM, or llama.cpp."
    ] = "local"
    backend_url: Annotated[
        tuple[str, ...], "Addresses of vLLM servers with the base model. [default: the server starts and ends one]"
    ] = ()
    serve_args: Annotated[str, "More arguments of `dlp-lora serve`: '--vllm-max-loras 32'."] = ""
    num_adapters: NumAdapters = 26
    streams: Annotated[tuple[int, ...], "Clients at once; each asks again after an answer."] = (1, 8, 16)
    requests: Annotated[int, "Requests in a round, over any number of streams."] = 48
    new_tokens: Annotated[int, "Tokens of an answer; routed ones may end before."] = 32
    dtypes: Annotated[tuple[str, ...], "Precisions of the base model, for the local backend. [default: bfloat16]"] = ()
    loads: Annotated[tuple[str, ...], "Eight mixtures by name, or questions routed under either KV policy."] = LOADS
    parts: Annotated[
        tuple[str, ...],
        "load, chunk (waiting while a long prompt is read), memory, disk. [default: all; load for other backends]",
    ] = ()
    peers: Annotated[
        tuple[str, ...], "Other servers that run and are asked the same: name|http://host:port/v1|model."
    ] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("loads", LOADS), ("parts", PARTS)):
            if unknown := set(getattr(self, name)) - set(known):
                raise ValueError(f"no {name} {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        for text in self.peers:
            _peer(text)
        if self.backend not in BACKENDS:
            raise ValueError(f"no backend {self.backend!r}; there are {', '.join(BACKENDS)}")
        if self.backend_url and self.backend != "vllm":
            raise ValueError(f"backend_url has addresses of vLLM servers, and the backend is {self.backend}")
        if self.backend != "local":
            if others := [part for part in self.parts if part not in PARTS_OF_ALL]:
                raise ValueError(f"parts {', '.join(others)} are measured with the local backend alone")
            if self.dtypes:
                raise ValueError(
                    f"dtypes are of the local backend; choose the precision of {self.backend} at its start, as with "
                    "--serve-args \"--vllm-args '--dtype bfloat16'\""
                )
        if taken := {option.partition("=")[0] for option in shlex.split(self.serve_args)} & SET:
            raise ValueError(f"serve_args: the benchmark itself sets {', '.join(sorted(taken))}")

    def with_defaults(self) -> "ServeArgs":
        """The same with the precisions and the parts of the backend, where there are none."""
        is_local = self.backend == "local"
        dtypes = self.dtypes or (("bfloat16",) if is_local else ())
        return replace(self, dtypes=dtypes, parts=self.parts or (PARTS if is_local else PARTS_OF_ALL))


def bench_serve(
    model: str | Path, args: ServeArgs | None = None, *, on_progress: OnProgress = unseen
) -> dict[str, Any]:
    """Measures a server; gives the record as JSON data.

    Raises:
        BundleError: if there is no bundle.
        DLPLoRAError: if a server does not start, or refuses a request.
    """
    args = (args or ServeArgs()).with_defaults()
    device = begin(args)
    if torch.cuda.is_initialized():  # by benchmarks before this one; the server needs the GPU's memory
        gc.collect()
        torch.cuda.empty_cache()
    programs: set[str] = set()
    rows: list[Row] = []
    with _bundle(str(model), args.bundle) as bundle:
        for dtype in args.dtypes or (None,):
            case = _Case(model=str(model), args=args, dtype=dtype, bundle=bundle, on_progress=on_progress)
            rows += [{"name": row["name"], **({"dtype": dtype} if dtype else {}), **row} for row in case.rows()]
            programs |= case.programs
    found = record(
        "serve",
        model,
        args,
        rows,
        bandwidth=bandwidth_gb_s(device),
        does_not_measure="how good answers are, networks, several GPUs"
        + ("" if args.backend == "local" else f", the memory of {args.backend}"),
    )
    return {**found, "backend": ", ".join(sorted(programs))}


@contextmanager
def _bundle(model: str, path: str | None) -> Iterator[Bundle]:
    """A bundle, or a new one of random adapters and a router of random weights."""
    if path is not None:
        yield read_bundle(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        written = write_random_adapters(model, Path(folder), NUM_ROUTED, r=8, target_modules=("q_proj", "v_proj"))
        adapters = {f"routed_{i}": adapter for i, adapter in enumerate(written.values())}
        router = mini_mlp(tuple(adapters), load_tokenizer(model))
        bundle = Path(folder) / "bundle"
        write_bundle(bundle, base=Base.of(model), adapters=adapters, router=router, settings=RoutingSettings())
        yield read_bundle(bundle)


@dataclass(frozen=True, kw_only=True)
class _Case:
    """One precision: the servers that are started, and what they are asked; `programs` are those of their backends."""

    model: str
    args: ServeArgs
    dtype: str | None  # None: the backend's
    bundle: Bundle
    on_progress: OnProgress
    programs: set[str] = field(default_factory=set)

    @property
    def is_local(self) -> bool:
        return self.args.backend == "local"

    def rows(self) -> list[Row]:
        args = self.args
        rows: list[Row] = []
        if "load" in args.parts:
            with self.server() as server:
                rows.append(self.start(server, len(self.bundle.adapters)))
                for name in args.loads:
                    rows += self.load(name, server)
        if {"chunk", "memory"} & set(args.parts):
            with self.server(*KEEPS_NO_KV) as server:
                if "chunk" in args.parts:
                    rows.append(self.chunk(server))
                if "memory" in args.parts:
                    rows.append(self.memory(server))
        if "disk" in args.parts:
            with self.random_adapters(ON_DISK) as adapters, self.server_on_disk(adapters) as server:
                rows += [self.start(server, ON_DISK), self.disk(server, tuple(adapters))]
        return rows

    @contextmanager
    def random_adapters(self, number: int) -> Iterator[dict[str, Path]]:
        """Random adapters of the shapes of the bundle's first one, in a folder."""
        config = json.loads((next(iter(self.bundle.adapters.values())) / CONFIG_FILE).read_text())
        targets = config["target_modules"]
        targets = [targets] if isinstance(targets, str) else sorted(targets)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapters"
            path.mkdir()
            yield write_random_adapters(self.model, path, max(0, number), r=config["r"], target_modules=targets)

    @contextmanager
    def server(self, *options: str) -> Iterator[Server]:
        """A server of the bundle, and of random adapters beside its adapters."""
        with self.random_adapters(self.args.num_adapters - len(self.bundle.adapters)) as more:
            folders = [option for path in {p.parent for p in more.values()} for option in ("--adapter-dir", str(path))]
            options = ("--bundle", str(self.bundle.path), *self.options(), *folders, *options)
            with self.started(options) as server:
                for name in more:
                    server.load_adapter(name)
                yield server

    @contextmanager
    def server_on_disk(self, adapters: Mapping[str, Path]) -> Iterator[Server]:
        """A server of adapters on disk, with a router of random weights that knows their names."""
        folder = next(iter(adapters.values())).parent
        mini_mlp(tuple(adapters), load_tokenizer(self.model)).save_pretrained(folder.parent / "router")
        options = ["--adapters", str(folder), "--router", str(folder.parent / "router"), *self.options(), *KEEPS_NO_KV]
        with self.started([*options, "--budget-mb", str(BUDGET_MB)]) as server:
            yield server

    @contextmanager
    def started(self, options: Sequence[str]) -> Iterator[Server]:
        """A server with these options, whose start is shown."""
        self.on_progress(Progress("start a server", 0, 1))
        with serving(options, model=MODEL, threads=self.args.threads) as server:
            self.on_progress(Progress("start a server", 1, 1, f"{server.start_s:.0f} s"))
            self.programs.add(server.backend())
            yield server

    def options(self) -> list[str]:
        """The options for the server's backend. Only the local one takes a precision and a device."""
        options = ["--model", self.model, "--backend", self.args.backend]
        if self.dtype is not None:
            options += ["--dtype", self.dtype, "--device", self.args.device]
        if self.args.backend_url:
            options += ["--backend-url", ",".join(self.args.backend_url)]
        return options + shlex.split(self.args.serve_args)

    def start(self, server: Server, num_adapters: int) -> Row:
        """Time and memory of a start; without the memory of vLLM, whose processes are others."""
        memory = {} if self.args.backend == "vllm" else {"resident_mb": round(server.resident_mb)}
        return {"name": f"start with {num_adapters} adapters", "start_s": round(server.start_s, 2), **memory}

    def load(self, name: str, server: Server) -> list[Row]:
        """Tokens a second and latency by the number of streams; one stream of the local backend beside the engine and
        the base."""
        args = self.args
        beside = (ENGINE, BASE) if self.is_local and 1 in args.streams else ()
        targets: list[tuple[Target, Server | None]] = [(server.target, server)]
        if name == "fixed":
            targets += [(_peer(text), None) for text in args.peers]
        streams: dict[tuple[str, int], _Streams] = {}
        for target, ours in targets:
            for number in args.streams:
                streams[target.name, number] = _Streams(target, self.draws(name, number), number, ours)
        runs: dict[str, Run] = {_key(*key): run for key, run in streams.items()}
        if beside:
            runs |= self.alone(name)
        scenario = f"serve, {name}, {self.dtype or args.backend}"
        times = interleave(runs, rounds=args.rounds, scenario=scenario, on_progress=self.on_progress)
        rows: list[Row] = []
        for (label, number), run in streams.items():
            key = _key(label, number)
            row: Row = {"name": f"{label}, {name}", "streams": number}
            row |= {**times.spread(key, "tokens_per_s"), **times.spread(key, "ms_per_token"), **latency(run.answers)}
            row |= _sizes(run.answers)
            if run.metrics_agree is not None:
                row["metrics_agree"] = run.metrics_agree
            if 1 in args.streams:
                row |= _called("speedup", times.ratio(key, "tokens_per_s", over=_key(label, 1)))
            if number == 1 and beside:
                row |= _called("over_engine", times.ratio(key, "beside_ms", over=ENGINE))
                row |= _called("over_base", times.ratio(key, "beside_ms", over=BASE))
            rows.append(row)
        return rows + [
            {
                "name": f"{key}, {name}",
                "streams": 1,
                **_called("ms_per_token", times.spread(key, "beside_ms"), "beside_ms"),
            }
            for key in beside
        ]

    def draws(self, name: str, streams: int) -> Draws:
        """The requests of each round of a load; none comes twice, so no server has read one before."""

        def draw(i: int) -> list[dict[str, Any]]:
            place = i * len(LOADS) + LOADS.index(name)
            return self.bodies(name, seed=place * (max(self.args.streams) + 1) + streams)

        return draw

    def bodies(self, name: str, *, seed: int) -> list[dict[str, Any]]:
        """Chats of one length that name mixtures of the bundle's adapters, or pairs of questions of their tasks, whose
        answers end where they end."""
        names, number = list(self.bundle.adapters), self.args.requests
        same = {"max_tokens": self.args.new_tokens, "temperature": 0}
        tasks = [n for n in names if n in PROCEDURAL]
        if name == "fixed" or not tasks:
            items = range(seed * number, (seed + 1) * number)
            texts = [f"Item {item}. {PROMPTS[item % len(PROMPTS)]}" for item in items]
        else:
            drawn = [procedural_task(n, num_train=1, num_test=number, seed=seed).test for n in tasks]
            questions = [examples[i].prompt for i in range(number) for examples in drawn]
            texts = [f"{a}\n{b}" for a, b in islice(pairwise(questions), number)]
        chats = [[{"role": "user", "content": text}] for text in texts]
        if name != "fixed":
            dlp = {"kv_policy": name, **ONE_CONTEXT}
            return [{"messages": chat, "dlp": dlp, **same} for chat in chats]
        two = [(names[i], names[(i + 1) % len(names)]) for i in range(len(names))]
        mixtures = [f"{a}={x},{b}={y}" for x, y in WEIGHTS for a, b in two if a != b] or names
        return [
            {"model": mixture, "messages": chat, "ignore_eos": True, **same}
            for mixture, chat in zip(cycle(mixtures), chats, strict=False)
        ]

    def alone(self, name: str) -> dict[str, Run]:
        """The engine and the plain base, in this process, which answer the first requests of one stream."""
        draws = self.draws(name, 1)
        where: dict[str, Any] = {"dtype": getattr(torch, str(self.dtype)), "device": self.args.device}
        routing: dict[str, Any] = {} if name == "fixed" else {"kv_policy": name, **ONE_CONTEXT}
        engine = load(self.bundle.path, base_model=self.model, **where, **routing)
        base: Any = AutoModelForCausalLM.from_pretrained(self.model, dtype=where["dtype"], trust_remote_code=False)
        base = base.to(self.args.device).eval()

        def by_engine(body: Body, num_tokens: int) -> Answer:
            answer = Answer()
            stream = engine.stream(
                body["messages"],
                mixture=_mixture(body.get("model")),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens if body.get("ignore_eos") else None,
                do_sample=False,
            )
            answer.times_s = [time.perf_counter() for _ in stream]
            answer.num_tokens = len(stream.generation.tokens)
            return answer

        def by_base(body: Body, num_tokens: int) -> Answer:
            prompts, _ = as_batch(body["messages"])
            tokens = [encode_prompt(engine.tokenizer, prompt).tokens for prompt in prompts]
            ids, clock = torch.tensor(tokens, device=self.args.device), _Clock(num_tokens)
            length = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens}
            base.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, streamer=clock, **length)
            return clock.answer

        def run(answer: Callable[[Body, int], Answer]) -> Run:
            def measure(i: int) -> dict[str, float]:
                num_tokens, number = (self.args.new_tokens, BESIDE) if i else (WARM_UP_TOKENS, 1)
                asked = draws(i)[:number]
                return {"beside_ms": ms_per_token([answer(body, num_tokens) for body in asked])}

            return measure

        return {ENGINE: run(by_engine), BASE: run(by_base)}

    def chunk(self, server: Server) -> Row:
        """The longest wait between two tokens of an answer while the server reads a long prompt."""
        first = dict(self.bodies("fixed", seed=0)[0], max_tokens=LONG_ANSWER)
        mixture = first["model"]

        def read(length: int) -> dict[str, Any]:
            return {"model": mixture, "prompt": self.text_ids(length), "max_tokens": 1, "temperature": 0}

        def measure(i: int) -> dict[str, float]:
            (alone,) = ask(server.target, [read(CHUNK_TOKENS)], streams=1)
            running, other = ask_beside(server.target, first, read(LONG_TOKENS), after=LONG_ANSWER // 4)
            step_ms = ms_per_token([running])
            end_s = other.times_s[-1]
            waits = [b - a for a, b in zip(running.times_s, running.times_s[1:], strict=False) if a < end_s]
            longest_ms = max(waits) * 1e3
            return {"longest_ms": longest_ms, "over_chunk": longest_ms / (alone.first_ms + step_ms)}

        runs: dict[str, Run] = {"chunk": measure}
        times = interleave(runs, rounds=self.args.rounds, scenario="serve, chunk", on_progress=self.on_progress)
        name = f"waiting while {LONG_TOKENS} tokens are read"
        return {"name": name, **times.spread("chunk", "longest_ms"), **times.spread("chunk", "over_chunk")}

    def memory(self, server: Server) -> Row:
        """Memory of the process by request, with as many at once as the most streams."""
        number = max(self.args.streams)
        before_mb = server.resident_mb
        body = {"prompt": self.text_ids(MEMORY_TOKENS), "max_tokens": self.args.new_tokens, "temperature": 0}
        with server.peak() as peak:
            ask(server.target, [body] * number, streams=number)
        by_request = (peak.resident_mb - before_mb) / number
        return {"name": f"memory, {number} prompts of {MEMORY_TOKENS} tokens", "mb_per_request": round(by_request, 2)}

    def disk(self, server: Server, names: Sequence[str]) -> Row:
        """Time to the first token of an adapter that lies on disk, and of the same one again."""
        chosen = iter(random.Random(0).sample(names, (self.args.rounds + 1) * ASKED_ON_DISK))
        messages = [{"role": "user", "content": PROMPTS[0]}]

        def measure(i: int) -> dict[str, float]:
            firsts: list[tuple[float, float]] = []
            for _ in range(ASKED_ON_DISK):
                body = {"model": next(chosen), "messages": messages, "max_tokens": 1, "temperature": 0}
                from_disk, again = (ask(server.target, [body], streams=1)[0].first_ms for _ in range(2))
                firsts.append((from_disk, again))
            means = [sum(times) / len(times) for times in zip(*firsts, strict=True)]
            return {"first_from_disk_ms": means[0], "first_again_ms": means[1]}

        times = interleave(
            {"disk": measure}, rounds=self.args.rounds, scenario="serve, disk", on_progress=self.on_progress
        )
        spreads = {**times.spread("disk", "first_from_disk_ms"), **times.spread("disk", "first_again_ms")}
        return {"name": f"one of {ON_DISK} adapters, budget {BUDGET_MB} MB", **spreads}

    def text_ids(self, length: int) -> list[int]:
        """So many tokens of a text."""
        tokenizer = AutoTokenizer.from_pretrained(self.model, trust_remote_code=False)
        ids: list[int] = tokenizer(" ".join(PROMPTS))["input_ids"]
        return (ids * -(-length // len(ids)))[:length]


class _Streams:
    """A round of requests over several streams at once; keeps the answers of all rounds.

    `metrics_agree` says whether the server's own percentiles were always those that the client saw, within one bucket
    of their histogram; None for a server without our metrics.
    """

    def __init__(self, target: Target, draws: Draws, streams: int, server: Server | None) -> None:
        self.answers: list[Answer] = []
        self.metrics_agree: bool | None = None if server is None else True
        self._target, self._draws, self._streams, self._server = target, draws, streams, server

    def __call__(self, i: int) -> Mapping[str, float]:
        bodies = self._draws(i)
        if self._server is None:
            bodies = [{key: value for key, value in body.items() if key not in OURS} for body in bodies]
        if i == 0:
            bodies = [{**body, "max_tokens": WARM_UP_TOKENS} for body in bodies[: self._streams]]
        before = None if self._server is None else self._server.histograms()
        found = ask(self._target, bodies, streams=self._streams)
        if i > 0:
            self.answers += found
            if self._server is not None and before is not None:
                firsts, gaps = [a.first_ms / 1e3 for a in found], [gap / 1e3 for a in found for gap in a.gaps_ms]
                pairs = zip(before, self._server.histograms(), (firsts, gaps), strict=True)
                self.metrics_agree = bool(self.metrics_agree) and all(agree(*pair) for pair in pairs)
        beside_ms = ms_per_token(found[:BESIDE])  # one stream is answered in order
        return {"tokens_per_s": tokens_per_s(found), "ms_per_token": ms_per_token(found), "beside_ms": beside_ms}


class _Clock(BaseStreamer):
    """Notes when `generate` gives a token; the first call brings the prompt."""

    def __init__(self, num_tokens: int) -> None:
        self.answer = Answer(num_tokens=num_tokens)
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self._has_prompt:
            self.answer.times_s.append(time.perf_counter())
        self._has_prompt = True

    def end(self) -> None:
        pass


def _sizes(answers: Sequence[Answer]) -> dict[str, float]:
    """Mean sizes of what was asked and answered; the number of switches, where the server tells it."""
    sizes = {"prompt_tokens": [a.num_prompt_tokens for a in answers], "answer_tokens": [a.num_tokens for a in answers]}
    traces = [answer.routing[-1].get("trace", ()) for answer in answers if answer.routing]
    if traces:
        sizes["switches"] = [sum(sentence["switched"] for sentence in trace) for trace in traces]
    return {name: round(fmean(values), 2) for name, values in sizes.items()}


def _key(label: str, streams: int) -> str:
    return f"{label}, {streams} streams"


def _called(name: str, spread: Mapping[str, float], instead_of: str = "ratio") -> dict[str, float]:
    return {key.replace(instead_of, name): value for key, value in spread.items()}


def _mixture(name: str | None) -> Mixture | None:
    if name is None:
        return None
    weights = [part.partition("=") for part in name.split(",")]
    return Mixture({adapter: float(weight or 1) for adapter, _, weight in weights})


def _peer(text: str) -> Target:
    name, url, model = ([*text.split("|"), "", ""])[:3]
    if not (name and model and url.startswith("http") and url.endswith("/v1")):
        raise ValueError(f"peers are written name|http://host:port/v1|model, got {text!r}")
    return Target(name=name, url=url, model=model)
