"""The sandbox in which a chat template runs: Jinja's, as transformers sets it up, with limits of time and size.

A chat template is a program that came with the weights, from whoever made them. Jinja's sandbox keeps it from Python's
insides; the `Guard` keeps it from taking all time and memory: every round of a loop, call, filter and operator asks it.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes, pass_environment
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.filters import do_format, do_indent, make_attrgetter
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from litlora.errors import UserError, WorkError

SECONDS = 0.8  # of this thread's CPU time, for one rendering; real templates take a thousandth of it
CHARACTERS = 1_000_000  # of what a template makes, beside four times what went in
WIDTH = 1_000  # the widest indent or number
NOT_OFFERED = "center filesizeformat forceescape pprint random slice batch striptags truncate urlize wordcount wordwrap xmlattr"
STRING_METHODS = (
    "strip lstrip rstrip split rsplit splitlines partition rpartition startswith endswith removeprefix removesuffix replace upper lower "
    "title capitalize casefold swapcase join format format_map find rfind index rindex count isdigit isalpha isalnum isspace isupper "
    "islower isnumeric isdecimal istitle isascii isidentifier"
)
SEQUENCES = (str, list, tuple)
FAULTS = (TemplateError, RecursionError, MemoryError, ArithmeticError, ValueError, TypeError, LookupError, AttributeError)


def compile_template(text: str) -> jinja2.Template:
    """A template ready for `render`. Raises UserError for one that Jinja or the sandbox refuses."""
    version = tuple(int(part) for part in re.findall(r"\d+", jinja2.__version__)[:3])
    if version < (3, 1, 6):
        raise WorkError(f"jinja2 {jinja2.__version__} lets templates out of its sandbox", hint='pip install "jinja2>=3.1.6"')
    try:
        return Sandbox().from_string(text)
    except TemplateSyntaxError as error:
        raise UserError(f"the chat template is no Jinja template: line {error.lineno}: {error.message}") from error
    except (*FAULTS, SyntaxError) as error:
        raise _refused(error) from error


def render(template: jinja2.Template, **values: Any) -> str:
    """The template's text. Raises UserError with the template's own words, or with the limit that it met."""
    guard: Guard = template.environment.guard  # type: ignore[attr-defined]
    try:
        guard.start(_weight(values))
        return guard.concat(template.root_render_func(template.new_context(values)))
    except FAULTS as error:
        raise _refused(error) from error


def _refused(error: BaseException) -> UserError:
    if isinstance(error, UserError):
        return error
    said = "it calls itself too deeply" if isinstance(error, RecursionError) else str(error) or type(error).__name__
    kind = "is not allowed to do this" if isinstance(error, SecurityError) else "refused this conversation"
    return UserError(f"the chat template {kind}: {said}")


class Guard(threading.local):
    """What one rendering may use. Every round of a loop, call, filter and operator comes by here."""

    def __init__(self) -> None:
        self.start(0)

    def start(self, characters: int) -> None:
        self.limit = CHARACTERS + 4 * characters
        self.deadline = time.thread_time() + SECONDS + characters / 1e8

    def tick(self) -> None:
        if time.thread_time() > self.deadline:
            raise SecurityError(f"it takes longer than {SECONDS:g} s")

    def size(self, wanted: int) -> None:
        if wanted > self.limit:
            raise SecurityError(f"it makes more than {self.limit:,} characters")

    def value(self, value: Any) -> Any:
        """The value, if writing it out or comparing it stays within the limits."""
        if isinstance(value, str):
            self.size(len(value))
        elif isinstance(value, list | tuple | dict | set):
            _weight(value, self)
        elif isinstance(value, int) and value.bit_length() > 4096:
            raise SecurityError("it computes with very large numbers")
        return value

    def loop(self, values: Any) -> Any:
        """The values of a loop; each round is a tick."""
        return values if isinstance(values, jinja2.Undefined) else self._rounds(values)

    def _rounds(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.tick()
            yield value

    def concat(self, pieces: Iterable[str]) -> str:
        """Jinja's `concat`: of the whole output, of a macro's, of a block's."""
        parts, total = [], 0
        for number, piece in enumerate(pieces):
            total += len(piece)
            self.size(total)
            if number % 16 == 0:
                self.tick()
            parts.append(piece)
        return "".join(parts)

    def join(self, values: Any, separator: Any) -> list[Any]:
        """The values as a list, if they may be joined by the separator."""
        listed, total = [], 0
        for value in self.loop(values):
            total += len(str(separator)) + (len(value) if isinstance(value, str) else _weight(value, self))
            self.size(total)
            listed.append(value)
        return listed

    def replace(self, text: Any, old: Any, new: Any) -> None:
        text, old, new = str(self.value(text)), str(self.value(old)), str(self.value(new))
        self.size(len(text) + text.count(old) * len(new))

    def format(self, text: str, values: Iterable[Any]) -> None:
        """Refuses wide fields, widths taken from an argument, and formats that repeat long values."""
        if re.search(r"%[^a-zA-Z%]*(\d{4}|\*)|\{[^{}]*:[^{}]*(\d{4}|\{)", text):
            raise SecurityError("it formats to a very large width")
        self.size(len(text) + (text.count("%") + text.count("{")) * sum(_weight(value, self) for value in values))

    def indent(self, text: Any, width: Any) -> None:
        wide = len(width) if isinstance(width, str) else int(width)
        if wide > WIDTH:
            raise SecurityError("it indents by a very large width")
        self.size(len(str(text)) + (str(text).count("\n") + 1) * wide)


