"""The wire formats that come with the package, and the paths they are found under."""

from collections.abc import Mapping

from .cohere import Cohere
from .format import Answer, Batch, FreshFields, Input, TokenArray, Uncacheable, Usage, WireFormat
from .ollama import Ollama, OllamaPrompt
from .openai import OpenAI
from .simple import Simple
from .tei import TEI

_OPENAI = OpenAI()
_OLLAMA, _OLLAMA_PROMPT = Ollama(), OllamaPrompt()
_COHERE, _COHERE_V1 = Cohere("cohere", typed=True), Cohere("cohere_v1", typed=False)
_TEI = TEI()

WIRE_FORMATS: Mapping[str, WireFormat] = {
    wire.name: wire for wire in (_OPENAI, _OLLAMA, _OLLAMA_PROMPT, _COHERE, _COHERE_V1, _TEI, Simple())
}

# A hand-written service chooses its path, so `simple` has none here.
DEFAULT_PATHS: Mapping[str, Mapping[str, WireFormat]] = {
    "openai": dict.fromkeys(
        (
            "/v1/embeddings",
            "/embeddings",
            "/v3/embeddings",
            "/openai/deployments/{model}/embeddings",
            "/engines/{model}/embeddings",
            "/v1/engines/{model}/embeddings",
        ),
        _OPENAI,
    ),
    "ollama": {"/api/embed": _OLLAMA, "/api/embeddings": _OLLAMA_PROMPT},
    "ollama_prompt": {"/api/embeddings": _OLLAMA_PROMPT},
    "cohere": {"/v2/embed": _COHERE, "/v1/embed": _COHERE_V1},
    "cohere_v1": {"/v1/embed": _COHERE_V1},
    "tei": {"/embed": _TEI},
}

# Ollama's own clients and curl examples send no content type.
ANY_CONTENT_TYPE = frozenset({"ollama", "ollama_prompt"})

__all__ = [
    "ANY_CONTENT_TYPE",
    "DEFAULT_PATHS",
    "WIRE_FORMATS",
    "Answer",
    "Batch",
    "FreshFields",
    "Input",
    "Simple",
    "TokenArray",
    "Uncacheable",
    "Usage",
    "WireFormat",
]
