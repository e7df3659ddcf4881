"""Keeps what was found of a deployment for as long as the deployment exists."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from paraserve_scheduler.state.spec import Deployment

_P = ParamSpec("_P")
_T = TypeVar("_T")

#: Answers that one function keeps of one deployment; with one more all are found anew.
_MOST_KEPT = 512


def kept_per_deployment(
    function: Callable[Concatenate[Deployment, _P], _T],
) -> Callable[Concatenate[Deployment, _P], _T]:
    """Have a pure function of a deployment and of hashable arguments keep its answers.

    They go with the deployment, whose index is large. So no answer may refer to it.
    """
    kept: WeakKeyDictionary[Deployment, dict[object, _T]] = WeakKeyDictionary()

    @wraps(function)
    def ask(deployment: Deployment, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        answers = kept.setdefault(deployment, {})
        asked = (args, *kwargs.items())
        if asked not in answers:
            if len(answers) == _MOST_KEPT:
                answers.clear()
            answers[asked] = function(deployment, *args, **kwargs)
        return answers[asked]

    return ask
