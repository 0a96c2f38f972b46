"""Checks put into a chat template, between what it does itself."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, nodes
from jinja2.sandbox import SecurityError
from jinja2.visitor import NodeTransformer

from stages.lib.text.chat_budget import Budget

# Filters of `Budget`, put into a template where it cannot be bounded otherwise. No template can spell their names.

SPEND, MADE, JOINED = "spend ", "made ", "joined "

CHECKS = {SPEND: Budget.spend, MADE: Budget.made, JOINED: Budget.joined}


class Bounding(NodeTransformer):
    """Puts checks into a parsed template: at the start of each body that may run often, and around what makes values."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment

    def visit(self, node: Any, *args: Any, **kwargs: Any) -> nodes.Node:
        """The node, or what takes its place, with the same done to everything below it."""
        placed: nodes.Node = node
        if isinstance(node, nodes.EvalContextModifier):
            raise SecurityError("autoescape is not available in chat templates")
        self.generic_visit(node)
        if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block):
            cost = nodes.Const(sum(map(cost_of, node.body)))
            node.body.insert(0, self.placed(nodes.ExprStmt(self.checked(SPEND, [cost], node)), node))
        elif isinstance(node, nodes.Concat):
            placed = self.checked(JOINED, node.nodes, node)
        elif isinstance(node, nodes.List | nodes.Tuple | nodes.Dict | nodes.Filter):
            is_target = isinstance(node, nodes.Tuple) and node.ctx != "load"
            placed = node if is_target or is_constant(node) else self.checked(MADE, [node], node)
        return placed

    def checked(self, name: str, values: list[nodes.Expr], like: nodes.Node) -> nodes.Expr:
        budget = self.placed(nodes.EnvironmentAttribute("budget"), like)
        filtered: nodes.Expr = self.placed(nodes.Filter(budget, name, values, [], None, None), like)
        return filtered

    def placed(self, node: Any, like: nodes.Node) -> Any:
        return node.set_lineno(like.lineno).set_environment(self.environment)


def cost_of(statement: nodes.Node) -> int:
    """The characters that the statement writes by itself, and the number of its parts."""
    cost = 0
    for node in (statement, *statement.find_all(nodes.Node)):
        text = node.data if isinstance(node, nodes.TemplateData) else getattr(node, "value", None)
        cost += 1 + (len(text) if isinstance(text, str) else 0)
    return cost


def is_constant(node: nodes.Expr) -> bool:
    try:
        node.as_const()
    except nodes.Impossible:
        return False
    return True
