"""A process that speaks S3 on the loopback address: moto's server, whose conditional writes are made one step.

python tests/features/object_server.py    prints its port, and ends when its standard input is closed
"""

import logging
import sys
import threading
from collections.abc import Callable, Iterable

from moto.moto_server.werkzeug_app import create_backend_app
from werkzeug.serving import make_server


def one_at_a_time(application: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """moto looks at what is there and then writes; S3 does both at once, so nothing may come between."""
    lock = threading.Lock()

    def locked(environ: dict, start_response: Callable) -> Iterable[bytes]:
        with lock:
            return list(application(environ, start_response))

    return locked


if __name__ == "__main__":
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, one_at_a_time(create_backend_app("s3")), threaded=True)
    print(server.port, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()
