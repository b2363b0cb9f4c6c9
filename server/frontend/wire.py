"""Proto in: a public message becomes a checked `ClientRequest`, or one error that names every wrong field.

What depends on the model's vocabulary is checked here too, so that a client sees all of its mistakes at once. What
depends on the prompt's length is not known yet and is checked after tokenising.
"""

import math
import uuid
from collections.abc import Iterable, Sequence

from pathfox.v1 import generation_pb2 as pb
from pathfox.v1 import model_pb2
from server.errors import ContextLengthExceeded, InvalidRequest, NotSupported, Violation, violation
from server.frontend.models import Models, ServedModel
from server.frontend.requests import (
    MAX_LOGIT_BIAS,
    MAX_LOGIT_BIASES,
    MAX_LOGPROBS,
    MAX_MESSAGES,
    MAX_METADATA,
    MAX_METADATA_KEY_CHARACTERS,
    MAX_METADATA_VALUE_CHARACTERS,
    MAX_N,
    MAX_REPETITION_PENALTY,
    MAX_STOP_CHARACTERS,
    MAX_STOP_TOKEN_IDS,
    MAX_STOPS,
    MAX_TEMPERATURE,
    MIN_REPETITION_PENALTY,
    ClientRequest,
    Prompt,
    SamplingChoices,
)
from server.messages import Criticality
from server.text.template import ChatMessage

ROLES = {pb.ROLE_SYSTEM: "system", pb.ROLE_USER: "user", pb.ROLE_ASSISTANT: "assistant", pb.ROLE_TOOL: "tool"}
MAX_IDEMPOTENCY_KEY_CHARACTERS = 255


class Checks:
    """Collects what is wrong with a message, so that all of it is said at once."""

    def __init__(self) -> None:
        self.violations: list[Violation] = []

    def refuse(self, field: str, *, seen: object, limit: str) -> None:
        """Note one wrong field."""
        self.violations.append(violation(field, seen=seen, limit=limit))

    def need(self, field: str, seen: float, limit: str, *, holds: bool) -> None:
        """Note a number that is out of its range; NaN is out of every one."""
        if not holds:
            self.refuse(field, seen=seen, limit=limit)

    def raise_if_any(self) -> None:
        """End the reading of a message.

        Raises:
            InvalidRequest: with everything that was noted.
        """
        if self.violations:
            raise InvalidRequest(self.violations)


def read_request(message: pb.GenerateRequest, models: Models, *, is_chat: bool = False) -> ClientRequest:
    """Check a request and read it.

    Args:
        message: as it came.
        models: to find the model, whose vocabulary bounds the token ids.
        is_chat: the message opens a conversation: it may come without input, and asks for one completion.

    Raises:
        NotFound: no such model.
        InvalidRequest: every wrong field.
        ContextLengthExceeded: more token ids than the model's context.
        NotSupported: the fields are right and need a store.
    """
    model = models.resolve(message.model if message.HasField("model") else None)
    checks = Checks()
    request_id = _read_uuid(message, checks)
    prompt = _read_input(message, model, checks, is_needed=not is_chat)
    choices = _read_sampling(message.sampling_params, model, checks)
    if is_chat and choices.n != 1:
        checks.refuse("sampling_params.n", seen=choices.n, limit="1 in a Chat: a conversation goes one way")
    if is_chat and choices.echo:
        checks.refuse("sampling_params.echo", seen=True, limit="unset in a Chat")
    if is_chat and message.WhichOneof("input") == "token_ids":
        checks.refuse("input", seen="token_ids", limit="messages or text in a Chat")
    _check_store_fields(message, checks)
    budget_ms = message.time_to_first_token_budget_ms
    if message.HasField("time_to_first_token_budget_ms") and budget_ms <= 0:
        checks.refuse("time_to_first_token_budget_ms", seen=budget_ms, limit="more than 0")
    request = ClientRequest(
        model=model,
        prompt=prompt,
        choices=choices,
        request_id=request_id,
        criticality=read_criticality(message.criticality, checks),
        time_to_first_token_budget_s=budget_ms / 1000 if budget_ms else None,
        return_token_ids=message.return_token_ids,
        metadata=_read_metadata(message, checks),
    )
    checks.raise_if_any()
    _refuse_store_fields(message)
    return request


