"""The service: a backend, the checks of requests to it, and the names that clients may see."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

from dlp_lora.engine.calls import Call
from dlp_lora.engine.prompts import EncodedPrompt
from dlp_lora.engine.routing import RowRouter
from dlp_lora.policy import Mixture, Only, RoutingSettings, policy_from_dict
from dlp_lora.serve.backend import Backend, Grammar, Request
from dlp_lora.serve.errors import invalid, unavailable, unsupported
from dlp_lora.serve.grammar import AnswerGrammar, Grammars
from dlp_lora.serve.keys import Access, Keys
from dlp_lora.serve.metrics import Metrics
from dlp_lora.serve.names import Choice, ModelNames
from dlp_lora.serve.prompts import PromptEncoder
from dlp_lora.serve.sampling import sampling_of
from dlp_lora.serve.schema import (
    MAX_CHOICES,
    ChatRequest,
    CompletionRequest,
    DLPOptions,
    RouteRequest,
    SamplingFields,
    Tool,
)
from dlp_lora.serve.settings import ServerSettings

DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as in OpenAI's API


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A checked request. `answers` has a backend's requests for each answer: one, or one per question if the questions
    are answered apart. The answers to one prompt are neighbours. `visible` are the adapters for its key.
    """

    id: str
    created: int
    choice: Choice
    visible: tuple[str, ...]
    options: DLPOptions
    prompts: tuple[EncodedPrompt, ...]
    answers: tuple[tuple[Request, ...], ...]
    deadline_s: float

    def prompt_of(self, index: int) -> EncodedPrompt:
        """The prompt of an answer."""
        return self.prompts[index * len(self.prompts) // len(self.answers)]

    @property
    def num_prompt_tokens(self) -> int:
        """The number of the prompts' tokens; for questions apart, in all of their contexts."""
        one_each = self.answers[:: len(self.answers) // len(self.prompts)]
        return sum(len(request.tokens) for requests in one_each for request in requests)


@dataclass(frozen=True, kw_only=True)
class RoutedPrompt:
    """The routing of a prompt: one row, or one per question, and their number of tokens."""

    choice: Choice
    rows: Sequence[RowRouter]
    num_tokens: int

    @property
    def questions(self) -> tuple[str, ...]:
        """The questions of the prompt, if it asks several: answered apart, or in turn."""
        return self.rows[0].questions if len(self.rows) == 1 else tuple(row.prompt.text for row in self.rows)


@dataclass(kw_only=True)
class Service:
    """A backend, with the parts that turn clients' requests into its requests.

    `call` has the default settings of answers. `num_running` is the number of running requests.
    """

    backend: Backend
    call: Call
    encoder: PromptEncoder
    grammars: Grammars
    names: ModelNames
    settings: ServerSettings
    keys: Keys
    sampling_defaults: Mapping[str, Any]
    root: str  # the base model
    is_draining: bool = False
    num_running: int = 0
    started_s: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.backend.stats)

    def visible(self, access: Access) -> tuple[str, ...]:
        """The adapters for a key."""
        names = self.backend.adapters
        return names if access.adapters is None else tuple(name for name in names if name in access.adapters)

    def check_open(self) -> None:
        """Raises an APIError if the server takes no requests any more."""
        if self.is_draining:
            raise unavailable("the server is closing; try again in a moment", "shutting_down")

    def chat(self, body: ChatRequest, access: Access) -> Asked:
        """Checks a request of /v1/chat/completions and encodes its messages; too slow for an event loop."""
        tools = offered(body)
        grammar = self._grammar(body, tools)
        prompt = self.encoder.chat(body, tools)
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        return self._asked(
            body,
            access,
            [prompt],
            prefix="chatcmpl",
            max_tokens=max_tokens,
            num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            grammar=grammar,
            is_text=not tools,
        )

    def completion(self, body: CompletionRequest, access: Access) -> Asked:
        """Checks a request of /v1/completions and encodes its prompts; too slow for an event loop."""
        given: Sequence[Any] = (
            [body.prompt] if isinstance(body.prompt, str) or not _is_nested(body.prompt) else body.prompt
        )
        prompts = [self.encoder.text(one) if isinstance(one, str) else self.encoder.ids(one) for one in given]
        max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        if max_tokens == 0 and not body.echo:
            raise invalid("max_tokens: must be at least 1, or 0 with echo", "max_tokens")
        return self._asked(
            body,
            access,
            prompts,
            prefix="cmpl",
            max_tokens=max_tokens,
            num_logprobs=body.logprobs,
            num_prompt_logprobs=body.logprobs if body.echo else None,
            grammar=self.grammars.of_format(body.response_format) if body.response_format else None,
            is_text=not body.echo,
        )

    def route(self, body: RouteRequest, access: Access) -> RoutedPrompt:
        """Routes a prompt without an answer; too slow for an event loop."""
        choice = self.names.choose(body.model, self.visible(access))
        tools = body.tools or ()
        prompt = self.encoder.chat(body, tools) if body.prompt is None else self.encoder.text(body.prompt)
        call, among = self._routed(choice, body.dlp or DLPOptions(), access)
        prompts = [prompt] if tools else self.backend.prompt_router.apart(prompt, call=call, among=among)
        rows = [
            self.backend.prompt_router.start_row(p.tokens, call=call, prompt=p.prompt, among=among) for p in prompts
        ]
        return RoutedPrompt(choice=choice, rows=rows, num_tokens=sum(len(each.tokens) for each in prompts))

    def _asked(
        self,
        body: SamplingFields,
        access: Access,
        prompts: Sequence[EncodedPrompt],
        *,
        prefix: str,
        max_tokens: int | None,
        num_logprobs: int | None,
        num_prompt_logprobs: int | None = None,
        grammar: AnswerGrammar | None = None,
        is_text: bool,
    ) -> Asked:
        visible = self.visible(access)
        choice = self.names.choose(body.model, visible)
        call, among = self._routed(choice, body.options, access)
        n = body.n or 1
        if n * len(prompts) > MAX_CHOICES:
            raise invalid(f"n: {n} answers to {len(prompts)} prompts are more than {MAX_CHOICES}", "n")
        if unknown := next((t for t in body.stop_token_ids or () if t >= self.encoder.vocab_size), None):
            raise invalid(
                f"stop_token_ids: the model knows token ids up to {self.encoder.vocab_size - 1}, got {unknown}",
                "stop_token_ids",
            )
        if max_tokens is not None and (body.min_tokens or 0) > max_tokens:
            raise invalid(f"min_tokens: {body.min_tokens} is more than max_tokens, {max_tokens}", "min_tokens")
        if body.stream_options is not None and not body.stream:
            raise invalid("stream_options needs stream: true", "stream_options")
        # These apply to one answer, not to several that are joined.
        may_be_parts = is_text and n == 1 and grammar is None and num_logprobs is None
        whole = [[prompt] for prompt in prompts]
        parts = self._apart(prompts, call, among, body.options) if may_be_parts else whole
        for prompt in (prompt for questions in parts for prompt in questions):
            self.encoder.check_room(prompt, 1 if max_tokens is None else max_tokens)
        id_ = f"{prefix}-{uuid4().hex}"

        def request_of(prompt: EncodedPrompt, number: int) -> Request:
            return Request(
                tokens=prompt.tokens,
                call=call,
                prompt=prompt.prompt,
                adapters=among,
                id=f"{id_}-{number}",
                sampling=sampling_of(
                    body,
                    self.sampling_defaults,
                    number=number,
                    max_tokens=max_tokens,
                    vocab_size=self.encoder.vocab_size,
                    num_logprobs=num_logprobs,
                    num_prompt_logprobs=num_prompt_logprobs,
                    grammar=None if grammar is None else _another(grammar),
                ),
            )

        answers = [
            tuple(request_of(question, first + number) for number, question in enumerate(questions))
            for questions in parts
            for first in range(n)
        ]
        return Asked(
            id=id_,
            created=int(time.time()),
            choice=choice,
            visible=visible,
            options=body.options,
            prompts=tuple(prompts),
            answers=tuple(answers),
            deadline_s=min(body.options.deadline_s or self.settings.deadline_s, self.settings.deadline_s),
        )

    def _apart(
        self, prompts: Sequence[EncodedPrompt], call: Call, among: frozenset[str] | None, options: DLPOptions
    ) -> list[list[EncodedPrompt]]:
        """The prompts to answer instead of each prompt; too many are no reason to refuse what nobody asked for."""
        parts = [self.backend.prompt_router.apart(prompt, call=call, among=among) for prompt in prompts]
        limit = min(MAX_CHOICES, self.backend.max_open)
        if (num_rows := sum(map(len, parts))) <= limit:
            return parts
        if options.prompt_routing is None:
            return [[prompt] for prompt in prompts]
        raise invalid(
            f"dlp.prompt_routing: the prompt asks {num_rows} questions, and {limit} are answered apart at "
            'most; ask for fewer, or with dlp.prompt_routing "questions"',
            "dlp.prompt_routing",
        )

    def _grammar(self, body: ChatRequest, tools: Sequence[Tool]) -> AnswerGrammar | None:
        choice = body.tool_choice
        if isinstance(choice, str) and choice in ("auto", "required") and not body.tools:
            raise invalid(f"tool_choice: {choice!r} needs tools", "tool_choice")
        called = called_tools(body)
        grammar = self.grammars.of_format(body.response_format) if body.response_format else None
        if not called:
            if tools and getattr(self.encoder.tokenizer, "response_template", None) is None:
                raise unsupported(
                    "tool_choice",
                    "tool_choice: 'auto', the default with tools, needs a tokenizer with a response template, which "
                    'tells calls from text; use "required", "none" or a function',
                )
            return grammar
        if grammar is not None:
            raise invalid("response_format cannot be followed in a call of a tool", "response_format")
        functions = [tool.function for tool in called]
        return self.grammars.of_calls(functions) if choice == "required" else self.grammars.of_call(functions[0])

    def _routed(self, choice: Choice, options: DLPOptions, access: Access) -> tuple[Call, frozenset[str] | None]:
        """The call of a request, and the adapters among which its router may choose."""
        visible = self.visible(access)
        allowed = access.adapters
        if options.adapters is not None:
            _check_known(options.adapters, visible, "dlp.adapters")
            allowed = frozenset(options.adapters)
        changes: dict[str, Any] = {"known": {}}  # each text of a prompt is read once
        for name in ("kv_policy", "prompt_routing"):
            if (value := getattr(options, name)) is not None:
                changes[name] = value
        if options.policy is not None:
            changes["policy"] = _policy(options.policy, visible if options.adapters is None else options.adapters)
        if options.switching is not None:
            changed = options.switching.model_dump(exclude_none=True)
            changes["switching"] = replace(self.call.settings.switching, **changed)
        mixture = choice.mixture
        if options.fixed is not None:
            if mixture is not None:
                raise invalid(f"dlp.fixed: {choice.asked!r} is fixed already; ask for {self.names.served}", "dlp.fixed")
            _check_known(options.fixed, visible, "dlp.fixed")
            mixture = Mixture(options.fixed)
        if mixture is not None:
            if options.adapters is not None and (others := sorted(set(mixture) - set(options.adapters))):
                raise invalid(
                    f"dlp.adapters: the mixture is fixed, and {others[0]!r} in it is not among them", "dlp.adapters"
                )
            return self.call.changed({**changes, "mixtures": (mixture,)}), allowed
        if self.call.router is None:
            raise invalid(
                f"model: there is no router, so {choice.asked!r} cannot choose adapters; ask for one of them, for a "
                f"mixture or for {self.names.base}",
                "model",
            )
        return self.call.changed(changes), allowed


def offered(body: ChatRequest) -> Sequence[Tool]:
    """The tools for the model."""
    return () if body.tool_choice == "none" else body.tools or ()


def called_tools(body: ChatRequest) -> Sequence[Tool]:
    """The tools of which one must be called; none if the model may also answer with text.

    Raises:
        APIError: if the named tool does not exist.
    """
    choice, tools = body.tool_choice, body.tools or ()
    if choice is None or isinstance(choice, str):
        return tools if choice == "required" else ()
    named = [tool for tool in tools if tool.function.name == choice.function.name]
    if not named:
        raise invalid(f"tool_choice: there is no function {choice.function.name!r} among the tools", "tool_choice")
    return named[:1]


def _is_nested(prompt: Sequence[Any]) -> bool:
    return not isinstance(prompt[0], int)


def _another(grammar: AnswerGrammar) -> Grammar:
    return grammar.copy()


def _check_known(names: Sequence[str] | Mapping[str, float], visible: Sequence[str], param: str) -> None:
    if unknown := sorted(set(names) - set(visible)):
        there = ", ".join(sorted(visible)[:12]) or "none"
        raise invalid(f"{param}: there is no adapter {unknown[0]!r}; there are {there}", param, "adapter_not_found")


def _policy(given: Mapping[str, Any], visible: Sequence[str]) -> Any:
    try:
        policy = policy_from_dict(given)
        RoutingSettings(policy=policy)
    except ValueError as error:
        raise invalid(f"dlp.policy: {error}", "dlp.policy") from error
    if isinstance(policy, Only):
        _check_known([policy.name], visible, "dlp.policy")
    return policy
