"""A jinja2 sandbox in which a template can only do so much.

A template comes with a model's files. The library's sandbox keeps it away from Python, not from looping for ever or
filling the memory. Here every operation of a template passes through one place that counts it:

- steps: each turn of a loop, call, filter, operator and literal is one; a render has so many, and so much time;
- weight: no value, and no output, is heavier than a limit. A list weighs what everything reached through it weighs:
  a list of twice the same list of twice the same list counts as what it would be written out to.

Operations whose result can be much larger than their operands (`*`, `replace`, `join`, `format`) are refused before
they are done, or are missing (`center`, `**` of large numbers). So a render is a bounded number of bounded operations.

Loops, literals and concatenations become countable by rewriting the syntax tree; for the rest the library has hooks.
"""

import contextlib
import functools
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sized
from contextvars import ContextVar

from jinja2 import nodes, pass_context
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_STEPS = 50_000
STEPS_PER_MESSAGE = 200
"""Templates in the field take ten to thirty."""
MAX_WEIGHT = 1_000_000
GROWTH = 8
"""How often the messages may be written, in one value or in all."""
MAX_RENDER_S = 2.0
"""For operations that are slow rather than many; a usual render takes less than a millisecond."""
_MAX_BITS = 256
_MAX_SEARCH_WORK = 100_000_000

_FILTERS = """
    abs attr capitalize count d default dictsort e escape first float indent int items join last length list lower
    map max min reject rejectattr replace reverse safe select selectattr sort string title trim unique upper
""".split()  # noqa: SIM905 (a list that is read, not indexed)
_STRING_METHODS = """
    capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal isdigit islower isnumeric
    isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition
    rsplit rstrip split splitlines startswith strip swapcase title upper
""".split()  # noqa: SIM905 (as above)
_METHODS: Mapping[type, frozenset[str]] = {
    str: frozenset(_STRING_METHODS),
    dict: frozenset(("get", "items", "keys", "values")),
    list: frozenset(("count", "index")),
    tuple: frozenset(("count", "index")),
    int: frozenset(),
    float: frozenset(),
}
_SLOW_SEARCHES = frozenset(("strip", "lstrip", "rstrip", "rfind", "rindex", "rsplit", "rpartition"))
_WIDE_FORMAT = re.compile(r"\d{4}|\{[^}]*\{|\*")


class WorkLimitError(Exception):
    """A template did more than a chat template needs to."""


class Budget:
    """What one render may still do."""

    def __init__(self, *, num_messages: int = 0, message_weight: int = 0) -> None:
        self._steps = MAX_STEPS + STEPS_PER_MESSAGE * num_messages
        self._max_weight = MAX_WEIGHT + GROWTH * message_weight
        self._output = self._max_weight
        self._end_s = time.monotonic() + MAX_RENDER_S

    def step(self) -> None:
        """Count one operation."""
        self._steps -= 1
        if self._steps < 0:
            raise WorkLimitError("it takes too many steps")
        if time.monotonic() > self._end_s:
            raise WorkLimitError("it takes too long")

    def write(self, weight: int) -> None:
        """Count output, of a macro too."""
        self._output -= weight
        if self._output < 0:
            raise WorkLimitError("it writes too much")

    def require(self, weight: int) -> None:
        """Refuse a value, if possible before it is made."""
        if weight > self._max_weight:
            raise WorkLimitError("it makes too large a value")

    def weigh(self, value: object) -> int:
        """Count about the characters that a value would be written as, and refuse it when they are too many."""
        if isinstance(value, str):
            self.require(len(value))
            return len(value)
        total = 0
        pending = [value]
        while pending:
            each = pending.pop()
            total += 1
            if isinstance(each, str):
                total += len(each)
            elif isinstance(each, Mapping):
                pending.extend(each.keys())
                pending.extend(each.values())
            elif isinstance(each, list | tuple):
                pending.extend(each)
            elif isinstance(each, int) and each.bit_length() > _MAX_BITS:
                raise WorkLimitError("it makes too large a number")
            elif isinstance(each, Namespace) and each is not value:
                raise WorkLimitError("it puts a namespace into another value")
            self.require(total + len(pending))
        return total

    def collect(self, value: object) -> object:
        """Take a lazy sequence out into a list of bounded weight; leave any other value."""
        if not isinstance(value, Iterator):
            return value
        items = []
        total = 0
        for item in value:
            self.step()
            total += self.weigh(item) + 1
            self.require(total)
            items.append(item)
        return items


_budget: ContextVar[Budget] = ContextVar("template_budget")


