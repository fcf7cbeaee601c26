"""`Way`: one way in which what a model reads can change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Way"]


@dataclass(frozen=True)
class Way:
    """A user's script, as `silent_changes.script` describes it.

    Args:
        name: of the way.
        source: of the script, without its first line.
        fit: whether `fit` can meet it.
        evidence: whether estimators of evidence can meet it.
        irreproducible: two plain runs differ, so that a compiled run can only say that it cannot be trusted.
        module: name of the script.
        files: {name: text} of other files in the script's folder.
    """

    name: str
    source: str
    fit: bool = True
    evidence: bool = True
    irreproducible: bool = False
    module: str = "user_script"
    files: Mapping[str, str] = field(default_factory=dict)
