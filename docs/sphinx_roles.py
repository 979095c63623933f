"""For mkdocstrings: the docstrings' Sphinx roles (:func:`name` and the like) as links, where the name is documented."""

import re

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|exc|data):`~?([\w.]+)`")


def _link(match: re.Match) -> str:
    name = match[1]
    return f'<autoref identifier="{name}" optional><code>{name.rsplit(".", 1)[-1]}</code></autoref>'


class SphinxRoles(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_link, obj.docstring.value)
