"""A checksum of tensors and plain values, by which a file that was damaged after it was written is noticed."""

import hashlib
from typing import Any

import torch


def checksum(content: Any) -> str:
    """SHA-256 over names, types, shapes and bytes, in hexadecimal.

    `content` is nested dicts and lists of tensors and plain values. The order of a dict does not count; strides and
    devices of tensors do not, either.
    """
    digest = hashlib.sha256()
    _add(digest, content)
    return digest.hexdigest()


def _add(digest: Any, content: Any) -> None:
    if isinstance(content, dict):
        digest.update(f"dict {len(content)}\n".encode())
        for key in sorted(content, key=repr):
            digest.update(f"{key!r}\n".encode())
            _add(digest, content[key])
    elif isinstance(content, list | tuple):
        digest.update(f"{type(content).__name__} {len(content)}\n".encode())
        for item in content:
            _add(digest, item)
    elif isinstance(content, torch.Tensor):
        digest.update(f"{content.dtype} {tuple(content.shape)}\n".encode())
        digest.update(content.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    else:
        digest.update(f"{content!r}\n".encode())
