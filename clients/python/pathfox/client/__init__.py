"""Client of the Pathfox server: `Client` for code that waits, `AsyncClient` for asyncio.

    with Client("127.0.0.1:50051") as client:
        for text in client.generate(messages=[("user", "Hello!")], max_tokens=64).texts():
            print(text, end="", flush=True)

Generations come as immutable values (`Event`, `Completion`); what is rarely asked for (models, status ...) comes as the
contract's own messages from `pathfox.v1`. Errors are a tree under `PathfoxError`.
"""

from pathfox.client._async import AsyncChat, AsyncClient, AsyncGeneration
from pathfox.client._calls import CallOptions, ChatMessage, GenerateOptions, ScoreOptions, TokenizeOptions
from pathfox.client._connection import Tls
from pathfox.client._errors import (
    Cancelled,
    Conflict,
    ContextLengthExceeded,
    DeadlineExceeded,
    FailedPrecondition,
    IdempotencyMismatch,
    Internal,
    InvalidRequest,
    NotFound,
    NotSupported,
    Overloaded,
    PathfoxError,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    Violation,
)
from pathfox.client._events import (
    Choice,
    Completion,
    Delta,
    Durability,
    Event,
    Finished,
    FinishReason,
    Interrupted,
    Started,
    Timings,
    TokenLogprob,
    Usage,
)
from pathfox.client._retry import Retry
from pathfox.client._sync import Chat, Client, Generation

__all__ = [
    "AsyncChat",
    "AsyncClient",
    "AsyncGeneration",
    "CallOptions",
    "Cancelled",
    "Chat",
    "ChatMessage",
    "Choice",
    "Client",
    "Completion",
    "Conflict",
    "ContextLengthExceeded",
    "DeadlineExceeded",
    "Delta",
    "Durability",
    "Event",
    "FailedPrecondition",
    "FinishReason",
    "Finished",
    "GenerateOptions",
    "Generation",
    "IdempotencyMismatch",
    "Internal",
    "Interrupted",
    "InvalidRequest",
    "NotFound",
    "NotSupported",
    "Overloaded",
    "PathfoxError",
    "PermissionDenied",
    "Retry",
    "ScoreOptions",
    "Started",
    "Timings",
    "Tls",
    "TokenLogprob",
    "TokenizeOptions",
    "Unauthenticated",
    "Unavailable",
    "Usage",
    "Violation",
]
