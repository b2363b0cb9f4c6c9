from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from tests.unit.clients.python.scripted_server import Script


@pytest.fixture
def script() -> Iterator[Script]:
    """A running server without lines yet."""
    script = Script()
    with ThreadPoolExecutor(max_workers=8) as pool:
        server = grpc.server(pool, handlers=[script])
        port = server.add_insecure_port("127.0.0.1:0")
        script.address = f"127.0.0.1:{port}"
        server.start()
        yield script
        server.stop(grace=0).wait(10)
