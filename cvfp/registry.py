"""Own parts: a researcher's objectives, blocks, contexts and corpus formats, by name.

A part is registered under a name by a decorator, or named as "module:function". Its source is part
of a run's key, so that a changed part is another run."""

from __future__ import annotations

import difflib
import dis
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import cloudpickle
import torch
from torch import Tensor

from cvfp import cache
from cvfp.errors import ParameterError, shortened

Part = TypeVar("Part", bound=Callable[..., Any])
HISTORY = ("iteration", "loss", "change", "converged", "change_p10", "change_p50", "change_p90")
RECEIVED: dict[tuple[str, str], str | None] = {}


def _built_in(*_: Any) -> Any:
    """Stands for the contexts of a built-in name, which `controls` has."""


CONTEXTS = ("trained", "random", "zero", "shuffled", "window", "end_to_end", "fine_tuned")
JOINTLY = ("end_to_end", "fine_tuned")  # the ContextBlock is trained with the TokenBlock
KINDS = ("objective", "block", "contexts", "corpus_format")
PARTS: dict[str, dict[str, Callable[..., Any]]] = {kind: {} for kind in KINDS}
PARTS["contexts"] |= dict.fromkeys(CONTEXTS, _built_in)


def is_built_in(part: object) -> bool:
    return str(getattr(part, "__module__", "")).startswith("cvfp.")


def _registering(kind: str, name: str) -> Callable[[Part], Part]:
    def register(part: Part) -> Part:
        if not name or ":" in name or not callable(part):
            raise ParameterError(kind, name, "a name without ':', for a function or a class")
        if is_built_in(PARTS[kind].get(name)):
            raise ParameterError(kind, name, "a name that no built-in part has")
        PARTS[kind][name] = part
        RECEIVED.pop((kind, name), None)
        return part

    return register


def objective(name: str) -> Callable[[Part], Part]:
    """Register what Phase 1 minimises: a function (new, old, batch) -> (losses [K], figures), or an
    nn.Module class called with (experiment, context_dim, embedding_dim)."""
    return _registering("objective", name)


def block(name: str) -> Callable[[Part], Part]:
    """Register a ContextBlock: an nn.Module class called with (experiment, input_dim), with the
    attributes of `model.Block`. Its `initialise` draws on the CPU, as `model.initialise` does."""
    return _registering("block", name)


def context_source(name: str) -> Callable[[Part], Part]:
    """Register contexts for Phase 2: a function (model, tokens, experiment) -> [T, D], called with
    the training stream, then with the validation stream; position t reads row t-1."""
    return _registering("contexts", name)


def corpus_format(name: str) -> Callable[[Part], Part]:
    """Register how a row is read: a function from a dict of columns, or a line of a .txt file, to
    the conversation's text, or None where it has none."""
    return _registering("corpus_format", name)