def read_score(message: model_pb2.ScoreRequest, models: Models) -> ClientRequest:
    """Check a request to score a text: as a generation of no tokens.

    Raises:
        NotFound: no such model.
        InvalidRequest: every wrong field.
        ContextLengthExceeded: more token ids than the model's context.
    """
    model = models.resolve(message.model if message.HasField("model") else None)
    checks = Checks()
    prompt: Prompt = None
    match message.WhichOneof("input"):
        case "text":
            prompt = _read_text(message.text, "text", checks)
        case "token_ids":
            prompt = _read_token_ids(message.token_ids.ids, "token_ids.ids", model, checks)
        case _:
            checks.refuse("input", seen="nothing", limit="text or token_ids")
    top = message.top_logprobs
    checks.need("top_logprobs", top, f"0 .. {MAX_LOGPROBS}", holds=0 <= top <= MAX_LOGPROBS)
    criticality = read_criticality(message.criticality, checks)
    checks.raise_if_any()
    return ClientRequest(model, prompt, SamplingChoices(prompt_logprobs=top), criticality=criticality)


def read_messages(messages: Sequence[pb.Message], field: str, checks: Checks) -> tuple[ChatMessage, ...]:
    """Read messages of known roles, at least one of them the user's."""
    if len(messages) > MAX_MESSAGES:
        checks.refuse(field, seen=f"{len(messages)} messages", limit=f"at most {MAX_MESSAGES}")
        return ()
    read: list[ChatMessage] = []
    for place, message in enumerate(messages):
        role = ROLES.get(message.role)
        if role is None:
            checks.refuse(
                f"{field}[{place}].role", seen=_enum_name(pb.Role.items(), message.role), limit="a known role"
            )
        else:
            read.append(ChatMessage(role, message.content))
    if not any(message.role == "user" for message in read):
        checks.refuse(field, seen=f"{len(read)} messages", limit="at least one of ROLE_USER")
    elif not any(message.content for message in read if message.role == "user"):
        checks.refuse(field, seen="empty user messages", limit="a user message with content")
    return tuple(read)


def read_criticality(value: int, checks: Checks) -> Criticality:
    """Read a class; unspecified is DEFAULT."""
    if value == pb.CRITICALITY_UNSPECIFIED:
        return Criticality.DEFAULT
    try:
        return Criticality(value)
    except ValueError:
        checks.refuse("criticality", seen=_enum_name(pb.Criticality.items(), value), limit="a known criticality")
        return Criticality.DEFAULT


def read_uuid(text: str, field: str, checks: Checks) -> str:
    """Check that an id is a UUID, and give it in the one spelling that ids are compared in."""
    try:
        return str(uuid.UUID(text))
    except ValueError:
        checks.refuse(field, seen=text, limit="a UUID")
        return text


def _read_uuid(message: pb.GenerateRequest, checks: Checks) -> str | None:
    return read_uuid(message.request_id, "request_id", checks) if message.HasField("request_id") else None


def _read_input(message: pb.GenerateRequest, model: ServedModel, checks: Checks, *, is_needed: bool) -> Prompt:
    match message.WhichOneof("input"):
        case "text":
            return _read_text(message.text, "text", checks)
        case "messages":
            messages = message.messages.messages
            is_few = len(messages) <= MAX_MESSAGES
            if not is_needed and is_few and not any(each.role == pb.ROLE_USER for each in messages):
                # A conversation may open with its system message alone.
                quiet = Checks()
                read = read_messages(messages, "messages.messages", quiet)
                checks.violations += [each for each in quiet.violations if each.field.endswith(".role")]
                return read
            return read_messages(messages, "messages.messages", checks)
        case "token_ids":
            return _read_token_ids(message.token_ids.ids, "token_ids.ids", model, checks)
    if is_needed:
        checks.refuse("input", seen="nothing", limit="text, messages or token_ids")
    return None


def _read_text(text: str, field: str, checks: Checks) -> str:
    if not text:
        checks.refuse(field, seen="", limit="at least one character")
    return text


def _read_token_ids(ids: Sequence[int], field: str, model: ServedModel, checks: Checks) -> tuple[int, ...]:
    most = model.info.context_length_tokens
    if len(ids) > most:
        # Alone among what is wrong: to look at each of a million ids would hold up everybody else.
        raise ContextLengthExceeded(prompt_tokens=len(ids), max_tokens=0, limit=most)
    read = tuple(ids)
    if not read:
        checks.refuse(field, seen="no ids", limit="at least one token id")
    check_token_ids(read, field, model, checks)
    return read


