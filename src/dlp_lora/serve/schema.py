"""The bodies of requests and answers: OpenAI's API as in vLLM, with the additional field `dlp`.

Types are strict; null means that a field is absent. Unknown fields are accepted, because clients send fields of many
servers. Fields in REFUSED are refused, because they would change the answer.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict  # on Python 3.11 pydantic reads no other

from dlp_lora.policy import KVPolicy, PromptRouting, Unsure

MAX_CHOICES = 128  # answers of one request
MAX_WEIGHT = 1000  # of an adapter in a mixture
MAX_LOGPROBS = 20
MAX_ENTRIES = 10_000  # of an object that is checked entry by entry
MAX_STOPS = 16

Item = TypeVar("Item")
Items = Annotated[list[Item], Field(fail_fast=True)]  # a body may have millions of wrong items: one error is enough
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Weight = Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT, allow_inf_nan=False)]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]

# Fields of other servers that are not supported here, and their values without effect.
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "add_special_tokens": (),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "cache_salt": (),
    "chat_template": (),
    "documents": ([],),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "lora_path": (),
    "modalities": (["text"],),
    "mm_processor_kwargs": (),
    "prediction": (),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "return_token_ids": (False,),
    "skip_special_tokens": (True,),
    "store": (False,),
    "structured_outputs": (),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": (),
    "web_search_options": (),
}


def _check_size(data: Any) -> Any:
    if isinstance(data, dict) and len(data) > MAX_ENTRIES:
        raise PydanticCustomError("too_many", f"must have at most {MAX_ENTRIES} entries")
    return data


NOT_HUGE = BeforeValidator(_check_size)


class Body(BaseModel):
    """A body: strict about types, open to unknown fields."""

    model_config = ConfigDict(extra="allow", strict=True)

    @model_validator(mode="after")
    def _refuse(self) -> "Body":
        for name, value in (self.model_extra or {}).items():
            # Types count, too: True equals 1, but `use_beam_search=False` is not one beam.
            neutral = any(value == other and type(value) is type(other) for other in REFUSED.get(name, ()))
            if name in REFUSED and value is not None and not neutral:
                raise PydanticCustomError("unsupported", "not supported; leave it out", {"field": name})
        return self


class Closed(BaseModel):
    """An object of this server, without unknown fields: a misspelt field would be lost."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _knows(cls, data: Any) -> Any:
        if isinstance(data, dict) and (unknown := sorted(data.keys() - cls.model_fields.keys())):
            raise PydanticCustomError(
                "unknown_field",
                "there is no such field; there are {fields}",
                {"field": unknown[0], "fields": ", ".join(cls.model_fields)},
            )
        return data


class SwitchingOptions(Closed):
    """When a sentence may switch; the server's settings are the defaults."""

    min_tokens: Annotated[int, Field(ge=1)] | None = None
    margin: Annotated[float, Field(ge=0, le=1)] | None = None
    unsure: Unsure | None = None


class DLPOptions(Closed):
    """The routing of one answer, and its report; the server's settings are the defaults."""

    trace: bool = Field(default=True, description="Whether the answer says which sentence used which adapters.")
    prompt_tokens: bool = Field(
        default=False,
        description="Whether the answer has the token ids of the prompt, or of all contexts of its questions.",
    )
    adapters: Items[str] | None = Field(default=None, description="The adapters that the router may choose among.")
    fixed: Annotated[dict[str, Weight], NOT_HUGE] | None = Field(
        default=None, description="Weights by adapter, instead of the router; {} is the base model."
    )
    policy: dict[str, Any] | None = Field(default=None, description='The policy, such as {"type": "TopP", "p": 0.9}.')
    switching: SwitchingOptions | None = None
    kv_policy: KVPolicy | None = None
    prompt_routing: PromptRouting | None = None
    deadline_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None, description="Longest time of the request, at most the server's."
    )


class StreamOptions(Body):
    """Further content of a stream."""

    include_usage: bool | None = Field(default=None, description="One more chunk, with usage and no choices.")
    continuous_usage_stats: bool | None = Field(
        default=None, description="With include_usage: every chunk has the usage so far, too."
    )