@contextlib.contextmanager
def spending(budget: Budget) -> Iterator[None]:
    """Let what is compiled and rendered inside be counted against a budget."""
    token = _budget.set(budget)
    try:
        yield
    finally:
        _budget.reset(token)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox. Compile and render in it only inside of `spending`."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_finalize,
            extensions=[LoopControlExtension, _GenerationBlock],
        )
        self.filters = {name: _counted(self.filters[name]) for name in _FILTERS}
        self.filters["replace"] = _counted(_replace)
        self.filters["join"] = _counted(_join(self.filters["join"]))
        self.filters["indent"] = _counted(_indent(self.filters["indent"]))
        self.filters["trim"] = _counted(_trim)
        self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace")}

    def add_filter(self, name: str, function: Callable[..., object]) -> None:
        """Offer one more filter to templates."""
        self.filters[name] = _counted(function)

    def is_safe_attribute(self, obj: object, attr: str, value: object) -> bool:
        """Bar methods of plain values that templates do not need."""
        for kind, methods in _METHODS.items():
            if isinstance(obj, kind):
                return attr in methods
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: object) -> Callable[..., str] | None:
        """Check a format before it is filled in."""
        wrapped = super().wrap_str_format(value)
        return functools.partial(_format, wrapped, getattr(value, "__self__", "")) if wrapped else None

    def call(self, context: Context, function: Callable[..., object], /, *args: object, **kwargs: object) -> object:
        """Count a call, of a macro too, and weigh what it returns."""
        budget = _budget.get()
        budget.step()
        positional = [budget.collect(each) for each in args]
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            _check_method(owner, function.__name__, positional)
        result: object = super().call(context, function, *positional, **kwargs)
        budget.weigh(result)
        return result

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        """Count an operator, and refuse it when its result would be too large."""
        budget = _budget.get()
        budget.step()
        if operator == "*":
            _check_product(left, right)
        elif operator == "**":
            _check_power(left, right)
        elif operator == "%" and isinstance(left, str):
            _check_format(left, [right])
        result: object = super().call_binop(context, operator, left, right)
        budget.weigh(result)
        return result

    def concatenate(self, *values: object) -> str:
        """Stand in for the operator `~`."""
        budget = _budget.get()
        budget.require(sum(budget.weigh(value) for value in values))
        return "".join(map(str, values))

    def count(self, value: object) -> object:
        """Return the value; being called is what counts it."""
        return value

    def _generate(self, source: nodes.Template, *args: object, **kwargs: object) -> str:
        return super()._generate(_Counting().visit(source), *args, **kwargs)  # type: ignore[arg-type]


class _Counting(NodeTransformer):
    """Makes what the library compiles to bare Python pass through `BoundedEnvironment.call` or its finalizer."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 (the library's name)
        self.generic_visit(node)
        turn = _call("count", [nodes.Const(1)])
        node.body.insert(0, nodes.ExprStmt(turn))
        if node.test is not None:
            node.test = nodes.And(turn, node.test)
        return _placed(node)

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802 (the library's name)
        self.generic_visit(node)
        return _placed(_call("count", [node]), node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802 (the library's name)
        self.generic_visit(node)
        return _placed(_call("count", [node]), node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802 (the library's name)
        self.generic_visit(node)
        return _placed(_call("count", [node]), node) if node.ctx == "load" else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 (the library's name)
        self.generic_visit(node)
        return _placed(_call("concatenate", node.nodes), node)

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:  # noqa: N802 (the library's name)
        return _placed(nodes.Const(node.data), node)


class _GenerationBlock(Extension):
    """`{% generation %} ... {% endgeneration %}`: marks the answer for training; here it is what stands in it."""

    tags = {"generation"}  # noqa: RUF012 (the library's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _call(name: str, arguments: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)


def _placed(node: nodes.Node, origin: nodes.Node | None = None) -> nodes.Node:
    return node.set_lineno((origin or node).lineno)


@pass_context
def _finalize(_context: Context, value: object) -> object:
    budget = _budget.get()
    budget.write(budget.weigh(value))
    return value


def _counted(function: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(function)
    def counted(*args: object, **kwargs: object) -> object:
        budget = _budget.get()
        budget.step()
        result = function(*map(budget.collect, args), **kwargs)
        budget.weigh(result)
        return result

    return counted


def _check_method(owner: str, name: str, args: list[object]) -> None:
    texts = [each for each in args if isinstance(each, str)]
    if name in _SLOW_SEARCHES and texts and len(owner) * len(texts[0]) > _MAX_SEARCH_WORK:
        raise WorkLimitError("it searches for too long a text")
    if name == "replace" and len(texts) == 2:
        _check_replace(owner, *texts)
    if name == "join" and args:
        _check_join(owner, args[0])


def _check_replace(text: str, old: str, new: str) -> None:
    _budget.get().require(len(text) + text.count(old) * len(new))


def _check_join(separator: str, values: object) -> None:
    if isinstance(values, Sized):
        _budget.get().require(len(values) * len(separator))


def _check_product(left: object, right: object) -> None:
    budget = _budget.get()
    budget.weigh(left)
    budget.weigh(right)
    for value, times in ((left, right), (right, left)):
        if isinstance(value, str | list | tuple) and isinstance(times, int):
            budget.require(budget.weigh(value) * max(times, 0))


def _check_power(left: object, right: object) -> None:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * max(right, 0) > _MAX_BITS:
        raise WorkLimitError("it makes too large a number")


def _check_format(pattern: str, values: list[object]) -> None:
    budget = _budget.get()
    if _WIDE_FORMAT.search(pattern):
        raise WorkLimitError("it uses a wide format")
    fields = pattern.count("%") + pattern.count("{")
    budget.require(len(pattern) + 999 * fields + fields * sum(budget.weigh(value) for value in values))


def _format(wrapped: Callable[..., str], pattern: str, *args: object, **kwargs: object) -> str:
    _check_format(pattern, [*args, *kwargs.values()])
    return wrapped(*args, **kwargs)


def _replace(value: object, old: object, new: object, count: int | None = None) -> str:
    text, before, after = str(value), str(old), str(new)
    _check_replace(text, before, after)
    return text.replace(before, after, -1 if count is None else count)


def _join(original: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(original)
    def join(eval_context: object, value: object, d: str = "", attribute: str | int | None = None) -> object:
        _check_join(str(d), value)
        return original(eval_context, value, d, attribute)

    return join


def _indent(original: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(original)
    def indent(value: str, width: int | str = 4, *args: object, **kwargs: object) -> object:
        size = len(width) if isinstance(width, str) else max(width, 0)
        _budget.get().require(size * (str(value).count("\n") + 1))
        return original(value, width, *args, **kwargs)

    return indent


def _trim(value: object, chars: str | None = None) -> str:
    text = str(value)
    _check_method(text, "strip", [chars])
    return text.strip(chars)