def check_token_ids(ids: Iterable[int], field: str, model: ServedModel, checks: Checks) -> None:
    """Name the first id that is outside the vocabulary, and how many are: there may be thousands."""
    size = model.info.vocabulary_size
    wrong = [(place, token_id) for place, token_id in enumerate(ids) if not 0 <= token_id < size]
    if wrong:
        place, token_id = wrong[0]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        checks.refuse(f"{field}[{place}]", seen=f"{token_id}{more}", limit=f"0 .. {size - 1}")


def _read_sampling(params: pb.SamplingParams, model: ServedModel, checks: Checks) -> SamplingChoices:
    _check_numbers(params, checks)
    _check_lists(params, model, checks)

    has = {field.name for field, _ in params.ListFields()}
    return SamplingChoices(
        temperature=params.temperature if "temperature" in has else None,
        top_p=params.top_p if "top_p" in has else None,
        top_k=params.top_k if "top_k" in has else None,
        min_p=params.min_p if "min_p" in has else None,
        repetition_penalty=params.repetition_penalty if "repetition_penalty" in has else None,
        presence_penalty=params.presence_penalty if "presence_penalty" in has else None,
        frequency_penalty=params.frequency_penalty if "frequency_penalty" in has else None,
        seed=params.seed if "seed" in has else None,
        max_tokens=params.max_tokens if "max_tokens" in has else None,
        min_tokens=params.min_tokens,
        stop=tuple(params.stop) if len(params.stop) <= MAX_STOPS else (),
        stop_token_ids=tuple(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
        logit_bias=dict(params.logit_bias),
        logprobs=params.logprobs if "logprobs" in has else None,
        prompt_logprobs=params.prompt_logprobs if "prompt_logprobs" in has else None,
        n=params.n if "n" in has else 1,
        echo=params.echo,
    )


def _check_numbers(params: pb.SamplingParams, checks: Checks) -> None:
    """Check each number that was set. Comparisons are written so that NaN fails them."""
    has = {field.name for field, _ in params.ListFields()}

    def check(name: str, limit: str, *, holds: bool) -> None:
        if name in has:
            checks.need(f"sampling_params.{name}", getattr(params, name), limit, holds=holds)

    check("temperature", f"0 .. {MAX_TEMPERATURE:g}", holds=0 <= params.temperature <= MAX_TEMPERATURE)
    check("top_p", "0 < top_p <= 1", holds=0 < params.top_p <= 1)
    check("top_k", "0 or more", holds=params.top_k >= 0)
    check("min_p", "0 .. 1", holds=0 <= params.min_p <= 1)
    # A penalty is a float32 on the wire: its 0.01 is a little less than ours.
    penalty = round(params.repetition_penalty, 6)
    limit = f"{MIN_REPETITION_PENALTY:g} .. {MAX_REPETITION_PENALTY:g}"
    check("repetition_penalty", limit, holds=MIN_REPETITION_PENALTY <= penalty <= MAX_REPETITION_PENALTY)
    check("presence_penalty", "-2 .. 2", holds=-2 <= params.presence_penalty <= 2)
    check("frequency_penalty", "-2 .. 2", holds=-2 <= params.frequency_penalty <= 2)
    check("max_tokens", "1 or more", holds=params.max_tokens >= 1)
    most = params.max_tokens if "max_tokens" in has else math.inf
    check("min_tokens", "0 .. max_tokens", holds=0 <= params.min_tokens <= most)
    check("logprobs", f"0 .. {MAX_LOGPROBS}", holds=0 <= params.logprobs <= MAX_LOGPROBS)
    check("prompt_logprobs", f"0 .. {MAX_LOGPROBS}", holds=0 <= params.prompt_logprobs <= MAX_LOGPROBS)
    check("n", f"1 .. {MAX_N}", holds=1 <= params.n <= MAX_N)


def _check_lists(params: pb.SamplingParams, model: ServedModel, checks: Checks) -> None:
    """Check stop strings, stop ids and biases: their number first, then each one."""
    if len(params.stop) > MAX_STOPS:
        checks.refuse("sampling_params.stop", seen=f"{len(params.stop)} strings", limit=f"at most {MAX_STOPS}")
    else:
        for place, stop in enumerate(params.stop):
            if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
                limit = f"1 .. {MAX_STOP_CHARACTERS} characters"
                checks.refuse(f"sampling_params.stop[{place}]", seen=stop, limit=limit)
    if len(params.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        seen = f"{len(params.stop_token_ids)} ids"
        checks.refuse("sampling_params.stop_token_ids", seen=seen, limit=f"at most {MAX_STOP_TOKEN_IDS}")
    else:
        check_token_ids(params.stop_token_ids, "sampling_params.stop_token_ids", model, checks)
    if len(params.logit_bias) > MAX_LOGIT_BIASES:
        seen = f"{len(params.logit_bias)} entries"
        checks.refuse("sampling_params.logit_bias", seen=seen, limit=f"at most {MAX_LOGIT_BIASES}")
        return
    for token_id, bias in params.logit_bias.items():
        if not 0 <= token_id < model.info.vocabulary_size:
            limit = f"keys 0 .. {model.info.vocabulary_size - 1}"
            checks.refuse(f"sampling_params.logit_bias[{token_id}]", seen=token_id, limit=limit)
        elif not -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS:
            limit = f"-{MAX_LOGIT_BIAS:g} .. {MAX_LOGIT_BIAS:g}"
            checks.refuse(f"sampling_params.logit_bias[{token_id}]", seen=bias, limit=limit)


def _check_store_fields(message: pb.GenerateRequest, checks: Checks) -> None:
    key = message.idempotency_key
    if message.HasField("idempotency_key") and not is_idempotency_key(key):
        limit = f"1 .. {MAX_IDEMPOTENCY_KEY_CHARACTERS} visible ASCII characters"
        checks.refuse("idempotency_key", seen=key, limit=limit)
    if message.HasField("consistency") and message.consistency not in pb.Consistency.values():
        seen = _enum_name(pb.Consistency.items(), message.consistency)
        checks.refuse("consistency", seen=seen, limit="a known consistency")
    if message.HasField("expected_version") and message.expected_version < 0:
        checks.refuse("expected_version", seen=message.expected_version, limit="0 or more")


def _refuse_store_fields(message: pb.GenerateRequest) -> None:
    """Refuse what needs a store, which this server is not set up with: ignoring it would break what it promises."""
    needs = {
        "session_id": message.HasField("session_id"),
        "expected_version": message.HasField("expected_version"),
        "parent_turn_id": message.HasField("parent_turn_id"),
        "consistency": message.consistency != pb.CONSISTENCY_UNSPECIFIED,
        "idempotency_key": message.HasField("idempotency_key"),
    }
    if asked := [field for field, is_asked in needs.items() if is_asked]:
        raise NotSupported(
            f"{', '.join(asked)}: this server has no store, so it keeps no sessions and no request records; leave unset"
        )


def is_idempotency_key(text: str) -> bool:
    """Tell whether a text may be an idempotency key."""
    return 0 < len(text) <= MAX_IDEMPOTENCY_KEY_CHARACTERS and all("!" <= character <= "~" for character in text)


def _read_metadata(message: pb.GenerateRequest, checks: Checks) -> dict[str, str]:
    metadata = dict(message.metadata)
    if len(metadata) > MAX_METADATA:
        checks.refuse("metadata", seen=f"{len(metadata)} entries", limit=f"at most {MAX_METADATA}")
        return metadata
    for key, value in metadata.items():
        if not 1 <= len(key) <= MAX_METADATA_KEY_CHARACTERS:
            checks.refuse("metadata", seen=key, limit=f"keys of 1 .. {MAX_METADATA_KEY_CHARACTERS} characters")
        if len(value) > MAX_METADATA_VALUE_CHARACTERS:
            limit = f"at most {MAX_METADATA_VALUE_CHARACTERS} characters"
            checks.refuse(
                f"metadata[{key[:MAX_METADATA_KEY_CHARACTERS]}]", seen=f"{len(value)} characters", limit=limit
            )
    return metadata


def _enum_name(items: Iterable[tuple[str, int]], value: int) -> str:
    return next((name for name, number in items if number == value), str(value))