class SamplingFields(Body):
    """The shared fields of both generating routes."""

    model: str | None = Field(default=None, description="The routed model, its base, an adapter or a mixture.")
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], NOT_HUGE] | None = None
    seed: Seed | None = None
    stop: StopString | Annotated[Items[StopString], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Items[TokenId] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    response_format: dict[str, Any] | None = None
    dlp: DLPOptions | None = None

    @property
    def options(self) -> DLPOptions:
        """The routing of the answer."""
        return self.dlp or DLPOptions()


class TextPart(Body):
    """A part of a message."""

    type: str
    text: str | None = None

    @model_validator(mode="after")
    def _is_text(self) -> "TextPart":
        if self.type != "text":
            raise PydanticCustomError(
                "unsupported", "parts of type {kind} are not supported; send text", {"kind": self.type}
            )
        if self.text is None:
            raise PydanticCustomError("incomplete", "a part of type text needs text")
        return self


class FunctionCall(Body):
    """A call that the assistant made."""

    name: str
    arguments: str | dict[str, Any]


class ToolCall(Body):
    """A call of a tool."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Body):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Items[TextPart] | None = None
    name: str | None = None
    tool_calls: Items[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> "ChatMessage":
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise PydanticCustomError("incomplete", "a message needs content")
        return self


class FunctionDefinition(Body):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    """A tool that the model may call."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Body):
    """The function to call."""

    name: str


class NamedTool(Body):
    """The tool to call."""

    type: Literal["function"] = "function"
    function: NamedFunction


class ChatFields(Body):
    """A chat, with the arguments of its template."""

    messages: Annotated[Items[ChatMessage], Field(min_length=1)]
    tools: Items[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None


class ChatRequest(ChatFields, SamplingFields):
    """The body of /v1/chat/completions."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


class CompletionRequest(SamplingFields):
    """The body of /v1/completions; a prompt is text or token ids, or a list of such."""

    prompt: (
        str
        | Annotated[Items[str], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[Items[TokenId], Field(min_length=1)]
        | Annotated[Items[Items[TokenId]], Field(min_length=1, max_length=MAX_CHOICES)]
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(default=None, description="16 by default; 0 only with echo.")
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


class PromptRequest(Body):
    """A prompt, or messages: the body of /v1/route and /tokenize."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[Items[ChatMessage], Field(min_length=1)] | None = None
    tools: Items[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    @model_validator(mode="after")
    def _is_one(self) -> "PromptRequest":
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("not_one", "give either prompt or messages")
        return self


class RouteRequest(PromptRequest):
    """The body of /v1/route."""

    dlp: DLPOptions | None = None


class TokenizeRequest(PromptRequest):
    """The body of /tokenize."""

    add_special_tokens: bool | None = Field(
        default=None, description="By default as the tokenizer does; only for a prompt."
    )
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """The body of /detokenize."""

    model: str | None = None
    tokens: Items[TokenId]


class ExampleFields(Closed):
    """A prompt that an adapter is for, and its answer: what the router learns from."""

    prompt: Annotated[str, Field(min_length=1, pattern=r"\S")]
    answer: Annotated[str, Field(min_length=1, pattern=r"\S")]


class LoadAdapterRequest(Body):
    """The body of /v1/load_lora_adapter; without `examples` the router never chooses the adapter."""

    lora_name: Annotated[str, Field(min_length=1, max_length=200)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool | None = None
    examples: Annotated[Items[ExampleFields], Field(min_length=1, max_length=10_000)] | None = None


class UnloadAdapterRequest(Body):
    """The body of /v1/unload_lora_adapter."""

    lora_name: Annotated[str, Field(min_length=1, max_length=200)]


class SentenceTrace(TypedDict):
    """One sentence of an answer and how it was routed; `start` and `end` count its tokens, `offset` characters.

    What is measured only later (`end`, `text`, `fuse_ms`, `encode_ms`) is missing while an answer streams.
    `left_out` are adapters for which a mixture had no room; `kept_tokens` how many tokens a switch under "keep" has
    left as they were, where the backend keeps whole blocks alone.
    """

    sentence: int
    start: int
    offset: int
    mixture: dict[str, float]
    probabilities: dict[str, float]
    switched: bool
    abstained: bool
    route_ms: float
    end: NotRequired[int]
    text: NotRequired[str]
    fuse_ms: NotRequired[float]
    encode_ms: NotRequired[float]
    left_out: NotRequired[list[str]]
    kept_tokens: NotRequired[int]


class DLPTrace(TypedDict, total=False):
    """How an answer was routed, sentence by sentence; and its prompt, if its sentences were routed, too.

    `parts` are the answers to the questions of a prompt, if they were answered apart.
    """

    trace: list[SentenceTrace]
    prompt_trace: list[SentenceTrace]
    parts: list[str]
    prompt_tokens: list[int]


class Usage(TypedDict):
    """How many tokens a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class TopLogprob(TypedDict):
    """A token that might have come."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token that came."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """The log-probabilities of an answer's tokens."""

    content: list[TokenLogprob]
    refusal: None


class CompletionLogprobs(TypedDict):
    """The log-probabilities of an answer's tokens, and of the prompt's with `echo`."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CalledFunction(TypedDict):
    """The function that is called; `arguments` is JSON."""

    name: str
    arguments: str


class CalledTool(TypedDict):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(TypedDict):
    """What the assistant said."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[CalledTool]]


FinishReason = Literal["stop", "length", "tool_calls"]


class ChatChoice(TypedDict):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    dlp: NotRequired[DLPTrace]


class ChatResponse(TypedDict):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: None


class CompletionChoice(TypedDict):
    """One answer."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    dlp: NotRequired[DLPTrace]


class CompletionResponse(TypedDict):
    """The answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: None


class ModelCard(TypedDict):
    """A model that may be asked for; an adapter's `parent` is the routed model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(TypedDict):
    """The answer of /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenizeResponse(TypedDict):
    """The answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(TypedDict):
    """The answer of /detokenize."""

    prompt: str


class RouteResponse(TypedDict):
    """Which adapters would answer; `questions` are those of a prompt that asks several."""

    model: str
    mixture: dict[str, float]
    probabilities: dict[str, float]
    abstained: bool
    questions: list[str]
    route_ms: float
    num_tokens: int


class AdapterResponse(TypedDict):
    """What was done with an adapter; `is_routed` says whether the router may choose it."""

    message: str
    lora_name: str
    is_routed: bool


class ReloadResponse(TypedDict):
    """How the adapters changed."""

    message: str
    added: list[str]
    removed: list[str]
    replaced: list[str]


class VersionResponse(TypedDict):
    """The answer of /version; `backend` is the program that computes the tokens, with its release."""

    version: str
    backend: str


class HealthResponse(TypedDict):
    """The answer of /health, whose status tells the same."""

    status: Literal["ok", "unhealthy", "draining"]
    reason: str
