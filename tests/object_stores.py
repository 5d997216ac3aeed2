"""Servers of object stores on this machine: moto's for S3, gcp-storage-emulator's for GCS."""

import contextlib
import logging
import re
import socket
from http import HTTPStatus

import pytest


@contextlib.contextmanager
def gcs():
    """Serves `gs://bucket`."""
    pytest.importorskip("gcsfs", reason="gs:// needs gcsfs")
    reason = "gs:// is tested by gcp-storage-emulator"
    server = pytest.importorskip("gcp_storage_emulator.server", reason=reason)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    logging.getLogger("gcsfs").setLevel(logging.ERROR)  # it misses the credentials
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)  # gcsfs
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)  # Orbax
        patch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", url)  # ArrayRecord
        patch.setenv("NO_GCE_CHECK", "true")
        patch.setenv("GOOGLE_CLOUD_PROJECT", "test")
        patch.setenv("EPATH_USE_TF", "false")  # TensorFlow would ask the real store
        _complete(patch, server)
        started = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
        started.start()
        yield "gs://bucket"
        started.stop()


def _complete(patch, server):
    """What GCS does and the emulator does not: generations of objects, and ranges from the end."""
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects

    download, insert = objects.download, objects.insert

    def facts(storage, bucket, name):
        try:
            return storage.get_file_obj(bucket, name)
        except NotFound:
            return {"generation": "0", "size": "0"}

    def download_with_generation(request, response, storage, *args, **kwargs):
        found = facts(storage, request.params["bucket_name"], request.params["object_id"])
        headers = request._request_handler.headers
        if end := re.fullmatch(r"bytes=-(\d+)", headers.get("Range", "")):
            del headers["Range"]
            headers["Range"] = f"bytes={max(0, int(found['size']) - int(end[1]))}-"
        response["x-goog-generation"] = str(found["generation"])
        download(request, response, storage, *args, **kwargs)

    def insert_if_generation_matches(request, response, storage, *args, **kwargs):
        wanted = request.query.get("ifGenerationMatch", [None])[0]
        if wanted is not None:
            name = request.query["name"][0]
            found = facts(storage, request.params["bucket_name"], name)
            if str(found["generation"]) != wanted:
                response.status = HTTPStatus.PRECONDITION_FAILED
                return
        insert(request, response, storage, *args, **kwargs)

    patch.setattr(objects, "download", download_with_generation)
    changed = {download: download_with_generation, insert: insert_if_generation_matches}
    for _, methods in server.HANDLERS:
        for method, handler in methods.items():
            patch.setitem(methods, method, changed.get(handler, handler))


@contextlib.contextmanager
def s3():
    """Serves `s3://bucket`."""
    s3fs = pytest.importorskip("s3fs", reason="s3:// needs s3fs")
    moto = pytest.importorskip("moto.server", reason="s3:// is tested by moto[server]")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        yield "s3://bucket"
        # Another server in this process would know it still.
        s3fs.S3FileSystem().rm("bucket", recursive=True)
    server.stop()
