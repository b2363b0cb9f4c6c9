from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from pathfox.client import AsyncClient, Client, Retry, Tls, Unavailable
from tests.fixtures.certificates import OPENSSL, make_certificate
from tests.unit.clients.python.scripted_server import Script

pytestmark = pytest.mark.skipif(OPENSSL is None, reason="no openssl to make a certificate with")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """A key and a certificate for `test.pathfox`, signed by itself."""
    key, cert = make_certificate(tmp_path_factory.mktemp("tls"))
    return key.read_bytes(), cert.read_bytes()


@pytest.fixture
def secured(certificate: tuple[bytes, bytes]) -> Iterator[Script]:
    """A server that speaks TLS only, and wants to know its clients."""
    script = Script()
    with ThreadPoolExecutor(max_workers=2) as pool:
        server = grpc.server(pool, handlers=[script])
        credentials = grpc.ssl_server_credentials([certificate], certificate[1], require_client_auth=True)
        script.address = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}"
        server.start()
        yield script
        server.stop(grace=0).wait(10)


async def test_mutual_tls_with_the_servers_own_name(secured: Script, certificate: tuple[bytes, bytes]) -> None:
    """Authorities, the client's own certificate and the server's name can be given; a token goes along."""
    key, cert = certificate
    tls = Tls(ca_certificates=cert, client_key=key, client_certificate=cert, server_name="test.pathfox")

    with Client(secured.address, tls=tls, token="t") as client:  # noqa: S106 (of this test)
        assert client.models(timeout_s=10) == ()
    async with AsyncClient(secured.address, tls=tls) as async_client:
        assert await async_client.models(timeout_s=10) == ()

    assert secured.metadata[0]["authorization"] == "Bearer t"


def test_a_server_that_is_not_trusted_is_not_talked_to(secured: Script) -> None:
    """tls=True trusts the usual authorities only; nothing is sent to anybody else."""
    with Client(secured.address, tls=True, retry=Retry(max_attempts=1)) as client, pytest.raises(Unavailable):
        client.models(timeout_s=10)
    assert not secured.seen
