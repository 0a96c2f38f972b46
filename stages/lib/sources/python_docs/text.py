"""The pretraining corpus: what a module says about itself, then its source, in documents of a few thousand characters."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from stages.lib.rows.canonical import Row
from stages.lib.sources.python_docs.modules import Module

LONGEST_DOCUMENT_CHARACTERS = 4000


def text_rows(module: Module) -> Iterator[Row]:
    """Text rows: first the docstrings as prose, under the names they describe, then the source in order."""
    for kind, pieces, separator in (("docs", doc_entries(module), "\n\n"), ("source", source_pieces(module), "\n")):
        for index, text in enumerate(joined_pieces(pieces, separator)):
            yield {"id": f"{module.name}#{kind}-{index}", "text": text}


def doc_entries(module: Module) -> Iterator[str]:
    """The module's docstring, then each class and function as `name(parameters)` with its docstring indented below."""
    if docstring := ast.get_docstring(module.tree):
        yield f"{module.name}\n\n{docstring}"
    described = [(item.node.lineno, item.name, item.docstring) for item in module.classes if item.docstring]
    described += [(item.node.lineno, item.call, item.docstring) for item in module.functions if item.docstring]
    for _, heading, docstring in sorted(described):
        yield heading + "".join(f"\n    {line}".rstrip(" ") for line in docstring.split("\n"))


def source_pieces(module: Module) -> Iterator[str]:
    """The source from the end of the module's docstring on, cut between statements, and in long ones between lines."""
    body = module.tree.body
    first_line = 1
    if body and ast.get_docstring(module.tree, clean=False) is not None:
        # The docstring opened the docs; what stands above it is a shebang, an encoding or a license.
        first_line = (body[0].end_lineno or 1) + 1
        body = body[1:]
    yield from statement_pieces(module, body, first_line)


def statement_pieces(module: Module, body: list[ast.stmt], first_line: int) -> Iterator[str]:
    """One piece per statement with the comments above it. Tables too long for a document are data, and left out."""
    for node in body:
        last_line = node.end_lineno or node.lineno
        if last_line < first_line:
            continue
        lines = module.lines[first_line - 1 : last_line]
        is_long = sum(len(line) + 1 for line in lines) > LONGEST_DOCUMENT_CHARACTERS
        if is_long and isinstance(node, ast.ClassDef):
            opening = node.body[0]
            decorated = min([opening, *getattr(opening, "decorator_list", [])], key=lambda each: each.lineno)
            yield "\n".join(module.lines[first_line - 1 : decorated.lineno - 1])
            yield from statement_pieces(module, node.body, decorated.lineno)
        elif not is_long or hasattr(node, "body") or is_string(node):
            yield "\n".join(lines)
        first_line = last_line + 1


def is_string(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def joined_pieces(pieces: list[str] | Iterator[str], separator: str) -> Iterator[str]:
    """Consecutive pieces joined up to the length of a document; a longer piece is cut between lines, or dropped."""
    gathered: list[str] = []
    length = 0
    for piece in pieces:
        is_long = len(piece) > LONGEST_DOCUMENT_CHARACTERS and "\n" in piece
        for part in joined_pieces(piece.split("\n"), "\n") if is_long else [piece]:
            if length + len(part) + len(separator) > LONGEST_DOCUMENT_CHARACTERS:
                yield from tidied(separator.join(gathered))
                gathered, length = [], 0
            if len(part) <= LONGEST_DOCUMENT_CHARACTERS:
                gathered.append(part)
                length += len(part) + len(separator)
    yield from tidied(separator.join(gathered))


def tidied(text: str) -> Iterator[str]:
    """The text without blank lines around it and blanks at the end of lines, or nothing if that is all there is."""
    text = "\n".join(line.rstrip() for line in text.split("\n")).strip("\n")
    if text:
        yield text
