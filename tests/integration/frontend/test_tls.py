import hashlib
from pathlib import Path

import pytest

from pathfox.client import AsyncClient, PermissionDenied, Retry, Tls, Unauthenticated, Unavailable
from tests.fixtures.certificates import OPENSSL, make_certificate
from tests.fixtures.front_ends import saying, served, serving

pytestmark = pytest.mark.skipif(OPENSSL is None, reason="no openssl to make a certificate with")

ONCE = Retry(max_attempts=1)


@pytest.fixture
def secured(tmp_path: Path) -> dict[str, str]:
    """Options of a server with TLS and one credential, `secret`, of tenant `blue`."""
    key, cert = make_certificate(tmp_path)
    credentials = tmp_path / "credentials.toml"
    digest = hashlib.sha256(b"secret").hexdigest()
    credentials.write_text(f'[[tokens]]\nsha256 = "{digest}"\ntenant = "blue"\nrole = "user"\n')
    return {
        "server.tls_key_file": str(key),
        "server.tls_certificate_file": str(cert),
        "server.credentials_file": str(credentials),
    }


def trusting(certificate: Path) -> Tls:
    """Trust one certificate."""
    return Tls(ca_certificates=certificate.read_bytes(), server_name="test.pathfox")


async def test_tls_and_a_bearer_token(secured: dict[str, str]) -> None:
    """Over TLS a known token is served, an unknown one is not, and a user's role does not drain the server."""
    tls = trusting(Path(secured["server.tls_certificate_file"]))

    async with serving(served(saying("hello")), options=dict(secured)) as world:
        async with AsyncClient(world.address, tls=tls, token="secret", retry=ONCE) as known:  # noqa: S106
            completion = await known.generate_once(text="x", timeout_s=10)
            with pytest.raises(PermissionDenied):
                await known.drain(timeout_s=10)
        async with AsyncClient(world.address, tls=tls, token="guess", retry=ONCE) as unknown:  # noqa: S106
            with pytest.raises(Unauthenticated):
                await unknown.generate_once(text="x", timeout_s=10)

    assert completion.text == "hello"


async def test_plain_text_is_not_served_over_tls(secured: dict[str, str]) -> None:
    """A client that does not encrypt gets nothing."""
    async with (
        serving(served(saying("hello")), options=dict(secured)) as world,
        AsyncClient(world.address, token="secret", retry=ONCE) as plain,  # noqa: S106
    ):
        with pytest.raises(Unavailable):
            await plain.generate_once(text="x", timeout_s=10)
