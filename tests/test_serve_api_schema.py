"""The server holds what its OpenAPI document promises, whatever schemathesis makes up: no 5xx, no other form of answer.

A bounded run; a long one is `SCHEMATHESIS_EXAMPLES=1000 pytest -m slow tests/test_serve_api_schema.py`.
"""

import os

import pytest
import schemathesis
from api_server import Server
from example_tokenizers import TOKENIZER
from fake_engine import FakeEngine
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from serve.config import Limits, ServeConfig

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("SCHEMATHESIS_EXAMPLES", "25"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
]
OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
]


@pytest.fixture(scope="module")
def schema():
    config = ServeConfig("runs/tiny", limits=Limits(default_max_tokens=16, max_choices=8))
    with Server(FakeEngine(TOKENIZER, chunk=8), config) as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_the_document_has_these_operations_and_no_others(schema):
    found = [(method.upper(), path) for path, methods in schema.raw_schema["paths"].items() for method in methods]
    assert sorted(found) == sorted(OPERATIONS)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["well-formed", "malformed"])
@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=[path for _, path in OPERATIONS])
def test_answers_are_what_the_document_says(schema, method, path, mode):
    if mode == GenerationMode.NEGATIVE and method == "GET":
        return
    examples = EXAMPLES if method == "POST" else min(EXAMPLES, 3)

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(schema[path][method].as_strategy(generation_mode=mode))
    def check(case):
        case.call_and_validate(checks=CHECKS)

    check()
