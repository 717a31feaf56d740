"""Vectors in answers, to compare those through the cache with those of the app alone."""

from typing import Any


def values_in(name: str, answer: Any) -> dict[str, list[Any]]:
    """The vectors of an answer by representation, taken out of it."""
    if name == "openai":
        values = [item.pop("embedding") for item in answer["data"]]
        return {"base64" if isinstance(values[0], str) else "float": values}
    if name == "ollama":
        return {"float": answer.pop("embeddings")}
    if name == "ollama_prompt":
        return {"float": [answer.pop("embedding")]}
    if name == "tei":
        values, answer[:] = list(answer), []
        return {"float": values}
    values = answer.pop("embeddings")
    return values if isinstance(values, dict) else {"float": values}