def resolve(kind: str, name: str) -> Callable[..., Any]:
    """The part of that name; raises `ParameterError` where there is none."""
    if name in PARTS[kind]:
        return PARTS[kind][name]
    module, _, attribute = name.partition(":")
    if module and attribute:
        try:
            part = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, TypeError) as error:
            accepted = f"a module and a name in it ({shortened(str(error))})"
            raise ParameterError(kind, name, accepted) from error
        if callable(part):
            return part
    near = difflib.get_close_matches(name, PARTS[kind], 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    names = " or ".join(map(repr, PARTS[kind])) or "a registered name"
    raise ParameterError(kind, name, f"{names}, one registered first, or 'module:function'{hint}")


def own(experiments: Iterable[Any]) -> bytes:
    """What a worker is sent, by value: own parts of Experiments, what they use, their sources."""
    named = {(k, str(getattr(one, k))) for one in experiments for k in KINDS if getattr(one, k)}
    parts = {(k, name): resolve(k, name) for k, name in sorted(named)}
    mine = {at: part for at, part in parts.items() if not is_built_in(part)}
    modules, todo = {"__main__"}, list[Any](mine.values())
    while todo:
        name = getattr(one := todo.pop(), "__module__", getattr(one, "__name__", ""))
        module = sys.modules.get(str(name))
        if module and module.__name__ not in modules and not _is_library(module):
            modules.add(module.__name__)
            cloudpickle.register_pickle_by_value(module)
            todo += vars(module).values()
    return cloudpickle.dumps({at: (part, source(*at)) for at, part in mine.items()})


def receive(parts: bytes) -> None:
    """In a worker: the caller's parts, whose sources only the caller can read."""
    for (kind, name), (part, digest) in cloudpickle.loads(parts).items():
        PARTS[kind][name], RECEIVED[kind, name] = part, digest


def source(kind: str, name: str) -> str | None:
    """A digest of an own part's code and of all that it names in its module or notebook: helpers,
    constants, values closed over. Empty for a built-in part; None where some of it has no source or
    no digest, so that the run has no key."""
    if (kind, name) in RECEIVED:
        return RECEIVED[kind, name]
    part = resolve(kind, name)
    if is_built_in(part):
        return ""
    if _is_library(part):  # whose version is not in the key
        return None
    content: list[object] = []
    try:
        _collect(name, part, content, {})
    except (OSError, TypeError, SyntaxError):
        return None
    return cache.digest(*content)


def sources(experiment: Any, *kinds: str) -> dict[str, str | None]:
    """`source` of each own part that an Experiment names, by kind; built-in ones are left out."""
    named = {kind: getattr(experiment, kind) for kind in kinds or PARTS}
    digests = {kind: source(kind, name) for kind, name in named.items() if name is not None}
    return {kind: digest for kind, digest in digests.items() if digest != ""}


def _is_library(part: Any) -> bool:
    """Code of this package, of the standard library, or installed: the versions stand for it."""
    named = part.__name__ if isinstance(part, types.ModuleType) else getattr(part, "__module__", "")
    root = str(named or "builtins").partition(".")[0]
    if root == "__main__" or (root == "builtins" and isinstance(part, types.FunctionType)):
        return False
    file = str(getattr(sys.modules.get(root), "__file__", None) or "")
    installed = "site-packages" in file or "dist-packages" in file
    return root == "cvfp" or root in sys.stdlib_module_names or installed


def _collect(name: str, value: Any, content: list[object], seen: dict[int, Any]) -> None:
    """Append what `value` is, followed through the functions and classes that it names; OSError or
    TypeError: it has no source, or is of a kind that has no digest."""
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype)):
        content.append([name, repr(value)])
    elif isinstance(value, Tensor):
        content += [name, str(value.dtype), list(value.shape), value]
    elif isinstance(value, (list, tuple, dict)):
        content.append([name, type(value).__name__, len(value)])
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            content.append(repr(key))
            _collect(name, one, content, seen)
    elif not isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        raise TypeError(f"{name}: no digest of a {type(value).__name__}")
    elif isinstance(value, types.BuiltinFunctionType) or _is_library(value):
        content.append([name, str(value.__module__), value.__qualname__])
    elif id(value) not in seen:
        seen[id(value)] = value  # held, so that no other object gets its id
        if isinstance(value, types.FunctionType):
            inspect.getsource(value)  # raises where there is none
            _collect_function(value, content, seen)
            return
        for base in value.__bases__:
            _collect(name, base, content, seen)
        for own_name, member in sorted(vars(value).items()):
            member = getattr(member, "__func__", getattr(member, "fget", member))
            if isinstance(member, types.FunctionType) or not own_name.startswith("__"):
                _collect(own_name, member, content, seen)


def _collect_function(function: types.FunctionType, content: list[object], seen: Any) -> None:
    """Its bytecode and constants (the docstring aside), and what it names. The bytecode is what
    runs: its text may have been edited since."""
    codes, used = [function.__code__], dict(vars(function))
    while codes:
        code = codes.pop()
        plain = [one for one in code.co_consts if not isinstance(one, types.CodeType)]
        plain = [one for one in plain if one is not function.__doc__ or one is None]
        content += [code.co_code, repr(plain), repr(code.co_names), repr(code.co_varnames)]
        codes += [one for one in code.co_consts if isinstance(one, types.CodeType)]
        steps = list(dis.get_instructions(code))
        for step in steps:
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval in function.__globals__:
                used[step.argval] = function.__globals__[step.argval]
            elif step.opname == "IMPORT_NAME" and not _is_library(types.ModuleType(step.argval)):
                raise TypeError(f"{step.argval}: no digest of an import inside a function")
        attributes = {step.argval for step in steps if step.opname in ("LOAD_ATTR", "LOAD_METHOD")}
        for module in [one for one in used.values() if isinstance(one, types.ModuleType)]:
            if not _is_library(module):
                used |= {n: getattr(module, n) for n in attributes if hasattr(module, n)}
    used |= inspect.getclosurevars(function).nonlocals
    used["defaults"] = [function.__defaults__, function.__kwdefaults__]
    for name, one in sorted(used.items()):
        if not isinstance(one, types.ModuleType):
            _collect(name, one, content, seen)


