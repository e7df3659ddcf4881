"""One client of bench_fetch in a process of its own: it reads one object into host memory.

    python -m integration.benchmarks.fetch.clients CLIENT ENDPOINT SIZE_BYTES FOLDER

It says `ready` when everything is set up, begins at the next line on its input, and reports one
JSON object. Only the read is timed; the content is checked afterwards.
"""

from __future__ import annotations

import json
import mmap
import resource
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from integration.support.limits import HANG_S

BUCKET, PREFIX, KEY = "bucket", "model", "weights.safetensors"
OBJECT = f"{PREFIX}/{KEY}"
REGION = "us-east-1"
#: The server does not check them; every client signs all the same.
ACCESS_KEY, SECRET_KEY = "AKIDBENCH", "benchmark-secret"
#: The product's defaults, given to all where a client has such a setting.
THREADS = 4
PART_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    endpoint: str
    size_bytes: int
    #: In host memory, empty.
    folder: Path

    def parts(self) -> list[tuple[int, int]]:
        return [
            (start, min(start + PART_BYTES, self.size_bytes))
            for start in range(0, self.size_bytes, PART_BYTES)
        ]


Buffer = bytes | memoryview | mmap.mmap
#: Reads the object; gives its bytes in order.
Read = Callable[[], Iterable[Buffer]]


def main() -> None:
    name, endpoint, size_bytes, folder = sys.argv[1:]
    target = Target(endpoint=endpoint, size_bytes=int(size_bytes), folder=Path(folder))
    read = CLIENTS[name](target)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    cpu_s, began_s = _cpu_s(), time.monotonic()
    content = read()
    seconds, cpu_s = time.monotonic() - began_s, _cpu_s() - cpu_s
    checksum = 0
    for piece in content:
        checksum = zlib.crc32(piece, checksum)
    report = {"seconds": seconds, "cpu_s": cpu_s, "crc32": checksum}
    sys.stdout.write(json.dumps(report) + "\n")


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def paraserve(target: Target) -> Read:
    from paraserve_backend.weights.checkpoint.fetch_plan import FetchPlan
    from paraserve_backend.weights.checkpoint.safetensors import TensorEntry
    from paraserve_backend.weights.fetching.fetch import fetch
    from paraserve_backend.weights.sources.base import StoredObject
    from paraserve_backend.weights.sources.http import http_version
    from paraserve_backend.weights.sources.open import open_source
    from paraserve_backend.weights.tiers.layout import OBJECTS
    from paraserve_backend.weights.tiers.memory import Tier

    uri = f"s3://{BUCKET}/{PREFIX}"
    source = open_source(uri, endpoint_url=target.endpoint, region=REGION)
    # The server cannot list; the scheduler does that when a model is deployed, not at its start.
    with urlopen(Request(f"{target.endpoint}/{BUCKET}/{OBJECT}", method="HEAD")) as answer:
        version = http_version(answer.headers["ETag"], 0, target.size_bytes)
    stored = StoredObject(key=KEY, size_bytes=target.size_bytes, version=version)
    whole = TensorEntry(
        name="w",
        dtype="U8",
        shape=(target.size_bytes,),
        object_key=KEY,
        start=0,
        end=target.size_bytes,
    )
    plan = FetchPlan(
        fetch_id="bench",
        source_uri=uri,
        objects=(stored,),
        tensors=(whole,),
        files=(),
        store=source.store,
    )
    tier = Tier.open(target.folder)

    def read() -> Iterable[Buffer]:
        fetch(tier.begin(plan), source, tier, timeout_s=HANG_S, cancel=threading.Event())
        (path,) = (target.folder / OBJECTS).iterdir()
        return _file_content(path)

    return read


