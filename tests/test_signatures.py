"""How requests are signed: as Flower's own client does it, and as Flower's server checks it."""

import json
from base64 import b64decode
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.supercore import constant
from flwr.supercore.error.base import ApiErrorCode, FlowerError
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, verify_signature
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedalt.flower.signatures import (
    AHEAD,
    BEHIND,
    Signatures,
    UnsignedError,
    signed_headers,
    write_keys,
)

KEY = generate_private_key(SECP384R1())
PUBLIC = public_key_to_bytes(KEY.public_key())


@pytest.fixture
def signatures(tmp_path: Path) -> Signatures:
    write_keys(tmp_path / "keys.json", {PUBLIC.decode(): "a"})
    signatures = Signatures(tmp_path / "keys.json")
    signatures.read()
    return signatures


def signed_by_flower() -> httpx.Headers:
    request = httpx.Request("POST", "http://127.0.0.1/v1/fleet/pull-messages")
    context = ProtobufRequestContext("PullMessages", PullMessagesRequest(), request)
    answer = httpx.Response(200, request=request)
    NodeAuthHttpInterceptor(KEY, KEY.public_key()).intercept(context, lambda _: answer)
    return request.headers


def test_what_flowers_client_signs_is_let_in_once(signatures: Signatures) -> None:
    headers = signed_by_flower()
    assert signatures.key_of(headers, "pull-messages") == PUBLIC
    with pytest.raises(UnsignedError, match="made before"):
        signatures.key_of(headers, "pull-messages")


def test_what_is_signed_here_is_what_flowers_server_checks(signatures: Signatures) -> None:
    headers = signed_headers(KEY)
    assert b64decode(headers[constant.FLEET_HTTP_PUBLIC_KEY_HEADER]) == PUBLIC
    signature = b64decode(headers[constant.FLEET_HTTP_SIGNATURE_HEADER])
    assert verify_signature(KEY.public_key(), headers[TIMESTAMP_HEADER].encode(), signature)
    assert signatures.key_of(headers, "deactivate-node") == PUBLIC
    assert (-AHEAD, BEHIND) == (
        constant.MIN_TIMESTAMP_DIFF_SECONDS,
        constant.MAX_TIMESTAMP_DIFF_SECONDS,
    )


def test_a_key_that_is_not_let_in_hears_it_in_flowers_words(signatures: Signatures) -> None:
    stranger = generate_private_key(SECP384R1())
    with pytest.raises(UnsignedError) as caught:
        signatures.key_of(signed_headers(stranger), "activate-node")
    assert caught.value.code == 412
    error = FlowerError.from_json(caught.value.text)
    assert error is not None
    assert error.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED
    assert json.loads(caught.value.text) == error.to_json("no client has this key")
