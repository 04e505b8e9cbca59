"""What the HTTP server accepts and answers, as pydantic models: OpenAI's chat completions and completions.

The OpenAPI description at /openapi.json is made of these, and the server refuses what they do not allow. A field of
OpenAI's that would change the answer and is not implemented may only hold its neutral value; any other field that is
not here is refused by name. How a body becomes an answer is `server_answers.py`.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Text = Annotated[str, Field(min_length=1)]
Zero = Annotated[float, Field(ge=0, le=0)]
EmptyList = Annotated[list[Any], Field(max_length=0)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Item = TypeVar("Item")
NotEmpty = Annotated[list[Item], Field(min_length=1)]
FinishReason = Literal["stop", "length"]

NOT_IMPLEMENTED = {
    "audio", "best_of", "echo", "frequency_penalty", "logit_bias", "modalities", "presence_penalty", "response_format",
    "suffix", "tool_choice", "tool_calls", "tools",
}  # fmt: skip
"""Fields that may only hold what they hold by default."""


class Body(BaseModel):
    """Something that clients send: nothing is converted, nothing unknown is let through."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool = False
    """End the stream with a chunk that has the usage numbers and no choices."""
    include_obfuscation: bool | None = None
    """Accepted without effect."""


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """One turn. Texts only; what an assistant's turn of this server carries besides may be sent back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | NotEmpty[TextPart]
    name: str | None = None
    refusal: None = None
    annotations: EmptyList | None = None
    audio: None = None
    function_call: None = None
    tool_calls: EmptyList | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextFormat(Body):
    type: Literal["text"]


class SamplingBody(Body):
    """What both kinds of requests have. null and a missing field are the same: the server's default."""

    model: str = Field(description='"base", or the name of an adapter; GET /v1/models lists them.')
    n: int | None = Field(None, ge=1, le=128, description="Answers to each prompt.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = Field(
        None, description="Strings that end the answer and are not part of it."
    )
    seed: int | None = Field(None, description="The same seed and request give the same text.")
    temperature: float | None = Field(None, ge=0, le=2, description="0: the likeliest token, always.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1, le=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, description="1 is off.")
    choices: Annotated[list[Text], Field(min_length=1, max_length=256)] | None = Field(
        None, description="The answer is one of these."
    )
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    user: str | None = Field(None, description="Accepted without effect, as are metadata, store and their like.")
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class ChatRequest(SamplingBody):
    messages: NotEmpty[ChatMessage]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="Counts before max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="So many alternatives of each token; implies logprobs."
    )
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    audio: None = None
    tools: EmptyList | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None


class CompletionRequest(SamplingBody):
    prompt: Text | NotEmpty[Text] | NotEmpty[TokenId] | NotEmpty[NotEmpty[TokenId]] = Field(
        description="A text, ids of its tokens, or a list of either; none of them empty."
    )
    max_tokens: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=5, description="So many alternatives of each token.")
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    echo: None = None
    suffix: None = None


class Logprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobs(Logprob):
    top_logprobs: list[Logprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprobs]
    refusal: None = None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class PromptDetails(BaseModel):
    cached_tokens: int = Field(description="Of the prompt, reused from another request.")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class CompletionChunkChoice(CompletionChoice):
    finish_reason: FinishReason | None


class Answer(BaseModel):
    id: str
    created: int
    model: str


class ChatCompletion(Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(Answer):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class Completion(Answer):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(Answer):
    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok"]
    models: list[str]


class Problem(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: Problem