def boto3_threads(target: Target) -> Read:
    boto3, botocore = map(_any_module, ("boto3", "botocore.config"))
    client = boto3.client(
        "s3",
        endpoint_url=target.endpoint,
        region_name=REGION,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        config=botocore.Config(
            response_checksum_validation="when_required", s3={"addressing_style": "path"}
        ),
    )
    memory = _shared_memory(target)

    def read_part(part: tuple[int, int]) -> None:
        start, end = part
        wanted = f"bytes={start}-{end - 1}"
        body = client.get_object(Bucket=BUCKET, Key=OBJECT, Range=wanted)["Body"]
        while start < end:
            start += body.readinto(memory[start:end])

    return _in_threads(target, read_part, memory)


def awscrt(target: Target) -> Read:
    auth, http, io, s3 = map(_any_module, ("awscrt.auth", "awscrt.http", "awscrt.io", "awscrt.s3"))
    loops = io.EventLoopGroup()
    client = s3.S3Client(
        bootstrap=io.ClientBootstrap(loops, io.DefaultHostResolver(loops)),
        region=REGION,
        tls_mode=s3.S3RequestTlsMode.DISABLED,
        credential_provider=auth.AwsCredentialsProvider.new_static(ACCESS_KEY, SECRET_KEY),
        part_size=PART_BYTES,
    )
    path = target.folder / KEY
    headers = http.HttpHeaders([("host", urlsplit(target.endpoint).netloc)])
    request = http.HttpRequest("GET", f"/{BUCKET}/{OBJECT}", headers)

    def read() -> Iterable[Buffer]:
        client.make_request(
            type=s3.S3RequestType.GET_OBJECT, request=request, recv_filepath=str(path)
        ).finished_future.result(HANG_S)
        return _file_content(path)

    return read


def obstore(target: Target) -> Read:
    library, stores = map(_any_module, ("obstore", "obstore.store"))
    store = stores.S3Store(
        BUCKET,
        endpoint=target.endpoint,
        region=REGION,
        access_key_id=ACCESS_KEY,
        secret_access_key=SECRET_KEY,
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )
    memory = _shared_memory(target)

    def read_part(part: tuple[int, int]) -> None:
        start, end = part
        memory[start:end] = memoryview(library.get_range(store, OBJECT, start=start, end=end))

    return _in_threads(target, read_part, memory)


def runai_streamer(target: Target) -> Read:
    """It has buffers of its own, which no other process can map: that saves it a copy here."""
    runai = _any_module("runai_model_streamer.file_streamer")
    sizes = [end - start for start, end in target.parts()]
    chunks = runai.FileChunks.contiguous(0, f"s3://{BUCKET}/{OBJECT}", 0, sizes)

    def read() -> Iterable[Buffer]:
        pieces: dict[int, Buffer] = {}
        with runai.FileStreamer() as streamer:
            streamer.stream_files([chunks])
            for _, number, tensor in streamer.get_chunks():
                pieces[number] = memoryview(tensor.numpy())
        return [pieces[number] for number in sorted(pieces)]

    return read


CLIENTS: Mapping[str, Callable[[Target], Read]] = {
    "paraserve": paraserve,
    "boto3": boto3_threads,
    "awscrt": awscrt,
    "obstore": obstore,
    "runai": runai_streamer,
}


def environment(endpoint: str) -> dict[str, str]:
    """Return what the clients that take settings from the environment need."""
    return {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL": endpoint,
        "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
    }


def _any_module(name: str) -> Any:
    """Import what is not installed where the types are checked."""
    return import_module(name)


def _in_threads(
    target: Target, read_part: Callable[[tuple[int, int]], None], memory: memoryview
) -> Read:
    def read() -> Iterable[Buffer]:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(read_part, target.parts()))
        return [memory]

    return read


def _shared_memory(target: Target) -> memoryview:
    """A file in host memory that other processes could map, as the product's tier is."""
    with (target.folder / KEY).open("w+b") as file:
        file.truncate(target.size_bytes)
        return memoryview(mmap.mmap(file.fileno(), target.size_bytes))


def _file_content(path: Path) -> list[Buffer]:
    with path.open("rb") as file:
        return [mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)]


if __name__ == "__main__":
    main()
