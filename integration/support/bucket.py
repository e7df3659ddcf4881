"""Puts a checkpoint into the bucket of a local cluster: uploaded, or linked into its folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
from botocore.config import Config  # type: ignore[import-untyped]
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from paraserve_backend.errors import Unavailable
from paraserve_scheduler.local.layout import BUCKET, ClusterLayout, read_s3_key
from paraserve_scheduler.local.processes import REGION


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
    )


def upload(layout: ClusterLayout, folder: Path, prefix: str, console: Console) -> str:
    """Upload all files of `folder` and return the URI to deploy from."""
    client = s3_client(layout)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    with progress_bar(console) as progress:
        total = sum(path.stat().st_size for path in files)
        task = progress.add_task(f"upload to s3://{BUCKET}/{prefix}", total=total)
        for path in files:
            client.upload_file(
                str(path),
                BUCKET,
                f"{prefix}/{path.name}",
                Callback=lambda sent: progress.advance(task, sent),
            )
    return f"s3://{BUCKET}/{prefix}"


def put_into_bucket(layout: ClusterLayout, folder: Path, prefix: str) -> str:
    """Make `folder` a prefix of the bucket, without a second copy where that is possible.

    The S3 server may not see it for a second if it was asked for something there before.
    """
    target = layout.files.buckets / BUCKET / prefix
    target.mkdir()
    for path in folder.iterdir():
        _link_or_copy(path, target / path.name)
    return f"s3://{BUCKET}/{prefix}"


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def s3_client(layout: ClusterLayout) -> Any:
    if layout.s3_url is None:
        raise Unavailable("This cluster was started without an S3 server.")
    key = read_s3_key(layout.files)
    return boto3.client(
        "s3",
        endpoint_url=layout.s3_url,
        region_name=REGION,
        aws_access_key_id=key.access_key,
        aws_secret_access_key=key.secret_key,
        # Not through a proxy that the environment may name.
        config=Config(proxies={}, retries={"mode": "standard"}, signature_version="s3v4"),
    )
