"""What a request may say, in OpenAI's words; what this server cannot do is refused by name."""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

from fedalt.data.records import Turn

_Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]
# Fields that change nothing here, and others with the values that ask for nothing special.
_IGNORED: Final = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
)
_NEUTRAL: Final[Mapping[str, object]] = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "logprobs": False,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
}


def _is_neutral(name: str, value: object) -> bool:
    """Whether a field asks for nothing special; `logprobs` 0 asks for those of the answer."""
    neutral = _NEUTRAL.get(name)
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


class StreamOptions(BaseModel):
    """What a stream tells beside the answer."""

    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class Asked(BaseModel):
    """What every request may say; strictly, so that neither true nor "5" is a number."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = None
    stop: Annotated[list[_Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """A single text is a list of one."""
        return [value] if isinstance(value, str) else value

    @property
    def counts_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def unsupported(self) -> str | None:
        """The first field that asks for what this server does not do."""
        for name, value in (self.model_extra or {}).items():
            if name not in _IGNORED and value is not None and not _is_neutral(name, value):
                return name
        return None


class Part(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "user", "assistant"]
    content: list[Part]

    @field_validator("content", mode="before")
    @classmethod
    def _parted(cls, value: Any) -> Any:
        """A text is a list of one part: of two forms an error would tell the wrong one."""
        if isinstance(value, str):
            return [Part(type="text", text=value)]
        if not isinstance(value, list):
            raise ValueError("expected a text, or a list of parts of type 'text'")
        return value

    @property
    def turn(self) -> Turn:
        """As a client's records have it."""
        return Turn(self.role, "".join(part.text for part in self.content))

    def unsupported(self) -> str | None:
        """The first field that says what no turn does, such as a call of a tool."""
        said = (self.model_extra or {}).items()
        return next((name for name, value in said if value not in (None, [])), None)


class ChatAsked(Asked):
    """A request to `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    def unsupported(self) -> str | None:
        """See `Asked`; of a message with its place."""
        for at, message in enumerate(self.messages):
            if (name := message.unsupported()) is not None:
                return f"messages.{at}.{name}"
        return super().unsupported()

    @property
    def most(self) -> int | None:
        """The longest answer, in tokens."""
        return self.max_completion_tokens or self.max_tokens


class TextAsked(Asked):
    """A request to `/v1/completions`."""

    prompt: str

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_of_one(cls, value: Any) -> Any:
        """A list of one prompt is that prompt."""
        return value[0] if isinstance(value, list) and len(value) == 1 else value

    @property
    def most(self) -> int | None:
        """The longest answer, in tokens."""
        return self.max_tokens
