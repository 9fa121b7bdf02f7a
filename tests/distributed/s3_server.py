"""An S3 server on loopback that serves a folder: PORT FOLDER BUCKET. Run where moto is installed.

The folder is loaded before the port is open, so a restart is a server that was away, not one that
lost its data.
"""

import signal
import sys
from pathlib import Path

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import make_server

ACCOUNT = "123456789012"


def main() -> None:
    """Load, then serve."""
    port, folder, bucket = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    backend = s3_backends[ACCOUNT]["aws"]
    backend.create_bucket(bucket, "us-east-1")
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            backend.put_object(bucket, str(file.relative_to(folder)), file.read_bytes())
    application = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", port, application, threaded=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server.serve_forever()


main()
