"""Which chat templates render in time and memory that follow from the conversation; others are kept in bounds."""

from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache

from jinja2 import Environment, TemplateError, nodes

# What templates are made of that go through a conversation once.
_STATEMENTS = (nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Assign, nodes.NSRef)
_JUMPS = (nodes.Break, nodes.Continue, nodes.ExprStmt)
_EXPRESSIONS = (
    *(nodes.Name, nodes.Const, nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Compare, nodes.Operand, nodes.And),
    *(nodes.Or, nodes.Not, nodes.Test, nodes.CondExpr, nodes.Filter, nodes.Call, nodes.Keyword, nodes.Pair),
    *(nodes.Concat, nodes.Add, nodes.Sub, nodes.Neg, nodes.Mod, nodes.List, nodes.Tuple, nodes.Dict),
)
_PLAIN = (*_STATEMENTS, *_JUMPS, *_EXPRESSIONS)
_FILTERS = {"default", "first", "int", "items", "last", "length", "list", "lower", "string", "tojson", "trim", "upper"}
# Spaces that `tojson` may be told to indent by.
_WIDEST = 16
_FUNCTIONS = {"raise_exception", "strftime_now", "namespace"}
_METHODS = {"endswith", "get", "items", "keys", "lower", "lstrip", "rstrip", "split", "startswith", "strip", "upper"}
# What makes a value larger than its parts.
_JOINING = (nodes.Concat, nodes.Add, nodes.List, nodes.Tuple, nodes.Dict, nodes.Call)


@lru_cache(maxsize=64)
def is_plain(template: str) -> bool:
    """Whether what rendering a chat template takes is bounded by the conversation's size.

    So it is where nothing repeats text (`*`, widths, filters and methods that join or replace), no value is joined of
    two that were joined before, and loops go over what the conversation holds, the inner one over a part of what the
    outer one is at. A template of which that is not seen may do no harm either.
    """
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except (TemplateError, RecursionError):
        return False
    joined = _joined(tree)
    return all(_is_plain(node, joined) for node in _all_nodes(tree)) and _loops_are_plain(tree, ())


def _all_nodes(tree: nodes.Node) -> Iterator[nodes.Node]:
    yield tree
    for child in tree.iter_child_nodes():
        yield from _all_nodes(child)


def _names(node: nodes.Node) -> list[str]:
    """The variables that a part of a template names."""
    return [one.name for one in _all_nodes(node) if isinstance(one, nodes.Name | nodes.NSRef)]


def _joined(tree: nodes.Node) -> set[str]:
    """The variables that may hold values joined of others."""
    found: set[str] = set()
    while True:
        more = {
            name
            for one in tree.find_all(nodes.Assign)
            if _joins(one.node) or not found.isdisjoint(_names(one.node))
            for name in _names(one.target)
        }
        if more <= found:
            return found
        found |= more


def _joins(node: nodes.Node) -> bool:
    return any(isinstance(one, _JOINING) for one in _all_nodes(node))


def _is_plain(node: nodes.Node, joined: set[str]) -> bool:
    if isinstance(node, nodes.Filter):
        return node.name in _FILTERS and all(_is_small(one) for one in _all_nodes(node) if one is not node)
    if isinstance(node, nodes.Call):
        called = node.node
        return (isinstance(called, nodes.Getattr) and called.attr in _METHODS) or (
            isinstance(called, nodes.Name) and called.name in _FUNCTIONS
        )
    if isinstance(node, nodes.Mod):  # of a text it would be a format
        texts = [one for one in node.left.find_all(nodes.Const) if isinstance(one.value, str)]
        return set(_names(node.left)) == {"loop"} and not texts
    if isinstance(node, nodes.Assign):
        return not _joins(node.node) or sum(name in joined for name in _names(node.node)) <= 1
    if isinstance(node, nodes.For):
        return joined.isdisjoint(_names(node.iter))
    return isinstance(node, _PLAIN)


def _is_small(node: nodes.Node) -> bool:
    """Whether a part of a filter's arguments is no number that could be a large width."""
    return not isinstance(node, nodes.Const) or isinstance(node.value, str) or abs(node.value or 0) <= _WIDEST


def _loops_are_plain(node: nodes.Node, outer: Sequence[Collection[str]]) -> bool:
    """Whether loops are two deep at most, the inner one over a part of what the `outer` one's variables stand for."""
    if isinstance(node, nodes.For):
        of_outer = not outer or not set(outer[-1]).isdisjoint(_names(node.iter))
        if node.recursive or len(outer) == 2 or not of_outer:
            return False
        outer = (*outer, _names(node.target))
    return all(_loops_are_plain(child, outer) for child in node.iter_child_nodes())
