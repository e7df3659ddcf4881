"""Triton's text of a failed model load, turned into one of our errors. Pure."""

from __future__ import annotations

import re

from paraserve_backend import errors

# What Triton 2.51 says: "load failed for model 'm': version 1 is at UNAVAILABLE state: Internal:
# TritonModelException: INVALID_ARGUMENT: Tensor x is missing.\n\nAt:\n  /.../model.py(7): ...\n;\n"
_PREAMBLE = re.compile(r"^load failed for model '[^']*': (?:version \d+ is at \w+ state: )?")
_STATUS = re.compile(r"^(?:Internal|Invalid argument|Unavailable|Not found|Unsupported): ")
_EXCEPTION = re.compile(r"^(?:[A-Za-z_]\w*\.)*([A-Z]\w*): ")
_DEAD_STUB = re.compile(r"Stub process '[^']*' is not healthy")

_OWN: dict[str, type[errors.ParaServeError]] = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.ParaServeError)
}


def load_error(model: str, details: str) -> errors.ParaServeError:
    """Return what made `model` fail: our own exception again where the model raised one."""
    if _DEAD_STUB.search(details):
        return errors.Unavailable(f"The process of model {model} died while it loaded.")
    text = _STATUS.sub("", _PREAMBLE.sub("", _without_traceback(details)))
    exception = _EXCEPTION.match(text)
    kind = exception.group(1) if exception else ""
    if kind in _OWN and exception:
        return _OWN[kind](text[exception.end() :])
    if kind == "TritonModelException" and exception:
        text = text[exception.end() :]
    coded = errors.read_coded(text)
    if coded and coded[0] in errors.BY_CODE:
        return errors.BY_CODE[coded[0]](coded[1])
    return errors.ParaServeError(f"Model {model} failed to load: {text}")


def _without_traceback(details: str) -> str:
    text = details.partition("\n\nAt:\n")[0]
    return " ".join(text.split()).rstrip(";").strip()