def build_objective(
    experiment: Any, context_dim: int, table: Tensor, seed: int
) -> tuple[Callable[..., Any], list[Tensor]]:
    """The Experiment's objective, and its parameters: a class is called with (experiment,
    context_dim, embedding_dim), drawing from a generator that is seeded for it."""
    part = resolve("objective", experiment.objective)
    if not isinstance(part, type):
        return part, []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = part(experiment, context_dim, table.shape[1])
    if not isinstance(module, torch.nn.Module):
        raise ParameterError("objective", experiment.objective, "a function, or an nn.Module class")
    return module.to(table), list(module.parameters())


def check_objective(name: str, returned: Any, new: Tensor) -> None:
    """Refuse an objective by name for what it returned for the contexts `new` [K, G, D].
    ValueError: no pair of losses and figures, another shape than [K], a value that is not finite,
    or no gradient that reaches `new`."""
    groups = len(new)
    how: dict[str, Any] = dict(retain_graph=True, allow_unused=True)

    def fits(one: object) -> bool:
        return isinstance(one, Tensor) and one.shape == (groups,)

    pair = isinstance(returned, tuple) and len(returned) == 2
    losses, figures = returned if pair else (returned, None)
    got = ""
    if not isinstance(losses, Tensor):
        got = "no losses"
    elif not fits(losses):
        got = f"losses of shape {tuple(losses.shape)}"
    elif not losses.isfinite().all():
        got = "a loss that is not finite"
    elif not losses.requires_grad or torch.autograd.grad(losses.sum(), new, **how)[0] is None:
        got = "losses without a gradient that reaches the new contexts"
    elif not isinstance(figures, Mapping) or not all(map(fits, figures.values())):
        got = "figures that are not a dict of one number a group"
    elif not all(one.isfinite().all() for one in figures.values()):
        got = f"a figure that is not finite, of {list(figures)}"
    elif set(figures) & set(HISTORY) or not all(isinstance(key, str) for key in figures):
        got = f"figures named {list(figures)}, where {', '.join(HISTORY)} are Phase 1's own"
    accepted = f"finite losses [{groups}] with a gradient, and a dict of figures [{groups}]"
    _refuse("objective", name, got, accepted)


def check_block(name: str, block: Any, width: int, input_dim: int) -> None:
    """Refuse a block for D = `width` by name; it is initialised and run on zeros. ValueError: a
    missing attribute, outputs of another shape, or not finite."""
    context_dim, widths = getattr(block, "context_dim", None), getattr(block, "widths", None)
    initialise: Any = getattr(block, "initialise", None)
    got = ""
    if not isinstance(block, torch.nn.Module) or not callable(initialise):
        got = f"a {type(block).__name__} without initialise(generator)"
    elif context_dim != width:
        got = f"context_dim {context_dim}"
    elif not isinstance(widths, (list, tuple)) or not widths or widths[-1] != width:
        got = f"widths {widths}"
    elif not list(block.parameters()):
        got = "no parameters"
    elif next(block.parameters()).is_meta:  # transformers 4 makes models without numbers first
        return
    elif not torch.equal(*(_initialised(block, seed) for seed in (1, 2))):
        got = "weights that initialise(generator) does not draw from its generator, or not at all"
    else:
        outputs = block(torch.zeros(2, width), torch.zeros(2, input_dim))
        shapes = [tuple(getattr(one, "shape", ())) for one in outputs]
        if shapes != [(2, one) for one in widths]:
            got = f"outputs of shape {shapes}"
        elif not all(one.isfinite().all() for one in outputs):
            got = "outputs that are not finite"
        elif not outputs[-1].requires_grad:
            got = "outputs without a gradient"
    accepted = f"an nn.Module with initialise, context_dim {width}, widths that end in {width}"
    accepted += ", and forward(c, e) -> [outputs of widths], the last the new context"
    _refuse("block", name, got, accepted)


def _initialised(block: Any, seed: int) -> Tensor:
    """A block's weights after `initialise`, with torch's own generator at `seed`."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in block.parameters():
            parameter.fill_(float("nan"))  # what is not drawn stays so, and NaN equals nothing
        block.initialise(torch.Generator().manual_seed(0))
        return torch.cat([parameter.detach().flatten() for parameter in block.parameters()])


def check_contexts(name: str, contexts: Any, shape: tuple[int, int]) -> Tensor:
    """Own contexts [T, D], without a graph; ValueError: another shape, or not finite."""
    got = ""
    if not isinstance(contexts, Tensor) or contexts.shape != shape:
        got = f"{type(contexts).__name__} of shape {tuple(getattr(contexts, 'shape', ()))}"
    elif not contexts.isfinite().all():
        got = "contexts that are not finite"
    _refuse("contexts", name, got, f"finite contexts {shape}")
    return contexts.detach()


def _refuse(kind: str, name: str, got: str, accepted: str) -> None:
    if got:
        raise ValueError(f"{kind}: got {got} from {name!r}; accepted: {accepted}")