def _weight(value: Any, guard: Guard | None = None, depth: int = 0) -> int:
    """About how many characters a value has when written out; a guard stops the count at its limit."""
    if isinstance(value, str):
        return len(value)
    if depth > 50:
        raise SecurityError("it nests lists too deeply")
    total = 8
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        for item in [*value.keys(), *value.values()] if isinstance(value, Mapping) else value:
            total += _weight(item, guard, depth + 1)
            if guard is not None:
                guard.size(total)
    return total


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, with limits."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self) -> None:
        self.guard = guard = Guard()
        extensions = [GenerationTag, "jinja2.ext.loopcontrols"]
        settings = {"trim_blocks": True, "lstrip_blocks": True, "finalize": guard.value, "cache_size": 0}
        super().__init__(**settings, extensions=extensions, optimized=False)  # nothing is computed before `render` counts the time
        self.concat = guard.concat  # type: ignore[method-assign]
        self.filters |= {"tojson": _tojson, "join": _join, "replace": _replace, "indent": _indent, "format": _format}
        offered = {name: function for name, function in self.filters.items() if name not in NOT_OFFERED.split()}
        self.filters = {name: _guarded(function, guard) for name, function in offered.items()}
        self.filters |= {"__loop": guard.loop, "__value": guard.value}
        self.tests = {name: _guarded(function, guard) for name, function in self.tests.items()}
        self.globals.pop("lipsum")
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "dict": TemplateDict(), "namespace": Namespace}

    def _generate(self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False) -> str:
        return super()._generate(_Limits().visit(source), name, filename, defer_init)

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"it reaches for {attribute!r} of {type(obj).__name__!r}")

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, str) and hasattr(str, attribute) and attribute not in STRING_METHODS.split():
            return self.unsafe_undefined(obj, attribute)
        return super().getattr(obj, attribute)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def limited(*args: Any, **kwargs: Any) -> str:
            self.guard.format(value.__self__, (*args, *kwargs.values()))
            return wrapped(*args, **kwargs)

        return limited

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.guard.tick()
        if operator == "+" and isinstance(left, SEQUENCES) and isinstance(right, SEQUENCES):
            self.guard.size(len(left) + len(right))
        elif operator == "*" and isinstance(left, SEQUENCES) != isinstance(right, SEQUENCES):
            sequence, count = (right, left) if isinstance(right, SEQUENCES) else (left, right)
            self.guard.size(len(sequence) * max(int(count), 0))
        elif operator == "**" and (abs(left) > 1_000_000 or abs(right) > 100):
            raise SecurityError("it computes with very large numbers")
        elif operator == "%" and isinstance(left, str):
            self.guard.format(left, right if isinstance(right, tuple) else (right,))
        return self.guard.value(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.guard.tick()
        owner, method = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str) and method == "replace" and len(args) > 1:
            self.guard.replace(owner, *args[:2])
        elif isinstance(owner, str) and method == "join" and args:
            args = (self.guard.join(args[0], owner),)
        elif isinstance(function, jinja2.runtime.LoopContext) and args:
            args = (self.guard.loop(args[0]), *args[1:])
        return self.guard.value(super().call(context, function, *args, **kwargs))


class _Limits(NodeTransformer):
    """Sends loops and comparisons of a template by the guard, and turns `a ~ b` into `+`, which goes by it already."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "__loop")
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _filtered(node.expr, "__value")
        for operand in node.ops:
            operand.expr = _filtered(operand.expr, "__value")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        joined, *others = [_filtered(part, "string") for part in node.nodes]
        for text in others:
            joined = nodes.Add(joined, text, lineno=node.lineno)
        return joined

    def _no_other_file(self, node: nodes.Node) -> NoReturn:
        raise SecurityError("it wants to read another template")

    visit_Include = visit_Import = visit_FromImport = visit_Extends = _no_other_file


def _filtered(node: Any, name: str) -> nodes.Expr:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _guarded(function: Any, guard: Guard) -> Callable[..., Any]:
    """A filter or test whose arguments and result are within the limits."""

    @wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        guard.tick()
        for value in (*args, *kwargs.values()):
            guard.value(value)
        return guard.value(function(*args, **kwargs))

    return limited


# ---- what a template may use -----------------------------------------------------------------------------------------


@pass_environment
def _join(environment: Sandbox, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    values = value if attribute is None else map(make_attrgetter(environment, attribute), value)
    return str(d).join(map(str, environment.guard.join(values, d)))


@pass_environment
def _replace(environment: Sandbox, s: str, old: str, new: str, count: int = -1) -> str:
    environment.guard.replace(s, old, new)
    return str(s).replace(str(old), str(new), count)


@pass_environment
def _indent(environment: Sandbox, s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    environment.guard.indent(s, width)
    return do_indent(s, width, first, blank)


@pass_environment
def _format(environment: Sandbox, value: str, *args: Any, **kwargs: Any) -> str:
    environment.guard.format(str(value), (*args, *kwargs.values()))
    return do_format(value, *args, **kwargs)


@pass_environment
def _tojson(
    environment: Sandbox, value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    environment.guard.indent("\n" * (_weight(value, environment.guard) // 8), indent or 0)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class TemplateDict:
    """`dict(...)` in a template, without the type behind it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class Namespace(jinja2.utils.Namespace):
    """`namespace(...)`, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no name for self, so that a template may use any
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: str) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace has no {name!r}")


class GenerationTag(Extension):
    """`{% generation %}` around an answer: some templates mark it so. Here it only lets its body through."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()
